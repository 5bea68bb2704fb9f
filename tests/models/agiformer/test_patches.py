"""Patches: which bytes a latent sees, and documents of a packed row."""

from __future__ import annotations

import pytest
import torch

from models.agiformer.patches import find_patches, num_packed_patches, packed_positions
from models.base import TokenInputs
from tests.models.agiformer.cases import config_of, model_of, text_of
from tests.tolerance import FP64


@pytest.mark.parametrize(("size", "kernel"), [(4, 6), (3, 3), (1, 2)])
def test_a_latent_sees_the_bytes_of_its_kernel_and_no_other(size, kernel):
    encoder = model_of(config_of(patch_size=size, patch_kernel=kernel)).encoder
    embedded = torch.randn(18, 1, 16, dtype=torch.float64, requires_grad=True)
    latents = encoder.norm(encoder.mix(encoder.windows(embedded)))
    for i, latent in enumerate(latents):
        (gradient,) = torch.autograd.grad(latent.sum(), embedded, retain_graph=True)
        seen = gradient.abs().sum(dim=(1, 2)).nonzero().squeeze(1).tolist()
        assert seen == list(range(max(0, i * size - kernel + 1), i * size + 1))


@pytest.mark.parametrize("byte_head", ["causal", "independent"])
def test_a_logit_sees_the_patches_before_and_with_the_causal_head_the_bytes_of_its_own(byte_head):
    """A published padding of the encoder showed one byte of every patch to the latent that predicts
    it; the independent head does not see the bytes before it in the patch."""
    model = model_of(config_of(byte_head=byte_head))
    text = text_of(20)
    before = model(TokenInputs(text)).logits
    for t in range(20):
        changed = text.clone()
        changed[0, t] = (changed[0, t] + 1) % 61
        moved = (model(TokenInputs(changed)).logits != before).any(dim=-1).squeeze(1)
        own = -(-t // 4) * 4 if byte_head == "independent" else t
        expected = torch.arange(20) >= own
        assert torch.equal(moved, expected), t


def _segments(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]


@pytest.mark.parametrize("lengths", [[21], [1] * 21, [4, 8, 9], [5, 1, 6, 9], [3, 17, 1]])
def test_every_document_begins_a_patch(lengths):
    positions = packed_positions(_segments(lengths), documents=99)
    assert positions[0].tolist() == [i for n in lengths for i in range(n)]
    ends, first = [], 0
    for length in lengths:
        ends += [(first + i, i // 4) for i in range(0, length, 4)]
        first += length
    found = find_patches(positions, count=24, patch_size=4)
    pairs = list(zip(found.ends[0].tolist(), found.positions[0].tolist(), strict=True))
    assert pairs == ends + [(0, 0)] * (24 - len(ends))


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_row_of_the_most_documents_has_room_for_their_patches(ranks):
    config = config_of(documents_per_row=5)
    for lengths in ([1, 1, 1, 1, 28], [5, 5, 5, 5, 12], [9, 9, 9, 1, 4], [1] * 32):
        positions = packed_positions(_segments(lengths), documents=5)
        count = num_packed_patches(config, 32, multiple_of=ranks)
        assert count % ranks == 0
        assert (positions % 4 == 0).sum() <= count


@torch.no_grad()
def test_documents_beyond_the_most_continue_the_last_one_that_fits():
    config, text = config_of(documents_per_row=2), text_of(24)
    model = model_of(config, segmented=True)
    found = model(TokenInputs(text, _segments([5, 7, 6, 6])))
    expected = model(TokenInputs(text, _segments([5, 19])))
    torch.testing.assert_close(found.logits, expected.logits, **FP64)
    assert (found.aux[0, -1], expected.aux[0, -1]) == (2, 0)


@torch.no_grad()
def test_a_packed_row_of_one_document_is_the_row_alone():
    config, text = config_of(), text_of(30)
    alone, packed = model_of(config), model_of(config, segmented=True)
    found = packed(TokenInputs(text, _segments([30])))
    torch.testing.assert_close(found.logits, alone(TokenInputs(text)).logits, **FP64)
    with pytest.raises(ValueError, match="segmented=False was given segment_ids=a tensor"):
        alone(TokenInputs(text, _segments([30])))
