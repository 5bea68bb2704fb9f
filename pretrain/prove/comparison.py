"""Comparison of what a run has written with the truth: one row for each check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import TrainingConfig
from pretrain.prove.bounds import (
    COUNTED,
    EXACT,
    FLOOR,
    ROUNDED,
    SUMS,
    UNTRAINED,
    UPDATE,
    Bound,
    Bounds,
)
from pretrain.prove.outputs import Saved
from pretrain.prove.truth.oracle import State, Tensors, TrueStep

_CLEAR, _HELD = 1e-2, 1e-4  # of the moment; of the element, 1/40 of half a step of bf16


class Row(NamedTuple):
    """One check: its largest relative error and where it is."""

    check: str
    error: float
    where: str
    rank: str
    bound: Bound

    @property
    def passed(self) -> bool:
        return self.error <= self.bound.value  # NaN has not passed


class Error(NamedTuple):
    """A relative error, the parameter or step where it is, and the rank that updates it."""

    value: float
    where: str
    rank: str = ""


Measure = Callable[[str, Tensor, Tensor], Tensor]


def row(check: str, errors: Iterable[Error], bound: Bound) -> Row:
    """The worst of several errors."""
    worst = max(errors, key=lambda e: math.inf if math.isnan(e.value) else e.value)
    if worst.value == 0:
        worst = Error(0.0, "")
    return Row(check, worst.value, worst.where, worst.rank, bound)


def number_rows(
    step: int, metrics: Mapping[int, Mapping[str, float]], truth: TrueStep, bounds: Bounds
) -> list[Row]:
    """Loss, gradient norm, learning rate and held-out loss of a step, from metrics.jsonl."""
    record = metrics.get(step, {})

    def number_row(check: str, key: str, true: float, bound: Bound) -> Row:
        found = record.get(key, math.nan)
        return row(check, [Error(abs(found - true) / max(abs(true), 1e-300), "")], bound)

    rows = [
        number_row("loss", "loss", truth.loss, bounds.loss),
        number_row("gradient norm", "grad_norm", truth.norm, bounds.gradient),
        number_row("learning rate", "lr", truth.rate, bounds.rate),
    ]
    if truth.held_out is not None:
        rows.append(number_row("held-out loss", "eval_loss", truth.held_out, bounds.loss))
    return rows


def choice_rows(truth: TrueStep, bounds: Bounds) -> list[Row]:
    """The choices of layers against scores of the truth; no row where no layer chooses."""
    errors = [
        Error(each.error, f"{each.layer} ({each.number} choices differ)") for each in truth.given
    ]
    return [row("choices", errors, bounds.choice)] if errors else []


def initial_row(saved: Saved, initial: State) -> Row:
    """The weights that a run starts from."""
    errors = _tensor_errors(saved, saved.masters or saved.weights, initial.weights, _absolute)
    return row("initial weights", errors, EXACT)


def gradient_row(
    saved: Saved, truth: TrueStep, before: State, training: TrainingConfig, bounds: Bounds
) -> Row:
    """Every gradient after clipping, from Adam's first moment: `(m - b m_before) / (1 - b)`."""
    found = _gradients(saved, before, training)
    true = {name: gradient * truth.scale for name, gradient in truth.gradients.items()}
    measure = _measure(training, truth.norm * truth.scale)
    return row("gradients", _tensor_errors(saved, found, true, measure), bounds.gradient)


def _gradients(saved: Saved, before: State, training: TrainingConfig) -> Tensors:
    beta = training.betas[0]
    return {
        n: (m - beta * before.exp_avg.get(n, torch.zeros_like(m))) / (1 - beta)
        for n, m in saved.exp_avg.items()
    }


def sum_rows(
    saved: Saved, truth: TrueStep, before: State, training: TrainingConfig, micro_batches: int
) -> list[Row]:
    """In bf16, whether sums over micro-batches have more than the 8 bits of their terms: the share
    of a gradient's elements that bf16 holds, at the median parameter.

    No row where there is one term, or where clipping has scaled the sums.
    """
    if training.precision != "bf16" or micro_batches == 1 or truth.scale != 1.0:
        return []
    shares = []
    for name, gradient in _gradients(saved, before, training).items():
        # Elsewhere the difference of two moments in fp32 has too few bits left.
        clear = gradient[gradient.abs() > _CLEAR * saved.exp_avg[name].abs()]
        if len(clear):
            held = (clear.bfloat16().double() - clear).abs() <= _HELD * clear.abs()
            shares.append(Error(float(held.double().mean()), name))
    shares.sort()
    return [row("sums of gradients", [shares[len(shares) // 2]], SUMS)] if shares else []


def update_row(saved: Saved, truth: TrueStep, before: State, training: TrainingConfig) -> Row:
    """The optimizer's update alone, from the moments that were saved, in either precision:

    w = w_before (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    """
    (beta1, beta2), step = training.betas, truth.state.step

    def update(name: str) -> Tensor:
        first = saved.exp_avg[name] / (1 - beta1**step)
        second = (saved.exp_avg_sq[name] / (1 - beta2**step)).sqrt() + training.eps
        return truth.rates[name] * first / second

    def measure(name: str, found: Tensor, true: Tensor) -> Tensor:
        scale = update(name).abs().max() + FLOOR * true.abs().max()
        return (found - true).abs() / scale.clamp(min=1e-300)

    true = {
        name: weight * (1 - truth.rates[name] * truth.decays[name]) - update(name)
        for name, weight in before.weights.items()
        if name in saved.exp_avg and name in truth.rates
    }
    return row("update of the weights", _tensor_errors(saved, saved.masters, true, measure), UPDATE)


def untrained_row(saved: Saved, untrained: Tensors) -> Row:
    """Parameters that are not trained, against those of the initial model."""
    found = {name: saved.buffers[name] for name in untrained if name in saved.buffers}
    errors = _tensor_errors(saved, found, untrained, _absolute)
    return row("untrained parameters", errors, UNTRAINED)


def state_rows(
    saved: Saved, truth: TrueStep, training: TrainingConfig, bounds: Bounds
) -> list[Row]:
    """Weights, optimizer states, step counts and layer states of a checkpoint."""
    state, norm = truth.state, truth.norm * truth.scale
    first, second = _measure(training, norm), _measure(training, norm**2, floor=FLOOR**2)
    doubled = Bound(2 * bounds.gradient.value, "twice that of gradients: squares")
    through_adam = Bound(bounds.gradient.value, "that of gradients, through Adam's update")
    counts = [Error(abs(number - state.step), f"{number} steps") for number in saved.steps]
    measure = _weight_measure(truth, training, through_adam.value)

    def compared(check: str, found: Tensors, true: Tensors, by: Measure, bound: Bound) -> Row:
        return row(check, _tensor_errors(saved, found, true, by), bound)

    rows = [
        compared("exp_avg", saved.exp_avg, state.exp_avg, first, bounds.gradient),
        compared("exp_avg_sq", saved.exp_avg_sq, state.exp_avg_sq, second, doubled),
        row("step counts", counts, COUNTED),
        compared("weights", saved.masters, state.weights, measure, through_adam),
    ]
    rounded = {name: m.to(saved.dtype).double() for name, m in saved.masters.items()}
    read = {name: weight for name, weight in saved.weights.items() if name in rounded}
    rows.append(compared("weights of the forward pass", read, rounded, _absolute, ROUNDED))
    if state.buffers:
        learnt = {name: b for name, b in saved.buffers.items() if name in state.buffers}
        by = _state_measure(truth)
        rows.append(compared("layer states", learnt, state.buffers, by, bounds.choice))
    return rows


def _absolute(name: str, found: Tensor, true: Tensor) -> Tensor:
    return (found - true).abs()


def _measure(training: TrainingConfig, norm: float, floor: float = FLOOR) -> Measure:
    if training.precision == "fp32":
        return _of_largest(floor * norm)
    return _of_norm(floor * norm)


def _of_largest(floor: float) -> Measure:
    """Every element relative to the largest of its tensor, or to `floor`."""

    def measure(name: str, found: Tensor, true: Tensor) -> Tensor:
        scale = max(float(true.abs().max()), floor)
        difference = (found - true).abs()
        return difference / scale if scale else difference

    return measure


def _of_norm(floor: float) -> Measure:
    """The norm of the difference relative to that of the tensor, or to `floor`; at the element that
    is furthest off."""

    def measure(name: str, found: Tensor, true: Tensor) -> Tensor:
        difference = (found - true).abs()
        error = float(difference.norm()) / max(float(true.norm()), floor)
        largest = float(difference.max())
        return difference * (error / largest) if largest else difference

    return measure


def _state_measure(truth: TrueStep) -> Measure:
    """Every element relative to the largest of its layer state, or to the scores of its layer.

    A threshold is an average of scores, which may cancel; it is off by no more than they are.
    """
    scales: dict[str, float] = {}
    for each in truth.given:
        scales[each.layer] = max(each.scale, scales.get(each.layer, 0.0))

    def measure(name: str, found: Tensor, true: Tensor) -> Tensor:
        scale = max(scales.get(name.partition(".")[0], 0.0), float(true.abs().max()))
        difference = (found - true).abs()
        return difference / scale if scale else difference

    return measure


def _weight_measure(truth: TrueStep, training: TrainingConfig, bound: float) -> Measure:
    """Every element relative to the largest weight and to how far its update may be off.

    With `u = m / (sqrt(v) + eps)`, both moments unbiased, a gradient that is off by d moves m by
    c1 d and sqrt(v), which is a norm, by at most c2 d, so u by `(c1 + c2 |u|) d / (sqrt(v) + eps)`,
    and never by more than twice the largest u: where a gradient is near zero its rounding decides
    the sign of u.
    """
    state, norm = truth.state, truth.norm * truth.scale
    (beta1, beta2), step = training.betas, state.step
    c1 = (1 - beta1) / (1 - beta1**step)
    c2 = math.sqrt((1 - beta2) / (1 - beta2**step))
    most = largest_update(training.betas, step)

    def measure(name: str, found: Tensor, true: Tensor) -> Tensor:
        gradient = truth.gradients[name] * truth.scale
        size = gradient.abs().max() if training.precision == "fp32" else gradient.norm()
        root = (state.exp_avg_sq[name] / (1 - beta2**step)).sqrt() + training.eps
        update = state.exp_avg[name] / (1 - beta1**step) / root
        moved = (c1 + c2 * update.abs()) * size.clamp(min=FLOOR * norm) / root
        scale = true.abs().max() + truth.rates[name] * moved.clamp(max=2 * most / bound)
        return (found - true).abs() / scale

    return measure


def largest_update(betas: tuple[float, float], step: int) -> float:
    """The largest `m / sqrt(v)` of Adam at a step, both moments unbiased, for any gradients.

    With m = sum a_i g_i and v = sum b_i g_i^2 it is `sqrt(sum a_i^2 / b_i)` (Cauchy-Schwarz): about
    1, but `1 / sqrt(1 - beta2)` after many steps with beta1 = 0.
    """
    a, b = (
        [(1 - beta) * beta ** (step - i) / (1 - beta**step) for i in range(1, step + 1)]
        for beta in betas
    )
    return math.sqrt(sum(x * x / y if y else math.inf for x, y in zip(a, b, strict=True) if x))


def _tensor_errors(saved: Saved, found: Tensors, true: Tensors, measure: Measure) -> list[Error]:
    """The largest error of each tensor; a missing or surplus one is infinitely wrong."""
    errors = [Error(math.inf, f"{name} is missing") for name in true.keys() - found.keys()]
    errors += [Error(math.inf, f"{name} is surplus") for name in found.keys() - true.keys()]
    for name, expected in true.items():
        if name not in found:
            continue
        if found[name].shape != expected.shape:
            errors.append(Error(math.inf, f"{name} has shape {list(found[name].shape)}"))
            continue
        each = measure(name, found[name], expected).flatten().nan_to_num(nan=math.inf)
        index = int(each.argmax())
        errors.append(
            Error(float(each[index]), name, saved.owners.rank_of(name, index, expected.shape))
        )
    return errors
