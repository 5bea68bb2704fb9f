"""Helpers of all studies: a small training loop, the leak verdict, and means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.base import ModelFamily, TokenInputs
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.layer_state import change_settings, layer_state_owners, update_layer_states

IGNORED = -100
# Settings of a Daria-Former that is trained on cross entropy alone.
NO_AUX = dict.fromkeys(
    (
        "emotion_loss_weight",
        "repetition_loss_weight",
        "rhythm_loss_weight",
        "memory_loss_weight",
        "gate_balance_weight",
    ),
    0.0,
)
NO_NOISE = {"path_dropout": 0.0, "rhythm_noise_std": 0.0}
WARMUP_SHARE, LAST_SHARE = 0.1, 0.1


class Batch(NamedTuple):
    """`tokens` and `labels` int64 [b, s]; a label is what comes next, or IGNORED."""

    tokens: Tensor
    labels: Tensor


class Trained(NamedTuple):
    """The model after its last step, and the loss terms averaged over the last tenth of it."""

    model: SequentialModel
    terms: dict[str, float]


def train(
    family: ModelFamily,
    config: Any,
    batches: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    seed: int,
    frozen: Callable[[str], bool] | None = None,
    changes: Mapping[int, Mapping[str, Any]] | None = None,
) -> Trained:
    """AdamW (0.9, 0.95), linear warm-up over a tenth, cosine decay to a tenth, clipping at 1.

    Matrices decay by 0.1, gains and biases do not. Parameters whose name is `frozen` stay as they
    are. `changes`: settings that the model takes before a step, as in the stages of a run.
    """
    model = SequentialModel(family.layer_specs(config), ParallelContext.single(), seed=seed).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen is None or not frozen(name))
    optimizer = optimizer_of(model, lr=lr)
    sums: dict[str, float] = {}
    counted = max(1, steps // 10)
    for step in range(steps):
        if changes and step in changes:
            change_settings(model, changes[step])
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        terms = train_step(family, config, model, optimizer, next(batches))
        if step >= steps - counted:
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term) / counted
    return Trained(model.eval(), sums)


def optimizer_of(model: nn.Module, *, lr: float) -> torch.optim.Optimizer:
    """AdamW as `train` uses it, over what is not frozen."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.dim() > 1].append(parameter)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": 0.1 * decays} for decays, ps in groups.items()],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,
    )


def train_step(
    family: ModelFamily,
    config: Any,
    model: SequentialModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> dict[str, Tensor]:
    """One step on one batch; the terms of its loss."""
    output = model(TokenInputs(batch.tokens))
    result = family.loss(output, batch.labels, config=config, ctx=model.ctx)
    result.total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    update_layer_states(layer_state_owners(model), ctx=model.ctx)
    return result.terms


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate in step number `step` of `steps`."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return LAST_SHARE + (1.0 - LAST_SHARE) * 0.5 * (1.0 + math.cos(math.pi * progress))


@torch.no_grad()
def logits_of(model: SequentialModel, tokens: Tensor) -> Tensor:
    """fp32 [s, b, V]."""
    output = model(TokenInputs(tokens))
    return getattr(output, "logits", output).float()


def future_leak(
    model: SequentialModel, tokens: Tensor, *, vocab_size: int, places: int = 8
) -> float:
    """The largest change of a logit when every token after it is replaced; 0 without a leak.

    Tokens from each of `places` positions on are replaced by random ones.
    """
    generator = torch.Generator().manual_seed(0)
    before = logits_of(model, tokens)
    length, worst = tokens.shape[1], 0.0
    for i in range(1, places + 1):
        position = i * length // (places + 1)
        changed = tokens.clone()
        shift = torch.randint(1, vocab_size, changed[:, position:].shape, generator=generator)
        changed[:, position:] = (changed[:, position:] + shift) % vocab_size
        after = logits_of(model, changed)
        worst = max(worst, float((after[:position] - before[:position]).abs().max()))
    return worst


def over_seeds(values: Sequence[float], *, digits: int = 3) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def with_parameters(
    config_cls: type[Any], values: Mapping[str, Any], family: ModelFamily, target: int
) -> Any:
    """The configuration of `values` whose FFN makes it have about `target` parameters."""

    def sized(ffn: int) -> Any:
        return config_cls(**values, ffn_hidden_dim=ffn)

    least = family.num_parameters(sized(1))
    per_column = family.num_parameters(sized(2)) - least
    return sized(1 + round((target - least) / per_column))


def with_flops(
    config_cls: type[Any],
    values: Mapping[str, Any],
    family: ModelFamily,
    target: float,
    *,
    length: int,
) -> Any:
    """The configuration of `values` whose FFN makes a token of a row of `length` cost about
    `target` forward FLOPs."""

    def sized(ffn: int) -> Any:
        return config_cls(**values, intermediate_size=ffn)

    least = family.flops(sized(1), length)
    per_column = family.flops(sized(2), length) - least
    return sized(1 + round((target - least) / per_column))
