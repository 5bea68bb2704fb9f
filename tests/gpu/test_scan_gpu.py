"""The recurrence of the emotion state in one kernel a pass on a CUDA device, against fp64 token by
token; on a CPU, the operations of other devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from models.common import scan as scan_module
from models.common.scan import scan
from tests.gpu.device import DEVICE
from tests.models.common.scan_oracle import assert_recurrence

ON_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no such kernel on a CPU")


def _inputs(length: int, rows: int, channels: int) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(length)
    shape = (length, rows, channels)
    raw, write, upstream = (
        torch.randn(shape, device=DEVICE, generator=generator) for _ in range(3)
    )
    keep = (4.0 + 2.0 * raw).sigmoid()
    keep[length // 2] = 0.0  # a document begins
    return [keep.requires_grad_(), write.requires_grad_(), upstream]


def _results(keep: Tensor, write: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    states = scan(keep, write)
    return (states, *torch.autograd.grad(states, (keep, write), upstream))


@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (3, 7), (4, 64)])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 127, 128, 130, 255, 256, 257, 1000, 5000])
def test_both_forms_are_the_recurrence_in_every_gradient(length, rows, channels, monkeypatch):
    inputs = _inputs(length, rows, channels)
    assert_recurrence(*inputs, _results(*inputs))
    monkeypatch.setattr(scan_module, "_has_kernel", lambda x: False)
    assert_recurrence(*inputs, _results(*inputs))


def test_tensors_of_any_layout_are_read():
    keep, write, upstream = _inputs(300, 3, 7)
    exchanged = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (keep, write)]
    upstream = upstream[:1].expand_as(upstream)
    inputs = (*(x.detach().requires_grad_() for x in exchanged), upstream)
    assert_recurrence(*inputs, _results(*inputs))


@ON_CUDA
def test_either_pass_is_one_launch():
    keep, write, upstream = _inputs(2048, 4, 64)
    _results(keep, write, upstream)  # compiles
    for _ in range(2):  # the first profile of a process also holds what starting it takes
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            _results(keep, write, upstream)
            torch.cuda.synchronize()
    launched = [e.name for e in recorded.events() if e.device_type == DeviceType.CUDA]
    assert launched == ["recurrence"] * 2, launched


@ON_CUDA
def test_offsets_beyond_32_bits_are_right():
    length, channels = 131_073, 16_384
    if torch.cuda.mem_get_info()[0] < 5 * 4 * length * channels:
        pytest.skip("needs 43 GB of free memory")
    keep = torch.full((length, 1, channels), 0.5, device=DEVICE)
    write = torch.ones_like(keep)
    states = scan(keep, write)
    assert torch.equal(states[0], write[0])
    assert torch.equal(states[24:].amin(), states[24:].amax())
    assert states[-1, 0, -1] == 2.0
