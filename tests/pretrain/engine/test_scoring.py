"""The losses of an evaluation, and those of a family's groups of tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.agiformer.carry import AgiformerOutput
from models.agiformer.config import AgiformerConfig
from parallel.context import ParallelContext
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine.scoring import Scoring
from pretrain.engine.train_spec import Targets, TrainSpec
from tests.models.families import CASES
from tests.pretrain.tiny_run import tiny_run


def test_every_place_of_a_patch_has_the_mean_bits_of_its_scored_bytes(tmp_path: Path) -> None:
    """Of two micro-batches, the second with a padded row; by a loop over every byte."""
    config = CASES["agiformer"].config
    assert isinstance(config, AgiformerConfig)
    run = tiny_run(tmp_path, model=config.model_dump())
    score = Scoring(
        TrainSpec.of(run, resolve_ds_config(None, run, data_size=1), ParallelContext.single())
    )
    generator = torch.Generator().manual_seed(0)
    kept: dict[int, list[float]] = {k: [] for k in range(config.patch_size)}
    total = 0.0
    for padded in (0, 11):
        logits = torch.randn(12, 3, config.vocab_size, generator=generator)
        labels = torch.randint(0, config.vocab_size, (3, 12), generator=generator)
        labels[2, 12 - padded :] = -100
        places = torch.arange(12).unsqueeze(0) % config.patch_size
        output = AgiformerOutput(logits, torch.zeros(3, 3), places)
        total += float(score(output, Targets(labels))[0])
        for row in range(3):
            for place in range(12):
                if labels[row, place] != -100:
                    loss = F.cross_entropy(logits[place, row], labels[row, place])
                    kept[place % config.patch_size].append(float(loss) / math.log(2))
    expected = {f"bits_of_byte_{k + 1}": sum(v) / len(v) for k, v in kept.items()}
    assert score.group_bits() == pytest.approx(expected, rel=1e-5)
    assert total / math.log(2) == pytest.approx(sum(map(sum, kept.values())), rel=1e-5)
