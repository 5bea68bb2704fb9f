"""Complete runs whose mix and sequence length change: at every layout, over a resume, by hand."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.loading.builders import build_train_loader
from models.base import TokenInputs
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.checkpoint import main as checkpoint_main
from pretrain.config import ConfigError, RunConfig, parse_config
from pretrain.config.layout import check_layout
from pretrain.config.run_length import plan_run
from pretrain.engine.lr_schedule import learning_rate
from tests.data_tools.corpora import write_counting_corpus
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.run_values import run_values
from tests.pretrain.tiny_run import metrics, stopped_after, tiny_run, write_data
from tests.refusals import assert_refused
from tests.tiers import tiered
from tests.tolerance import FP32_LOSS

_refused = partial(assert_refused, error=ConfigError)

VOCAB, STEPS = 3100, 7
FIRST_OF = {"a": 0, "b": 1000, "c": 2000}
STAGES = [
    {"until_step": 2, "weights": {"a": 1}, "sequence_length": 8},
    {"until_step": 5, "weights": {"a": 1, "b": 1}, "sequence_length": 16},
    {"weights": {"b": 1, "c": 3}},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_data(directory)
    for name, first in FIRST_OF.items():
        write_counting_corpus(directory / name, 1000, first=first, vocab_size=VOCAB)
    return directory


def _config(data: Path, run_dir: Path, sources: str = "abc", **changes: Any) -> RunConfig:
    values = {
        "run_dir": str(run_dir),
        "model__vocab_size": VOCAB,
        "data__train": [str(data / name) for name in sources],
        "training__max_steps": STEPS,
        "checkpoint__interval": 1,
        "checkpoint__keep": STEPS,
        "evaluation__max_windows": 8,
    }
    return tiny_run(data, **(values | changes))


def _train(config: RunConfig, world_size: int = 1, *, entry=run_training) -> list[Any]:
    return run_ranks(entry, world_size, config, "configs/ds/zero1.json", init=False)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> list[float]:
    """Losses of a plain torch loop over the same stages."""
    config = _config(data, tmp_path_factory.mktemp("unused"), data__stages=STAGES)
    training, family, ctx = config.training, get_family("llama"), ParallelContext.single()
    loader = build_train_loader(
        config.data,
        sequence_length=32,
        micro_batch_size=8,
        data_rank=0,
        data_size=1,
        seed=training.seed,
        vocab_size=VOCAB,
        curriculum=plan_run(config, data_size=1),
    )
    model = SequentialModel(family.layer_specs(config.model), ctx, seed=training.seed)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        betas=training.betas, eps=training.eps, weight_decay=training.weight_decay,
    )  # fmt: skip
    losses = []
    for step in range(1, STEPS + 1):
        batch = next(loader)
        output = model(TokenInputs(batch.tokens))
        loss, _ = family.loss(output, batch.labels, config=config.model, ctx=ctx)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training, total_steps=STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    loader.close()
    return losses


LAYOUTS = {
    "one process": (1, {}),
    "data 2": (2, {"training__batch_size": 2}),
    "pipeline 2": (2, {"parallel__pipeline": 2}),
    "pipeline 4, evaluated in every stage": (
        4, {"parallel__pipeline": 4, "evaluation__interval": 1},
    ),
    "pipeline 2 x tensor 2, sequence parallel": (
        4, {"parallel__pipeline": 2, "parallel__tensor": 2, "parallel__sequence_parallel": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "layout",
    tiered(
        LAYOUTS,
        [
            "one process",
            "pipeline 4, evaluated in every stage",
            "pipeline 2 x tensor 2, sequence parallel",
        ],
    ),
)
def test_stages_train_at_any_layout_like_a_plain_torch_loop(layout, data, reference, tmp_path):
    world_size, changes = LAYOUTS[layout]
    config = _config(data, tmp_path / "run", data__stages=STAGES, **changes)
    assert _train(config, world_size) == [0] * world_size
    trained, _ = metrics(config)
    assert [r["loss"] for r in trained] == pytest.approx(reference, rel=FP32_LOSS)
    assert [r["tokens"] for r in trained] == [64, 128, 256, 384, 512, 768, 1024]


@pytest.mark.parametrize(
    ("pipeline", "stops"), tiered([(1, (1, 2, 4, 6)), (2, (2, 4))], [(2, (2, 4))])
)
def test_a_run_continues_inside_any_stage_bit_for_bit(pipeline, stops, data, tmp_path):
    changes = {"data__stages": STAGES, "parallel__pipeline": pipeline}
    undisturbed = _config(data, tmp_path / "a", **changes)
    _train(undisturbed, pipeline)
    curve = [(r["loss"], r["grad_norm"], r["tokens"]) for r in metrics(undisturbed)[0]]
    for stop in stops:
        config = _config(data, tmp_path / f"b{stop}", **changes)
        assert set(_train(config, pipeline, entry=stopped_after(stop))) == {75}
        assert set(_train(config, pipeline)) == {0}
        again = [(r["loss"], r["grad_norm"], r["tokens"]) for r in metrics(config)[0]]
        assert again == curve


def _watched(config, ds_config_path) -> list[list[int]]:
    """`run`, returning the rows of tokens that the engine trained on."""
    from pretrain.engine.engine import PlainEngine

    rows: list[list[int]] = []
    original = PlainEngine.train_step

    def train_step(self, batches, **kwargs):
        step = [next(batches) for _ in range(self.num_micro_batches)]
        rows.extend(row.tolist() for batch in step for row in batch.tokens)
        return original(self, iter(step), **kwargs)

    PlainEngine.train_step = train_step
    assert run_training(config, ds_config_path) == 0
    return rows


def test_a_mix_changed_at_each_resume_repeats_no_token_and_the_ledger_says_so(
    data, tmp_path, capsys
):
    rows: list[list[int]] = []
    mixes = [({"a": 3.0, "b": 1.0}, 4), ({"c": 3.0, "a": 1.0}, 7), ({"b": 1.0, "c": 1.0}, 10)]
    for weights, max_steps in mixes:
        train = [{"path": str(data / n), "weight": w} for n, w in weights.items()]
        config = _config(data, tmp_path / "run", data__train=train, training__max_steps=max_steps)
        (trained_on,) = _train(config, entry=_watched)
        rows += trained_on
    assert len(rows) == 10 * 8
    tokens = [token for row in rows for token in row]
    assert len(set(tokens)) == len(tokens)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_10"
    sources = json.loads((checkpoint / "trainer.json").read_text())["data"]["sources"]
    given = {
        name: sum(first <= token < first + 1000 for token in tokens)
        for name, first in FIRST_OF.items()
    }
    assert {name: source["tokens"] for name, source in sources.items()} == given
    assert checkpoint_main(["list", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    for name, count in given.items():
        assert f"{name} {count:,}" in said


def test_a_setting_that_the_family_does_not_let_change_is_refused():
    stages = [{"until_step": 3, "model": {"rope_theta": 5e5}}, {}]
    with _refused(
        "data.stages.0.model.rope_theta", value="llama", constraint="setting", remedy="remove"
    ):
        parse_config(run_values(data__stages=stages))


def test_a_stage_that_tensor_ranks_cannot_split_is_refused():
    config = parse_config(
        run_values(
            data__stages=[{"until_step": 3, "sequence_length": 1}, {}],
            parallel__tensor=2,
            parallel__sequence_parallel=True,
        )
    )
    with _refused(
        "data.stages.0.sequence_length", value=1, constraint="parallel.tensor=2", remedy="2"
    ):
        check_layout(config, 2)
