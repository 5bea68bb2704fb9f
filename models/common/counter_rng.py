"""Counter-based random numbers for training: a function of a token's prefix, layer and channel.

A stateful generator would give different numbers at another layout, where other ranks draw in
another order. Here the first layer hashes every prefix of a document to an int64 key, the keys
travel in the carry, and a layer that needs noise hashes the key with a stream number. Every block
passes on the keys of the next one, so that no layer depends on its index and all share compiled
code. So a step draws the same numbers at any tensor, pipeline and data size, compiled, under
recomputation and after a resume, and no token's noise depends on a later token. The same text gets
the same noise again in a later epoch.

Shapes: s sequence, b batch, n channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Streams of each layer, and channels of each stream.
STREAMS = 8
_CHANNELS = 1 << 32

# Multipliers of SplitMix64 (Steele, Lea and Flood 2014) and its increment, as signed integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def prefix_keys(tokens: Tensor, positions: Tensor | None) -> Tensor:
    """Hash each token's document prefix to a key: int64 [b, s] and positions -> int64 [b, s]."""
    length = tokens.shape[1]
    index = torch.arange(length, device=tokens.device)
    place = index if positions is None else positions.long()
    total = _mix(tokens * _GAMMA + place).cumsum(dim=1)
    if positions is not None:
        before = F.pad(total, (1, 0))
        total = total - before.gather(1, (index - place).expand_as(total))
    return _mix(total)


def next_layer(keys: Tensor) -> Tensor:
    """The keys of the next layer: int64 [b, s]."""
    return keys + STREAMS * _CHANNELS


def uniform(keys: Tensor, size: int, *, stream: int, first: int = 0) -> Tensor:
    """`size` numbers of [0, 1) per key, from channel `first`: int64 [...] -> fp32 [..., size]."""
    return _shift(_bits(keys, size, stream=stream, first=first), 40).float() * 2.0**-24


def normal(keys: Tensor, size: int, *, stream: int) -> Tensor:
    """`size` numbers of N(0, 1) per key, by Box and Muller: int64 [...] -> fp32 [..., size]."""
    bits = _bits(keys, (size + 1) // 2, stream=stream)
    # One hash gives two uniform numbers, and those two normal ones. The radius comes from a number
    # in (0, 1], so that its logarithm is finite.
    radius = (_shift(bits, 40).float() + 1.0).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).float().mul_(2.0**-24 * 2.0 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)[..., :size]


def dropout(x: Tensor, keys: Tensor, probability: float, *, stream: int, first: int = 0) -> Tensor:
    """Zero elements of x [s, b, n] with `probability` and scale the others: keys [s, b]."""
    kept = uniform(keys, x.shape[-1], stream=stream, first=first) >= probability
    return x * (kept.to(x.dtype) / (1.0 - probability))


def _bits(keys: Tensor, size: int, *, stream: int, first: int = 0) -> Tensor:
    """`size` hashes per key: int64 [...] -> int64 [..., size]."""
    channels = torch.arange(size, device=keys.device) + (stream * _CHANNELS + first)
    # Not `channels * _GAMMA`: inductor folds expressions of an arange alone into unbounded
    # integers, where products do not wrap around (torch 2.13).
    return _mix((keys.unsqueeze(-1) + channels) * _GAMMA)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; products wrap around."""
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, count: int) -> Tensor:
    """A logical shift to the right, which torch has for unsigned integers only."""
    return (x >> count) & ((1 << (64 - count)) - 1)
