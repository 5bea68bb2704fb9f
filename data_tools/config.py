"""The `data:` section of a run configuration."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SourceConfig(BaseModel):
    """One source of a mix; a bare path stands for a source with weight 1."""

    model_config = _STRICT

    path: str = Field(
        min_length=1,
        description="tokens: PREFIX of PREFIX.bin and PREFIX.idx. bytes: a file, directory or glob",
    )
    weight: float = Field(
        default=1.0, gt=0, description="Share of the samples, relative to the other sources"
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

    @field_validator("weight", mode="before")
    @classmethod
    def _accept_whole_numbers(cls, value: Any) -> Any:
        return float(value) if type(value) is int else value


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
    sequence_length: int = Field(gt=0, description="Tokens per sample that the model sees")
    reset_at_documents: bool = Field(
        default=False,
        description="Number the documents of each sample, so that attention and positions restart "
        "there, and do not score the first token of a document",
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
        return self
