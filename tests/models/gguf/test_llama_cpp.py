"""Results of llama.cpp from the files, against our models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.base import TokenInputs, logits_of
from models.gguf.export import to_gguf
from models.gguf.weights import DTYPES
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
        new = logits_of(model(TokenInputs(new), cache))[-1].argmax(-1, keepdim=True)
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
        assert_close(found, logits_of(whole(TokenInputs(TEXT)))[:, 0], BOUND)
        text = greedy(model, TEXT[0].tolist(), NEW)
    assert len(set(text)) > 5
    assert text == _continued(whole, NEW)


def test_a_file_without_a_tokenizer_runs_on_ids(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "step_1", SHAPES["llama"].config, tokenizer=None)
    to_gguf(tmp_path / "step_1", tmp_path / "m.gguf")
    with opened(tmp_path / "m.gguf") as model, torch.no_grad():
        expected = whole.double()(TokenInputs(TEXT))[:, 0]
        assert_close(logits(model, TEXT[0].tolist()), expected, BOUND)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_weights_of_half_precision_are_read_as_such(dtype: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to the dtype of the matrix that they meet, as training does."""
    whole = write_checkpoint(tmp_path / "step_1", SHAPES["llama"].config)
    to_gguf(tmp_path / "step_1", tmp_path / "m.gguf", dtype=dtype)
    for parameter in whole.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.to(DTYPES[dtype]))
    expected = whole.double()(TokenInputs(TEXT))[:, 0]
    with opened(tmp_path / "m.gguf") as model:
        found = logits(model, TEXT[0].tolist())
    # Seven products in a layer and the head, each of operands that are rounded once.
    assert_close(found, expected, rounding(DTYPES[dtype], depth=7 * 3 + 1, length=1))


def test_generation_ends_with_the_end_token_of_training(tmp_path: Path) -> None:
    """Of a model that says the end token or A, and nothing else."""
    of = SHAPES["llama"].config
    whole = write_checkpoint(tmp_path / "unused", of)
    with torch.no_grad():
        head = whole.get_parameter("head.output.weight")
        head[ord("A")] = -head[256]
        head[[i for i in range(len(head)) if i not in (256, ord("A"))]] = 0
    write_checkpoint(tmp_path / "step_1", of, whole=whole)
    to_gguf(tmp_path / "step_1", tmp_path / "m.gguf")
    with opened(tmp_path / "m.gguf") as model:
        reasons = {}
        for text in map(chr, range(97, 107)):
            (choice,) = model(text, max_tokens=1, temperature=0.0)["choices"]
            says_end = bool(logits(model, [ord(text)])[0, 256] > 0)
            reasons.setdefault(says_end, set()).add((choice["text"], choice["finish_reason"]))
    assert reasons == {True: {("", "stop")}, False: {("A", "length")}}
