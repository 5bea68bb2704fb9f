"""A model is the same after it has been traced: nothing of the tracer's stays in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.hf.modeling import FamilyForCausalLM
from tests.models.hf.exports import FAMILIES, TOKENS, exported

# As few layers as have everything: tracing takes long.
SMALL = {
    "agiformer": {"num_layers": 1},
    "amrpa": {"num_layers": 3, "target_layers": [2]},
    "daria_former": {"num_layers": 1, "esv_sites": 1},
    "dart": {"num_layers": 2},
    "mod": {"num_layers": 2},
    "dtf": {"num_layers": 2},
}


class Logits(nn.Module):
    def __init__(self, model: FamilyForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_computes_and_learns_as_before_after_torch_export(kind, tmp_path):
    other = exported(kind, **SMALL[kind])
    other.save_pretrained(tmp_path)
    theirs = type(other).from_pretrained(tmp_path)  # which has never computed anything on a CPU
    # Of any batch, and of operators that whoever loads it has.
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Logits(theirs), (TOKENS,), dynamic_shapes=shapes).module()
    assert not any("manyformer" in str(node.target) for node in program.graph.nodes)
    for tokens in (TOKENS, TOKENS[:1, :17]):
        torch.testing.assert_close(theirs(tokens).logits, other(tokens).logits)
    for tokens in (TOKENS, torch.cat((TOKENS.flip(0), TOKENS[:1]))):
        torch.testing.assert_close(program(tokens), other(tokens).logits)
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 4}
    assert torch.equal(theirs.generate(TOKENS, **options), other.generate(TOKENS, **options))
    with torch.enable_grad():
        theirs.train()(TOKENS, labels=TOKENS).loss.backward()
    assert any(parameter.grad is not None for parameter in theirs.parameters())


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_compiled_model_that_keeps_some_logits_is_one_graph(use_cache):
    theirs = exported("dart", **SMALL["dart"])
    options = {"use_cache": use_cache, "logits_to_keep": 5}
    compiled = torch.compile(theirs, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS, **options).logits, theirs(TOKENS, **options).logits)
