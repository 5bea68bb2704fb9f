"""What llama.cpp computes from the files, against our models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.base import TokenInputs
from models.gguf.export import to_gguf
from parallel.carry import SequentialModel
from tests.models.checkpoints import write_checkpoint
from tests.models.gguf.llama_cpp_runs import greedy, logits, opened
from tests.models.gguf.shapes import SHAPES
from tests.tolerance import assert_close, rounding

pytestmark = pytest.mark.ecosystem
TEXT = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(3))
NEW = 60
# Per layer: two norms, three projections, scores, values, output, gate and down; and the head.
BOUND = rounding(torch.float32, depth=10 * 5 + 2, length=256)


@torch.no_grad()
def _continued(model: SequentialModel, count: int) -> list[int]:
    cache, new, found = model.new_cache(1, TEXT.shape[1] + count), TEXT, []
    for _ in range(count):
        new = model(TokenInputs(new), cache)[-1].argmax(-1, keepdim=True)
        found.append(int(new))
    return found


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_greedy_text_are_those_of_our_model(shape: str, tmp_path: Path) -> None:
    """Also far beyond the original context of 32 or 64 positions where frequencies are scaled."""
    case = SHAPES[shape]
    whole = write_checkpoint(tmp_path / "step_1", case.config, family=case.family_of())
    to_gguf(tmp_path / "step_1", tmp_path / "m.gguf")
    whole = whole.double()
    with opened(tmp_path / "m.gguf") as model:
        assert model.metadata["general.architecture"] == case.architecture
        found = logits(model, TEXT[0].tolist())
        assert_close(found, whole(TokenInputs(TEXT))[:, 0], BOUND)
        text = greedy(model, TEXT[0].tolist(), NEW)
    assert len(set(text)) > 10
    assert text == _continued(whole, NEW)
