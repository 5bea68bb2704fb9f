from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.daria_former.standalone.training import (
    DariaFormerLoss,
    EmotionAlignmentLoss,
    MemoryConsistencyLoss,
    RepetitionPenaltyLoss,
    RhythmRegularizer,
)
from tests.models.daria_former.shrunk import shrunk
from tests.refusals import assert_refused

STREAM = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(0))


def test_the_losses_are_the_weighted_sum_of_their_terms():
    config = shrunk(emotion_loss_weight=0.3, repetition_loss_weight=0.2, memory_loss_weight=0.1)
    tensors = {
        "logits": torch.randn(2, 8, 257),
        "hidden_states": torch.randn(2, 8, 64),
        "emotions": torch.rand(2, 8, 16),
        "emotion_logits": torch.randn(2, 8),
        "emotion_labels": torch.tensor([1, 3]),
        "memory_readout": torch.randn(2, 3, 64),
        "memory_target": torch.randn(2, 3, 64),
    }
    labels = STREAM.clone()
    labels[0, :3] = -100
    terms = DariaFormerLoss(config)(labels=labels, **tensors)
    ce = F.cross_entropy(tensors["logits"].flatten(0, 1), labels.flatten(), ignore_index=-100)
    steps = (tensors["emotions"][:, 1:] - tensors["emotions"][:, :-1]).square().sum(-1).mean()
    emotion = F.cross_entropy(tensors["emotion_logits"], tensors["emotion_labels"]) + 0.1 * steps
    assert terms["ce_loss"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert terms["emotion_loss"].item() == pytest.approx(emotion.item(), rel=1e-5)
    total = (
        terms["ce_loss"] + 0.3 * terms["emotion_loss"] + 0.2 * terms["repetition_loss"]
        + config.rhythm_loss_weight * terms["rhythm_loss"] + 0.1 * terms["memory_loss"]
    )  # fmt: skip
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_smoothness_of_two_moments_and_of_a_sequence():
    previous, current = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    loss = EmotionAlignmentLoss()
    expected = (current - previous).square().sum(-1)
    of_rows = loss(prev_esv=previous[:, 0], curr_esv=current[:, 0])
    torch.testing.assert_close(of_rows, expected[:, 0].mean())
    torch.testing.assert_close(loss(prev_esv=previous, curr_esv=current), expected.mean())
    torch.testing.assert_close(
        loss(emotions=current), (current[:, 1:] - current[:, :-1]).square().sum(-1).mean()
    )
    assert loss() == 0


def test_repetition_is_the_similarity_of_neighbours_beyond_what_is_free():
    states = torch.randn(2, 5, 8)
    states[:, 1] = 2.0 * states[:, 0]
    cosines = F.cosine_similarity(states[:, 1:], states[:, :-1], dim=-1)
    expected = (cosines - 0.9).relu().mean()
    assert expected >= 0.1 / 4 - 1e-6
    torch.testing.assert_close(RepetitionPenaltyLoss()(states), expected)


def test_rhythm_is_rewarded_up_to_its_target():
    logits = torch.randn(2, 6, 30) * torch.linspace(0.1, 9.0, 6).view(1, 6, 1)
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    variances = entropies.var(dim=1, correction=0)
    found = RhythmRegularizer(target_var=2.0)(logits)
    torch.testing.assert_close(found, (2.0 - variances).relu().mean())
    assert RhythmRegularizer(target_var=1e-6)(logits) == 0


def test_memory_is_drawn_to_the_segment_and_not_the_segment_to_memory():
    readout = torch.randn(2, 3, 8, requires_grad=True)
    target = torch.randn(2, 3, 8, requires_grad=True)
    loss = MemoryConsistencyLoss()(readout, target)
    loss.backward()
    assert loss.item() == pytest.approx(
        1.0 - F.cosine_similarity(readout, target, dim=-1).mean().item(), rel=1e-5
    )
    assert readout.grad.abs().sum() > 0
    assert target.grad is None


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"prev_esv": torch.zeros(2, 4)}, "curr_esv"),
        ({"emotion_labels": torch.zeros(2, dtype=torch.int64)}, "emotion_logits"),
        ({"memory_readout": torch.zeros(2, 3, 8)}, "memory_target"),
    ],
)
def test_half_a_pair_is_refused(given, missing):
    with assert_refused(next(iter(given)), value=missing, constraint="without", remedy="both"):
        DariaFormerLoss(shrunk())(logits=torch.zeros(2, 8, 257), labels=STREAM, **given)
