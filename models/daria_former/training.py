"""Training in one process (or data parallel under torchrun), with the published interface.

For anything large use `pretrain/train.py`: it trains the same layers with the same losses at any
layout, and its checkpoints survive what a machine does to them. This is for fine-tuning by script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from models.daria_former.config import DariaFormerConfig
from models.daria_former.losses import emotion_smoothness, repetition
from models.daria_former.model import rhythm_regularizer
from models.daria_former.single import DariaFormerModel
from parallel.context import ParallelContext
from parallel.cross_entropy import IGNORED_LABEL, cross_entropy_and_entropy

_SINGLE = ParallelContext.single()


class DariaFormerLoss(nn.Module):
    """The losses of tensors that a call returned, batch first, weighted as the configuration says.

    The cross entropy of `labels[t]`, the token after t, plus those terms whose tensors are given.
    """

    def __init__(self, config: DariaFormerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        hidden_states: Tensor | None = None,
        emotion_logits: Tensor | None = None,
        emotion_labels: Tensor | None = None,
        emotions: Tensor | None = None,
        memory_readout: Tensor | None = None,
        memory_target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`logits` [b, s, V], `labels` [b, s] (-100 = not scored), `hidden_states` [b, s, h],
        `emotion_logits` [b, C] and `emotion_labels` [b], `emotions` [b, s, E] of every token,
        `memory_readout` and `memory_target` [b, c, h] of segments."""
        losses, entropies = cross_entropy_and_entropy(logits.transpose(0, 1), labels, ctx=_SINGLE)
        num_scored = (labels != IGNORED_LABEL).sum().clamp(min=1)
        zero = losses.new_zeros(())
        emotion = zero
        if emotions is not None:
            smoothness = emotion_smoothness(emotions.transpose(0, 1), None, ctx=_SINGLE)
            emotion = smoothness if emotion_labels is None else 0.1 * smoothness
        if emotion_logits is not None and emotion_labels is not None:
            emotion = emotion + F.cross_entropy(emotion_logits, emotion_labels)
        terms = {
            "ce_loss": losses.sum() / num_scored,
            "emotion_loss": emotion,
            "repetition_loss": zero,
            "rhythm_loss": rhythm_regularizer(entropies, self.config.rhythm_target_var),
            "memory_loss": zero,
        }
        if hidden_states is not None:
            terms["repetition_loss"] = repetition(hidden_states.transpose(0, 1), None, ctx=_SINGLE)
        if memory_readout is not None and memory_target is not None:
            cosines = F.cosine_similarity(memory_readout, memory_target.detach(), dim=-1)
            terms["memory_loss"] = (1.0 - cosines).mean()
        total = terms["ce_loss"]
        for name in ("emotion", "repetition", "rhythm", "memory"):
            total = total + getattr(self.config, f"{name}_loss_weight") * terms[f"{name}_loss"]
        return {"loss": total, **terms}


def build_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    lora_lr: float | None = None,
    emotion_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW in groups: adapters at `lora_lr` (10 times lr by default), the emotion sites at
    `emotion_lr` (lr by default), the rest; in each, matrices decay and vectors do not."""
    rates = {"lora": 10 * lr if lora_lr is None else lora_lr, "emotion": emotion_lr or lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = next((kind for kind in rates if f".{kind}." in name), None)
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((rates[kind] if kind else lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        betas=betas,
        eps=eps,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int, min_ratio: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warmup, then a cosine down to `min_ratio` of the learning rate."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Trainer:
    """A loop over batches of `input_ids` and `labels` int64 [b, s] (mappings or pairs).

    With torch.distributed initialised the ranks average their gradients. `use_amp` computes in
    bf16 and keeps weights in fp32. Writes `checkpoint-N/` (safetensors, no pickle is executed when
    it is read) and prints a line every `log_every` steps.
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
        if max_steps < 1 or gradient_accumulation_steps < 1:
            raise ValueError(
                f"max_steps={max_steps} and gradient_accumulation_steps="
                f"{gradient_accumulation_steps} must be 1 or more"
            )
        self.model, self.config = model, config
        self.train_dataloader, self.eval_dataloader = train_dataloader, eval_dataloader
        self.max_steps, self.accumulation = max_steps, gradient_accumulation_steps
        self.max_grad_norm, self.use_amp = max_grad_norm, use_amp
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.save_every, self.eval_every, self.log_every = save_every, eval_every, log_every
        self.optimizer = build_optimizer(model, lr, weight_decay)
        self.scheduler = build_scheduler(self.optimizer, warmup_steps, max_steps)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._wandb = _start_wandb(wandb_project, config) if use_wandb else None
        if resume_from is not None:
            self.load(Path(resume_from))

    def train(self) -> list[dict[str, float]]:
        """Train to `max_steps`; what was logged, a mapping for each time."""
        self.model.train()
        batches = _endless(self.train_dataloader, skip=self.step * self.accumulation)
        while self.step < self.max_steps:
            terms = self._train_step(batches)
            self.step += 1
            if self.step % self.log_every == 0 or self.step == self.max_steps:
                self._log({name: value.item() for name, value in terms.items()})
            if self.eval_dataloader is not None and self.step % self.eval_every == 0:
                self._log({"eval_loss": self.evaluate()})
            if self.save_dir and (self.step % self.save_every == 0 or self.step == self.max_steps):
                self.save(self.save_dir / f"checkpoint-{self.step}")
        return self.history

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross entropy, in nats per scored token, of `eval_dataloader`.

        Raises:
            ValueError: there is none.
        """
        if self.eval_dataloader is None:
            raise ValueError("eval_dataloader was not given; give one to Trainer")
        self.model.eval()
        nats, tokens = 0.0, 0
        for batch in self.eval_dataloader:
            input_ids, labels = self._tensors(batch)
            with self._autocast():
                terms = self.model.loss(input_ids, labels).terms
            scored = int((labels != IGNORED_LABEL).sum())
            nats, tokens = nats + terms["lm_loss"].item() * scored, tokens + scored
        self.model.train()
        return nats / max(1, tokens)

    def save(self, folder: Path) -> None:
        """Write a checkpoint; the folder appears when it is complete."""
        if _rank() == 0:
            partial = folder.with_name(f".{folder.name}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(partial / "model.safetensors"))
            state = {"optimizer": self.optimizer.state_dict(), "step": self.step}
            state["scheduler"] = self.scheduler.state_dict()
            torch.save(state, partial / "training_state.pt")
            (partial / "config.yaml").write_text(yaml.safe_dump(self.config.to_dict()))
            partial.rename(folder)

    def load(self, folder: Path) -> None:
        """Continue a checkpoint exactly: weights, optimizer, schedule and position in the data.

        Raises:
            ValueError: it is of another configuration.
        """
        saved = DariaFormerConfig.from_dict(yaml.safe_load((folder / "config.yaml").read_text()))
        if saved != self.config:
            raise ValueError(f"{folder} is of another configuration; build the model from its own")
        load_model(self.model, str(folder / "model.safetensors"))
        state = torch.load(folder / "training_state.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.scheduler.load_state_dict(state["scheduler"])

    def _train_step(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for _ in range(self.accumulation):
            input_ids, labels = self._tensors(next(batches))
            with self._autocast():
                total, terms = self.model.loss(input_ids, labels)
            (total / self.accumulation).backward()
            for name, value in {"loss": total.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value / self.accumulation
        self._average_gradients()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        sums["grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums

    def _average_gradients(self) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()

    def _autocast(self) -> torch.autocast:
        kind = self.model.head.norm.weight.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.use_amp)

    def _tensors(self, batch: Any) -> tuple[Tensor, Tensor]:
        given = (batch["input_ids"], batch["labels"]) if isinstance(batch, Mapping) else batch
        device = self.model.head.norm.weight.device
        input_ids, labels = (x.to(device) for x in given)
        return input_ids, labels

    def _log(self, values: dict[str, float]) -> None:
        lr = float(self.scheduler.get_last_lr()[0])
        record: dict[str, float] = {"step": self.step, "lr": lr, **values}
        self.history.append(record)
        if _rank() == 0:
            print(json.dumps({k: round(v, 6) for k, v in record.items()}), flush=True)
            if self._wandb is not None:
                self._wandb.log(values, step=self.step)


def _endless(batches: Iterable[Any], *, skip: int) -> Iterator[Any]:
    """The batches again and again, from number `skip` on.

    Raises:
        ValueError: there are none.
    """
    while True:
        empty = True
        for batch in batches:
            empty = False
            if skip > 0:
                skip -= 1
            else:
                yield batch
        if empty:
            raise ValueError("train_dataloader has no batches; check the data and the batch size")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _start_wandb(project: str, config: DariaFormerConfig) -> Any:
    import wandb

    return wandb.init(project=project, config=config.to_dict()) if _rank() == 0 else None
