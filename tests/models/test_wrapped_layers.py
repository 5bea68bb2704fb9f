"""Wrappers and replacements of layers take effect: adapters, hooks, offloading, quantisation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import accelerate
import pytest
import torch
from torch import Tensor, nn

from models.base import TokenInputs, logits_of
from parallel.carry import SequentialModel
from tests.models.checkpoints import model
from tests.models.families import CASES, evaluated
from tests.models.hf.exports import EXPORTED, FAMILIES, TOKENS, exported
from tests.tiers import tiered

EXACT = {"rtol": 1e-10, "atol": 1e-10}
# One of each family, with the most kinds of linear layers.
ORDINARY = (
    "agiformer",
    "amrpa",
    "daria_former_lora",
    "llama_qwen3_shape",
    "mod_experts",
    "dtf",
    "dart",
    "mixture",
)
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


class Adapter(nn.Module):
    """`y = base(x) + x (B A)^T`, as PEFT puts it around a linear layer."""

    def __init__(self, base: nn.Module, seed: int) -> None:
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": base.weight.dtype}
        rows, columns = base.weight.shape
        self.A = nn.Parameter(torch.randn(2, columns, **options))
        self.B = nn.Parameter(0.3 * torch.randn(rows, 2, **options))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ (self.B @ self.A).T


def _whole(kind: str) -> SequentialModel:
    """In evaluation and fp64, where a sum in another order shows in the tenth digit at most."""
    family, config = CASES[kind]
    whole = model(config, family)
    return evaluated(whole.train(), TOKENS).double()


def _adapters(whole: SequentialModel) -> dict[str, Adapter]:
    """One for every linear layer, around it but not in the model."""
    names = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
    return {name: Adapter(whole.get_submodule(name), seed) for seed, name in enumerate(names)}


@contextmanager
def _adapted(whole: SequentialModel, adapters: dict[str, Adapter]) -> Iterator[None]:
    """With the adapters in the place of their layers."""
    for name, adapter in adapters.items():
        whole.set_submodule(name, adapter)
    yield
    for name, adapter in adapters.items():
        whole.set_submodule(name, adapter.base_layer)


@contextmanager
def _merged(adapters: dict[str, Adapter]) -> Iterator[None]:
    """With what the adapters add in the weights of their layers."""
    own = {name: adapter.base_layer.weight for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        # Not in place: a tied head shares its weight with the embedding, which is not adapted.
        adapter.base_layer.weight = nn.Parameter(own[name] + adapter.B @ adapter.A)
    yield
    for name, adapter in adapters.items():
        adapter.base_layer.weight = own[name]


def _logits(whole: SequentialModel) -> Tensor:
    return logits_of(whole(TokenInputs(TOKENS)))


@torch.no_grad()
@pytest.mark.parametrize("kind", tiered(CASES, ORDINARY))
def test_an_adapter_around_a_linear_layer_is_the_layer_with_the_sum_of_both(kind):
    whole = _whole(kind)
    adapters, plain = _adapters(whole), _logits(whole)
    assert adapters
    without_effect = []
    # All of them, and one layer of every kind alone.
    kinds = {re.sub(r"\d+", "", name): {name: one} for name, one in reversed(adapters.items())}
    for some in (adapters, *kinds.values()):
        with _adapted(whole, some):
            found = _logits(whole)
        with _merged(some):
            torch.testing.assert_close(found, _logits(whole), **EXACT)
        if torch.equal(found, plain):
            without_effect += some
    # What a prior expects decides which tokens are computed, and may decide the same.
    assert [name for name in without_effect if ".prior." not in name] == []


@pytest.mark.parametrize("kind", tiered(CASES, ORDINARY))
def test_every_adapter_gets_a_gradient_and_every_hook_is_called(kind):
    family, config = CASES[kind]
    whole = _whole(kind).float().train()
    adapters, called = _adapters(whole), []
    with _adapted(whole, adapters):
        owners = {n: m for n, m in whole.named_modules() if list(m.parameters(recurse=False))}
        for name, module in owners.items():
            module.register_forward_hook(lambda *_, name=name: called.append(name))
        output = whole(TokenInputs(TOKENS))
        family.loss(output, TOKENS, config=config, ctx=whole.ctx).total.backward()
    for name, adapter in adapters.items():
        assert adapter.A.grad is not None, name
        assert adapter.A.grad.any(), name
    assert set(called) == set(owners)


@torch.no_grad()
@pytest.mark.parametrize("kind", tiered(EXPORTED, FAMILIES))
def test_what_is_put_around_the_token_table_gets_the_rows_of_its_ids(kind):
    """In the order of torch's own, as noise (NEFTune) and adapters of the table expect them."""
    theirs = exported(kind).double()
    table = theirs.get_input_embeddings()
    assert torch.equal(table(TOKENS), table.weight[TOKENS])
    more = 0.3 * torch.randn(table.weight.shape, dtype=table.weight.dtype)
    hook = table.register_forward_hook(lambda _, given, rows: rows + more[given[0]])
    found = theirs(TOKENS).logits
    hook.remove()
    # Not in place: a tied head shares the weight and has no adapter.
    table.weight = nn.Parameter(table.weight + more)
    torch.testing.assert_close(found, theirs(TOKENS).logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("kind", tiered(EXPORTED, FAMILIES))
def test_weights_that_are_there_only_during_the_call_of_their_module_are_enough(kind):
    theirs = exported(kind).double()
    expected, rows = theirs(TOKENS).logits, theirs.generate(TOKENS, **GREEDY)
    hidden = accelerate.cpu_offload(theirs, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in hidden.parameters()} == {"meta"}
    torch.testing.assert_close(hidden(TOKENS).logits, expected, **EXACT)
    assert torch.equal(hidden.generate(TOKENS, **GREEDY), rows)


def _quantized(theirs: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        return torch.ao.quantization.quantize_dynamic(theirs, {nn.Linear}, dtype=torch.qint8)


def _products(theirs: nn.Module) -> Iterator[nn.Module]:
    quantized = torch.ao.nn.quantized.dynamic.Linear
    return (module for module in theirs.modules() if isinstance(module, quantized))


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_dynamic_quantisation_finds_every_linear_layer(kind):
    theirs = exported(kind)
    small = _quantized(theirs)
    linear = [module for module in theirs.modules() if isinstance(module, nn.Linear)]
    assert len(list(_products(small))) == len(linear) > 20
    # Not near in general: routers choose other tokens. The first ones are always computed.
    expected, found = (one(TOKENS).logits[:, 0] for one in (theirs, small))
    assert (found - expected).norm() < 0.2 * expected.norm()
    assert small.generate(TOKENS, **GREEDY).shape == (2, 32)
