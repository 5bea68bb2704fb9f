"""Checkpoint state of the training loader, and the check of what may change at a resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.errors import DataError
from data_tools.sampling.blend import Blend
from data_tools.sampling.mix import Mix, MixSegment, MixSetting, SourceProgress, plan_mix

_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid")


class SourceProgressState(BaseModel):
    """`data_tools.sampling.mix.SourceProgress` as JSON."""

    model_config = _STRICT

    position: int
    tokens: int


class SourceState(SourceProgressState):
    """Ledger entry of one source, which may belong to an earlier mix only."""

    fingerprint: str


class MixState(BaseModel):
    """The current mix segment: weights, sequence length, first sample and initial ledger."""

    model_config = _STRICT

    weights: dict[str, float]
    sequence_length: int
    start_sample: int
    base: dict[str, int]
    """Samples of `sequence_length` before the segment's first one, by source."""
    given: dict[str, SourceProgressState]
    """The ledger at the start of the segment."""


class LoaderState(BaseModel):
    """Position and ledger of a training loader; plain JSON.

    `consumed_samples` counts whole optimizer steps of all data-parallel ranks, so that it does not
    depend on the batch size or the number of ranks. `sequence_length` is the longest of the run.
    """

    model_config = _STRICT

    version: Literal[2] = 2
    consumed_samples: int
    seed: int
    sequence_length: int
    sources: dict[str, SourceState]
    mix: MixState

    @classmethod
    def parse(cls, state: Mapping[str, Any]) -> LoaderState:
        """Parse the result of `model_dump`.

        Raises:
            DataError: `state` does not have this format.
        """
        try:
            return cls.model_validate(dict(state) if isinstance(state, Mapping) else state)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise DataError(
                f"data position of the checkpoint: {key}: {problem['msg']}; "
                "resume from another checkpoint"
            ) from error

    def check_resumable(
        self, *, seed: int, sequence_length: int, fingerprints: Mapping[str, str]
    ) -> None:
        """Refuse changes that would repeat or skip samples.

        Raises:
            DataError: the seed, the sequence length, or the content or name of a source has
                changed.
        """
        for setting, saved, now in (
            ("training.seed", self.seed, seed),
            ("data.sequence_length", self.sequence_length, sequence_length),
        ):
            if saved != now:
                raise DataError(
                    f"{setting} is {now}, but the checkpoint was made with {saved}; the order of "
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
        self._check_names(fingerprints)

    def _check_names(self, fingerprints: Mapping[str, str]) -> None:
        gone = {
            source.fingerprint: name
            for name, source in self.sources.items()
            if name not in fingerprints
        }
        for name, fingerprint in fingerprints.items():
            if name not in self.sources and (before := gone.get(fingerprint)) is not None:
                raise DataError(
                    f"data source {name} is the corpus that the checkpoint was trained on as "
                    f"{before}, and under a new name it would be read again from its beginning; "
                    f"keep the name in data.train: {{path: ..., name: {before}}}"
                )

    def plan_mix(self, schedule: Sequence[MixSetting]) -> Mix:
        """Plan the mix from here on: continue the saved segment, or start one from the ledger."""
        saved = self.mix
        ledger, ledger_before = (
            {name: SourceProgress(each.position, each.tokens) for name, each in states.items()}
            for states in (self.sources, saved.given)
        )
        blend = Blend(saved.weights, start_sample=saved.start_sample, base=saved.base)
        return plan_mix(
            schedule,
            consumed_samples=self.consumed_samples,
            ledger=ledger,
            current=MixSegment(blend, saved.sequence_length, ledger_before),
        )
