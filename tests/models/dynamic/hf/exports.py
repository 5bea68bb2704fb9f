"""Exports of `mod` and `dtf`, beside the models that they were made of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models import convert
from models.base import ModelFamily
from models.dynamic import DTFForCausalLM, DTFHFConfig, MoDForCausalLM, MoDHFConfig
from parallel.carry import SequentialModel
from tests.models.checkpoints import write_checkpoint
from tests.models.dynamic.settled import settled
from tests.models.families import CASES

CLASSES = {"mod": (MoDForCausalLM, MoDHFConfig), "dtf": (DTFForCausalLM, DTFHFConfig)}
VOCAB_SIZE = 301
TOKENS = torch.randint(0, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))


class Exported(NamedTuple):
    """A checkpoint of 2 x 2 ranks, the model in it, and what it was exported to."""

    folder: Path
    family: ModelFamily
    config: Any
    whole: SequentialModel

    @property
    def hf(self) -> Path:
        return self.folder / "hf"

    def loaded(self, **options: Any) -> Any:
        """In fp64, so that what differs from ours differs by more than the order of a sum."""
        options = {"dtype": torch.float64, **options}
        return CLASSES[self.family.name][0].from_pretrained(self.hf, **options)

    @property
    def double(self) -> SequentialModel:
        return copy.deepcopy(self.whole).double()


def export(folder: Path, case: str) -> Exported:
    family, config = CASES[case]
    config = config.model_copy(update={"vocab_size": VOCAB_SIZE})
    whole = settled(config, family)
    write_checkpoint(
        folder / "step_1", config, family=family, pipeline=2, tensor=2, tokenizer=None, whole=whole
    )
    convert.to_hf(folder / "step_1", folder / "hf", max_shard_size="60KB")
    return Exported(folder, family, config, whole)
