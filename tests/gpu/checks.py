"""Checks of a family on a device, at shapes that the device's own kernels serve.

`tests/gpu` calls them with sizes of `configs/model` on CUDA, `tests/test_gpu_checks.py` with small
ones on a CPU, so that a check cannot be broken without being noticed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.base import ModelFamily, TokenInputs
from models.registry import get_config_class, get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.precision import Precision
from tests.models.families import CASES, Case

MODELS = Path(__file__).parents[2] / "configs" / "model"
FAMILIES = ("agiformer", "amrpa", "daria_former", "dart", "dtf", "llama", "mod")
# A choice between tokens or ends of loops is made the other way where rounding decides it.
CHOOSING = ("agiformer", "dtf", "mod")
SEED = 7
# Calls that make the host wait for the device, on CUDA.
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")
# On a CPU alone its attention asks whether a part has any keys (models/dart/merged_attention.py).
ASKS_A_CPU = {"dart"}


class Batch(NamedTuple):
    inputs: TokenInputs
    labels: Tensor


def real_case(name: str) -> Case:
    """A family's 125M with four layers."""
    values = yaml.safe_load((MODELS / name / "125m.yaml").read_text())
    values["num_layers"] = 4
    if "target_layers" in values:
        values["target_layers"] = [1, 2, 3]
    return Case(get_family(name), get_config_class(name).model_validate(values))


def small_case(name: str) -> Case:
    return CASES[name]


def random_tokens(case: Case, device: torch.device, *, rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    vocabulary = case.config.vocab_size
    stream = torch.randint(vocabulary, (rows, length + 1), generator=generator).to(device)
    return Batch(TokenInputs(stream[:, :-1].contiguous()), stream[:, 1:].contiguous())


def packed_tokens(case: Case, device: torch.device, *, rows: int, length: int) -> Batch:
    """The same in documents of a third, a half and what is left."""
    inputs, labels = random_tokens(case, device, rows=rows, length=length)
    ends = torch.tensor([length // 3, length // 3 + length // 2], device=device)
    segments = torch.bucketize(torch.arange(length, device=device), ends, right=True)
    segments = segments.int().expand(rows, -1).contiguous()
    return Batch(TokenInputs(inputs.tokens, segments), labels)


class Step:
    """A forward and backward pass of a family's model, again and again."""

    def __init__(self, case: Case, device: torch.device, precision: Precision | str, batch: Batch):
        if isinstance(precision, str):
            precision = Precision(precision)
        self.ctx = ParallelContext.single(device=device, precision=precision)
        self.family: ModelFamily = case.family
        self.config: Any = case.config
        segmented = batch.inputs.segment_ids is not None
        specs = case.family.layer_specs(case.config, segmented=segmented)
        self.model = SequentialModel(specs, self.ctx, seed=SEED).to(precision.dtype)
        self.batch = batch

    def __call__(self) -> Tensor:
        """The loss; gradients are added to what the parameters have."""
        with self.ctx.precision.autocast():
            output = self.model(self.batch.inputs)
            loss = self.family.loss(
                output, self.batch.labels, config=self.config, ctx=self.ctx
            ).total
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        found = self.model.named_parameters()
        return {name: p.grad.float() for name, p in found if p.grad is not None}


class Distance(NamedTuple):
    """Of bf16 from fp32: of the loss, and of all gradients together, each over its own size."""

    loss: float
    gradient: float


def bf16_distance(case: Case, device: torch.device, batch: Batch) -> Distance:
    """With the same weights; every gradient in bf16 is finite."""
    exact, rounded = (Step(case, device, precision, batch) for precision in ("fp32", "bf16"))
    exact.model.load_state_dict(rounded.model.state_dict())
    losses = exact(), rounded()
    gradients = rounded.gradients()
    expected = exact.gradients()
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    error = sum(float((gradients[n] - g).square().sum()) for n, g in expected.items())
    size = sum(float(g.square().sum()) for g in expected.values())
    return Distance(abs(float(losses[1] - losses[0]) / float(losses[0])), (error / size) ** 0.5)


class Operations(TorchDispatchMode):
    """Counts operations that compute something, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(out)
        name = func.overloadpacket.__name__
        storages = {x.untyped_storage().data_ptr() for x in given}
        into = func._overloadname.endswith("out")  # what is made is given, too
        changes = into or (name.endswith("_") and not name.startswith("_"))
        if not changes and any(x.untyped_storage().data_ptr() in storages for x in made):
            return out  # a view
        if "empty" in name:
            return out
        self.names[name] += 1
        moved = given if into else (*given, *made)
        self.bytes += sum(x.numel() * x.itemsize for x in moved)
        return out


def operations(step: Step) -> Operations:
    """Of a second pass: the first makes tables that are kept."""
    step()
    with Operations() as counted:
        step()
    return counted


def per_layer(name: str, case: Case, device: torch.device, batch: Batch) -> tuple[float, float]:
    """(operations, bytes) of a pass per layer: all of them over the number of layers."""
    counted = operations(Step(case, device, "bf16", batch))
    number = case.config.num_layers
    return counted.names.total() / number, counted.bytes / number


def attention_kernels(step: Step) -> set[str]:
    """Which forms of torch's attention a pass uses, `math` among them if no kernel serves it."""
    names = operations(step).names
    found = {name for name in names if "scaled_dot_product" in name or "flex_attention" in name}
    # What the form without a kernel calls, and nothing of ours (torch 2.13).
    return found | ({"math"} if "_safe_softmax" in names else set())


class _Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        of_device = any(x.numel() for x in _tensors((args, kwargs)))
        assert name not in _SYNCS or not of_device, f"{name} would wait for the device"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_waiting(device: torch.device) -> Iterator[None]:
    """Refuse what makes the host wait for the device: by CUDA itself, and by name elsewhere."""
    if device.type != "cuda":
        with _Refuse():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
