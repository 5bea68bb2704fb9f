"""Skipping of steps whose loss or gradient is not finite, with a rerun that finds the origin.

DeepSpeed does not update the weights when the global gradient norm, which all ranks share, is not
finite. `optimizers.propagate_nonfinite` extends this to the loss, so all ranks decide alike without
communication. The loop then has the step rerun here, from data read again and with hooks on every
layer: either it is finite now, and the fault is not in the data, or the hooks find where it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data_tools.loading.loader import TrainLoader
from pretrain.distributed.consensus import RankGroup
from pretrain.engine.engine import Engine, StepResult
from pretrain.engine.partitions import local_shard
from pretrain.errors import TrainingError

_WEIGHT, _OUTPUT, _GRADIENT = range(3)  # the first numbers of `NonFiniteOrigin.order`
_MAX_LISTED = 4  # samples listed in the message; the rest are only counted


class NonFiniteOrigin(NamedTuple):
    """The first non-finite tensor on a rank. `micro_batch`: counted from 0, where known.

    `order`: sort key over ranks; the smallest is the origin.
    """

    what: str
    order: tuple[int, ...]
    micro_batch: int | None = None

    @property
    def is_weight(self) -> bool:
        return self.order < (_OUTPUT,)


class NonFiniteTracer:
    """Context manager that hooks a module to find its first non-finite output or gradient.

    Synchronises with the device after every layer, so it is for a step that has already failed.
    `stage`, `num_stages`: of the pipeline.
    """

    def __init__(self, module: nn.Module, *, stage: int = 0, num_stages: int = 1) -> None:
        self._module = module
        self._stage, self._num_stages = stage, num_stages
        self._micro_batch, self._num_outputs = -1, 0
        self._handles: list[RemovableHandle] = []
        self.origin = first_nonfinite_parameter(module)

    def __enter__(self) -> Self:
        self._handles = [self._module.register_forward_pre_hook(self._begin)]
        for name, module in self._module.named_modules():
            if name:
                hook = partial(self._see_output, name)
                self._handles.append(module.register_forward_hook(hook))
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                hook = partial(self._see_gradient, name)
                self._handles.append(parameter.register_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._micro_batch += 1

    def _see_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._num_outputs += 1
        # Non-finite inputs originate elsewhere.
        if self.origin is None and not _all_finite(output) and _all_finite(inputs):
            order = (_OUTPUT, self._micro_batch, self._stage, self._num_outputs)
            self.origin = NonFiniteOrigin(f"the output of {name}", order, self._micro_batch)

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        if self.origin is None and not bool(gradient.isfinite().all()):
            # A pipeline interleaves micro-batches: which one this backward belongs to is unknown.
            micro_batch = self._micro_batch if self._num_stages == 1 else None
            order = (_GRADIENT, -self._stage)
            self.origin = NonFiniteOrigin(f"the gradient of {name}", order, micro_batch)


def first_nonfinite_parameter(module: nn.Module) -> NonFiniteOrigin | None:
    """The first parameter with a non-finite element on this rank."""
    parameters = {name: local_shard(p).elements for name, p in module.named_parameters()}
    if not parameters:
        return None
    finite = torch.stack([tensor.isfinite().all() for tensor in parameters.values()])
    name = next((n for n, ok in zip(parameters, finite.tolist(), strict=True) if not ok), None)
    return None if name is None else NonFiniteOrigin(f"parameter {name} itself", (_WEIGHT,))


def check_finite(module: nn.Module, ranks: RankGroup, *, step: int) -> None:
    """Refuse to save non-finite weights (collective).

    Raises:
        TrainingError: on every rank; a weight is not finite.
    """
    origin = first_nonfinite_parameter(module)
    message = ranks.first_error(
        None if origin is None else f"{origin.what} of rank {ranks.rank} is not finite"
    )
    if message is not None:
        raise TrainingError(
            f"after step {step} {message}: nothing was saved since the last checkpoint; start "
            "again from there, with a lower training.lr if it happens again"
        )


class SkipNonFinite:
    """Reruns the steps of a run that are not finite; where one still is not, skips it.

    Args:
        max_skipped: most consecutive steps that may be skipped.

    `num_skipped`: steps skipped so far, the last `in_a_row` of them consecutive; the loop sets
    `in_a_row` to 0 at a finite step. Both are part of a checkpoint: otherwise a run that is
    restarted again and again would never reach the limit.
    """

    def __init__(
        self,
        engine: Engine,
        loader: TrainLoader,
        ranks: RankGroup,
        *,
        max_skipped: int,
    ) -> None:
        self._engine, self._loader, self._ranks = engine, loader, ranks
        self._max_skipped = max_skipped
        self.num_skipped = self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain JSON."""
        return {"num_skipped": self.num_skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts; zero where an older checkpoint has none."""
        self.num_skipped = state.get("num_skipped", 0)
        self.in_a_row = state.get("in_a_row", 0)

    def rerun(
        self, step: int, samples: range, failed: StepResult, *, learning_rate: float
    ) -> tuple[StepResult, str]:
        """Rerun step number `step`, counted from 1, which was not finite (collective).

        Also returns a message to log. `samples`: their indices in the run, over all data ranks.

        Raises:
            TrainingError: on every rank; more than `max_skipped` steps in a row were not finite, or
                a weight is not.
        """
        before = _numbers(failed)
        # Random numbers of a model derive from seeds, names and the text: the rerun draws the same.
        pipeline = self._engine.ctx.pipeline
        watch = NonFiniteTracer(self._engine.module, stage=pipeline.rank, num_stages=pipeline.size)
        self._loader.skip_to(samples.start)
        with watch as tracer:
            result = self._engine.train_step(self._loader, learning_rate=learning_rate)
        self._engine.uncount_step()
        if result.applied:
            self.in_a_row = 0
            return result, (
                f"step {step}: {before}; rerun, it is finite ({_numbers(result)}): a device or "
                "its memory may have failed"
            )
        self.in_a_row += 1
        self.num_skipped += 1
        message = f"step {step}: {before}; {self._find_origin(step, samples, tracer.origin)}"
        self._check_limit(step, message)
        return result, (
            f"{message}; the step is skipped ({self.in_a_row} in a row, "
            f"stability.max_skipped_steps={self._max_skipped})"
        )

    def _check_limit(self, step: int, message: str) -> None:
        if self.in_a_row > self._max_skipped:
            first = step - self.in_a_row + 1
            raise TrainingError(
                f"{message}; {self.in_a_row} steps in a row were not finite, more than "
                f"stability.max_skipped_steps={self._max_skipped}: nothing was saved since the "
                "last checkpoint; start again from it with "
                f"stability.skip_steps=[[{first},{step}]] or a lower training.lr"
            )

    def _find_origin(self, step: int, samples: range, origin: NonFiniteOrigin | None) -> str:
        """Describe the origin over all ranks, on all ranks alike (collective).

        Raises:
            TrainingError: a weight is not finite, which no other batch can repair.
        """
        text = "" if origin is None else self._describe_origin(samples, origin)
        every = self._ranks.broadcast(self._ranks.gather((origin, text))) or []
        found = [(each.order, each.is_weight, text) for each, text in every if each is not None]
        if not found:
            where = self._describe_samples(samples, None)
            return f"no single layer is the origin, the batch is {where}"
        _, is_weight, text = min(found)
        if is_weight:
            raise TrainingError(
                f"step {step}: {text}: memory or an update has gone wrong; start again from the "
                "last checkpoint"
            )
        more = len(found) - 1
        return text + (f", and has spread to {more} more ranks" if more else "")

    def _describe_origin(self, samples: range, origin: NonFiniteOrigin) -> str:
        return (
            f"it begins on rank {self._ranks.rank} with {origin.what}, "
            f"in {self._describe_samples(samples, origin.micro_batch)}"
        )

    def _describe_samples(self, samples: range, micro_batch: int | None) -> str:
        """Locate the samples of a step, or of a micro-batch of this data rank, in the data."""
        if micro_batch is not None:
            data = self._engine.ctx.data
            count = len(samples) // (self._engine.num_micro_batches * data.size)
            first = (micro_batch * data.size + data.rank) * count
            samples = samples[first : first + count]
        places = self._loader.describe(samples[:_MAX_LISTED])
        more = f" and {len(samples) - _MAX_LISTED} more" if len(samples) > _MAX_LISTED else ""
        return f"samples {samples[0]} to {samples[-1]} of the run ({', '.join(places)}{more})"


def _all_finite(value: Any) -> bool:
    """Whether nested tuples, lists and dicts hold no NaN and no +inf; -inf may be a mask."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool((value < torch.inf).all())
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_all_finite, value))
    return True


def _numbers(result: StepResult) -> str:
    return f"loss {float(result.loss):.4g}, gradient norm {float(result.grad_norm):.4g}"
