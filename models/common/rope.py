"""Rotary position embedding.

Shapes: s sequence, b batch, n heads, d head dimension.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.common.config import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


class Rotation(NamedTuple):
    """cos and sin of the angle of every position: fp32, [s, d] or [b, 1, s, d].

    The first half of `sin` is negated, so that `rotate` needs no sign change.
    """

    cos: Tensor
    sin: Tensor


class RotaryTable:
    """cos and sin of every position up to `max_positions`, one object for all layers of a model.

    Angle of position p in dimension i (and i + d/2): `p * theta^(-2i/d)`, computed in fp32; see
    the classes of `RopeScaling` for how `scaling` changes the frequencies, and YaRN both. A plain
    object: DeepSpeed casts the buffers of modules to bf16, which cannot tell position 256 from 257.
    """

    def __init__(
        self,
        head_dim: int,
        max_positions: int,
        *,
        theta: float,
        scaling: RopeScaling | None = None,
    ) -> None:
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.theta = theta
        self.scaling = scaling
        self._by_device: dict[torch.device, Rotation] = {}

    def on(self, device: torch.device) -> Rotation:
        """The table [max_positions, d] on `device`, computed when first asked for."""
        table = self._by_device.get(device)
        if table is None:
            table = self._compute(device)
            # While torch.export traces, tensors are fake and valid only inside its graph.
            if type(table.cos) is Tensor:
                self._by_device[device] = table
        return table

    def check(self, length: int) -> None:
        """Check that the table covers a sequence of `length` tokens.

        Raises:
            ValueError: the positions do not fit into the table.
        """
        if length > self.max_positions:
            raise ValueError(
                f"position {length - 1} is beyond max_position_embeddings={self.max_positions}; "
                "shorten the sequence or raise max_position_embeddings"
            )

    def at(self, device: torch.device, *, start: int, length: int) -> Rotation:
        """Rotation of positions start .. start + length - 1, the same for every row: [s, d].

        Raises:
            ValueError: the positions do not fit into the table.
        """
        self.check(start + length)
        return Rotation(*(table[start : start + length] for table in self.on(device)))

    def gather(self, positions: Tensor) -> Rotation:
        """Rotation of the given positions [b, s]: [b, 1, s, d].

        Raises:
            ValueError: a position is not in the table.
        """
        # Positions count tokens of a row, so only a row longer than the table can exceed it: the
        # check of the values, which synchronises with the GPU, is rare.
        if positions.shape[1] > self.max_positions and not positions.is_meta:
            self.check(int(positions.max()) + 1)
        rows = positions.long()  # ONNX has no int32 index
        return Rotation(*(table[rows].unsqueeze(1) for table in self.on(positions.device)))

    def of(self, heads: Tensor, positions: Tensor | None = None, *, start: int = 0) -> Rotation:
        """Rotation of heads [b, n, s, d]: at the given positions [b, s], else from `start` on.

        Raises:
            ValueError: a position is not in the table.
        """
        if positions is not None:
            return self.gather(positions)
        return self.at(heads.device, start=start, length=heads.shape[2])

    @torch.inference_mode(False)  # a table first computed in a generation also serves training
    def _compute(self, device: torch.device) -> Rotation:
        if device.type == "meta":  # arithmetic there would import torch._dynamo: seconds
            shape = (self.max_positions, 2 * math.ceil(self.head_dim / 2))
            return Rotation(*(torch.empty(shape, device=device) for _ in Rotation._fields))
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / self.theta ** (exponents / self.head_dim)
        gain = 1.0
        if self.scaling is not None:
            frequencies = stretch(frequencies, self.scaling, theta=self.theta)
            gain = attention_factor(self.scaling)
        positions = torch.arange(self.max_positions, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies
        cos, sin = gain * angles.cos(), gain * angles.sin()
        return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate dimensions i and i + d/2 of every head by the angle of its position: [b, n, s, d].

    `y_i = x_i cos - x_(i+d/2) sin`, `y_(i+d/2) = x_(i+d/2) cos + x_i sin`, with the angles rounded
    to the dtype of x. The pairing is Hugging Face's, not the interleaved one of the paper.
    Source: arXiv 2104.09864.
    """
    cos, sin = rotation.cos.to(x.dtype), rotation.sin.to(x.dtype)
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin)
    turned: Tensor = _Rotate.apply(x, cos, sin)
    return turned


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class _Rotate(torch.autograd.Function):
    """Backward rotates the gradient back by the same angle and saves nothing but the table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (
            torch.addcmul(g * cos, g.roll(g.shape[-1] // 2, dims=-1), sin, value=-1.0),
            None,
            None,
        )


def stretch(frequencies: Tensor, scaling: RopeScaling, *, theta: float) -> Tensor:
    """Rescale frequencies [d/2] for a longer context, as described in the class of `scaling`."""
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, YarnScaling):
        # In transformers' order of operations: what fp32 rounds otherwise in a frequency is at
        # position 100,000 a hundredth of a turn.
        exponents = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32)
        powers = theta ** (exponents.to(frequencies) / (2 * len(frequencies)))
        kept = 1 - _ramp(len(frequencies), scaling, theta).to(frequencies)
        return 1.0 / (scaling.factor * powers) * (1 - kept) + frequencies * kept
    return _stretch_by_wavelength(frequencies, scaling)


def attention_factor(scaling: RopeScaling) -> float:
    """The factor on rotated queries and keys."""
    if not isinstance(scaling, YarnScaling):
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _ramp(size: int, scaling: YarnScaling, theta: float) -> Tensor:
    """fp32 [d/2] over the frequencies from fast to slow: 0 where they are kept, 1 where divided."""

    def dimension(turns: float) -> float:
        """The index of the frequency that turns so often in the original context."""
        original = scaling.original_max_position_embeddings
        return 2 * size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * size - 1)
    if low == high:
        high += 0.001  # a step
    return ((torch.arange(size, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def _stretch_by_wavelength(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def positions_in_segments(segment_ids: Tensor) -> Tensor:
    """Position of every token in its document: int32 [b, s], 0 wherever the segment id changes."""
    length = segment_ids.shape[1]
    index = torch.arange(length, dtype=torch.int32, device=segment_ids.device)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = torch.where(begins, index, 0).cummax(dim=1).values
    return index - starts
