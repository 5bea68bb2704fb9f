from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from models.common.config import LinearScaling, Llama3Scaling, YarnScaling
from models.common.rope import RotaryTable, positions_in_segments, rotate, stretch

CPU = torch.device("cpu")
LLAMA3 = Llama3Scaling(
    type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def _complex_rotation(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """The pair (x_i, x_(i+d/2)) as a complex number times e^(i angle), in fp64."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[..., None].double() * frequencies
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_rotate_is_a_complex_rotation_of_each_pair():
    table = RotaryTable(16, 64, theta=10_000.0)
    x = torch.randn(2, 3, 20, 16)
    rotated = rotate(x, table.at(CPU, start=7, length=20))
    expected = _complex_rotation(x, torch.arange(7, 27), 10_000.0)
    torch.testing.assert_close(rotated.double(), expected, rtol=1e-5, atol=1e-5)


def test_gathered_rotations_equal_consecutive_ones():
    table = RotaryTable(16, 64, theta=10_000.0)
    x = torch.randn(2, 3, 20, 16)
    positions = torch.arange(5, 25, dtype=torch.int32).expand(2, -1)
    expected = rotate(x, table.at(CPU, start=5, length=20))
    assert torch.equal(rotate(x, table.gather(positions)), expected)


def test_scores_depend_on_the_distance_alone():
    table = RotaryTable(32, 1024, theta=10_000.0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(query: int, key: int) -> torch.Tensor:
        turned = (
            rotate(x, table.at(CPU, start=p, length=1)).double() for x, p in ((q, query), (k, key))
        )
        return torch.linalg.vecdot(*turned)

    torch.testing.assert_close(score(20, 3), score(1017, 1000), rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_inverse_rotation():
    table = RotaryTable(8, 16, theta=100.0)
    rotation = table.at(CPU, start=0, length=16)
    x = torch.randn(1, 1, 16, 8, requires_grad=True)
    upstream = torch.randn_like(x)
    rotate(x, rotation).backward(upstream)
    torch.testing.assert_close(rotate(x.grad, rotation), upstream)


def test_yarn_keeps_what_turns_often_and_divides_what_turns_less_than_once():
    yarn = YarnScaling(type="yarn", factor=4.0, original_max_position_embeddings=4096)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, 128, 2) / 128)
    stretched = stretch(frequencies, yarn, theta=10_000.0)
    turns = 4096 * frequencies / (2 * torch.pi)
    # Ends are rounded to whole dimensions, one of which is a factor of 1.15 here.
    assert torch.equal(stretched[turns > 37], frequencies[turns > 37])
    torch.testing.assert_close(stretched[turns < 0.86], frequencies[turns < 0.86] / 4)
    between = (turns < 31) & (turns > 1)
    assert (stretched[between] < frequencies[between]).all()
    assert (stretched[between] > frequencies[between] / 4).all()
    # Rotated queries and keys grow with the length of the context.
    table = RotaryTable(128, 8, theta=10_000.0, scaling=yarn)
    x = torch.randn(1, 1, 8, 128)
    grown = rotate(x, table.at(CPU, start=0, length=8)).norm() / x.norm()
    assert grown == pytest.approx(0.1 * math.log(4) + 1)


def test_llama3_scaling_divides_long_wavelengths_and_keeps_short_ones():
    frequencies = 1.0 / 500_000.0 ** (torch.arange(0, 128, 2) / 128)
    stretched = stretch(frequencies, LLAMA3, theta=500_000.0)
    wavelengths = 2 * torch.pi / frequencies
    long, short = wavelengths > 8192, wavelengths < 2048
    assert torch.equal(stretched[long], frequencies[long] / 8)
    assert torch.equal(stretched[short], frequencies[short])
    between = ~long & ~short
    assert between.any()
    assert (stretched[between] < frequencies[between]).all()
    assert (stretched[between] > frequencies[between] / 8).all()


QWEN_YARN = YarnScaling(type="yarn", factor=4.0, original_max_position_embeddings=4096)
# Ends of the ramp that are no whole dimensions, and beyond the first one.
YARN_BETWEEN = YarnScaling(
    type="yarn", factor=40.0, original_max_position_embeddings=1000,
    beta_fast=200.0, attention_factor=1.3, truncate=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "scaling",
    [None, LLAMA3, LinearScaling(type="linear", factor=3.0), QWEN_YARN, YARN_BETWEEN],
    ids=str,
)
def test_the_table_equals_that_of_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": 5e5, "rope_type": "default"}
    if scaling is not None:
        rope |= scaling.model_dump(exclude={"type"}, exclude_none=True) | {
            "rope_type": scaling.type
        }
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters=rope,
    )
    positions = torch.arange(16384)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = RotaryTable(64, 16384, theta=5e5, scaling=scaling).on(CPU)
    assert torch.equal(ours.cos, cos[0])
    assert torch.equal(ours.sin[:, 32:], sin[0, :, 32:])
    assert torch.equal(-ours.sin[:, :32], sin[0, :, :32])


def test_one_table_serves_every_layer():
    table = RotaryTable(8, 16, theta=100.0)
    assert table.on(CPU).cos is table.on(torch.device("cpu")).cos


def test_stand_ins_of_a_tracer_are_not_kept():
    table = RotaryTable(8, 16, theta=1e4)
    with FakeTensorMode():
        assert isinstance(table.on(CPU).cos, FakeTensor)
    assert type(table.on(CPU).cos) is torch.Tensor
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(table.on(CPU).cos) is torch.Tensor


def test_positions_beyond_the_table_are_refused():
    table = RotaryTable(8, 16, theta=100.0)
    with pytest.raises(ValueError, match="position 16 is beyond max_position_embeddings=16"):
        table.at(CPU, start=10, length=7)


def test_positions_begin_anew_wherever_the_segment_id_changes():
    segments = torch.tensor([[4, 4, 4, 7, 7, 4], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    positions = positions_in_segments(segments)
    assert positions.dtype == torch.int32
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_the_gradient_passes_the_numerical_check_for_strided_heads():
    table = RotaryTable(8, 16, theta=100.0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    for rotation in (
        table.at(CPU, start=2, length=5),
        table.gather(torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])),
    ):
        assert torch.autograd.gradcheck(lambda x, r=rotation: rotate(x, r), (x,))


def test_packed_rows_may_be_longer_than_the_table_but_not_their_documents():
    table = RotaryTable(8, 16, theta=100.0)
    table.gather(torch.arange(10).repeat(2).view(1, 20))
    with pytest.raises(ValueError, match="position 19 is beyond max_position_embeddings=16"):
        table.gather(torch.arange(20).view(1, 20))
