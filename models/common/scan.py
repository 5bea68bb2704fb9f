"""Gated linear recurrence over tokens, computed in chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def scan(keep: Tensor, write: Tensor) -> Tensor:
    """`e_t = keep_t e_{t-1} + write_t` with e_{-1} = 0, over the first dimension of [s, b, E] fp32.

    Work grows with s and the longest chain of dependent steps with sqrt(s). Backward is the same
    recurrence from the end; only `keep` and the result are saved for it.
    """
    return _Scan.apply(keep, write)


class _Scan(torch.autograd.Function):
    """`g_t = de_t + keep_{t+1} g_{t+1}`; `dwrite = g`, `dkeep_t = g_t e_{t-1}`."""

    @staticmethod
    def forward(ctx: Any, keep: Tensor, write: Tensor) -> Tensor:
        states = _scanned(keep, write)
        ctx.save_for_backward(keep, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        keep, states = ctx.saved_tensors
        following = torch.cat((keep[1:], torch.zeros_like(keep[:1]))).flip(0)
        gradient = _scanned(following, upstream.flip(0)).flip(0)
        before = torch.cat((torch.zeros_like(states[:1]), states[:-1]))
        return gradient * before, gradient


def _scanned(keep: Tensor, write: Tensor) -> Tensor:
    """The recurrence in chunks of sqrt(s): within all chunks in parallel, then across chunks."""
    length = keep.shape[0]
    if length == 1:
        return write.clone()
    chunk = int(length**0.5 + 0.5)
    num_chunks = -(-length // chunk)
    padding = (0, 0) * (keep.dim() - 1) + (0, num_chunks * chunk - length)
    keep = F.pad(keep, padding).unflatten(0, (num_chunks, chunk)).transpose(0, 1).contiguous()
    write = F.pad(write, padding).unflatten(0, (num_chunks, chunk)).transpose(0, 1).contiguous()
    for t in range(1, chunk):  # step t of every chunk
        write[t].addcmul_(keep[t], write[t - 1])
        keep[t].mul_(keep[t - 1])
    incoming = torch.zeros_like(write[0])  # the state before each chunk
    for i in range(1, num_chunks):
        torch.addcmul(write[-1, i - 1], keep[-1, i - 1], incoming[i - 1], out=incoming[i])
    states = torch.addcmul(write, keep, incoming)
    return states.transpose(0, 1).flatten(0, 1)[:length]
