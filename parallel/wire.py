"""The wire: the carry packed into the tensors that cross a pipeline stage boundary.

DeepSpeed's pipeline engine runs backward once for every floating-point tensor that crosses a
boundary, mixes up receive buffers of different dtypes on middle stages, and fails on a float
without gradient. So the carry crosses as exactly one floating-point tensor with the bits of all
differentiable fields, followed by one integer tensor with the bits of the others, if any. Fields
arrive bit for bit in their own dtype; gradients return the same way, and fields without gradient
cost nothing in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.carry import Field, check_carry, leaves, schema_after

# Every field starts at a multiple of this, so that any dtype can be viewed in place.
ALIGNMENT_BYTES = 16


class Wire:
    """Packs and unpacks the carry described by `schema` (the carry's class filled with Fields).

    `after`: the layer before the boundary, for a schema with fields that vary between layers.
    """

    def __init__(self, schema: Any, *, after: str = "") -> None:
        self.schema = schema_after(schema, after)
        named = leaves(self.schema)
        fields = [field for _, field in named]
        for name, field in named:
            if field.gradient and not field.dtype.is_floating_point:
                raise ValueError(
                    f"carry field {name}: {field} cannot carry a gradient; declare it with "
                    "gradient=False"
                )
        self.differentiable = [f for f in fields if f.gradient]
        self.constant = [f for f in fields if not f.gradient]
        self._is_differentiable = [f.gradient for f in fields]
        if not self.differentiable:
            raise ValueError(f"{type(schema).__name__}: no field carries a gradient")

    def pack(self, carry: Any, *, layer: str) -> Tensor | tuple[Tensor, Tensor]:
        """Pack into one fp32 tensor of bits, or that and one int32 tensor. `layer` is for errors.

        Raises:
            ValueError: the carry does not match the schema.
        """
        check_carry(layer, carry, self.schema)
        values = [x for _, x in leaves(carry)]
        floats = [x for x, d in zip(values, self._is_differentiable, strict=True) if d]
        others = [x for x, d in zip(values, self._is_differentiable, strict=True) if not d]
        bits: Tensor = _Pack.apply(self.differentiable, *floats)
        if not others:
            return bits
        return bits, _to_bytes(others, self.constant).view(torch.int32)

    def unpack(self, received: Tensor | tuple[Tensor, ...]) -> Any:
        """Unpack the received tensors into the carry of the previous stage."""
        tensors = (received,) if isinstance(received, Tensor) else received
        floats = iter(_Unpack.apply(self.differentiable, tensors[0]))
        others = iter(_from_bytes(tensors[1], self.constant) if self.constant else ())

        def arrived(field: Any) -> Any:
            if field is None:
                return None
            if isinstance(field, Field):
                return next(floats if field.gradient else others)
            return tuple(map(arrived, field))

        return type(self.schema)(*map(arrived, self.schema))

    @property
    def forward_bytes(self) -> int:
        return _size(self.differentiable) + _size(self.constant)

    @property
    def backward_bytes(self) -> int:
        return _size(self.differentiable)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fields: Sequence[Field], *tensors: Tensor) -> Tensor:
        ctx.fields = fields
        return _to_bytes(tensors, fields).view(torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return (None, *_from_bytes(gradient, ctx.fields))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fields: Sequence[Field], bits: Tensor) -> tuple[Tensor, ...]:
        ctx.fields = fields
        ctx.set_materialize_grads(False)
        return tuple(_from_bytes(bits, fields))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor]:
        device = next(g.device for g in gradients if g is not None)
        present = [
            torch.zeros(f.shape, dtype=f.dtype, device=device) if g is None else g.to(f.dtype)
            for g, f in zip(gradients, ctx.fields, strict=True)
        ]
        return None, _to_bytes(present, ctx.fields).view(torch.float32)


def _padded_bytes(field: Field) -> int:
    size = torch.Size(field.shape).numel() * field.dtype.itemsize
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _size(fields: Sequence[Field]) -> int:
    return sum(_padded_bytes(field) for field in fields)


def _to_bytes(tensors: Sequence[Tensor], fields: Sequence[Field]) -> Tensor:
    """Concatenate the tensors' bytes at aligned offsets, with one copy of each."""
    out = torch.empty(_size(fields), dtype=torch.uint8, device=tensors[0].device)
    for target, tensor in zip(_from_bytes(out, fields), tensors, strict=True):
        target.copy_(tensor.detach())
    return out


def _from_bytes(bits: Tensor, fields: Sequence[Field]) -> list[Tensor]:
    """The fields as views of the received bytes, without a copy."""
    data = bits.detach().contiguous().view(torch.uint8)
    views, offset = [], 0
    for field in fields:
        count = torch.Size(field.shape).numel() * field.dtype.itemsize
        views.append(data[offset : offset + count].view(field.dtype).view(field.shape))
        offset += _padded_bytes(field)
    return views
