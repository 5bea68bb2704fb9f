"""Compiled layers: whole graphs, no more of them at any depth, equal to eager ones."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from models.base import TokenInputs
from models.common.attention import is_aligned
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.cross_entropy import set_logits_parts
from pretrain.engine.build import compile_layers
from tests.equivalence import build
from tests.models.families import CASES
from tests.tiers import tiered
from tests.tolerance import FP64

SEQ, DEPTH = 16, 10
# Of the families with their defaults, dropout and adapters; experts with constant shapes.
COMPILED: dict[str, dict[str, str | float]] = {
    "agiformer": {},
    "amrpa": {},
    "llama": {},
    "dart": {},
    "daria_former": {},
    "daria_former_lora": {},
    "mod": {},
    "mod_experts": {"expert_capacity_factor": 1.0},
    "mod random": {"router_score": "random"},
    "dtf": {},
    "dtf random": {"router_score": "random"},
}


# torch's own tracing reads it (2.13).
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def _step(
    name: str, counter: CompileCounterWithBackend | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]:
    """Loss and terms, gradients, and what layers have counted: one step in fp64, recomputed and
    compiled with `counter`, or eager."""
    family, config = CASES[name.split()[0]]
    config = config.model_copy(update={"num_layers": DEPTH, **COMPILED[name]})
    model: SequentialModel = build(
        family.layer_specs(config, segmented=True), ParallelContext.single(), seed=3, noise=0.2,
        recompute=counter is not None,
    ).double()  # fmt: skip
    if counter is not None:
        set_logits_parts(model.layers[-1], 4)
    if counter is not None:
        compile_layers(model, num_lengths=1, backend=counter)
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, config.vocab_size, (2, SEQ + 1), generator=generator)
    segments = (torch.arange(SEQ) >= 7).int().expand(2, -1).contiguous()
    output = model(TokenInputs(stream[:, :-1].contiguous(), segments))
    total, terms = family.loss(output, stream[:, 1:], config=config, ctx=model.ctx)
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    sums = [m.take_sums() for m in model.modules() if hasattr(m, "take_sums")]
    return {"loss": total.detach(), **terms}, gradients, sums


def test_operands_of_kernels_on_cuda_are_told_apart_within_the_graph():
    """Columns of a joined projection: aligned in one of 32 columns, not in one of 27."""

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return torch.ones(()) if is_aligned(x) else torch.zeros(())

    for width, expected in ((32, 1), (27, 0)):
        columns = torch.zeros(4, 2, width)[..., :16]
        assert compiled(columns) == expected == is_aligned(columns)


_ORDINARY = ("llama", "mod", "dtf")


@pytest.mark.parametrize("name", tiered(COMPILED, _ORDINARY))
def test_compiled_layers_are_whole_graphs_and_equal_eager_ones(name):
    """With noise drawn, decisions taken once and counted once although the pass is repeated."""
    counter = CompileCounterWithBackend("aot_eager")
    terms, gradients, sums = _step(name, counter)
    expected_terms, expected, expected_sums = _step(name, None)
    assert not counters["graph_break"]
    assert 0 < counter.frame_count < DEPTH, "graphs of single layers, not of kinds of them"
    assert gradients.keys() == expected.keys()
    for found, wanted in ((terms, expected_terms), (gradients, expected)):
        for key, value in wanted.items():
            torch.testing.assert_close(found[key].double(), value.double(), **FP64, msg=key)
    assert len(sums) == len(expected_sums)
    for found, wanted in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(found, wanted, **FP64)
