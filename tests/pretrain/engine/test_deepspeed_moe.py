"""Complete runs with experts: any expert size equals one process, saved and continued."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from models import registry
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from parallel.context import ParallelContext
from parallel.layers import VocabParallelHead
from parallel.moe import MoELayer
from pretrain.config import RunConfig
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.config.layout import check_layout
from pretrain.engine.deepspeed_moe import register_experts
from pretrain.errors import ConfigError
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import SEQ, metrics, tiny_run
from tests.refusals import assert_refused
from tests.tiers import tiered
from tests.tolerance import FP32_LOSS

_refused = partial(assert_refused, error=ConfigError)

STEPS, CLIP = 4, 0.3
EXPERT_2 = {"parallel__expert": 2, "training__batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def family():
    """The mixture family among the registered ones."""
    entry = registry._Entry("tests.models.mixture", "MixtureConfig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._FAMILIES, "mixture", entry)
        yield


def _config(data: Path, run_dir: Path, *, factor: float | None = None, **changes) -> RunConfig:
    model = {"family": "mixture", "max_position_embeddings": SEQ, "init_std": 0.2}
    values = {
        "run_dir": str(run_dir), "model": model | {"capacity_factor": factor},
        "training__max_steps": STEPS, "training__grad_clip": CLIP,
        "training__schedule": "constant",
    }  # fmt: skip
    return tiny_run(data, **values | changes)


def _train(
    config: RunConfig, world_size: int, *, stage: int = 1, zero: dict | None = None
) -> list[dict[str, float]]:
    """The records of a run, at a ZeRO stage or with settings of its own."""
    file = f"configs/ds/zero{stage}.json"
    if zero is not None:
        file = f"{config.run_dir}.json"
        Path(file).write_text(json.dumps({"zero_optimization": zero}))
    codes = run_ranks(run_training, world_size, config, file, init=False)
    assert codes == [0] * world_size
    trained, evaluated = metrics(config)
    return trained + evaluated


NAMES = ("loss", "balance_loss", "expert_z_loss", "eval_loss", "grad_norm")


def _assert_equal(records, expected, *, rel: float = FP32_LOSS, names=NAMES) -> None:
    for record, reference in zip(records, expected, strict=True):
        for name in names:
            if name in reference:
                bound = 10 * rel if name == "grad_norm" else rel
                assert record[name] == pytest.approx(reference[name], rel=bound), name


def _weights(config: RunConfig) -> dict[str, torch.Tensor]:
    with ShardedWeightsReader(Path(config.run_dir)) as reader:
        return dict(reader.items())


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """Records and final weights of one process, which an engine test holds to a plain loop."""
    found = {}
    for factor in (None, 0.75):
        config = _config(data, tmp_path_factory.mktemp("one"), factor=factor)
        found[factor] = _train(config, 1, stage=0), _weights(config)
        norms = [record["grad_norm"] for record in found[factor][0] if "grad_norm" in record]
        assert min(norms) > CLIP, "the clipping must bite"
    return found


LAYOUTS = {
    "expert 2, ZeRO-1": (2, 1, None, {}),
    "expert 2, ZeRO-2": (2, 2, 0.75, {}),
    "expert 1 of data 2, ZeRO-3": (2, 3, None, {"parallel__expert": 1}),
    "expert 1 of data 2, ZeRO-3, capacity": (2, 3, 0.75, {"parallel__expert": 1}),
    "expert 2 of data 4, recomputed": (
        4, 1, 0.75, {"training__batch_size": 1, "training__activation_recomputation": "full"},
    ),
    "expert 4, ZeRO-2": (4, 2, None, {"training__batch_size": 1, "parallel__expert": 4}),
    "tensor 2 x expert 2": (
        4, 1, 0.75, {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    ),
    "pipeline 2 x expert 2": (4, 1, None, {"parallel__pipeline": 2}),
}  # fmt: skip


ORDINARY = [
    "expert 2, ZeRO-2",
    "expert 1 of data 2, ZeRO-3, capacity",
    "expert 2 of data 4, recomputed",
    "expert 4, ZeRO-2",
    "tensor 2 x expert 2",
]


@pytest.mark.parametrize("layout", tiered(LAYOUTS, ORDINARY))
def test_a_run_at_any_expert_size_equals_one_process(layout, data, reference, tmp_path):
    world_size, stage, factor, changes = LAYOUTS[layout]
    config = _config(data, tmp_path / "run", factor=factor, **EXPERT_2 | changes)
    records, weights = reference[factor]
    _assert_equal(_train(config, world_size, stage=stage), records)
    for name, weight in _weights(config).items():
        torch.testing.assert_close(
            weight, weights[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


BF16 = {"training__precision": "bf16"}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(2, {}), (8, {"parallel__tensor": 2, "parallel__pipeline": 2})],
    ids=["expert 2", "tensor 2 x pipeline 2 x expert 2"],
)
def test_bf16_follows_fp32_in_loss_and_norm_as_far_as_bf16_allows(
    world_size, changes, data, reference, tmp_path
):
    changes = EXPERT_2 | BF16 | changes | {"training__max_steps": 2}
    records = _train(_config(data, tmp_path / "run", **changes), world_size)
    first = [record for record in reference[None][0] if record["step"] <= 2]
    # A tenth of the squared norm is that of experts: to leave out half of them would show.
    _assert_equal(records, first, rel=2e-3, names=("loss", "grad_norm"))


@pytest.mark.parametrize(
    ("world_size", "zero", "changes"),
    [
        pytest.param(2, {"stage": 1}, BF16, id="bf16", marks=pytest.mark.slow),
        pytest.param(4, {"stage": 1}, {"parallel__pipeline": 2}, id="pipeline 2"),
        # In DeepSpeed's own files.
        pytest.param(2, {"stage": 2, "round_robin_gradients": True}, {}, id="round robin"),
    ],
)
def test_a_continued_run_equals_an_undisturbed_one_bit_for_bit(
    world_size, zero, changes, data, tmp_path
):
    changes = EXPERT_2 | changes
    undisturbed = _config(data, tmp_path / "whole", **changes)
    records = _train(undisturbed, world_size, zero=zero)
    for max_steps in (2, STEPS):
        config = _config(data, tmp_path / "run", **changes | {"training__max_steps": max_steps})
        continued = _train(config, world_size, zero=zero)
    _assert_equal(continued, records, rel=0.0)
    expected = _weights(undisturbed)
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(config).items())


PLACES = {
    "one process": (1, 0, {}),
    "expert 2 of data 2": (2, 1, EXPERT_2),
    "tensor 2 x expert 2": (4, 2, EXPERT_2 | {"parallel__tensor": 2}),
}


@pytest.mark.parametrize(
    ("first", "second"),
    tiered(
        [
            ("expert 2 of data 2", "one process"),
            ("one process", "tensor 2 x expert 2"),
            ("tensor 2 x expert 2", "expert 2 of data 2"),
        ],
        [("tensor 2 x expert 2", "expert 2 of data 2")],
    ),
)
def test_a_run_continues_at_another_expert_size(first, second, data, tmp_path):
    # Against the first layout to its end: a choice of experts that rounding has turned would stay.
    runs = (("whole", first, STEPS), ("run", first, 2), ("run", second, STEPS))
    results = []
    for directory, place, max_steps in runs:
        world_size, stage, changes = PLACES[place]
        config = _config(data, tmp_path / directory, **changes | {"training__max_steps": max_steps})
        results.append(_train(config, world_size, stage=stage))
    _assert_equal(results[2], results[0])


def test_another_expert_size_begins_with_the_same_weights(data, tmp_path):
    config = _config(data, tmp_path / "run", **EXPERT_2, training__max_steps=2)
    _train(config, 2)
    begun = {"training__init_from": config.run_dir, "training__max_steps": 2}
    expected = _train(_config(data, tmp_path / "one", **begun), 1)
    _assert_equal(_train(_config(data, tmp_path / "two", **begun, **EXPERT_2), 2), expected)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"parallel__expert": 4}, ["parallel.expert=4", "the 6 data ranks", "set it to 1, 2"]),
        ({"parallel__expert": 3}, ["parallel.expert=3", "num_experts=4", "set it to 1, 2"]),
        ({"training__optimizer": "muon"}, ["training.optimizer=muon", "parallel.expert=2"]),
    ],
)
def test_a_layout_that_experts_do_not_fit_is_refused(changes, parts, data, tmp_path):
    with pytest.raises(ConfigError) as error:
        check_layout(_config(data, tmp_path, **EXPERT_2 | changes), 6)
    assert all(part in str(error.value) for part in parts), error.value


def test_expert_ranks_for_a_family_without_experts_are_refused(data):
    with _refused("parallel.expert", value=2, constraint="llama", remedy="parallel.expert=1"):
        check_layout(tiny_run(data, parallel__expert=2), 2)


@pytest.mark.parametrize(
    ("zero", "part"),
    [
        ({"stage": 0}, "stage=0 with parallel.expert=2"),
        ({"stage": 3}, "stage=3 with parallel.expert=2"),
        ({"stage": 1, "reduce_scatter": False}, "reduce_scatter=false .*parallel.expert=2"),
        ({"stage": 2, "contiguous_gradients": False}, "contiguous_gradients=false"),
    ],
)
def test_what_deepspeed_does_wrongly_with_experts_is_refused(zero, part, data, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ConfigError, match=part):
        resolve_ds_config(file, _config(data, tmp_path, **EXPERT_2), data_size=2)


def _a_stage_without_experts():
    ctx = ParallelContext.from_world(pipeline=2, expert=2)
    moe, head = MoELayer(8, 8, num_experts=2, top_k=2, ctx=ctx), VocabParallelHead(8, 8, ctx=ctx)
    with _refused(
        "parallel.expert", value=2, constraint="parallel.pipeline=2", remedy="parallel.expert=1"
    ):
        register_experts(moe if ctx.is_first_stage else head, ctx)


def test_a_stage_without_experts_is_refused_on_every_rank():
    run_ranks(_a_stage_without_experts, 4)
