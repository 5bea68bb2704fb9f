"""Exports of `mod` and `dtf`, beside the models that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.dynamic import DTFForCausalLM, DTFHFConfig, MoDForCausalLM, MoDHFConfig
from tests.models.dynamic.settled import settled
from tests.models.families import CASES
from tests.models.hf import export_folder
from tests.models.hf.export_folder import VOCAB_SIZE

CLASSES = {"mod": (MoDForCausalLM, MoDHFConfig), "dtf": (DTFForCausalLM, DTFHFConfig)}


class Exported(export_folder.Exported):
    """Loaded through the classes of the family."""

    def loaded(self, **options: Any) -> Any:
        options = {"dtype": torch.float64, **options}
        return CLASSES[self.family.name][0].from_pretrained(self.hf, **options)


def export(folder: Path, case: str) -> Exported:
    family, config = CASES[case]
    config = config.model_copy(update={"vocab_size": VOCAB_SIZE})
    return Exported(*export_folder.export(folder, family, config, settled(config, family)))
