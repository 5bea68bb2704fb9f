"""One model, one layout, one DeepSpeed engine, behind the few calls that the loop needs.

At pipeline size 1 the model is a SequentialModel in DeepSpeed's plain engine (ZeRO 0-3), at larger
sizes a PipelineStage in DeepSpeed's PipelineEngine (ZeRO-1). For the same samples both give the
same losses, terms and gradient norms. Nothing outside this folder touches DeepSpeed's engine.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_tools.loading.batch import Batch
from models.base import TokenInputs
from parallel.checkpoint.weights import Weight, module_weights
from parallel.layer_state import (
    change_settings,
    discard_layer_sums,
    layer_state_owners,
    update_layer_states,
)
from parallel.sharding import all_experts
from pretrain.checkpointing.index import INDEX_NAME, parse_index, read_index
from pretrain.checkpointing.optimizer_shards import OptimizerShard
from pretrain.checkpointing.selection import Checkpoint
from pretrain.distributed.consensus import RankGroup
from pretrain.engine.deepspeed_files import load_engine_state, save_engine_state
from pretrain.engine.deepspeed_optimizer import publish_weights
from pretrain.engine.optimizer_state import optimizer_shard, restore_optimizer_state
from pretrain.engine.optimizers import (
    clip_gradients,
    drop_averaged_gradients,
    set_learning_rate,
    without_update,
)
from pretrain.engine.part_scoring import Part, PartScores, PartScoring
from pretrain.engine.phases import PHASES, Phase, all_of, in_phase
from pretrain.engine.scoring import Scores, Scoring
from pretrain.engine.train_spec import Targets, TrainSpec, count_scored
from pretrain.supervision.pass_timer import CountedPasses

Objective = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]
Progress = Callable[[str], object]


class StepResult(NamedTuple):
    """Result of one optimizer step: means over all its samples, and the norm before clipping.

    Tensors stay on the device until they are read. `applied`: the same on all ranks; False if the
    loss or the norm is not finite, and then nothing has changed.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    grad_norm: Tensor | float
    applied: bool


class Engine(ABC):
    """Trains and evaluates the model of a run, and hands out and restores its state."""

    def __init__(self, deepspeed_engine: Any, spec: TrainSpec) -> None:
        self._deepspeed = deepspeed_engine
        self.module: nn.Module = deepspeed_engine.module
        self._layer_states = layer_state_owners(self.module)
        self.spec = spec
        self.ctx = spec.ctx
        self._phases: dict[str, Phase] = {}  # by what enters them

    def _phase(self, name: str) -> AbstractContextManager[Any]:
        """Around a phase of a step."""
        return all_of(self._phases.values(), name) if self._phases else contextlib.nullcontext()

    def _set_phase(self, purpose: str, phase: Phase | None) -> None:
        if phase is None:
            self._phases.pop(purpose, None)
        else:
            self._phases[purpose] = phase

    @property
    @abstractmethod
    def counted_passes(self) -> CountedPasses:
        """Passes that wait for other ranks in marked collectives alone."""

    def time_passes(self, phase: Phase) -> None:
        """Enter `phase(name)` around each phase of all steps, whatever `record_phases` enters."""
        self._set_phase("time", phase)

    def record_phases(self, phase: Phase | None) -> None:
        """Enter `phase(name)` around each phase of the steps from here on; None: no longer.

        Phases are data, forward, backward and optimizer, and in a pipeline reduction (of gradients,
        otherwise a part of backward and optimizer) and pipeline (waiting for other stages).
        """
        self._set_phase("record", phase)

    @abstractmethod
    def set_sequence_length(self, length: int) -> None:
        """Set the sequence length of the batches from here on; all ranks call it alike."""

    @property
    @abstractmethod
    def num_micro_batches(self) -> int:
        """Batches of each data rank that an optimizer step takes."""

    def set_num_micro_batches(self, number: int) -> None:
        """Set `num_micro_batches` of the steps from here on; all ranks call it alike."""
        engine = self._deepspeed
        micro_batch, data_size = engine.train_micro_batch_size_per_gpu(), engine.dp_world_size
        engine.set_train_batch_size(number * micro_batch * data_size)
        # The plain engine steps when its micro-batch count is a multiple of their number (0.19.8,
        # is_gradient_accumulation_boundary); the count so far is of steps of the previous size.
        engine.micro_steps = 0

    def change_settings(self, settings: Mapping[str, Any]) -> None:
        """Change settings of the layers from here on; all ranks call it alike."""
        change_settings(self.module, settings)

    @abstractmethod
    def train_step(self, batches: Iterator[Batch], *, learning_rate: float) -> StepResult:
        """Take one optimizer step over `num_micro_batches` batches of this data rank."""

    def evaluate(self, batches: Iterable[Batch], *, num_batches: int, progress: Progress) -> Scores:
        """The losses of every scored token in `num_batches` batches of all data ranks; all ranks
        call it alike. `progress` is called with each batch that this rank begins."""
        score = Scoring(self.spec)
        nats = self._evaluate(batches, score, num_batches, progress)
        return Scores(nats, score.group_bits())

    def score_part(self, part: Part, *, progress: Progress) -> PartScores | None:
        """The scores of this data rank's rows, on one rank of its tensor ranks and stages, None on
        the others; all ranks call it alike, and then set the sequence length of what follows."""
        score = PartScoring(self.spec, part)
        self.set_sequence_length(part.tokens.shape[1])
        batches = score.batches()
        self._evaluate(batches, score, len(batches), progress)
        return score.scores() if self.ctx.is_last_stage and self.ctx.tensor.rank == 0 else None

    @abstractmethod
    def _evaluate(
        self, batches: Iterable[Batch], objective: Objective, num_batches: int, progress: Progress
    ) -> float:
        """Pass batches through the model in evaluation, and give each output to `objective` once,
        where the last stage is; the sum of what it returns, over all data ranks."""

    @abstractmethod
    def weights(self) -> list[Weight]:
        """The weights of this rank's checkpoint file; loading them is collective."""

    def optimizer_shard(self) -> OptimizerShard:
        """Masters, moments and step counts that this rank updates; not collective."""
        return optimizer_shard(self._deepspeed, ctx=self.ctx)

    def write_files(self, directory: Path) -> list[Path]:
        """Let DeepSpeed write its own files below `directory`; see `save_engine_state`."""
        return save_engine_state(self._deepspeed, directory)

    def restore(
        self,
        checkpoint: Checkpoint,
        *,
        samples: int,
        ranks: RankGroup,
        progress: Callable[[str], object],
    ) -> None:
        """Restore weights, optimizer state and step counts (collective over `ranks`).

        Args:
            samples: taken by the run so far, over all ranks.
            progress: called with the name of each file before this rank reads it.

        Raises:
            CheckpointError, AgreedError: the checkpoint does not fit the model.
        """
        engine, path = self._deepspeed, checkpoint.path
        if not checkpoint.any_layout:
            load_engine_state(engine, path)
            return
        raw = ranks.run_on_rank0(lambda: read_index(path))

        def restore() -> None:
            index = parse_index(raw, source=path / INDEX_NAME)
            restore_optimizer_state(engine, path, index, ctx=self.ctx, progress=progress)

        ranks.run_on_all_ranks(restore)
        publish_weights(engine)
        engine.global_steps, engine.global_samples = checkpoint.step, samples

    def uncount_step(self) -> None:
        """Decrement DeepSpeed's step counts, after a step was rerun."""
        self._deepspeed.global_steps -= 1
        self._deepspeed.global_samples -= self._deepspeed.train_batch_size()

    def _finish_step(self, *, applied: bool) -> None:
        """Update layer states after a step; a skipped step must leave no trace."""
        if not applied:
            discard_layer_sums(self._layer_states)
            drop_averaged_gradients(self._deepspeed.optimizer)
        elif self._layer_states:
            update_layer_states(self._layer_states, ctx=self.ctx)


class PlainEngine(Engine):
    """Pipeline size 1: a loop of forward, backward and step over DeepSpeed's plain engine."""

    def __init__(self, deepspeed_engine: Any, spec: TrainSpec) -> None:
        super().__init__(deepspeed_engine, spec)
        needs_reduction = hasattr(deepspeed_engine.optimizer, "reduce_gradients")
        if self.ctx.data.size == 1 and spec.ds_config.zero_stage <= 1 and not needs_reduction:
            # ZeRO-0, and ZeRO-1 in bf16: with one data rank DeepSpeed would still copy all
            # gradients to a buffer and back. In other cases the call also partitions them.
            deepspeed_engine.enable_backward_allreduce = False

    @property
    def counted_passes(self) -> CountedPasses:
        # Gradients are reduced in the last backward pass of a step, with ZeRO-2 in each, and with
        # ZeRO-3 weights gathered in every pass: on streams of DeepSpeed's, for which ours waits.
        stage = self.spec.ds_config.zero_stage
        return CountedPasses(forward=stage < 3, backward=stage < 2, last_backward=False)

    def set_sequence_length(self, length: int) -> None:
        """Do nothing: no buffer depends on the sequence length."""

    @property
    def num_micro_batches(self) -> int:
        number: int = self._deepspeed.gradient_accumulation_steps()
        return number

    def train_step(self, batches: Iterator[Batch], *, learning_rate: float) -> StepResult:
        engine, clip_in_loop = self._deepspeed, self.spec.ds_config.clip_in_loop
        set_learning_rate(engine.optimizer, learning_rate)
        names = ("loss", *self.spec.loss_names)
        sums = torch.zeros(len(names), device=self.ctx.device)
        norm: Tensor | float = 0.0
        applied = True
        num_scored = None
        if self.spec.segmented:
            with self._phase("data"):
                batches, num_scored = count_scored(batches, self.num_micro_batches, self.ctx)
        for _ in range(self.num_micro_batches):
            with self._phase("data"):
                inputs, labels = _to_device(next(batches), self.ctx.device)
            with self._phase("forward"):
                total, terms = self.spec.objective(engine(inputs), Targets(labels, num_scored))
            with self._phase("backward"):
                engine.backward(total)
            sums += torch.stack([total.detach(), *(terms[name].detach() for name in names[1:])])
            with self._phase("optimizer"):
                if clip_in_loop and engine.is_gradient_accumulation_boundary():
                    max_norm = self.spec.config.training.grad_clip
                    norm = clip_gradients(self.module, max_norm, self.ctx)
                    # Synchronises with the device, as DeepSpeed's own optimizers do.
                    applied = bool(norm.isfinite())
                with contextlib.nullcontext() if applied else without_update(engine.optimizer):
                    engine.step()
        if not clip_in_loop:
            norm, applied = engine.get_global_grad_norm(), engine.was_step_applied()
        self._finish_step(applied=applied)
        if self.ctx.data.size > 1:
            dist.all_reduce(sums, group=self.ctx.data.group)
        means = sums / (self.num_micro_batches * self.ctx.data.size)
        return StepResult(means[0], dict(zip(names[1:], means[1:], strict=True)), norm, applied)

    @torch.no_grad()
    def _evaluate(
        self, batches: Iterable[Batch], objective: Objective, num_batches: int, progress: Progress
    ) -> float:
        self._deepspeed.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.ctx.device)
        for number, batch in enumerate(batches, 1):
            progress(f"batch {number} of {num_batches}")
            inputs, labels = _to_device(batch, self.ctx.device)
            total += objective(self._deepspeed(inputs), Targets(labels))[0].double()
        dist.all_reduce(total, group=self.ctx.data.group)
        self._deepspeed.train()
        return total.item()

    def weights(self) -> list[Weight]:
        is_partitioned = self.spec.ds_config.zero_stage == 3
        read = _gathered if is_partitioned else partial(all_experts, ctx=self.ctx)
        return module_weights(self.module, read=read)


class StageEngine(Engine):
    """Pipeline size > 1: DeepSpeed's PipelineEngine schedules the micro-batches of a stage."""

    def __init__(self, deepspeed_engine: Any, spec: TrainSpec) -> None:
        super().__init__(deepspeed_engine, spec)
        self.sequence_length = spec.config.data.sequence_length

    @property
    def counted_passes(self) -> CountedPasses:
        return CountedPasses()

    def _set_phase(self, purpose: str, phase: Phase | None) -> None:
        super()._set_phase(purpose, phase)
        engine = self._deepspeed
        # The class's table, which an attribute of the object hides while phases are entered.
        engine.__dict__.pop("_INSTRUCTION_MAP", None)
        if self._phases:
            engine._INSTRUCTION_MAP = {
                instruction: in_phase(self._phase, PHASES[instruction.__name__], run)
                for instruction, run in engine._INSTRUCTION_MAP.items()
            }

    def set_sequence_length(self, length: int) -> None:
        """Replace the wires and the receive buffers, which DeepSpeed keeps from the first batch."""
        if length != self.sequence_length:
            stage: Any = self.module
            stage.set_schema(self.spec.schema(self.ctx, seq_length=length))
            self._deepspeed.reset_activation_shape()
            self.sequence_length = length

    @property
    def num_micro_batches(self) -> int:
        number: int = self._deepspeed.micro_batches
        return number

    def train_step(self, batches: Iterator[Batch], *, learning_rate: float) -> StepResult:
        engine = self._deepspeed
        set_learning_rate(engine.optimizer, learning_rate)
        num_scored = None
        if self.spec.segmented and self.ctx.is_last_stage:
            batches, num_scored = count_scored(batches, self.num_micro_batches, self.ctx)
        loss = engine.train_batch(self._pairs(batches, num_scored))
        applied = engine.was_step_applied()
        self._finish_step(applied=applied)
        terms = dict(engine.agg_additional_losses)
        return StepResult(loss, terms, engine.get_global_grad_norm(), applied)

    def _evaluate(
        self, batches: Iterable[Batch], objective: Objective, num_batches: int, progress: Progress
    ) -> float:
        numbers = itertools.count(1)
        # DeepSpeed runs all batches in one call, and every stage calls its module once for each.
        hook = self.module.register_forward_pre_hook(
            lambda *_: progress(f"batch {next(numbers)} of {num_batches}")
        )
        with self._objective(objective), hook:
            mean: Tensor = self._deepspeed.eval_batch(
                self._pairs(iter(batches)), num_micro_batches=num_batches
            )
        # The engine averages the sums of `objective` over micro-batches and data ranks.
        return mean.item() * num_batches * self.ctx.data.size

    def weights(self) -> list[Weight]:
        copies = [name for name, p in self.module.named_parameters() if p.ds_pipe_replicated]  # type: ignore[attr-defined]
        return module_weights(self.module, read=partial(all_experts, ctx=self.ctx), skip=copies)

    def _pairs(
        self, batches: Iterator[Batch], num_scored: Tensor | None = None
    ) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """(inputs, targets) pairs, which PipelineEngine pulls on its first and last stage only."""
        for batch in batches:
            pair = TokenInputs(batch.tokens, batch.segment_ids), Targets(batch.labels, num_scored)
            inputs, targets = (tuple(x for x in each if x is not None) for each in pair)
            yield inputs, targets

    @contextmanager
    def _objective(self, objective: Callable[..., Any]) -> Iterator[None]:
        stage: Any = self.module
        usual, stage.objective = stage.objective, objective
        try:
            yield
        finally:
            stage.objective = usual


def _gathered(parameter: Tensor) -> Tensor:
    """Gather a parameter partitioned by ZeRO-3 (collective over data ranks)."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _to_device(batch: Batch, device: torch.device) -> tuple[TokenInputs, Tensor]:
    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    segment_ids = None if batch.segment_ids is None else move(batch.segment_ids)
    return TokenInputs(move(batch.tokens), segment_ids), move(batch.labels)
