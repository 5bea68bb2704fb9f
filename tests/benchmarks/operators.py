"""Operators of a step as they reach a CPU: time, FLOPs and bytes of each, and the machine's rates.

On a CPU an operator has ended when its call returns, so that a clock around each call misses
nothing but what Python does between them. Bytes are those of its operands and results, each once:
what a kernel reads twice counts once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

PRODUCTS, ATTENTION, ADAMW = "matrix products", "attention", "AdamW"
ELEMENTWISE, COMMUNICATION = "elementwise, other", "communication"
# Parts of operators' names -> what the kernel is for; the first that fits.
_KINDS = {
    "mm": PRODUCTS,
    "scaled_dot_product": ATTENTION,
    "fused_adamw": ADAMW,
    "cumsum": "scans",
    "softmax": "softmax, exp and log",
    "logsumexp": "softmax, exp and log",
    "exp": "softmax, exp and log",
    "amax": "softmax, exp and log",
    "norm": "norms and sums",
    "sum": "norms and sums",
    "mean": "norms and sums",
    "index": "gather and scatter",
    "gather": "gather and scatter",
    "scatter": "gather and scatter",
    "embedding": "gather and scatter",
    "sort": "sorting",
    "topk": "sorting",
    "copy": "copies and casts",
    "cat": "copies and casts",
    "clone": "copies and casts",
    "fill": "copies and casts",
    "zero": "copies and casts",
    "roll": "copies and casts",
    "stack": "copies and casts",
}
# Operators of attention on a CPU, and what their FLOPs follow from.
_CPU_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": ("query", "key", "value"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": ("grad_out", "query", "key", "value"),
}
Clock = Callable[[], float]


@dataclass
class Spent:
    """Sums over calls."""

    seconds: float = 0.0
    flops: float = 0.0
    num_bytes: float = 0.0

    def add(self, other: Spent) -> None:
        self.seconds += other.seconds
        self.flops += other.flops
        self.num_bytes += other.num_bytes


class Operators(TorchDispatchMode):
    """Inside it, sums over the operators of each kind."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        super().__init__()
        self._clock = clock
        self.by_kind: defaultdict[str, Spent] = defaultdict(Spent)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        begin = self._clock()
        result = func(*args, **kwargs)
        seconds = self._clock() - begin
        flops = _flops(func, args, kwargs, result)
        num_bytes = _num_bytes(func, (args, kwargs), result)
        self.by_kind[_kind(func)].add(Spent(seconds, flops, num_bytes))
        return result


def total(by_kind: Mapping[str, Spent], kinds: Iterable[str] | None = None) -> Spent:
    """The sums over some kinds, or all."""
    result = Spent()
    for kind in by_kind if kinds is None else kinds:
        result.add(by_kind.get(kind, Spent()))
    return result


def of_compiled(step: Callable[[], object]) -> dict[str, Spent]:
    """Of a compiled step: what is left to kernels of torch, by its profiler, and all else, which is
    generated code, other operators and Python."""
    spent = {kind: Spent() for kind in (PRODUCTS, ATTENTION, ADAMW)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()  # as the profiler counts
        step()
        seconds = time.perf_counter() - begin
    for event in profiler.key_averages():
        kind = _kind_of_name(event.key) if event.key.startswith("aten::") else None
        if kind in spent:
            spent[kind].seconds += event.self_cpu_time_total / 1e6
    return spent | {ELEMENTWISE: Spent(seconds - total(spent).seconds)}


def _kind(func: Any) -> str:
    if func.namespace == "c10d":
        return COMMUNICATION
    return _kind_of_name(func.overloadpacket.__name__)


def _kind_of_name(name: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in name), ELEMENTWISE)


def _flops(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> float:
    """As torch counts them, but of causal attention the half that its mask leaves."""
    name = func.overloadpacket.__name__
    if name in _CPU_ATTENTION:  # torch (2.13) has no count of these
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        shapes = [values[key].shape for key in _CPU_ATTENTION[name]]
        count = sdpa_flop_count if len(shapes) == 3 else sdpa_backward_flop_count
        return float(count(*shapes)) * (0.5 if values.get("is_causal") else 1.0)
    count = flop_registry.get(func.overloadpacket)
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=result))


def _num_bytes(func: Any, given: Any, result: Any) -> int:
    name = func.overloadpacket.__name__
    operands, made = _tensors(given), _tensors(result)
    storages = {x.untyped_storage().data_ptr() for x in operands}
    into = func._overloadname.endswith("out")  # what is made is given, too
    changes = into or (name.endswith("_") and not name.startswith("_"))
    is_view = any(x.untyped_storage().data_ptr() in storages for x in made)
    if name.startswith(("empty", "new_empty")) or (is_view and not changes):
        return 0
    if name in ("copy_", "fill_", "zero_"):  # what was there is not read
        operands = operands[1:]
    moved = operands if into else (*operands, *made)
    # Of an expanded tensor what is there.
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in moved)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Rates(NamedTuple):
    """What this machine reaches: FLOP/s of a large product, bytes/s of a large copy."""

    flops: float
    num_bytes: float


def measure_rates(*, clock: Clock = time.perf_counter, rounds: int = 5) -> Rates:
    """The best of some rounds, in fp32, with the threads of this process."""
    size, length = 1536, 1 << 25
    a, b, out = (torch.ones(size, size) for _ in range(3))
    source, target = torch.ones(length), torch.ones(length)

    def best(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(rounds):
            begin = clock()
            call()
            seconds.append(clock() - begin)
        return min(seconds)

    product = best(lambda: torch.mm(a, b, out=out))
    copy = best(lambda: target.copy_(source))
    return Rates(2 * size**3 / product, 2 * 4 * length / copy)


def floor_seconds(spent: Spent, rates: Rates) -> float:
    """The least time of operators: their FLOPs or their bytes, whichever takes longer."""
    return max(spent.flops / rates.flops, spent.num_bytes / rates.num_bytes)
