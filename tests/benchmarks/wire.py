"""Cost of a stage boundary: our wire against a bare hidden state.

A boundary packs in the sender and unpacks in the receiver, and the same for gradients on the way
back. The baseline is what DeepSpeed's pipeline does with one hidden state: a contiguous copy for
each direction. Nothing is sent; bytes are counted, as their time depends on the link. The block is
a llama block's forward and backward pass over the same tokens: a stage holds several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.common.decoder import DecoderCarry
from models.llama.config import LlamaConfig
from models.llama.model import FAMILY as LLAMA
from parallel.carry import Field, SequentialModel
from parallel.context import ParallelContext
from parallel.precision import Precision
from parallel.wire import Wire
from tests.benchmarks.timing import Table, interleaved

HIDDEN_SIZES = (1024, 2048)
SEQ_LENGTH, BATCH_SIZE = 512, 4
ROUNDS, WARMUP = 11, 2


class MixedCarry(NamedTuple):
    """The dtypes that a hard family mixes: a stream, a recurrent state, ids, a mask, two losses."""

    hidden: Any
    state: Any
    ids: Any
    flags: Any
    aux: Any


def tables() -> Iterator[Table]:
    """Time and bytes of a boundary for every carry and hidden size."""
    ctx = ParallelContext.single(precision=Precision("bf16"))
    yield Table(
        f"One stage boundary, bf16, {BATCH_SIZE} x {SEQ_LENGTH} tokens, forward and backward, "
        f"median of {ROUNDS}",
        ("carry", "wire ms", "copy ms", "wire MB", "copy MB", "block ms", "wire / block"),
        [row for size in HIDDEN_SIZES for row in _rows(size, ctx)],
    )


def _rows(hidden_size: int, ctx: ParallelContext) -> Iterator[tuple[str, ...]]:
    tokens, hidden = (BATCH_SIZE, SEQ_LENGTH), (SEQ_LENGTH, BATCH_SIZE, hidden_size)
    stream = Field(hidden, ctx.precision.dtype, gradient=True)
    state = Field((*hidden[:2], hidden_size // 8), torch.float32, gradient=True)
    schemas = {
        "hidden alone": DecoderCarry(stream),
        "hidden and positions": DecoderCarry(stream, Field(tokens, torch.int32)),
        "mixed dtypes": MixedCarry(
            stream, state, Field(tokens, torch.int64), Field(tokens, torch.bool),
            Field((2,), torch.float32, gradient=True),
        ),
    }  # fmt: skip
    contestants = {name: _wire_crossing(schema) for name, schema in schemas.items()}
    contestants |= {"copy": _copy_crossing(stream), "block": _block(hidden_size, ctx)}
    seconds = interleaved(contestants, rounds=ROUNDS, warmup=WARMUP)
    milliseconds = {name: 1e3 * median(times) for name, times in seconds.items()}
    plain = 2 * Wire(schemas["hidden alone"]).backward_bytes
    for name, schema in schemas.items():
        wire = Wire(schema)
        yield (
            f"hidden {hidden_size}, {name}",
            f"{milliseconds[name]:.2f}",
            f"{milliseconds['copy']:.2f}",
            f"{(wire.forward_bytes + wire.backward_bytes) / 1e6:.2f}",
            f"{plain / 1e6:.2f}",
            f"{milliseconds['block']:.0f}",
            f"{100 * milliseconds[name] / milliseconds['block']:.2f} %",
        )


def _wire_crossing(schema: Any) -> Callable[[], None]:
    """Pack and unpack, then the same for the gradients."""
    wire = Wire(schema)
    carry = type(schema)(*(None if f is None else _filled(f) for f in schema))
    leaves = [x for x in carry if x is not None and x.requires_grad]
    gradients = [x.detach().clone() for x in leaves]

    def cross() -> None:
        packed = wire.pack(carry, layer="block")
        bits, *others = (packed,) if isinstance(packed, Tensor) else packed
        received = bits.detach().requires_grad_()
        arrived = wire.unpack((received, *others))
        outputs = [x for x in arrived if x is not None and x.requires_grad]
        (returned,) = torch.autograd.grad(outputs, received, gradients)
        torch.autograd.grad(bits, leaves, returned)

    return cross


def _copy_crossing(field: Field) -> Callable[[], None]:
    hidden, gradient = _filled(field), _filled(field).detach()

    def cross() -> None:
        hidden.detach().clone()
        gradient.clone()

    return cross


def _filled(field: Field) -> Tensor:
    value = torch.ones(field.shape, dtype=field.dtype)
    return value.requires_grad_() if field.gradient else value


def _block(hidden_size: int, ctx: ParallelContext) -> Callable[[], None]:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_layers=1,
        num_heads=hidden_size // 128,
        num_kv_heads=hidden_size // 128,
        max_position_embeddings=SEQ_LENGTH,
    )
    model = SequentialModel(LLAMA.layer_specs(config)[1:2], ctx).to(ctx.precision.dtype)
    shape = (SEQ_LENGTH, BATCH_SIZE, hidden_size)
    hidden = _filled(Field(shape, ctx.precision.dtype, gradient=True))
    gradient = torch.ones(shape, dtype=ctx.precision.dtype)
    return lambda: model(DecoderCarry(hidden)).hidden.backward(gradient)
