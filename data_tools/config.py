"""The `data:` section of a run configuration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SourceConfig(BaseModel):
    """One source of a mix; a bare path stands for a source with weight 1."""

    model_config = _STRICT

    path: str = Field(
        min_length=1,
        description="tokens: PREFIX of PREFIX.bin and PREFIX.idx, also a URL such as "
        "s3://bucket/train. bytes: a file, directory or glob",
    )
    weight: float = Field(
        default=1.0, gt=0, description="Share of the samples, relative to the other sources"
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Refuse a run that would read the source more often than this; null: no limit",
    )
    name: str = Field(
        default="",
        description="Name in the ledger and part of the shuffling key, so that a corpus may move; "
        "default: the last part of the path",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_after_path(cls, value: Any) -> Any:
        value = {"path": value} if isinstance(value, str) else value
        if isinstance(value, dict) and isinstance(value.get("path"), str) and "name" not in value:
            value = {**value, "name": PurePath(value["path"]).name}
        return value


class StageConfig(BaseModel):
    """A part of a run: what it leaves out is as the `data` section says."""

    model_config = _STRICT

    until_step: int | None = Field(default=None, gt=0, description="Last step of the stage")
    until_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the run's tokens after which it ends"
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        min_length=1,
        description="Name of a source of data.train -> share of the samples; null: its weights",
    )
    sequence_length: int | None = Field(
        default=None, gt=0, description="A divisor of data.sequence_length; null: that length"
    )
    model: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the model during the stage, of those its family lets change",
    )


class FimConfig(BaseModel):
    """Fill-in-the-middle (`data_tools/sampling/fim.py`); rearranges training samples only."""

    model_config = _STRICT

    rate: float = Field(gt=0, le=1, description="Share of the documents that are rearranged")
    spm_rate: float = Field(
        default=0.5, ge=0, le=1, description="Share of those with the suffix first; the rest PSM"
    )
    level: Literal["document", "window"] = Field(
        default="window",
        description="Rearrange whole documents, or the part of each that a sample holds",
    )
    prefix: int | str | None = Field(
        default=None,
        description="Token or id that marks the prefix; null: what the tokenizer is known to have",
    )
    suffix: int | str | None = Field(default=None, description="And the suffix")
    middle: int | str | None = Field(default=None, description="And the middle")

    @model_validator(mode="after")
    def _check(self) -> FimConfig:
        kinds = {type(each) for each in (self.prefix, self.suffix, self.middle)}
        if len(kinds) > 1:
            raise ValueError(
                f"data.fim has prefix {self.prefix!r}, suffix {self.suffix!r} and middle "
                f"{self.middle!r}; give three names, three ids or none of them"
            )
        return self


class DataConfig(BaseModel):
    """Corpora of a run and how samples are cut from them."""

    model_config = _STRICT

    kind: Literal["tokens", "bytes"] = Field(
        default="tokens",
        description="tokens: .bin/.idx made by data_tools.preprocess. bytes: raw files, ids are "
        "byte values and 256 ends a file, vocabulary 257 or larger",
    )
    train: tuple[SourceConfig, ...] = Field(
        min_length=1, description="Sources of the training mix: a path, or a list"
    )
    validation: tuple[SourceConfig, ...] = Field(
        default=(), description="Held-out sources, read whole and in order; weights do not apply"
    )
    tokenizer: str | None = Field(
        default=None,
        description="What the tokens were made with: `bytes`, a tokenizer.json, a directory or a "
        "SentencePiece .model; checked against the sources",
    )
    eod: int | str | None = Field(
        default=None,
        description="Token or id that ends documents, where the corpora do not say it: of corpora "
        "that Megatron wrote; null: what the corpora say",
    )
    documents: Literal["file", "blank_line", "jsonl"] | None = Field(
        default=None,
        description="With kind bytes, what is a document: a file (the default), text between blank "
        "lines, or a field of each line of .jsonl files",
    )
    json_key: str | None = Field(
        default=None, min_length=1, description="With documents jsonl, the field; default: text"
    )
    sequence_length: int = Field(gt=0, description="Tokens per sample that the model sees")
    stages: tuple[StageConfig, ...] = Field(
        default=(),
        description="A curriculum: stages with their own weights or sequence length, each but the "
        "last `until_step` or `until_fraction`",
    )
    reset_at_documents: bool = Field(
        default=False,
        description="Number the documents of each sample, so that attention and positions restart "
        "there, and do not score the first token of a document",
    )
    fim: FimConfig | None = Field(
        default=None, description="Rearrange documents to fill in the middle; null: none"
    )
    warn_epochs: float = Field(
        default=4.0,
        gt=0,
        description="Warn of a source that the run reads more often than this; one that is read "
        "four times still teaches almost as much as new text (arXiv 2305.16264)",
    )
    cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Where corpora given as URLs and the text of .jsonl files are copied to; null: "
        "~/.cache/manyformer",
    )
    num_workers: int = Field(
        default=1,
        ge=0,
        le=64,
        description="Threads that prepare the next micro-batches; 0: prepare each when asked",
    )

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _accept_a_path_or_a_list(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("validation", mode="before")
    @classmethod
    def _accept_none(cls, value: Any) -> Any:
        return () if value is None else value

    @field_validator("stages", mode="before")
    @classmethod
    def _accept_a_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def sequence_lengths(self) -> list[int]:
        """Every length that the model sees, the longest first."""
        stages = {stage.sequence_length or self.sequence_length for stage in self.stages}
        return sorted(stages | {self.sequence_length}, reverse=True)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for split in ("train", "validation"):
            names = [source.name for source in getattr(self, split)]
            repeated = [name for name in names if names.count(name) > 1]
            if repeated:
                raise ValueError(
                    f"data.{split} has two sources named {repeated[0]}; give each its own `name`"
                )
        for source in self.validation:
            if source.weight != 1.0:
                raise ValueError(
                    f"data.validation source {source.name}: weight {source.weight} has no effect, "
                    "held-out text is read whole; remove it"
                )
        if self.kind == "bytes" and self.tokenizer not in (None, "bytes"):
            raise ValueError(
                f"data.tokenizer is {self.tokenizer}, but data.kind is bytes; remove it"
            )
        if self.kind == "bytes" and self.eod is not None:
            raise ValueError(
                f"data.eod={self.eod} has no effect with data.kind=bytes, where 256 ends a "
                "document; remove it"
            )
        _check_documents(self)
        _check_urls(self)
        if self.stages:
            _check_ends(self.stages)
            _check_mixes(self.stages, self.train)
            _check_lengths(self.stages, self.sequence_length)
        return self


def _check_documents(config: DataConfig) -> None:
    if config.kind != "bytes" and config.documents is not None:
        raise ValueError(
            f"data.documents={config.documents} has no effect with data.kind={config.kind}, whose "
            "files say what a document is; remove it or set data.kind=bytes"
        )
    if config.documents != "jsonl" and config.json_key is not None:
        raise ValueError(
            f"data.json_key={config.json_key} has no effect without data.documents=jsonl; "
            "remove it or set that"
        )


def _check_urls(config: DataConfig) -> None:
    urls = [s.path for s in (*config.train, *config.validation) if "://" in s.path]
    if config.kind == "bytes" and urls:
        raise ValueError(
            f"data.kind is bytes, but {urls[0]} is a URL; copy it here, or preprocess it and set "
            "data.kind=tokens"
        )
    if config.cache_dir is not None and not urls and config.documents != "jsonl":
        raise ValueError(
            f"data.cache_dir={config.cache_dir} has no effect: no source is a URL; remove it"
        )


def _check_ends(stages: Sequence[StageConfig]) -> None:
    if len(stages) == 1:
        raise ValueError(
            "data.stages has one stage, which has no effect; set data.train and "
            "data.sequence_length instead, or add a stage"
        )
    kinds = {kind for stage in stages for kind in _end_of(stage)}
    missing = [i for i, stage in enumerate(stages[:-1]) if len(_end_of(stage)) != 1]
    if missing or len(kinds) != 1:
        raise ValueError(
            f"data.stages.{missing[0] if missing else 0} needs one of until_step and "
            "until_fraction, and all stages the same one; correct the stages"
        )
    if _end_of(stages[-1]):
        raise ValueError(
            f"data.stages.{len(stages) - 1}, the last, has an end; it lasts as long as the run: "
            "remove it"
        )
    ends = [end for stage in stages for end in _end_of(stage).values()]
    for number, (before, end) in enumerate(itertools.pairwise(ends), start=1):
        if end <= before:
            raise ValueError(
                f"data.stages.{number} ends at {end}, not after {before}, the end of the stage "
                "before it; order the stages"
            )


def _end_of(stage: StageConfig) -> dict[str, float]:
    ends = {"until_step": stage.until_step, "until_fraction": stage.until_fraction}
    return {kind: end for kind, end in ends.items() if end is not None}


def _check_mixes(stages: Sequence[StageConfig], sources: Sequence[SourceConfig]) -> None:
    names = [source.name for source in sources]
    for number, stage in enumerate(stages):
        unknown = [name for name in stage.weights or () if name not in names]
        if unknown:
            raise ValueError(
                f"data.stages.{number}.weights names {unknown[0]}, which is not a source of "
                f"data.train ({', '.join(names)}); add the source or correct the name"
            )
    if any(stage.weights is None for stage in stages):
        return
    used = {name for stage in stages for name in stage.weights or ()}
    for source in sources:
        if source.name not in used:
            raise ValueError(
                f"data.train source {source.name} is in no stage, so it has no effect; give it a "
                "weight in data.stages or remove it"
            )
        if source.weight != 1.0:
            raise ValueError(
                f"data.train source {source.name}: weight {source.weight} has no effect, every "
                "stage has its own weights; remove it"
            )


def _check_lengths(stages: Sequence[StageConfig], longest: int) -> None:
    for number, stage in enumerate(stages):
        length = stage.sequence_length
        if length is not None and longest % length:
            raise ValueError(
                f"data.stages.{number}.sequence_length={length} does not divide "
                f"data.sequence_length={longest}, of which a stage reads whole parts; change one"
            )
