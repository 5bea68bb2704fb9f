"""Values and gradients of the whole model against the independent form of its equations."""

from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs
from models.daria_former.carry import DariaInputs
from models.daria_former.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.equivalence import build
from tests.models.daria_former import oracle
from tests.models.daria_former.cases import MODALITIES, SUBSETS, config_of, model_of, tokens_of
from tests.tolerance import FP64

# Against the oracle: a model in fp64 has the rotary angles of one in fp32.
EQUATIONS = {"rtol": 2e-6, "atol": 2e-6}
FP32 = {"rtol": 1e-4, "atol": 1e-5}


def _double(config, *, segmented: bool = False) -> SequentialModel:
    specs = FAMILY.layer_specs(config, segmented=segmented)
    return build(specs, ParallelContext.single(), seed=11, noise=0.2).eval().double()


def _assert_gradients_equal(model, found, expected) -> None:
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.manual_seed(3))
    parameters = dict(model.named_parameters())
    ours, theirs = (
        torch.autograd.grad((y * upstream).sum(), list(parameters.values()), allow_unused=True)
        for y in (found, expected)
    )
    unused = set()
    for name, mine, other in zip(parameters, ours, theirs, strict=True):
        if other is None:
            unused.add(name)
            assert mine is None, name
            continue
        scale = other.abs().max().clamp(min=0.1)
        torch.testing.assert_close(
            mine / scale, other / scale, rtol=0.0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    # Noise is drawn in training alone.
    assert unused <= {"head.rhythm.noise_down", "head.rhythm.noise_up"}


@pytest.mark.parametrize("subset", SUBSETS)
def test_logits_and_every_gradient_are_those_of_the_equations_in_fp64(subset):
    config = config_of(**{"num_layers": 2, "esv_sites": 2} | SUBSETS[subset])
    model, tokens = _double(config), tokens_of(19)
    found = model(TokenInputs(tokens)).logits[:, 0]
    expected = oracle.logits(config, dict(model.named_parameters()), tokens[0])
    torch.testing.assert_close(found, expected, **EQUATIONS)
    _assert_gradients_equal(model, found, expected)


@torch.no_grad()
@pytest.mark.parametrize("subset", SUBSETS)
def test_logits_in_fp32_are_those_of_the_equations(subset):
    config = config_of(**SUBSETS[subset])
    model = model_of(config).float()
    parameters = dict(model.named_parameters())
    # Around the window (6), the stride (2), segments (4), and the capacity of both levels (10, 12).
    for length in (1, 4, 7, 23):
        tokens = tokens_of(length)
        found = model(TokenInputs(tokens)).logits[:, 0].double()
        expected = oracle.logits(config, parameters, tokens[0])
        torch.testing.assert_close(found, expected, **FP32)


@torch.no_grad()
def test_a_model_with_an_image_path_and_no_image_reads_the_others():
    config = config_of(image_enabled=True, image_size=8, image_patch_size=4)
    model, tokens = model_of(config), tokens_of(11)
    found = model(TokenInputs(tokens)).logits[:, 0]
    expected = oracle.logits(config, dict(model.named_parameters()), tokens[0])
    torch.testing.assert_close(found, expected, **EQUATIONS)


def test_gradients_of_packed_documents_are_the_sum_over_documents():
    config = config_of(num_layers=2)
    model, tokens, lengths = _double(config, segmented=True), tokens_of(26), [1, 14, 4, 7]
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).int().unsqueeze(0)
    found = model(TokenInputs(tokens, segments)).logits[:, 0]
    parameters = dict(model.named_parameters())
    documents = tokens[0].split(lengths)
    expected = torch.cat([oracle.logits(config, parameters, d) for d in documents])
    torch.testing.assert_close(found, expected, **EQUATIONS)
    _assert_gradients_equal(model, found, expected)


def test_gradients_of_what_is_given_beside_tokens_are_those_of_the_equations():
    config = config_of(num_layers=2, **MODALITIES)
    model, tokens = _double(config), tokens_of(9)
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    audio = torch.randn(1, 4, 7, dtype=torch.float64)
    persona = torch.randn(1, config.persona_dim, dtype=torch.float64, requires_grad=True)
    emotion = torch.rand(1, config.emotion_dim, requires_grad=True)
    given = DariaInputs(tokens, images=images, audio=audio, persona=persona, emotion=emotion)
    found = model(given).logits[:, 0]
    encoded = model.layers[0].encoder(images, audio, 1)
    expected = oracle.logits(
        config,
        dict(model.named_parameters()),
        tokens[0],
        modality=encoded[:, 0],
        persona=persona[0],
        initial=emotion[0],
    )
    torch.testing.assert_close(found, expected, **EQUATIONS)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    leaves = [persona, emotion, *model.layers[0].encoder.parameters()]
    ours, theirs = (torch.autograd.grad((y * upstream).sum(), leaves) for y in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_length_up_to_beyond_all_boundaries_is_that_of_the_equations(dtype):
    """Window 6, strides 2 and 4, segments of 4, capacities of 10 and 12 tokens, 3 slots read."""
    config = config_of(num_layers=2)
    model, tokens = _double(config).to(dtype), tokens_of(34)
    expected = oracle.logits(config, dict(model.named_parameters()), tokens[0])
    tolerance = EQUATIONS if dtype == torch.float64 else FP32
    for length in range(1, 35):
        found = model(TokenInputs(tokens[:, :length])).logits[:, 0]
        torch.testing.assert_close(found.double(), expected[:length], **tolerance)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window_size": 1},
        {"sliding_window_size": 64},
        {"memory_top_k": 12, "working_memory_slots": 5, "episodic_memory_slots": 3},
        {"memory_top_k": 1, "working_stride": 1, "episodic_stride": 4},
        {"segment_len": 6, "working_stride": 3, "episodic_stride": 6, "persistent_memory_slots": 1},
        {"num_kv_heads": 1, "head_dim": 6, "num_global_tokens": 1},
        {"num_kv_heads": 4, "num_heads": 4, "working_memory_slots": 1, "episodic_memory_slots": 1},
        {"emotion_categories": 1, "esv_sites": 3, "num_layers": 3},
    ],
    ids=str,
)
def test_sizes_at_their_ends_are_those_of_the_equations(changes):
    config = config_of(**{"num_layers": 2} | changes)
    model, tokens = _double(config), tokens_of(27)
    found = model(TokenInputs(tokens)).logits[:, 0]
    expected = oracle.logits(config, dict(model.named_parameters()), tokens[0])
    torch.testing.assert_close(found, expected, **EQUATIONS)


@torch.no_grad()
def test_rows_with_their_own_persona_image_and_state_do_not_mix():
    config = config_of(num_layers=2, image_enabled=True, image_size=8, image_patch_size=4)
    model, tokens = _double(config), tokens_of(14, batch=3)
    given = {
        "images": torch.randn(3, 3, 8, 8, dtype=torch.float64),
        "persona": torch.randn(3, config.persona_dim, dtype=torch.float64),
        "emotion": torch.rand(3, config.emotion_dim),
    }
    together = model(DariaInputs(tokens, **given)).logits
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in given.items()}
        separate = model(DariaInputs(tokens[row : row + 1], **alone)).logits[:, 0]
        torch.testing.assert_close(together[:, row], separate, **FP64)
