"""Training in one process (or data parallel under torchrun), with the published interface.

For anything large use `pretrain/train.py`: it trains the same layers with the same losses at any
layout, and its checkpoints survive what a machine does to them. This is for fine-tuning by script.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_model
from torch import Tensor, nn

from models.daria_former.config import DariaFormerConfig
from models.daria_former.standalone.checkpoint_io import load_trainer_weights, read_trainer_config
from models.daria_former.standalone.loss_modules import (
    DariaFormerLoss,
    EmotionAlignmentLoss,
    MemoryConsistencyLoss,
    RepetitionPenaltyLoss,
    RhythmRegularizer,
)
from models.daria_former.standalone.model import DariaFormerModel
from models.daria_former.standalone.optimizer import build_optimizer, build_scheduler
from models.daria_former.standalone.resumable_batches import BatchStream
from parallel.cross_entropy import IGNORED_LABEL

__all__ = [
    "Trainer",
    "DariaFormerLoss",
    "EmotionAlignmentLoss",
    "RepetitionPenaltyLoss",
    "RhythmRegularizer",
    "MemoryConsistencyLoss",
    "build_optimizer",
    "build_scheduler",
]

STATE_NAME = "training_state.pt"
# What a batch may hold beside `input_ids` and `labels`.
_MODALITIES = ("images", "audio", "persona")


class Trainer:
    """A loop over batches: `input_ids` and `labels` int64 [b, s] (a mapping, which may also hold
    `images`, `audio` and `persona`, or a pair).

    A step is the mean over the scored tokens of all its micro-batches and ranks, however many rows
    and scored tokens each of them has, also in the losses beside the cross entropy. With
    torch.distributed initialised, ranks begin with the weights of rank 0, each takes the batches of
    its own loader, and gradients are averaged. `use_amp` computes in bf16 and keeps weights in
    fp32. `max_grad_norm` 0: no clipping. Writes `save_dir/checkpoint-N/`, of which nothing is
    unpickled when it is read, and prints a line every `log_every` steps.

    Raises:
        ValueError: a setting out of its range or of another model, or a checkpoint that does not
            fit.
    """

    def __init__(
        self,
        model: DariaFormerModel,
        config: DariaFormerConfig,
        train_dataloader: Iterable[Any],
        eval_dataloader: Iterable[Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        max_steps: int = 100_000,
        warmup_steps: int = 0,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float = 1.0,
        use_amp: bool = False,
        save_dir: str | Path | None = None,
        save_every: int = 1000,
        eval_every: int = 1000,
        log_every: int = 10,
        use_wandb: bool = False,
        wandb_project: str = "daria-former",
        resume_from: str | Path | None = None,
    ) -> None:
        _check_settings(
            max_steps=max_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            save_every=save_every,
            eval_every=eval_every,
            log_every=log_every,
        )
        _check_ranges(warmup_steps=warmup_steps, max_grad_norm=max_grad_norm)
        if config != model.config:
            raise ValueError("config is not that of the model, which decides; give model.config")
        self.model, self.config = model, config
        self.eval_dataloader = eval_dataloader
        self.max_steps, self.accumulation = max_steps, gradient_accumulation_steps
        self.max_grad_norm, self.use_amp = max_grad_norm or math.inf, use_amp
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.save_every, self.eval_every, self.log_every = save_every, eval_every, log_every
        self.optimizer = build_optimizer(model, lr, weight_decay)
        self.scheduler = build_scheduler(self.optimizer, warmup_steps, max_steps)
        self.batches = BatchStream(train_dataloader)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._random: dict[str, Tensor] | None = None  # of a checkpoint, until training goes on
        self._wandb = _start_wandb(wandb_project, config, self.save_dir) if use_wandb else None
        if resume_from is not None:
            self.load(Path(resume_from))
        _share_weights(model)

    def train(self) -> list[dict[str, float]]:
        """Train to `max_steps`; what was logged, a mapping for each time.

        Raises:
            ValueError: there are no batches, or the loss is not finite.
        """
        self.model.train()
        if self._random is not None:
            _set_random(self._random)
            self._random = None
        try:
            while self.step < self.max_steps:
                self._advance()
        finally:
            if self._wandb is not None:
                self._wandb.finish()
        return self.history

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross entropy, in nats per scored token, of `eval_dataloader` on all ranks.

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
        """Write a checkpoint (collective); the folder appears, or is replaced, when complete."""
        ranks = _gather({"batches": self.batches.state_dict(), "random": _get_random()})
        if _rank() == 0:
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_model(self.model, str(partial / "model.safetensors"))
            state = {"optimizer": self.optimizer.state_dict(), "step": self.step, "ranks": ranks}
            state["scheduler"] = self.scheduler.state_dict()
            torch.save(state, partial / STATE_NAME)
            (partial / "config.yaml").write_text(yaml.safe_dump(self.config.to_dict()))
            if folder.exists():
                folder.rename(partial / "replaced")
            partial.rename(folder)
            shutil.rmtree(folder / "replaced", ignore_errors=True)
        if dist.is_initialized():
            dist.barrier()

    def load(self, folder: Path) -> None:
        """Continue a checkpoint exactly: weights, optimizer, schedule, random numbers and position
        in the data.

        Raises:
            ValueError: it is none, damaged, of another configuration, or of more or fewer ranks.
        """
        if read_trainer_config(folder) != self.config:
            raise ValueError(f"{folder} is of another configuration; build the model from its own")
        try:
            state = torch.load(folder / STATE_NAME, weights_only=True, map_location="cpu")
            ranks = state["ranks"]
        except Exception as error:  # torch raises errors of many types for damaged files
            raise ValueError(f"{folder / STATE_NAME} cannot be read; it is damaged") from error
        size = dist.get_world_size() if dist.is_initialized() else 1
        if len(ranks) != size:
            raise ValueError(
                f"{folder} was written by {len(ranks)} processes and there are {size}; start as "
                "many, so that each goes on with its own data"
            )
        load_trainer_weights(self.model, folder, add_adapters=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = int(state["step"])
        self.batches.load_state_dict(ranks[_rank()]["batches"])
        self._random = ranks[_rank()]["random"]

    def _advance(self) -> None:
        """One step, and after it what is due."""
        lr = float(self.scheduler.get_last_lr()[0])
        terms = self._train_step()
        self.step += 1
        is_last = self.step == self.max_steps
        if self.step % self.log_every == 0 or is_last:
            self._log({"lr": lr, **_means(terms)})
        if self.eval_dataloader is not None and self.step % self.eval_every == 0:
            self._log({"eval_loss": self.evaluate()})
        if self.save_dir and (self.step % self.save_every == 0 or is_last):
            self.save(self.save_dir / f"checkpoint-{self.step}")

    def _train_step(self) -> dict[str, Tensor]:
        """One optimizer step; means of this rank's losses, and the norm of the gradient."""
        micro_batches = [self._inputs(next(self.batches)) for _ in range(self.accumulation)]
        scored = torch.stack([_num_scored(inputs) for inputs in micro_batches]).sum()
        num_scored = _sum_over_ranks(scored.double()).clamp(min=1) / (self.accumulation * _size())
        sums: dict[str, Tensor] = {}
        for inputs in micro_batches:
            with self._autocast():
                total, terms = self.model.loss(**inputs, num_scored=num_scored)
            (total / self.accumulation).backward()
            for name, value in {"loss": total.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value / self.accumulation
        _average_gradients(self.model)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        sums["grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.tokens.weight.device

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.use_amp)

    def _inputs(self, batch: Any) -> dict[str, Tensor]:
        if not isinstance(batch, Mapping):
            batch = dict(zip(("input_ids", "labels"), batch, strict=True))
        names = ("input_ids", "labels", *(name for name in _MODALITIES if name in batch))
        return {name: batch[name].to(self._device) for name in names}

    def _log(self, values: dict[str, float]) -> None:
        self.history.append({"step": self.step, **values})
        if _rank() == 0:
            print(json.dumps({k: round(v, 6) for k, v in self.history[-1].items()}), flush=True)
            if self._wandb is not None:
                self._wandb.log(values, step=self.step)
        if not math.isfinite(values.get("loss", 0.0)):
            raise ValueError(
                f"the loss of step {self.step} is {values['loss']}; lower lr, or warm up for longer"
            )


def _check_settings(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")


def _check_ranges(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be 0 or more, and finite")


def _num_scored(inputs: Mapping[str, Tensor]) -> Tensor:
    return (inputs["labels"] != IGNORED_LABEL).sum()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_over_ranks(x: Tensor) -> Tensor:
    if _size() > 1:
        dist.all_reduce(x)
    return x


def _means(terms: dict[str, Tensor]) -> dict[str, float]:
    """Every term as a mean over ranks; the norm of the gradient is the same on all."""
    stacked = torch.stack([value.detach().float() for value in terms.values()])
    return dict(zip(terms, (_sum_over_ranks(stacked) / _size()).tolist(), strict=True))


def _share_weights(model: nn.Module) -> None:
    if _size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def _average_gradients(model: nn.Module) -> None:
    if _size() == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # a modality that only other ranks' batches have
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in trained if p.grad is not None]
    joined = _sum_over_ranks(torch.cat([g.flatten() for g in gradients])) / _size()
    for gradient, mean in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _gather(value: Any) -> list[Any]:
    values = [value] * _size()
    if _size() > 1:
        dist.all_gather_object(values, value)
    return values


def _get_random() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _start_wandb(project: str, config: DariaFormerConfig, folder: Path | None) -> Any:
    import wandb

    if _rank() != 0:
        return None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    # Configuration and numbers leave the machine, no console output, source code or command line.
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
    )
    return wandb.init(project=project, config=config.to_dict(), dir=folder, settings=settings)
