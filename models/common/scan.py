"""Gated linear recurrence over tokens, computed in chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 32  # tokens


def scan(keep: Tensor, write: Tensor) -> Tensor:
    """`e_t = keep_t e_{t-1} + write_t` with e_{-1} = 0, over the first dimension of [s, b, E] fp32.

    Work grows with s and the longest chain of dependent steps with log s. Backward is the same
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
