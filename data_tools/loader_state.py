"""What a checkpoint keeps of a training loader, and what a resumed one may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.blend import Blend
from data_tools.errors import DataError

_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid")


class SourceState(BaseModel):
    """The ledger's line of one source, also of one that an earlier mix had."""

    model_config = _STRICT

    samples: int
    tokens: int
    fingerprint: str


class MixState(BaseModel):
    """The blend in force: its weights, where it began, and the counts it began from."""

    model_config = _STRICT

    weights: dict[str, float]
    start_sample: int
    base: dict[str, int]


class LoaderState(BaseModel):
    """Position and ledger of a training loader; plain JSON.

    `consumed_samples` counts whole optimizer steps of all data-parallel ranks, so it does not
    depend on the batch size or the number of ranks.
    """

    model_config = _STRICT

    version: int = 1
    consumed_samples: int
    seed: int
    sequence_length: int
    sources: dict[str, SourceState]
    mix: MixState

    @classmethod
    def parse(cls, state: Mapping[str, Any]) -> LoaderState:
        """Read what `model_dump` gave.

        Raises:
            DataError: it is something else.
        """
        try:
            return cls.model_validate(dict(state))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise DataError(
                f"data position of the checkpoint: {where}: {problem['msg']}; "
                "resume from another checkpoint"
            ) from error

    def check_resumable(
        self, *, seed: int, sequence_length: int, fingerprints: Mapping[str, str]
    ) -> None:
        """Refuse what would repeat or skip samples.

        Raises:
            DataError: the seed, the sequence length or the content of a source has changed.
        """
        for what, saved, now in (
            ("training.seed", self.seed, seed),
            ("data.sequence_length", self.sequence_length, sequence_length),
        ):
            if saved != now:
                raise DataError(
                    f"{what} is {now}, but the checkpoint was made with {saved}; the order of "
                    "samples depends on it: restore it or start a new run"
                )
        for name, fingerprint in fingerprints.items():
            saved_source = self.sources.get(name)
            if saved_source is not None and saved_source.fingerprint != fingerprint:
                raise DataError(
                    f"data source {name} is not the corpus that the checkpoint was trained on "
                    f"(fingerprint {fingerprint[:12]}, {saved_source.fingerprint[:12]} saved); "
                    "restore it, or give the new corpus another name"
                )

    def blend(self, weights: Mapping[str, float]) -> Blend:
        """The saved blend, or with other weights a new one that goes on from the ledger."""
        if dict(weights) == self.mix.weights:
            return Blend(weights, start_sample=self.mix.start_sample, base=self.mix.base)
        ledger = {name: source.samples for name, source in self.sources.items()}
        return Blend(weights, start_sample=self.consumed_samples, base=ledger)
