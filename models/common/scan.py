"""Gated linear recurrence over tokens, computed in chunks; on CUDA in one kernel."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 32  # tokens
_KERNEL_TOKENS, _KERNEL_CHANNELS = 256, 8  # a program's tile


def scan(keep: Tensor, write: Tensor) -> Tensor:
    """`e_t = keep_t e_{t-1} + write_t` with e_{-1} = 0, over the first dimension of [s, b, E] fp32.

    Work grows with s and the longest chain of dependent steps with log s. Backward is the same
    recurrence from the end; only `keep` and the result are saved for it. On CUDA either pass is one
    Triton kernel where Triton is installed, as torch for Linux brings it. Without it, in fp64, and
    in compiled programs, which fuse them, the operations of other devices compute the same within
    rounding. A Triton that is installed and fails is an error.
    """
    return _Scan.apply(keep, write)


class _Scan(torch.autograd.Function):
    """`g_t = de_t + keep_{t+1} g_{t+1}`; `dwrite = g`, `dkeep_t = g_t e_{t-1}`."""

    @staticmethod
    def forward(ctx: Any, keep: Tensor, write: Tensor) -> Tensor:
        states = scan_kernel(keep, write) if _has_kernel(keep) else _scanned(keep, write)
        ctx.save_for_backward(keep, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        keep, states = ctx.saved_tensors
        if _has_kernel(keep):
            return scan_gradient_kernel(keep, states, upstream)
        following = torch.cat((keep[1:], torch.zeros_like(keep[:1]))).flip(0)
        gradient = _scanned(following, upstream.flip(0)).flip(0)
        before = torch.cat((torch.zeros_like(states[:1]), states[:-1]))
        return gradient * before, gradient


def _scanned(keep: Tensor, write: Tensor) -> Tensor:
    """The recurrence: within chunks of all of them at once, and again across chunks."""
    length = keep.shape[0]
    if length == 1:
        return write.clone()
    padding = (0, 0) * (keep.dim() - 1) + (0, -length % _CHUNK)
    keep, write = (F.pad(x, padding).unflatten(0, (-1, _CHUNK)) for x in (keep, write))
    step = 1
    while step < min(_CHUNK, length):  # `write` then covers twice as many tokens
        earlier, later = slice(0, -step), slice(step, None)
        both = torch.addcmul(write[:, later], keep[:, later], write[:, earlier])
        write = torch.cat((write[:, :step], both), dim=1)
        keep = torch.cat((keep[:, :step], keep[:, later] * keep[:, earlier]), dim=1)
        step *= 2
    if len(keep) > 1:
        # The state before each chunk but the first.
        before = _scanned(keep[:-1, -1], write[:-1, -1])
        write[1:].addcmul_(keep[1:], before.unsqueeze(1))
    return write.flatten(0, 1)[:length]


def _has_kernel(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.is_cuda
        and x.dtype == torch.float32
        and x.numel() > 0
        and _is_triton_installed()
    )


@cache
def _is_triton_installed() -> bool:
    return find_spec("triton") is not None


def scan_kernel(keep: Tensor, write: Tensor) -> Tensor:
    """`scan` of fp32 [s, b, E] in one kernel."""
    keep, write = keep.contiguous(), write.contiguous()
    states = torch.empty_like(write)
    _launch(keep, write, states, states, states, is_backward=False)
    return states


def scan_gradient_kernel(keep: Tensor, states: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `keep` and `write`, fp32 [s, b, E], in one kernel."""
    keep, states, upstream = keep.contiguous(), states.contiguous(), upstream.contiguous()
    d_keep, d_write = torch.empty_like(keep), torch.empty_like(keep)
    _launch(keep, upstream, d_write, states, d_keep, is_backward=True)
    return d_keep, d_write


def _launch(keep: Tensor, *tensors: Tensor, is_backward: bool) -> None:
    length, channels = len(keep), keep[0].numel()
    grid = (-(-channels // _KERNEL_CHANNELS),)
    with torch.cuda.device_of(keep):  # Triton launches on the current device
        _kernel()[grid](
            keep, *tensors, length, channels, is_backward, _KERNEL_TOKENS, _KERNEL_CHANNELS
        )


@cache
def _kernel() -> Any:
    """Both passes. A program takes some channels through all tokens, a tile of tokens at a time,
    and carries the last state in registers. Offsets have 64 bits: s b E may exceed 2^31."""
    # By name: transformers takes an `import` in exported code for a requirement.
    triton, tl = import_module("triton"), import_module("triton.language")

    @triton.jit
    def after(keep_a, write_a, keep_b, write_b):
        return keep_a * keep_b, keep_b * write_a + write_b

    @triton.jit(do_not_specialize=["length"])  # or it is compiled anew for lengths of another kind
    def recurrence(  # type: ignore[no-untyped-def]
        keep,
        write,
        result,
        states,
        d_keep,
        length,
        channels,
        IS_BACKWARD: tl.constexpr,  # type: ignore[name-defined]
        TOKENS: tl.constexpr,  # type: ignore[name-defined]
        CHANNELS: tl.constexpr,  # type: ignore[name-defined]
    ):
        channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
        is_channel = (channel < channels)[None, :]
        is_last = (tl.arange(0, TOKENS) == TOKENS - 1)[:, None]
        carried = tl.zeros((CHANNELS,), tl.float32)
        for first in range(0, length, TOKENS):
            index = (first + tl.arange(0, TOKENS)).to(tl.int64)
            is_token = (index < length)[:, None] & is_channel
            if IS_BACKWARD:  # from the last token, which has none after it, to the first
                place = (length - 1 - index)[:, None] * channels + channel[None, :]
                kept_at, is_kept = place + channels, is_token & (index > 0)[:, None]
            else:
                place = index[:, None] * channels + channel[None, :]
                kept_at, is_kept = place, is_token
            kept = tl.load(keep + kept_at, mask=is_kept, other=0.0)
            written = tl.load(write + place, mask=is_token, other=0.0)
            kept, written = tl.associative_scan((kept, written), 0, after)
            state = kept * carried[None, :] + written
            tl.store(result + place, state, mask=is_token)
            if IS_BACKWARD:
                is_later = is_token & (index < length - 1)[:, None]
                before = tl.load(states + (place - channels), mask=is_later, other=0.0)
                tl.store(d_keep + place, state * before, mask=is_token)
            carried = tl.sum(tl.where(is_last, state, 0.0), axis=0)

    return recurrence
