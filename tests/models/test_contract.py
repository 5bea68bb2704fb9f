"""The contract of every family, at every layout. Families join in tests/models/families.py."""

from __future__ import annotations

import itertools
from contextlib import suppress
from functools import cache
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs, logits_of
from models.registry import family_names
from parallel.carry import SequentialModel, check_layers
from parallel.context import ParallelContext
from parallel.sharding import sharding_table
from tests.distributed import run_ranks
from tests.equivalence import Measured, build, measure
from tests.models.families import CASES, NOT_DECODED, evaluated
from tests.tiers import tiered
from tests.tolerance import FP64, assert_close, rounding

SEQ, BATCH, SEED = 32, 3, 7
NOISE = 0.2  # on gates and gains, away from where they start
# Between one process and two tensor ranks: at most 7 layers of two sums each, forward and backward,
# of at most 96 products (32 tokens of 3 rows, in the gradient of a weight).
BOUNDS = {
    torch.float64: FP64["rtol"],
    torch.float32: rounding(torch.float32, depth=28, length=96),
}

# With every remainder by the sizes of windows, strides, segments, blocks and patches.
PREFIXES = [1, 2, 4, 7, 11, 13, 15, 16, 20, 25, 29, 32]

pytestmark = pytest.mark.parametrize("name", CASES)


def _tokens(name: str, *, batch: int = BATCH, seq: int = SEQ) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    vocab = CASES[name].config.vocab_size
    # No token occurs twice in a row: equal tokens have equal scores in a router of the first layer,
    # and the last bit would choose.
    rows = [torch.randperm(vocab, generator=generator)[: seq + 1] for _ in range(batch)]
    stream = torch.stack(rows)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def _model(name: str, *, segmented: bool = False) -> SequentialModel:
    """The model in fp64, so that what differs by more than 1e-10 differs by more than rounding."""
    family, config = CASES[name]
    ctx = ParallelContext.single()
    specs = family.layer_specs(config, segmented=segmented)
    return build(specs, ctx, seed=SEED, noise=NOISE).double()


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


@cache
def _context(tensor: int, sequence_parallel: bool) -> ParallelContext:
    """Made once: each one from the world has communicators of its own."""
    if tensor == 1:
        return ParallelContext.single()
    return ParallelContext.from_world(tensor=tensor, sequence_parallel=sequence_parallel)


def _measure(name: str, *, tensor: int = 1, sequence_parallel: bool = False, **options) -> Measured:
    family, config = CASES[name]
    tokens, labels = _tokens(name)
    ctx = _context(tensor, sequence_parallel)
    return measure(
        family, config, TokenInputs(tokens), labels, ctx, seed=SEED, noise=NOISE, **options
    )


@cache
def _measure_alone(name: str, dtype: torch.dtype = torch.float32) -> Measured:
    """One process, whole: what all layouts are compared with."""
    return _measure(name, dtype=dtype)


_Key = tuple[str, bool]


@cache
def _measure_at_two_ranks(family: str, dtype: torch.dtype) -> list[dict[_Key, Measured]]:
    """By case and sequence parallelism, on either rank: all of a family in one process."""
    names = [name for name, case in CASES.items() if case.family.name == family]
    return run_ranks(_measure_all, 2, names, dtype)


def _measure_all(names: list[str], dtype: torch.dtype) -> dict[_Key, Measured]:
    return {
        (name, split): _measure(name, tensor=2, sequence_parallel=split, dtype=dtype)
        for name, split in itertools.product(names, (False, True))
    }


def _assert_equal(measured: Measured, expected: Measured, *, within: float = 0.0) -> None:
    """Equal bits, or every tensor `within` so much of its largest entry."""
    assert_close(measured.loss, expected.loss, within, "loss")
    assert measured.gradients.keys() == expected.gradients.keys()
    for parameter, gradient in expected.gradients.items():
        assert_close(measured.gradients[parameter], gradient, within, parameter)


def test_stages_joined_by_the_wire_equal_the_whole_model_bit_for_bit(name):
    expected = _measure_alone(name)
    last = len(_model(name).specs) - 1
    for cuts in [(2, last - 1), tuple(range(1, last + 1))]:
        _assert_equal(_measure(name, cuts=cuts), expected)


def test_recomputation_changes_nothing(name):
    _assert_equal(_measure(name, recompute=True), _measure_alone(name))


def test_logits_in_parts_give_the_loss_and_every_gradient_of_the_whole(name):
    found = _measure(name, logits_parts=4, dtype=torch.float64)
    _assert_equal(found, _measure_alone(name, torch.float64), within=BOUNDS[torch.float64])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_ranks_equal_one_in_loss_and_every_gradient(name, sequence_parallel):
    _assert_two_ranks_equal_one(name, torch.float64, sequence_parallel=sequence_parallel)


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_ranks_equal_one_in_single_precision(name, sequence_parallel):
    _assert_two_ranks_equal_one(name, torch.float32, sequence_parallel=sequence_parallel)


def _assert_two_ranks_equal_one(name: str, dtype: torch.dtype, *, sequence_parallel: bool) -> None:
    for measured in _measure_at_two_ranks(CASES[name].family.name, dtype):
        found = measured[name, sequence_parallel]
        _assert_equal(found, _measure_alone(name, dtype), within=BOUNDS[dtype])


def test_every_parameter_gets_a_gradient_and_declares_its_sharding(name):
    model = _model(name)
    gradients = _measure_alone(name).gradients
    assert set(sharding_table(model)) == set(gradients)
    silent = [parameter for parameter, g in gradients.items() if not g.abs().max() > 0]
    assert not silent


def test_every_layer_keeps_the_declared_carry_on_the_meta_device(name):
    family, config = CASES[name]
    tokens, _ = _tokens(name)
    schema = family.carry_schema(
        config, ParallelContext.single(device="meta"), micro_batch_size=BATCH, seq_length=SEQ
    )
    model = SequentialModel(family.layer_specs(config), ParallelContext.single(device="meta"))
    check_layers(model, TokenInputs(tokens), schema)


@torch.no_grad()
def test_changing_a_token_changes_no_earlier_logit(name):
    """Bit for bit, except that an expert multiplies as many rows as it was chosen for."""
    model = _causal_model(name)
    has_experts = getattr(CASES[name].config, "num_experts", 0)
    tokens, _ = _tokens(name)
    # For each position the batch once, changed from there on: all in one pass.
    together = tokens.repeat(SEQ - 1, 1)
    changed = together.unflatten(0, (SEQ - 1, BATCH)).clone()
    for position in range(1, SEQ):
        changed[position - 1, :, position:] += 1
    changed = changed.flatten(0, 1) % CASES[name].config.vocab_size
    before, after = (
        logits_of(model(TokenInputs(rows))).unflatten(1, (SEQ - 1, BATCH))
        for rows in (together, changed)
    )
    for position in range(1, SEQ):
        old, new = before[:, position - 1], after[:, position - 1]
        if has_experts:
            torch.testing.assert_close(new[:position], old[:position], **FP64)
        else:
            assert torch.equal(new[:position], old[:position]), position
        assert not torch.equal(old[position], new[position]), position


def _step_in_parts(
    name: str, parts: list[list[int]], *, segmented: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss and terms, and gradients, of four rows that score different numbers of tokens: fp64."""
    family, config = CASES[name]
    tokens, labels = _tokens(name, batch=4)
    starts = torch.tensor([[5, 20], [1, 2], [31, 31], [9, 10]])
    segments = (torch.arange(SEQ).view(1, -1, 1) >= starts.unsqueeze(1)).sum(dim=2).int()
    if segmented:
        labels[:, :-1].masked_fill_(segments[:, 1:] != segments[:, :-1], -100)
    labels[0, : SEQ // 2], labels[1, 7:] = -100, -100
    num_scored = (labels != -100).sum().double() / len(parts)
    model = _model(name, segmented=segmented).double()
    means: dict[str, torch.Tensor] = {}
    for part in parts:
        output = model(TokenInputs(tokens[part], segments[part] if segmented else None))
        total, terms = family.loss(
            output, labels[part], config=config, ctx=model.ctx, num_scored=num_scored
        )
        (total / len(parts)).backward()
        for term, value in {"loss": total.detach(), **terms}.items():
            means[term] = means.get(term, 0.0) + value / len(parts)
    return means, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("segmented", tiered([False, True], [True]))
def test_a_step_is_the_same_in_any_micro_batches(name, segmented):
    """Loss, every reported term and every gradient: no value of a micro-batch may be in them."""
    whole, gradients = _step_in_parts(name, [[0, 1, 2, 3]], segmented=segmented)
    for parts in ([[0], [1], [2], [3]], [[3, 1, 0], [2]]):
        terms, own = _step_in_parts(name, parts, segmented=segmented)
        assert terms.keys() == whole.keys() == {"loss", *CASES[name].family.loss_names}
        assert own.keys() == gradients.keys()
        for found, expected in ((terms, whole), (own, gradients)):
            for key, value in expected.items():
                torch.testing.assert_close(
                    found[key].double(), value.double(), rtol=1e-10, atol=1e-12,
                    msg=lambda m, k=key, p=parts: f"{k} in {p}: {m}",
                )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("lengths", tiered([PREFIXES, range(1, SEQ + 1)], [PREFIXES]), ids=len)
def test_a_prefix_alone_gives_the_logits_it_has_in_the_whole(name, lengths):
    model = _causal_model(name)
    tokens, _ = _tokens(name)
    whole = logits_of(model(TokenInputs(tokens)))
    for length in lengths:
        alone = logits_of(model(TokenInputs(tokens[:, :length].contiguous())))
        torch.testing.assert_close(alone[-1], whole[length - 1], **FP64)


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch(name):
    model = _causal_model(name)
    tokens, _ = _tokens(name)
    together = logits_of(model(TokenInputs(tokens)))
    for row in range(BATCH):
        alone = logits_of(model(TokenInputs(tokens[row : row + 1])))
        torch.testing.assert_close(alone[:, 0], together[:, row], **FP64)


@torch.no_grad()
@pytest.mark.parametrize(
    "lengths", [(10, 22), (1, 30, 1), pytest.param((7, 9, 16), marks=pytest.mark.slow)]
)
def test_packed_documents_equal_separate_ones(name, lengths):
    packed, alone = _causal_model(name, segmented=True), _causal_model(name)
    tokens, _ = _tokens(name)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = TokenInputs(tokens, segments.int().expand(BATCH, -1).contiguous())
    together = logits_of(packed(inputs)).split(list(lengths))
    for document, logits in zip(tokens.split(list(lengths), dim=1), together, strict=True):
        separate = logits_of(alone(TokenInputs(document.contiguous())))
        torch.testing.assert_close(logits, separate, **FP64)


@torch.no_grad()
@pytest.mark.parametrize(
    "chunks",
    [
        (1,) * SEQ,
        (5, 1, 1, 9, 16),
        pytest.param((SEQ,), marks=pytest.mark.slow),
        pytest.param((31, 1), marks=pytest.mark.slow),
    ],
)
def test_cached_decoding_equals_the_full_forward_pass_in_any_chunks(name, chunks):
    tokens, _ = _tokens(name)
    model = evaluated(_model(name), tokens)
    whole = logits_of(model(TokenInputs(tokens)))
    cache = model.new_cache(BATCH, SEQ)
    parts = [
        logits_of(model(TokenInputs(part.contiguous()), cache))
        for part in tokens.split(list(chunks), dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, **FP64)


def test_the_model_overfits_one_batch(name):
    family, config = CASES[name]
    model = _model(name).float()
    tokens, labels = _tokens(name, batch=2, seq=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        output = model(TokenInputs(tokens))
        total, terms = family.loss(output, labels, config=config, ctx=model.ctx)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        # What follows a token that occurs twice is uncertain where nothing mixes positions.
        if terms["lm_loss"] < 0.5:
            return
    pytest.fail(f"the loss is {terms['lm_loss']:.2f} after 150 steps")


class _CountedFlops(TorchDispatchMode):
    """FLOPs by the formulas of torch's FlopCounterMode, which also looks into every operation that
    has none, and takes twice the time."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.total += flops(*args, **(kwargs or {}), out_val=result)
        return result


def test_parameters_and_flops_equal_their_formulas(name):
    family, config = CASES[name]
    tokens, _ = _tokens(name, batch=1, seq=16)
    model = evaluated(_model(name), tokens)
    assert family.num_parameters(config) == sum(p.numel() for p in model.parameters())
    # Token by token, attention meets exactly the keys that causality allows, as formulas count it.
    # The counter knows the plain attention kernels, not those for the CPU.
    cache = model.new_cache(1, 16)
    plain = sdpa_kernel(SDPBackend.MATH)
    with _CountedFlops() as counter, torch.no_grad(), plain:
        for token in tokens.split(1, dim=1):
            model(TokenInputs(token), cache)
    counted = counter.total / 16 + NOT_DECODED.get(name, 0)
    assert counted == pytest.approx(family.flops(config, 16), rel=1e-6)


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
        specs = family.layer_specs(changed)
        other = SequentialModel(specs, ParallelContext.single(), seed=None).double()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(logits_of(other.eval()(TokenInputs(tokens))), expected), setting
    assert tried > 0 or not settings
