"""The encoders against loops over patches and frames in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.daria_former.encoders import AudioEncoder, ImageEncoder, ModalityEncoder
from parallel.context import ParallelContext
from parallel.random import initialize
from tests.equivalence import perturb
from tests.models.daria_former.cases import MODALITIES, config_of

CONFIG = config_of(**MODALITIES)


def _encoder(kind: type) -> torch.nn.Module:
    encoder = kind(CONFIG, ctx=ParallelContext.single())
    initialize(encoder, seed=1, prefix="encoder", tensor_rank=0)
    perturb(encoder, seed=1, prefix="encoder", tensor_rank=0, std=0.3)
    return encoder.double()


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean() + CONFIG.norm_eps).sqrt()


@torch.no_grad()
def test_an_image_becomes_one_token_per_patch_row_after_row():
    encoder, images = _encoder(ImageEncoder), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = encoder(images)
    assert found.shape == (4, 2, CONFIG.hidden_dim)
    for b in range(2):
        for row in range(2):
            for column in range(2):
                patch = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
                token = encoder.projection @ patch + encoder.bias
                token = token + encoder.positions[2 * row + column]
                expected = _normed(token, encoder.norm.weight)
                torch.testing.assert_close(found[2 * row + column, b], expected)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(12, 8), (4, 4), (16, 16)])
def test_positions_of_another_image_size_are_interpolated(height, width):
    encoder = _encoder(ImageEncoder)
    tokens = encoder(torch.zeros(1, 3, height, width, dtype=torch.float64))[:, 0]
    rows, columns = height // 4, width // 4
    grid = encoder.positions.T.view(1, -1, 2, 2)
    resized = F.interpolate(grid, (rows, columns), mode="bilinear", align_corners=False)
    positions = resized[0].flatten(1).T
    assert len(tokens) == rows * columns
    for token, position in zip(tokens, positions, strict=True):
        expected = _normed(encoder.bias + position, encoder.norm.weight)
        torch.testing.assert_close(token, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_sound_becomes_one_token_per_two_frames(frames):
    encoder, mels = _encoder(AudioEncoder), torch.randn(2, 4, frames, dtype=torch.float64)

    def convolved(x, weight, bias, stride):
        padded = F.pad(x, (1, 1))
        starts = range(0, x.shape[1], stride)
        return torch.stack(
            [(weight * padded[:, t : t + 3]).sum(dim=(1, 2)) + bias for t in starts], dim=1
        )

    found = encoder(mels)
    assert found.shape == ((frames + 1) // 2, 2, CONFIG.hidden_dim)
    for b in range(2):
        x = F.gelu(convolved(mels[b], encoder.first, encoder.first_bias, 1))
        x = F.gelu(convolved(x, encoder.second, encoder.second_bias, 2))
        for t in range(len(found)):
            token = encoder.projection @ x[:, t] + encoder.positions[t]
            torch.testing.assert_close(found[t, b], _normed(token, encoder.norm.weight))


@torch.no_grad()
def test_images_come_before_sound_and_nothing_gives_nothing():
    encoder = _encoder(ModalityEncoder)
    images, audio = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6)
    expected = torch.cat((encoder.image(images), encoder.audio(audio)))
    assert torch.equal(encoder(images, audio, 2), expected)
    assert encoder(None, None, 2) is None
