"""Pipeline stages for DeepSpeed, with the wire between them.

The only module that imports deepspeed.pipe. PipelineModule supplies the process grid, the
checkpoint files and the contract with PipelineEngine; partitioning, building, naming, tying and
running layers is ours:

* parameters carry the same names as in SequentialModel, at every pipeline size;
* the carry crosses a stage through the wire, never as a bare tuple;
* tied parameters are tied one by one and all of them, wherever their layers are.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from parallel.carry import AfterEach, LayerSpec, build_layers, run_layers, ties
from parallel.context import ParallelContext
from parallel.wire import Wire

# (output of the last layer, targets as loaded) -> (loss to minimise, named terms to report)
Objective = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]


class TiedParameter(NamedTuple):
    """A parameter held by several stages: this stage's copy and the group that keeps it equal."""

    parameter: nn.Parameter
    group: dist.ProcessGroup
    first_rank: int


class _TiedGradient(NamedTuple):
    """The gradient that PipelineEngine all-reduces over the stages that hold a tied parameter.

    The engine reads `grad`, or BF16_Optimizer's `_hp_grad` (DeepSpeed 0.19.8, pipe/engine.py,
    `_exec_reduce_tied_grads`). But ZeRO-1 in bf16 with `offload_optimizer` accumulates in
    `grad_accum` and leaves no `grad`: every copy would train on its own part of the gradient.
    """

    parameter: Any

    @property
    def grad(self) -> Tensor | None:
        accumulated = getattr(self.parameter, "grad_accum", None)
        return self.parameter.grad if accumulated is None else accumulated

    @property
    def _hp_grad(self) -> Tensor:
        return self.parameter._hp_grad


def check_num_stages(num_layers: int, num_stages: int) -> None:
    """Check that every stage can get a layer.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ValueError(
            f"parallel.pipeline={num_stages} is more than the {num_layers} layers that this model "
            f"can be cut into; set parallel.pipeline to {num_layers} or less"
        )


def partition(costs: Sequence[int], num_stages: int) -> list[int]:
    """Partition consecutive layers into stages, minimising the cost of the most expensive stage.

    Returns the boundaries: stage i holds layers [b[i], b[i+1]), at least one.

    Raises:
        ValueError: fewer layers than stages.
    """
    num_layers = len(costs)
    check_num_stages(num_layers, num_stages)
    # best[k][n]: the first n layers in k stages: (cost of the most expensive stage, its start)
    prefix = [0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for k in range(1, num_stages + 1):
        best.append(
            {
                n: min(
                    (max(best[k - 1][m][0], prefix[n] - prefix[m]), m) for m in best[k - 1] if m < n
                )
                for n in range(k, num_layers + 1)
            }
        )
    boundaries = [num_layers]
    for k in range(num_stages, 0, -1):
        boundaries.append(best[k][boundaries[-1]][1])
    return boundaries[::-1]


def layer_costs(specs: Sequence[LayerSpec]) -> list[int]:
    """The number of parameters that multiply a token, per layer.

    Embedding look-ups cost nothing; modules below one with a `token_share` count by that share.
    """
    ctx = ParallelContext.single(device="meta")
    return [round(_cost(spec.module(ctx=ctx, **spec.kwargs))) for spec in specs]


def _cost(module: nn.Module) -> float:
    if isinstance(module, nn.Embedding):
        return 0.0
    cost: float = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    cost += sum(_cost(child) for child in module.children())
    return cost * getattr(module, "token_share", 1.0)


class PipelineStage(PipelineModule):
    """The layers of this rank's stage, as DeepSpeed's PipelineEngine drives them.

    The first stage receives the tuple of input tensors (`inputs_type` rebuilds the NamedTuple), the
    last returns the output of the last layer, and `objective` computes the loss from it and the
    targets. `boundaries` overrides the partition.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        ctx: ParallelContext,
        *,
        schema: Any,
        inputs_type: Callable[..., Any],
        objective: Objective,
        loss_names: Sequence[str],
        seed: int,
        recompute: bool = False,
        after_each: AfterEach | None = None,
        boundaries: Sequence[int] | None = None,
    ) -> None:
        # Plain attributes, read by the hooks below during PipelineModule.__init__.
        self.specs = tuple(specs)
        self.ctx = ctx
        self.seed = seed
        self.after_each = after_each
        self.boundaries = list(boundaries or partition(layer_costs(specs), ctx.pipeline.size))
        topology = PipeModelDataParallelTopology(
            num_pp=ctx.pipeline.size, num_mp=ctx.tensor.size, num_dp=ctx.data.size
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers and its seed
            super().__init__(layers=self.specs, topology=topology, loss_fn=self._loss)
        self.set_schema(schema)
        self.inputs_type = inputs_type
        self.objective = objective
        self.recompute = recompute
        self._terms = {name: torch.zeros((), device=ctx.device) for name in loss_names}

    @property
    def local_specs(self) -> tuple[LayerSpec, ...]:
        return self.specs[self._local_start : self._local_stop]

    def set_schema(self, schema: Any) -> None:
        """Set the carry's shapes, which are constant in a stage of a run (data.stages)."""
        # The first stage receives nothing, and the last sends nothing.
        before, last = self.specs[self._local_start - 1], self.local_specs[-1]
        self.received, self.sent = Wire(schema, after=before.name), Wire(schema, after=last.name)

    def forward(self, received: Any) -> Any:
        if self.ctx.is_first_stage:
            carry = self.inputs_type(*received)
        else:
            carry = self.received.unpack(received)
        with self.ctx.precision.autocast():
            carry = run_layers(
                self.local_specs, self.forward_funcs, carry, self.ctx, recompute=self.recompute
            )
        if self.ctx.is_last_stage:
            return carry
        return self.sent.pack(carry, layer=self.local_specs[-1].name)

    def get_additional_losses(self) -> dict[str, Tensor]:
        """The named terms of the last loss; PipelineEngine averages them over micro-batches."""
        return self._terms

    def _loss(self, output: Any, targets: Any) -> Tensor:
        total, self._terms = self.objective(output, targets)
        return total

    # Hooks that PipelineModule.__init__ calls.

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = self.boundaries
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _build(self) -> None:
        layers = build_layers(
            self.local_specs, self.ctx, seed=self.seed, after_each=self.after_each
        )
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.forward_funcs = list(layers.values())
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def _index_tied_modules(self) -> dict[str, Any]:
        self.tied_parameters = self._tie()
        return {}  # DeepSpeed's own tying, by whole modules, is not used

    def _tie(self) -> list[TiedParameter]:
        """One process group per tied parameter and (data, tensor) coordinate, in the same order."""
        stage_of = {s.name: self.stage_owner(i) for i, s in enumerate(self.specs)}
        members: dict[str, list[tuple[str, str]]] = {}
        for tie in ties(self.specs):
            owner, _, path = tie.target.partition(".")
            members.setdefault(tie.target, [(owner, path)]).append((tie.layer, tie.path))
        tied = []
        for copies in members.values():
            stages = sorted({stage_of[layer] for layer, _ in copies})
            if len(stages) == 1:
                continue
            group, ranks = self._stage_group(stages)
            if group is not None:
                here = next((x, p) for x, p in copies if stage_of[x] == self.stage_id)
                parameter = self.get_submodule(here[0]).get_parameter(here[1])
                parameter.ds_pipe_replicated = (
                    self.stage_id != stages[0]
                )  # counted once in the norm
                tied.append(TiedParameter(parameter, group, ranks[0]))
        return tied

    def _stage_group(self, stages: list[int]) -> tuple[dist.ProcessGroup | None, list[int]]:
        """Create the groups that join `stages`; return the one this rank belongs to, if any."""
        own: tuple[dist.ProcessGroup | None, list[int]] = (None, [])
        for data in range(self.ctx.data.size):
            for model in range(self.ctx.tensor.size):
                ranks = [self._topo.get_rank(pipe=s, data=data, model=model) for s in stages]
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    own = (group, ranks)
        return own

    # Hooks that PipelineModule and PipelineEngine call for tied parameters.

    def get_tied_weights_and_groups(self) -> list[tuple[_TiedGradient, dist.ProcessGroup]]:
        return [(_TiedGradient(tied.parameter), tied.group) for tied in self.tied_parameters]

    def allreduce_tied_weight_gradients(self) -> None:
        for tied in self.tied_parameters:
            dist.all_reduce(_TiedGradient(tied.parameter).grad, group=tied.group)

    def _synchronize_tied_weights(self) -> None:
        for tied in self.tied_parameters:
            dist.broadcast(tied.parameter.data, src=tied.first_rank, group=tied.group)
