"""The run in one process, written as plainly as it can be: the truth of every comparison.

A loop over the whole model and torch's optimizer, in fp64, with all samples of a step in one batch.
With the program it shares the family: its layers, their initialisation and learnt states, its
losses. It shares nothing of the engine, the loader, gradient hooks, accumulation, clipping, the
schedule or parameter groups. What layers choose (tokens, experts) it takes from the program, and
says what this supposes (choices.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.config import StageConfig
from models.base import TokenInputs, logits_of
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.decisions import observed_decisions
from parallel.layer_state import ChangedByStages, UpdatedAfterStep
from pretrain.config import RunConfig, TrainingConfig
from pretrain.prove.choices import Choices, Given, Giver
from pretrain.prove.truth.reader import IGNORED, Sample, Step, held_out_rows, samples_of_steps
from pretrain.prove.truth.roundings import roundings_in_a_row

Tensors = dict[str, Tensor]


class State(NamedTuple):
    """The content of a checkpoint, in fp64, by parameter name. `buffers`: learnt layer states;
    `step`: optimizer steps taken."""

    weights: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors
    buffers: Tensors
    step: int


class TrueStep(NamedTuple):
    """One step: `norm` and `gradients` are those of the loss, before clipping by `scale`; `rates`
    and `decays` are learning rate and weight decay by parameter; `held_out`: the loss on held-out
    text after the step; `given`: the decisions of its layers that were taken as given."""

    loss: float
    norm: float
    scale: float
    rate: float
    rates: dict[str, float]
    decays: dict[str, float]
    gradients: Tensors
    state: State
    held_out: float | None
    given: Sequence[Given] = ()


class OneProcess:
    """The whole model of a run, and the steps that it would take from any state."""

    def __init__(self, config: RunConfig) -> None:
        training, reset = config.training, config.data.reset_at_documents
        self.config = config
        self.family = get_family(config.model.family)
        torch.manual_seed(training.seed)
        specs = self.family.layer_specs(config.model, segmented=reset)
        self.model = SequentialModel(specs, ParallelContext.single(), seed=training.seed).double()
        self.batches: list[tuple[TokenInputs, Tensor]] = []
        held_out = held_out_rows(config.data, max_windows=config.evaluation.max_windows)
        self.held_out = _batch(held_out, reset) if held_out else None

    def read(self, plan: Sequence[Step]) -> None:
        """Read the samples of every step of a run."""
        reset = self.config.data.reset_at_documents
        rows = samples_of_steps(self.config.data, plan, seed=self.config.training.seed)
        self.batches = [_batch(each, reset) for each in rows]

    def roundings(self) -> int:
        """Roundings in a row in the forward pass of a sequence in bf16."""
        data = self.config.data
        tokens = torch.arange(data.sequence_length).unsqueeze(0) % self.config.model.vocab_size
        segments = torch.zeros_like(tokens).int() if data.reset_at_documents else None
        return roundings_in_a_row(self.model, TokenInputs(tokens, segments))

    def initial(self) -> State:
        """The state before the first step. In bf16 master weights begin as rounded weights."""
        weights = {name: p.detach().clone() for name, p in trained(self.model)}
        if self.config.training.precision == "bf16":
            weights = {name: p.bfloat16().double() for name, p in weights.items()}
        zeros = {name: torch.zeros_like(p) for name, p in weights.items()}
        return State(weights, zeros, zeros, _buffers(self.model), 0)

    def untrained(self) -> Tensors:
        """The parameters that no step changes, as forward reads them."""
        is_rounded = self.config.training.precision == "bf16"
        frozen = {n: p.detach() for n, p in self.model.named_parameters() if not p.requires_grad}
        return {n: p.bfloat16().double() if is_rounded else p.clone() for n, p in frozen.items()}

    def step(
        self, number: int, before: State, *, grad_clip: float, choices: Sequence[Choices] = ()
    ) -> TrueStep:
        """Step `number` of the run, from the state before it, with the decisions of the program."""
        training = self.config.training
        self._load(before)
        self._change_settings(number)
        giver = Giver(choices)
        with observed_decisions(giver), _naming_layers(self.model, giver):
            loss = self._loss(*self.batches[number - 1])
        gradients = _gradients(self.model, loss)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        scale = clipping(norm, grad_clip)
        rate = learning_rate(number, training)
        rates = {name: rate * _multiplier(name, training) for name in gradients}
        decays = self._decays()
        optimizer, weights = self._optimizer(before, rates, decays)
        for name, gradient in gradients.items():
            weights[name].grad = gradient * scale
        optimizer.step()
        _update_layer_states(self.model)
        state = _state(optimizer, weights, _buffers(self.model), before.step + 1)
        self._load(state)
        held_out = self._held_out_loss(*self.held_out) if self.held_out else None
        return TrueStep(
            loss.item(), norm, scale, rate, rates, decays, gradients, state, held_out,
            giver.finish(),
        )  # fmt: skip

    @torch.no_grad()
    def logits(self, tokens: Tensor, state: State) -> Tensor:
        """Logits [b, s, V] of the model in evaluation, each row one document."""
        self._load(state)
        self.model.eval()
        segments = torch.zeros_like(tokens).int() if self.config.data.reset_at_documents else None
        return logits_of(self.model(TokenInputs(tokens, segments))).transpose(0, 1)

    @torch.no_grad()
    def _load(self, state: State) -> None:
        """Give the model its weights: the master weights, rounded in bf16."""
        is_rounded = self.config.training.precision == "bf16"
        for name, parameter in trained(self.model):
            weight = state.weights[name]
            parameter.copy_(weight.bfloat16() if is_rounded else weight)
        for name, buffer in state.buffers.items():
            self.model.get_buffer(name).copy_(buffer)

    def _change_settings(self, number: int) -> None:
        """Give the layers the settings of the step's stage of the curriculum."""
        stage, model = _stage_of(number, self.config), self.config.model
        if stage is None:
            return
        names = {name for each in self.config.data.stages for name in each.model}
        settings = {name: stage.model.get(name, getattr(model, name)) for name in names}
        for module in self.model.modules():
            if isinstance(module, ChangedByStages):
                module.change_settings(settings)

    def _loss(self, inputs: TokenInputs, labels: Tensor) -> Tensor:
        """The mean over all scored tokens of the step, and the other losses of the family."""
        output = self.model(inputs)
        single = ParallelContext.single()
        loss, _ = self.family.loss(output, labels, config=self.config.model, ctx=single)
        if self.config.training.z_loss:
            log_z = logits_of(output).logsumexp(dim=-1).T  # [b, s]
            squares = log_z[labels != IGNORED].square()
            loss = loss + self.config.training.z_loss * squares.mean()
        return loss

    @torch.no_grad()
    def _held_out_loss(self, inputs: TokenInputs, labels: Tensor) -> float:
        self.model.eval()
        losses = self.family.token_losses(self.model(inputs), labels, ctx=ParallelContext.single())
        self.model.train()
        return float(losses.sum() / (labels != IGNORED).sum())

    def _decays(self) -> dict[str, float]:
        """Weight decay by parameter: none of vectors."""
        full = self.config.training.weight_decay
        return {
            name: 0.0 if p.role == "vector" else full  # type: ignore[attr-defined]
            for name, p in trained(self.model)
        }

    def _optimizer(
        self, before: State, rates: dict[str, float], decays: dict[str, float]
    ) -> tuple[torch.optim.Optimizer, Tensors]:
        """AdamW in the state `before`, and the weights that it trains."""
        training = self.config.training
        weights = {name: weight.clone() for name, weight in before.weights.items()}
        groups = [
            {"params": [weight], "lr": rates[name], "weight_decay": decays[name]}
            for name, weight in weights.items()
        ]
        optimizer = torch.optim.AdamW(groups, betas=training.betas, eps=training.eps)
        for name, weight in weights.items():
            optimizer.state[weight] = {
                "step": torch.tensor(float(before.step)),
                "exp_avg": before.exp_avg[name].clone(),
                "exp_avg_sq": before.exp_avg_sq[name].clone(),
            }
        return optimizer, weights


@contextmanager
def _naming_layers(model: nn.Module, giver: Giver) -> Iterator[None]:
    """Tell `giver` which layer computes."""

    def announce(name: str) -> Callable[[nn.Module, object], None]:
        return lambda layer, inputs: setattr(giver, "layer", name)

    hooks = [
        layer.register_forward_pre_hook(announce(name)) for name, layer in model.named_children()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that an optimizer updates, by the name in the first layer that holds them."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def planned_steps(config: RunConfig, *, batches: Mapping[int, int]) -> list[Step]:
    """Batch, length and mix of every step: the stage it lies in, and the level of the ramp whose
    tokens have not all been seen. `batches`: first step -> sequences of a full batch from it on."""
    training, data = config.training, config.data
    default = {source.name: source.weight for source in data.train}
    plan: list[Step] = []
    tokens = 0
    for number in range(1, (training.max_steps or 0) + 1):
        full = batches[max(first for first in batches if first <= number)]
        stage = _stage_of(number, config)
        length = (stage and stage.sequence_length) or data.sequence_length
        levels = [r.sequences_per_step for r in training.batch_ramp if tokens < r.until_tokens]
        plan.append(Step((levels or [full])[0], length, (stage and stage.weights) or default))
        tokens += plan[-1].sequences * length
    return plan


def _stage_of(step: int, config: RunConfig) -> StageConfig | None:
    """The stage of the curriculum that a step lies in; None without stages."""
    stages = config.data.stages
    return next((s for s in stages if s.until_step is None or step <= s.until_step), None)


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Linear warmup to `lr`; then a cosine, or (wsd) a line over the last `decay_steps`, down to
    `min_lr_ratio`, reached at the last step."""
    last, low = training.max_steps or 0, training.min_lr_ratio
    if step < training.warmup_steps:
        return training.lr * step / training.warmup_steps
    if training.schedule == "cosine":
        share = (step - training.warmup_steps) / (last - training.warmup_steps)
        return training.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))
    if training.schedule == "wsd":
        return training.lr * (low + (1 - low) * min(1.0, (last - step) / training.decay_steps))
    return training.lr


def clipping(norm: float, limit: float) -> float:
    """The factor of gradients of this norm, as torch's `clip_grad_norm_` has it: with norms of 0.1
    its 1e-6 is as large as the bound of gradients."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def _gradients(model: nn.Module, loss: Tensor) -> Tensors:
    names, parameters = zip(*trained(model), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }


def _multiplier(name: str, training: TrainingConfig) -> float:
    """The factor of the longest key that is a part of the name."""
    keys = sorted((key for key in training.lr_multipliers if key in name), key=len)
    return training.lr_multipliers[keys[-1]] if keys else 1.0


def _update_layer_states(model: nn.Module) -> None:
    """Let layers learn what they learn beside their parameters (parallel/layer_state.py)."""
    for module in model.modules():
        if isinstance(module, UpdatedAfterStep):
            module.after_step(module.take_sums())


def _batch(rows: Sequence[Sample], reset: bool) -> tuple[TokenInputs, Tensor]:
    tokens, labels, segments = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
    return TokenInputs(tokens, segments.int() if reset else None), labels


def _buffers(model: nn.Module) -> Tensors:
    saved = model.state_dict()
    return {name: b.detach().clone() for name, b in model.named_buffers() if name in saved}


def _state(
    optimizer: torch.optim.Optimizer, weights: Tensors, buffers: Tensors, step: int
) -> State:
    first, second = (
        {name: optimizer.state[weight][key] for name, weight in weights.items()}
        for key in ("exp_avg", "exp_avg_sq")
    )
    return State(
        {name: weight.detach() for name, weight in weights.items()}, first, second, buffers, step
    )
