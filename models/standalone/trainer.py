"""A small training loop for one process, or data parallel under torchrun.

For anything large use `pretrain/train.py`: it trains the same layers with the same losses at any
layout, and its checkpoints survive failures of the machine. This loop is for scripts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.standalone.batches import ResumableBatches
from models.standalone.checkpoint import (
    TrainingState,
    load_into,
    load_model_state,
    load_training_state,
    num_ranks,
    open_training,
    rank,
    save_training,
)
from models.standalone.model import StandaloneModel
from models.standalone.optimizer import build_scheduler
from parallel.context import Axis
from parallel.cross_entropy import IGNORED_LABEL
from parallel.layer_state import layer_state_owners, update_layer_states


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """`max_grad_norm` 0: no clipping. `use_amp`: compute in bf16, keep weights in fp32.

    Raises:
        ValueError: a setting out of range.
    """

    max_steps: int
    warmup_steps: int = 0
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    use_amp: bool = False
    save_dir: Path | None = None
    save_every: int = 1000
    eval_every: int = 1000
    log_every: int = 10

    def __post_init__(self) -> None:
        counts = ("max_steps", "gradient_accumulation_steps")
        for name in (*counts, "save_every", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more; raise it")
        for name in ("warmup_steps", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be finite and not negative; pass 0 or more"
                )


class Writer(Protocol):
    """A destination of the log beside standard output; called on rank 0 alone."""

    def write(self, record: Mapping[str, float]) -> None:
        """A record has `step` and the values of that step."""

    def close(self) -> None: ...


class Trainer:
    """A loop over batches: `input_ids` and `labels` int64 [b, s], as a pair or as a mapping, which
    may also hold the model's `optional_inputs`.

    A step is the mean over the scored tokens of all its micro-batches and processes, however many
    rows and scored tokens each has, also in the losses beside the cross entropy. With
    torch.distributed initialized, every process starts from the weights of rank 0, takes the
    batches of its own loader, and gradients are averaged in place. Writes
    `save_dir/checkpoint-N/` (models.standalone.checkpoint) and prints a line every `log_every`
    steps; `writer` gets the same records.
    """

    def __init__(
        self,
        model: StandaloneModel,
        settings: TrainerSettings,
        train_dataloader: Iterable[Any],
        eval_dataloader: Iterable[Any] | None = None,
        *,
        optimizer: torch.optim.Optimizer,
        writer: Writer | None = None,
    ) -> None:
        self.model, self.settings, self.optimizer = model, settings, optimizer
        self.scheduler = build_scheduler(optimizer, settings.warmup_steps, settings.max_steps)
        self.batches = ResumableBatches(train_dataloader)
        self.eval_dataloader, self.writer = eval_dataloader, writer
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._random: dict[str, Tensor] | None = None  # a checkpoint's, until training continues
        _broadcast_weights(model)

    def train(self) -> list[dict[str, float]]:
        """Train to `max_steps`; returns what was logged.

        Raises:
            ValueError: there are no batches, or the loss is not finite.
        """
        self.model.train()
        if self._random is not None:
            _set_random(self._random)
            self._random = None
        try:
            while self.step < self.settings.max_steps:
                self._advance()
        finally:
            if self.writer is not None and rank() == 0:
                self.writer.close()
        return self.history

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross entropy of `eval_dataloader` on all processes, in nats per scored token.

        Raises:
            ValueError: there is none, or it scores no token.
        """
        if self.eval_dataloader is None:
            raise ValueError("eval_dataloader was not given; give one to Trainer")
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        one = torch.ones((), device=self._device)
        for batch in self.eval_dataloader:
            inputs = self._inputs(batch)
            with self._autocast():
                nats = self.model.loss(**inputs, num_scored=one).terms["lm_loss"]
            sums += torch.stack((nats.double().cpu(), _num_scored(inputs).double().cpu()))
        self.model.train(was_training)
        sums = _sum_over_ranks(sums.to(self._device))
        if sums[1] == 0:
            raise ValueError("eval_dataloader scores no token; check its batches and labels")
        return (sums[0] / sums[1]).item()

    def save(self, folder: Path) -> None:
        """Write a checkpoint (collective)."""
        shared = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        own = {"batches": self.batches.state_dict(), "random": _get_random()}
        save_training(folder, self.model, TrainingState(shared, own), step=self.step)

    def load(self, folder: Path) -> None:
        """Continue a checkpoint exactly: weights, optimizer, schedule, random numbers and data
        position.

        Raises:
            ValueError: there is no such checkpoint, it is damaged, or of another configuration or
                number of processes.
        """
        stored = open_training(folder)
        if stored.config != self.model.config:
            raise ValueError(f"{folder} is of another configuration; build the model from its own")
        state = load_training_state(folder)
        load_into(self.model, load_model_state(folder, stored), source=stored.weights)
        self.restore(state, source=folder)

    def restore(self, state: TrainingState, *, source: Path) -> None:
        """Continue from a state whose weights are loaded."""
        try:
            optimizer = dict(state.shared["optimizer"])
            optimizer["state"] = {int(k): v for k, v in optimizer["state"].items()}
            self.optimizer.load_state_dict(optimizer)
            self.scheduler.load_state_dict(state.shared["scheduler"])
            self.step = int(state.shared["step"])
            self.batches.load_state_dict(state.own["batches"])
            self._random = dict(state.own["random"])
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{source} cannot be continued; its state is damaged") from error

    def _advance(self) -> None:
        """Take one step, then log, evaluate and save if due."""
        settings, lr = self.settings, float(self.scheduler.get_last_lr()[0])
        terms = self._train_step()
        self.step += 1
        is_last = self.step == settings.max_steps
        if self.step % settings.log_every == 0 or is_last:
            self._log({"lr": lr, **_means(terms)})
        if self.eval_dataloader is not None and self.step % settings.eval_every == 0:
            self._log({"eval_loss": self.evaluate()})
        if settings.save_dir and (self.step % settings.save_every == 0 or is_last):
            self.save(settings.save_dir / f"checkpoint-{self.step}")

    def _train_step(self) -> dict[str, Tensor]:
        """One optimizer step; means of this process's losses, and the gradient norm."""
        count = self.settings.gradient_accumulation_steps
        micro_batches = [self._inputs(next(self.batches)) for _ in range(count)]
        scored = torch.stack([_num_scored(inputs) for inputs in micro_batches]).sum()
        num_scored = _sum_over_ranks(scored.double()).clamp(min=1) / (count * num_ranks())
        sums: dict[str, Tensor] = {}
        for inputs in micro_batches:
            with self._autocast():
                total, terms = self.model.loss(**inputs, num_scored=num_scored)
            (total / count).backward()
            for name, value in {"loss": total.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value / count
        average_gradients(self.model)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        max_norm = self.settings.max_grad_norm or math.inf
        sums["grad_norm"] = nn.utils.clip_grad_norm_(parameters, max_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_layer_states()
        return sums

    def _update_layer_states(self) -> None:
        """Update the layer state (parallel.layer_state) from the sums of all processes."""
        ctx = self.model.body.ctx
        if num_ranks() > 1:
            ctx = replace(ctx, data=Axis(num_ranks(), rank(), dist.group.WORLD))
        update_layer_states(layer_state_owners(self.model), ctx=ctx)

    @property
    def _device(self) -> torch.device:
        return self.model.body.ctx.device

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.use_amp
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)

    def _inputs(self, batch: Any) -> dict[str, Tensor]:
        if not isinstance(batch, Mapping):
            batch = dict(zip(("input_ids", "labels"), batch, strict=True))
        optional = (name for name in self.model.optional_inputs if name in batch)
        return {name: batch[name].to(self._device) for name in ("input_ids", "labels", *optional)}

    def _log(self, values: dict[str, float]) -> None:
        record = {"step": self.step, **values}
        self.history.append(record)
        if rank() == 0:
            print(json.dumps({k: round(v, 6) for k, v in record.items()}), flush=True)
            if self.writer is not None:
                self.writer.write(record)
        if not math.isfinite(values.get("loss", 0.0)):
            raise ValueError(
                f"the loss of step {self.step} is {values['loss']}; lower lr, or warm up for longer"
            )


def average_gradients(model: nn.Module) -> None:
    """Average gradients over the processes, each in place: no second copy of them exists."""
    if num_ranks() == 1:
        return
    pending = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # an input that only batches of other processes have
                parameter.grad = torch.zeros_like(parameter)
            pending.append((dist.all_reduce(parameter.grad, async_op=True), parameter.grad))
    for work, gradient in pending:
        work.wait()
        gradient /= num_ranks()


def _num_scored(inputs: Mapping[str, Tensor]) -> Tensor:
    return (inputs["labels"] != IGNORED_LABEL).sum()


def _sum_over_ranks(x: Tensor) -> Tensor:
    if num_ranks() > 1:
        dist.all_reduce(x)
    return x


def _means(terms: dict[str, Tensor]) -> dict[str, float]:
    """Every term as a mean over processes; the gradient norm is the same on all."""
    stacked = torch.stack([value.detach().float() for value in terms.values()])
    return dict(zip(terms, (_sum_over_ranks(stacked) / num_ranks()).tolist(), strict=True))


def _broadcast_weights(model: nn.Module) -> None:
    if num_ranks() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def _get_random() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
