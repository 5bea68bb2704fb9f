"""What every family must keep, at every layout. Families join in tests/models/families.py."""

from __future__ import annotations

from contextlib import suppress
from typing import get_args

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs, logits_of
from models.registry import family_names
from parallel.carry import SequentialModel, check_layers
from parallel.context import ParallelContext
from parallel.sharding import sharding_table
from pretrain.equivalence import Measured, build, measure
from tests.distributed import run_ranks
from tests.models.families import CASES, evaluated

SEQ, BATCH, SEED = 32, 3, 7
NOISE = 0.2  # on gates and gains, away from where they start

pytestmark = pytest.mark.parametrize("name", CASES)


def _tokens(name: str, *, batch: int = BATCH, seq: int = SEQ) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    vocab = CASES[name].config.vocab_size
    stream = torch.randint(0, vocab, (batch, seq + 1), generator=generator)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def _model(name: str, *, segmented: bool = False, device: str = "cpu") -> SequentialModel:
    family, config = CASES[name]
    ctx = ParallelContext.single(device=device)
    return build(family.layer_specs(config, segmented=segmented), ctx, seed=SEED, noise=NOISE)


def _causal_model(name: str, *, segmented: bool = False) -> SequentialModel:
    """The model in a mode in which it is causal: for most families that of training, too."""
    if CASES[name].family.causal_in_training:
        return _model(name, segmented=segmented)
    alone = evaluated(_model(name), _tokens(name)[0])
    if not segmented:
        return alone
    model = _model(name, segmented=True)
    model.load_state_dict(alone.state_dict())
    return model.eval()


def _measure(name: str, *, tensor: int = 1, sequence_parallel: bool = False, **options) -> Measured:
    family, config = CASES[name]
    ctx = ParallelContext.single()
    if tensor > 1:
        ctx = ParallelContext.from_world(tensor=tensor, sequence_parallel=sequence_parallel)
    tokens, labels = _tokens(name)
    return measure(
        family, config, TokenInputs(tokens), labels, ctx, seed=SEED, noise=NOISE, **options
    )


def _assert_equal(measured: Measured, expected: Measured, *, exactly: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(measured.loss, expected.loss, **tolerance)
    assert measured.gradients.keys() == expected.gradients.keys()
    for parameter, gradient in expected.gradients.items():
        torch.testing.assert_close(
            measured.gradients[parameter],
            gradient,
            **tolerance,
            msg=lambda m, p=parameter: f"{p}: {m}",
        )


def test_stages_joined_by_the_wire_equal_the_whole_model_bit_for_bit(name):
    expected = _measure(name)
    last = len(_model(name).specs) - 1
    for cuts in [(1,), (last,), (2, last - 1), (1, 2, 3), tuple(range(1, last + 1))]:
        _assert_equal(_measure(name, cuts=cuts), expected, exactly=True)


def test_recomputation_changes_nothing(name):
    _assert_equal(_measure(name, recompute=True), _measure(name), exactly=True)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_ranks_equal_one_in_loss_and_every_gradient(name, sequence_parallel):
    expected = _measure(name)
    options = {"tensor": 2, "sequence_parallel": sequence_parallel}
    for measured in run_ranks(_measure, 2, name, **options):
        _assert_equal(measured, expected)


def test_every_parameter_gets_a_gradient_and_declares_its_sharding(name):
    model = _model(name)
    gradients = _measure(name).gradients
    assert set(sharding_table(model)) == set(gradients)
    silent = [parameter for parameter, g in gradients.items() if not g.abs().max() > 0]
    assert not silent


def test_every_layer_keeps_the_declared_carry_on_the_meta_device(name):
    family, config = CASES[name]
    tokens, _ = _tokens(name)
    schema = family.carry_schema(
        config, ParallelContext.single(device="meta"), micro_batch_size=BATCH, seq_length=SEQ
    )
    check_layers(family.layer_specs(config), TokenInputs(tokens), schema)


@torch.no_grad()
def test_changing_a_token_changes_no_earlier_logit_bit_for_bit(name):
    model = _causal_model(name)
    tokens, _ = _tokens(name)
    before = logits_of(model(TokenInputs(tokens)))
    for position in range(1, SEQ):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % CASES[name].config.vocab_size
        after = logits_of(model(TokenInputs(changed)))
        assert torch.equal(before[:position], after[:position]), position
        assert not torch.equal(before[position], after[position]), position


@torch.no_grad()
def test_halves_of_a_batch_with_a_common_count_add_up_to_the_whole(name):
    family, config = CASES[name]
    tokens, labels = _tokens(name, batch=2)
    labels[0, : SEQ // 2] = -100
    num_scored = (labels != -100).sum()
    model = _model(name)
    whole = family.loss(model(TokenInputs(tokens)), labels, config=config, ctx=model.ctx).terms
    halves = [
        family.loss(
            model(TokenInputs(tokens[i : i + 1])),
            labels[i : i + 1],
            config=config,
            ctx=model.ctx,
            num_scored=num_scored / 2,
        ).terms
        for i in range(2)
    ]
    mean = sum(half["lm_loss"] for half in halves) / 2
    torch.testing.assert_close(mean, whole["lm_loss"])


@torch.no_grad()
def test_a_prefix_alone_gives_the_logits_it_has_in_the_whole(name):
    model = _causal_model(name)
    tokens, _ = _tokens(name)
    whole = logits_of(model(TokenInputs(tokens)))
    for length in range(1, SEQ + 1):
        alone = logits_of(model(TokenInputs(tokens[:, :length].contiguous())))
        torch.testing.assert_close(alone[-1], whole[length - 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch(name):
    model = _causal_model(name)
    tokens, _ = _tokens(name)
    together = logits_of(model(TokenInputs(tokens)))
    for row in range(BATCH):
        alone = logits_of(model(TokenInputs(tokens[row : row + 1])))
        torch.testing.assert_close(alone[:, 0], together[:, row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(10, 22), (1, 30, 1), (7, 9, 16)])
def test_packed_documents_equal_separate_ones(name, lengths):
    packed, alone = _causal_model(name, segmented=True), _causal_model(name)
    tokens, _ = _tokens(name)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = TokenInputs(tokens, segments.int().expand(BATCH, -1).contiguous())
    together = logits_of(packed(inputs)).split(list(lengths))
    for document, logits in zip(tokens.split(list(lengths), dim=1), together, strict=True):
        separate = logits_of(alone(TokenInputs(document.contiguous())))
        torch.testing.assert_close(logits, separate, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(SEQ,), (1,) * SEQ, (5, 1, 1, 9, 16), (31, 1)])
def test_cached_decoding_equals_the_full_forward_pass_in_any_chunks(name, chunks):
    tokens, _ = _tokens(name)
    model = evaluated(_model(name), tokens)
    whole = logits_of(model(TokenInputs(tokens)))
    cache = model.new_cache(BATCH, SEQ)
    parts = [
        logits_of(model(TokenInputs(part.contiguous()), cache))
        for part in tokens.split(list(chunks), dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_the_model_overfits_one_batch(name):
    family, config = CASES[name]
    model = _model(name)
    tokens, labels = _tokens(name, batch=2, seq=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        output = model(TokenInputs(tokens))
        total, terms = family.loss(output, labels, config=config, ctx=model.ctx)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    # What follows a token that occurs twice is uncertain where nothing mixes positions.
    assert terms["lm_loss"] < 0.5


def test_parameters_and_flops_equal_their_formulas(name):
    family, config = CASES[name]
    tokens, _ = _tokens(name, batch=1)
    model = evaluated(_model(name), tokens)
    assert family.num_parameters(config) == sum(p.numel() for p in model.parameters())
    # Token by token, attention meets exactly the keys that causality allows, as formulas count it.
    # The counter knows the plain attention kernels, not those for the CPU.
    cache = model.new_cache(1, SEQ)
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        for token in tokens.split(1, dim=1):
            model(TokenInputs(token), cache)
    assert counter.get_total_flops() / SEQ == pytest.approx(family.flops(config, SEQ), rel=1e-6)


def test_every_registered_family_is_under_the_contract(name):
    assert set(family_names()) <= {case.family.name for case in CASES.values()}


def _others(value: object, annotation: object) -> list[object]:
    """Values that a setting might have in place of its own."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, value + 1]
    if isinstance(value, float):
        return [value / 2, 0.25]
    return [choice for choice in get_args(annotation) if choice != value]


def _changed(config: BaseModel, setting: str) -> BaseModel | None:
    """The configuration with another value of a setting; None where no other is valid."""
    values = config.model_dump(mode="json")
    for other in _others(values[setting], type(config).model_fields[setting].annotation):
        if other != values[setting]:
            with suppress(ValidationError):
                return type(config).model_validate({**values, setting: other})
    return None


def test_a_setting_that_is_not_of_the_function_changes_no_logit(name):
    family, config = CASES[name]
    tokens, _ = _tokens(name)
    model = evaluated(_model(name), tokens)
    with torch.no_grad():
        expected = logits_of(model(TokenInputs(tokens)))
    settings = sorted(type(config).model_fields.keys() - config.function().keys())
    tried = 0
    for setting in settings:
        changed = _changed(config, setting)
        if changed is None:
            continue
        tried += 1
        assert changed.function() == config.function(), setting
        other = build(family.layer_specs(changed), ParallelContext.single(), seed=8, noise=0.0)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(logits_of(other.eval()(TokenInputs(tokens))), expected), setting
    assert tried > 0 or not settings
