"""The recurrence token by token in fp64, and how far fp32 in any order may be from it."""

from __future__ import annotations

import torch
from torch import Tensor

# Additions that a term meets: in its own tile or chunk no more than that has tokens (256 at most),
# one for each that follows.
_TILE, _FOLLOWING = 256, 1 / 32
_UNIT = torch.finfo(torch.float32).eps / 2
_TINY = torch.finfo(torch.float32).tiny


def sequential(keep: Tensor, write: Tensor) -> Tensor:
    """`e_t = keep_t e_{t-1} + write_t`."""
    state, states = torch.zeros_like(write[0]), []
    for a, b in zip(keep.unbind(0), write.unbind(0), strict=True):
        state = a * state + b
        states.append(state)
    return torch.stack(states)


def _after(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:1]), x[:-1]))


def _sizes(keep: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of magnitudes of a state's terms, and the bound on its error.

    A term that was written n tokens ago is a product of n + 1 factors: n roundings in whatever
    order, and those of its additions. `lags` is the sum of magnitudes times n.
    """
    sizes = sequential(keep, write.abs())
    lags = sequential(keep, keep * _after(sizes))
    additions = _TILE + _FOLLOWING * len(keep)
    # A product below the smallest normal number may be lost, of any term.
    lost = len(keep) * _TINY * (1 + write.abs().max())
    return sizes, _UNIT * (lags + additions * sizes) + lost


def assert_recurrence(
    keep: Tensor, write: Tensor, upstream: Tensor, found: tuple[Tensor, Tensor, Tensor]
) -> None:
    """`found`: the states and the gradients of `keep` and `write`, in fp32."""
    exact = [x.detach().double().requires_grad_() for x in (keep, write)]
    states = sequential(*exact)
    expected = (states, *torch.autograd.grad(states, exact, upstream.double()))
    keep, write = (x.detach() for x in exact)
    sizes, errors = _sizes(keep, write)
    following = torch.cat((keep[1:], torch.zeros_like(keep[:1])))
    flipped = _sizes(following.flip(0), upstream.double().flip(0))
    back, back_errors = (x.flip(0) for x in flipped)
    # dkeep_t = g_t e_{t-1}, each off by its own error, and rounded.
    sizes, before = _after(sizes), _after(errors)
    products = back_errors * (sizes + before) + back * before + _UNIT * back * sizes + _TINY
    names, bounds = ("states", "keep", "write"), (errors, products, back_errors)
    for name, own, other, bound in zip(names, found, expected, bounds, strict=True):
        assert own.shape == other.shape, name
        excess = ((own.double() - other).abs() / bound).max().item()
        assert excess <= 1, f"{name}: {excess:.3g} times the bound"  # nan is no less
