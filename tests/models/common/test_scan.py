"""The chunked recurrence against the sequential one."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from models.common.scan import scan
from tests.models.common.scan_oracle import assert_recurrence, sequential


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 50])
def test_the_scan_is_the_recurrence(length):
    generator = torch.Generator().manual_seed(length)
    raw, write = (
        torch.randn(length, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    torch.testing.assert_close(scan(raw.sigmoid(), write), sequential(raw.sigmoid(), write))
    assert gradcheck(lambda r, w: scan(r.sigmoid(), w), (raw, write))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 1000])
def test_the_scan_in_fp32_is_the_recurrence_within_its_rounding(length):
    generator = torch.Generator().manual_seed(length)
    raw, write, upstream = (torch.randn(length, 3, 7, generator=generator) for _ in range(3))
    keep = (4.0 + 2.0 * raw).sigmoid().requires_grad_()
    write.requires_grad_()
    states = scan(keep, write)
    gradients = torch.autograd.grad(states, (keep, write), upstream)
    assert_recurrence(keep, write, upstream, (states, *gradients))


@pytest.mark.parametrize("shape", [(0, 2, 3), (3, 0, 2), (3, 2, 0)])
def test_nothing_to_scan_is_nothing(shape):
    keep, write = (torch.rand(shape, requires_grad=True) for _ in range(2))
    states = scan(keep, write)
    assert states.shape == shape
    assert torch.autograd.grad(states.sum(), keep)[0].shape == shape


def test_the_scan_keeps_its_precision_over_long_sequences():
    keep = torch.full((32768, 1, 2), 0.999)
    write = torch.rand(32768, 1, 2, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = sequential(keep.double(), write.double())
    assert ((scan(keep, write).double() - exact).abs() / exact).max() < 1e-4


@pytest.mark.parametrize("kept", [0.5, 0.999, 1.0])
def test_gradients_over_a_long_sequence_are_those_of_thesequential_form(kept):
    """fp32 against fp64."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.full((8192, 1, 2), kept)
    write = torch.rand(8192, 1, 2, generator=generator) * (1.0 - kept + 1e-4)
    upstream = torch.rand(8192, 1, 2, generator=generator)
    results = []
    for run, dtype in ((scan, torch.float32), (sequential, torch.float64)):
        inputs = [x.to(dtype).clone().requires_grad_() for x in (keep, write)]
        states = run(*inputs)
        results.append([states, *torch.autograd.grad(states, inputs, upstream.to(dtype))])
    for found, expected in zip(*results, strict=True):
        error = (found.double() - expected).abs() / expected.abs().clamp(min=expected.abs().mean())
        assert error.max() < 1e-4


def test_inputs_of_the_scan_are_left_as_they_are():
    for length in (1, 4, 16, 17):
        keep, write = torch.rand(length, 2, 3), torch.rand(length, 2, 3)
        before = keep.clone(), write.clone()
        scan(keep, write)
        assert torch.equal(keep, before[0])
        assert torch.equal(write, before[1])
