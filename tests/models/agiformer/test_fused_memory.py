"""The memory through the interface of flash-linear-attention's kernel."""

from __future__ import annotations

import itertools
import sys
import warnings

import pytest
import torch

from models.agiformer.memory.forms import MemoryInputs, chunked_memory, naive_memory
from models.agiformer.memory.fused import check_equal, fused_memory, load_kernel
from tests.models.agiformer.test_memory import _inputs, _read
from tests.tolerance import FP64


def _reference(q, k, v, g, *, scale, initial_state, output_final_state, cu_seqlens):
    """The published interface, one document after the other, patch after patch."""
    assert output_final_state
    values, states = torch.zeros_like(v), []
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for n, (first, last) in enumerate(itertools.pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        shape = (len(q), *q.shape[2:], v.shape[-1])
        state = q.new_zeros(shape) if initial_state is None else initial_state[rows]
        read = []
        for t in range(first, last):
            state = g[:, t].exp()[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            read.append(scale * torch.einsum("bne,bnef->bnf", q[:, t], state))
        values = torch.cat((values[:, :first], torch.stack(read, dim=1), values[:, last:]), dim=1)
        states.append(state)
    return values, torch.cat(states)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("starts", [False, True])
def test_a_kernel_of_that_interface_gives_outputs_state_and_gradients(starts, with_state):
    inputs = _inputs(13, starts=starts)
    state = torch.randn(2, 3, 6, 7, dtype=torch.float64).abs() if with_state else None
    if starts:
        inputs.starts[:, 0] = torch.tensor([True, False])  # a row that continues, and one that not
    found = _read(fused_memory, inputs, state, kernel=_reference)
    for one, other in zip(found, _read(naive_memory, inputs, state), strict=True):
        torch.testing.assert_close(one, other, **FP64)


def test_a_kernel_that_is_not_equal_is_refused():
    check_equal(_reference, device="cpu")

    def rounded(q, k, v, g, **options):
        return _reference(q.bfloat16().float(), k, v, g, **options)

    with pytest.raises(ValueError, match=r"cuda_memory_kernel=fla .*_DEFAULT=ieee"):
        check_equal(rounded, device="cpu")


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ValueError, match=r"=fla .*flash-linear-attention .*; install"):
        load_kernel.__wrapped__(torch.device("cpu"))


def test_the_reference_of_the_package_computes_the_memory():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no device for its kernels
        naive = pytest.importorskip("fla.ops.simple_gla.naive")

    def kernel(q, k, v, g, *, cu_seqlens, **options):
        assert cu_seqlens is None
        return naive.naive_recurrent_simple_gla(q, k, v, g, **options)

    check_equal(kernel, device="cpu")
    inputs = MemoryInputs(*(x.float().abs() for x in _inputs(70)[:3]), _inputs(70)[3].float())
    found, expected = fused_memory(inputs, kernel=kernel), chunked_memory(inputs, chunk=16)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)
