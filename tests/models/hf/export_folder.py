"""A checkpoint and the Hugging Face directory that it is exported to."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from models import convert
from models.base import ModelFamily
from parallel.carry import SequentialModel
from tests.models.checkpoints import write_checkpoint

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

    @property
    def code(self) -> set[str]:
        """The files of code that config.json names; none where transformers knows the type."""
        named = json.loads((self.hf / "config.json").read_text()).get("auto_map", {})
        return {f"{reference.partition('.')[0]}.py" for reference in named.values()}

    def loaded(self, **options: Any) -> Any:
        """In fp64, so that what differs from ours differs by more than the order of a sum."""
        return AutoModelForCausalLM.from_pretrained(self.hf, **{"dtype": torch.float64, **options})

    @property
    def double(self) -> SequentialModel:
        return copy.deepcopy(self.whole).double()


def export(folder: Path, family: ModelFamily, config: Any, whole: SequentialModel) -> Exported:
    """Write `whole` as a checkpoint and convert it, in several shards."""
    write_checkpoint(
        folder / "step_1", config, family=family, pipeline=2, tensor=2, tokenizer=None, whole=whole
    )
    convert.to_hf(folder / "step_1", folder / "hf", max_shard_size="60KB")
    return Exported(folder, family, config, whole)
