"""Schema of the `data:` section of a run configuration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SourceConfig(BaseModel):
    """One source of a mix; a bare path means weight 1."""

    model_config = _STRICT

    path: str = Field(
        min_length=1,
        description="tokens: PREFIX of PREFIX.bin and PREFIX.idx, or a URL such as "
        "s3://bucket/train. bytes: a file, directory or glob",
    )
    weight: float = Field(
        default=1.0, gt=0, description="Share of the samples relative to the other sources"
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Most passes over the source; a run that needs more is refused. null: no limit",
    )
    name: str = Field(
        default="",
        description="Name in the ledger and in the shuffling key, so that a corpus can be moved; "
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
    """One stage of the curriculum; unset fields default to the `data` section's."""

    model_config = _STRICT

    until_step: int | None = Field(default=None, gt=0, description="Last step of the stage")
    until_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the run's tokens after which the stage ends"
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        min_length=1,
        description="data.train source name -> share of the samples; null: the weights there",
    )
    sequence_length: int | None = Field(
        default=None, gt=0, description="A divisor of data.sequence_length; null: that length"
    )
    model: dict[str, Any] = Field(
        default_factory=dict,
        description="Model settings during the stage, among those that its family allows to change",
    )


class FimConfig(BaseModel):
    """Fill-in-the-middle (`data_tools/sampling/fim.py`), applied to training samples only."""

    model_config = _STRICT

    rate: float = Field(gt=0, le=1, description="Share of the documents to rearrange")
    spm_rate: float = Field(
        default=0.5, ge=0, le=1, description="Share of those in SPM order; the rest in PSM order"
    )
    level: Literal["document", "window"] = Field(
        default="window",
        description="Rearrange whole documents, or only the part of each inside the sample",
    )
    prefix: int | str | None = Field(
        default=None,
        description="Token or id before the prefix; null: a well-known one of the tokenizer",
    )
    suffix: int | str | None = Field(default=None, description="Token or id before the suffix")
    middle: int | str | None = Field(default=None, description="Token or id before the middle")

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
    """Corpora of a run and how they are cut into samples."""

    model_config = _STRICT

    kind: Literal["tokens", "bytes"] = Field(
        default="tokens",
        description="tokens: .bin/.idx written by data_tools.preprocess. bytes: raw files; ids are "
        "byte values, 256 ends a file, the vocabulary is 257 or larger",
    )
    train: tuple[SourceConfig, ...] = Field(
        min_length=1, description="Sources of the training mix: a path, or a list"
    )
    validation: tuple[SourceConfig, ...] = Field(
        default=(), description="Held-out sources, read whole and in order; weights do not apply"
    )
    tokenizer: str | None = Field(
        default=None,
        description="Tokenizer of the corpora: `bytes`, a tokenizer.json, a directory or a "
        "SentencePiece .model; checked against the sources",
    )
    eod: int | str | None = Field(
        default=None,
        description="End-of-document token or id of corpora that do not record one, such as "
        "Megatron's; null: the recorded one",
    )
    documents: Literal["file", "blank_line", "jsonl"] | None = Field(
        default=None,
        description="Unit of a document with kind bytes: a file (the default), text between blank "
        "lines, or a field of each line of .jsonl files",
    )
    json_key: str | None = Field(
        default=None, min_length=1, description="Field to read with documents jsonl; default: text"
    )
    sequence_length: int = Field(gt=0, description="Tokens per sample that the model sees")
    stages: tuple[StageConfig, ...] = Field(
        default=(),
        description="Curriculum: stages with their own weights or sequence length; all but the "
        "last have an `until_step` or `until_fraction`",
    )
    reset_at_documents: bool = Field(
        default=False,
        description="Reset attention and positions at document boundaries, and leave the first "
        "token of a document out of the loss",
    )
    fim: FimConfig | None = Field(
        default=None, description="Fill-in-the-middle rearrangement of documents; null: off"
    )
    warn_epochs: float = Field(
        default=4.0,
        gt=0,
        description="Warn if the run makes more passes over a source than this; up to four are "
        "almost as good as new text (arXiv 2305.16264)",
    )
    cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Cache directory for corpora given as URLs and for the text of .jsonl files; "
        "null: ~/.cache/manyformer",
    )
    num_workers: int = Field(
        default=1,
        ge=0,
        le=64,
        description="Threads that prefetch micro-batches; 0: prepare each on demand",
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
        """All sequence lengths of the run, longest first."""
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
            "files record the document boundaries; remove it or set data.kind=bytes"
        )
    if config.documents != "jsonl" and config.json_key is not None:
        raise ValueError(
            f"data.json_key={config.json_key} has no effect without data.documents=jsonl; "
            "remove it or set data.documents=jsonl"
        )


def _check_urls(config: DataConfig) -> None:
    urls = [s.path for s in (*config.train, *config.validation) if "://" in s.path]
    if config.kind == "bytes" and urls:
        raise ValueError(
            f"data.kind is bytes, but {urls[0]} is a URL; copy it to a local path, or preprocess "
            "it and set data.kind=tokens"
        )
    if config.cache_dir is not None and not urls and config.documents != "jsonl":
        raise ValueError(
            f"data.cache_dir={config.cache_dir} has no effect: no source is a URL or .jsonl; "
            "remove it"
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
            f"data.stages.{missing[0] if missing else 0} needs exactly one of until_step and "
            "until_fraction, and all stages the same one; correct the stages"
        )
    if _end_of(stages[-1]):
        raise ValueError(
            f"data.stages.{len(stages) - 1} is the last stage and ends with the run; remove its "
            f"{next(iter(_end_of(stages[-1])))}"
        )
    ends = [end for stage in stages for end in _end_of(stage).values()]
    for number, (before, end) in enumerate(itertools.pairwise(ends), start=1):
        if end <= before:
            raise ValueError(
                f"data.stages.{number} ends at {end}, but must end after the previous stage's end "
                f"{before}; order the stages"
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
                f"data.train source {source.name} has no effect: no stage uses it; give it a "
                "weight in data.stages or remove it"
            )
        if source.weight != 1.0:
            raise ValueError(
                f"data.train source {source.name}: weight {source.weight} has no effect, every "
                "stage sets its own weights; remove it"
            )


def _check_lengths(stages: Sequence[StageConfig], longest: int) -> None:
    for number, stage in enumerate(stages):
        length = stage.sequence_length
        if length is not None and longest % length:
            raise ValueError(
                f"data.stages.{number}.sequence_length={length} must divide "
                f"data.sequence_length={longest}; change one"
            )
