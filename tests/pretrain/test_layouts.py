"""A run saved at one layout goes on at another: its state bit for bit, then the same losses."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
import pretrain.engine
from parallel.context import Axis
from parallel.weights_io import ShardedWeightsReader, ShardPosition, write_shard
from pretrain.checkpoint import stored_optimizer
from pretrain.checkpoint.live_optimizer import MASTER, MOMENTS
from pretrain.checkpoint.stored_optimizer import StoredOptimizer
from pretrain.errors import EXIT_COMPLETED
from pretrain.loop import TrainLoop
from pretrain.loop import run as run_training
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.tiny_run import metrics, tiny_run, write_data

SAVED, STEPS = 4, 7


class Place(NamedTuple):
    """A layout: sizes of the axes and the ZeRO stage. The global batch is 8 everywhere."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    stage: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def changes(self) -> dict[str, Any]:
        return {
            "parallel__tensor": self.tensor,
            "parallel__pipeline": self.pipeline,
            "parallel__sequence_parallel": self.sequence_parallel,
            "training__batch_size": 4 // self.data,
        }


PLACES = {
    "ZeRO-0": Place(stage=0),
    "ZeRO-1": Place(),
    "ZeRO-1 DP2": Place(data=2),
    "ZeRO-2 DP2": Place(data=2, stage=2),
    "ZeRO-3 DP2": Place(data=2, stage=3),
    "TP2": Place(tensor=2),
    "TP2 SP": Place(tensor=2, sequence_parallel=True),
    "TP4": Place(tensor=4),
    "TP2 DP2 ZeRO-3": Place(tensor=2, data=2, stage=3),
    "PP2": Place(pipeline=2),
    "PP4": Place(pipeline=4),
    "PP2 TP2": Place(pipeline=2, tensor=2),
    "PP2 DP2": Place(pipeline=2, data=2),
}
# Tied embeddings; a vocabulary of 61 leaves padding rows at 2 and at 4 tensor ranks.
LLAMA = CASES["llama_qwen2_shape"].config.model_copy(update={"num_kv_heads": 4, "init_std": 0.1})
MODELS = {
    "llama": LLAMA,
    "daria_former": CASES["daria_former"].config,
    "mod": CASES["mod"].config,  # layers with a threshold that is updated after every step
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_data(directory)
    return directory


class Origin(NamedTuple):
    """The whole run at one layout, which has left a checkpoint after `SAVED` steps."""

    run_dir: Path
    curve: list[dict[str, float]]
    evaluation: float


class Runs:
    """Trains at each layout once."""

    def __init__(self, data: Path, directory: Path) -> None:
        self.data = data
        self.directory = directory
        self._origins: dict[tuple[str, str, str], Origin] = {}

    def config(self, family: str, precision: str, place: str, run_dir: Path, **changes: Any):
        return tiny_run(
            self.data,
            run_dir=str(run_dir),
            model=MODELS[family].model_dump(),
            training__max_steps=STEPS,
            checkpoint__interval=SAVED,
            evaluation__interval=STEPS,
            **{"training__precision": precision, **PLACES[place].changes, **changes},
        )

    def origin(self, family: str, precision: str, place: str) -> Origin:
        key = (family, precision, place)
        if key not in self._origins:
            run_dir = self.directory / f"origin_{len(self._origins)}"
            config = self.config(*key, run_dir)
            train(config, PLACES[place])
            self._origins[key] = Origin(run_dir, *tail(config))
        return self._origins[key]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Runs:
    return Runs(data, tmp_path_factory.mktemp("origins"))


def train(config, place: Place, entry=run_training, *, ds_config_path: str | None = None) -> None:
    json_file = ds_config_path or f"configs/ds/zero{place.stage}.json"
    codes = run_ranks(entry, place.world_size, config, json_file, init=False)
    assert codes == [EXIT_COMPLETED] * place.world_size


def tail(config) -> tuple[list[dict[str, float]], float]:
    """What was logged after the checkpoint, and the last evaluation."""
    trained, evaluated = metrics(config)
    return [r for r in trained if r["step"] > SAVED], evaluated[-1]["eval_loss"]


def begin_at_checkpoint(origin: Origin, run_dir: Path) -> None:
    """A run directory as if the job had ended after `SAVED` steps."""
    shutil.copytree(
        origin.run_dir / "checkpoints" / f"step_{SAVED}", run_dir / "checkpoints" / f"step_{SAVED}"
    )


def saved_again(config, ds_config_path: str) -> int:
    """`run` that also writes what it has just restored, before its first step."""
    restore = TrainLoop.restore

    def restore_and_save(self, checkpoint):
        restore(self, checkpoint)
        copy = Path(config.run_dir, "copy")
        (copy / "weights").mkdir(parents=True, exist_ok=True)
        self._save_optimizer(copy)
        position = ShardPosition.of(self.ctx)
        path = copy / "weights" / position.file_name if self.ctx.data.rank == 0 else os.devnull
        with open(path, "wb") as file:
            write_shard(file, self.engine.weights(), position=position)

    TrainLoop.restore = restore_and_save
    return run_training(config, ds_config_path)


def state(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, buffer, master, moment and step count of a checkpoint, merged."""
    with ShardedWeightsReader(directory / "weights") as reader:
        yield from reader.items()
    stored = StoredOptimizer(directory / "optimizer")
    for name in sorted(stored.names()):
        numel = torch.Size(stored.parameter(name).shape).numel()
        yield f"{name} steps", torch.tensor(sorted(stored.steps(name)))
        for key in (MASTER, *MOMENTS):
            yield (
                f"{name} {key}",
                stored.read(name, key, start=0, length=numel, tensor=Axis()),
            )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    with ShardedWeightsReader(run_dir / "checkpoints" / f"step_{STEPS}") as reader:
        return {name: weight.float() for name, weight in reader.items()}


def assert_same_state(found: Path, expected: Path) -> None:
    restored, saved = dict(state(found)), dict(state(expected))
    assert saved.keys() == restored.keys()
    for name, tensor in saved.items():
        assert restored[name].dtype == tensor.dtype, name
        assert torch.equal(restored[name], tensor), name


def assert_continues(runs: Runs, run_dir: Path, pair: Pair) -> None:
    origin = runs.origin(pair.family, pair.precision, pair.old)
    begin_at_checkpoint(origin, run_dir)
    config = runs.config(pair.family, pair.precision, pair.new, run_dir)
    train(config, PLACES[pair.new], saved_again)

    assert_same_state(run_dir / "copy", run_dir / "checkpoints" / f"step_{SAVED}")
    curve, evaluation = tail(config)
    for expected, found in zip(origin.curve, curve, strict=True):
        assert found["step"] == expected["step"]
        assert found["tokens"] == expected["tokens"]
        assert found["lr"] == expected["lr"]
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=pair.rel), name
    assert evaluation == pytest.approx(origin.evaluation, rel=pair.rel)
    expected_weights, found_weights = weights(origin.run_dir), weights(run_dir)
    # Of all weights at once: the gradient of a key's bias is rounding alone, and Adam scales it up.
    difference = torch.stack([(found_weights[n] - w).norm() for n, w in expected_weights.items()])
    size = torch.stack([w.norm() for w in expected_weights.values()])
    assert difference.norm() <= 20 * pair.rel * size.norm()


class Pair(NamedTuple):
    """What is trained, where it is saved and where it goes on, to which relative tolerance."""

    family: str
    precision: str
    old: str
    new: str

    @property
    def rel(self) -> float:
        if self.precision == "bf16":
            return 1e-2  # the state is equal bit for bit; what follows rounds elsewhere
        same = PLACES[self.old]._replace(stage=1) == PLACES[self.new]._replace(stage=1)
        return 1e-6 if same else 1e-5

    def __str__(self) -> str:
        return f"{self.family} {self.precision} {self.old} to {self.new}"


PAIRS = [
    Pair("llama", "fp32", "PP2 TP2", "ZeRO-0"),
    Pair("llama", "fp32", "PP2 TP2", "PP4"),
    Pair("llama", "fp32", "PP2 TP2", "TP4"),
    Pair("llama", "fp32", "PP2 TP2", "TP2 SP"),
    Pair("llama", "fp32", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("llama", "fp32", "ZeRO-3 DP2", "ZeRO-1 DP2"),
    Pair("llama", "fp32", "ZeRO-3 DP2", "PP2 TP2"),
    Pair("llama", "fp32", "ZeRO-0", "ZeRO-1"),
    Pair("llama", "fp32", "ZeRO-0", "TP2 DP2 ZeRO-3"),
    Pair("llama", "bf16", "PP2 TP2", "ZeRO-1"),
    Pair("llama", "bf16", "PP2 TP2", "ZeRO-2 DP2"),
    Pair("llama", "bf16", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("llama", "bf16", "ZeRO-1", "PP2 DP2"),
    Pair("daria_former", "fp32", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("daria_former", "bf16", "ZeRO-2 DP2", "TP2"),
    Pair("mod", "fp32", "PP2 TP2", "ZeRO-3 DP2"),
    Pair("mod", "bf16", "ZeRO-1", "PP2 TP2"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_run_goes_on_at_another_layout(pair, runs, tmp_path):
    assert_continues(runs, tmp_path, pair)


def all_pairs() -> Iterator[Pair]:
    for family, precision in itertools.product(MODELS, ("fp32", "bf16")):
        for old, new in itertools.permutations(PLACES, 2):
            places = (PLACES[old], PLACES[new])
            bf16_without_master = precision == "bf16" and any(p.stage == 0 for p in places)
            too_few_heads = family != "llama" and any(p.tensor == 4 for p in places)
            pair = Pair(family, precision, old, new)
            if not (bf16_without_master or too_few_heads or pair in PAIRS):
                yield pair


@pytest.mark.slow
@pytest.mark.parametrize("pair", all_pairs(), ids=str)
def test_a_run_goes_on_at_every_other_layout(pair, runs, tmp_path):
    assert_continues(runs, tmp_path, pair)


def refusal(config, place: Place) -> str:
    """The line with which a run at `place` ends, the same on all ranks."""
    arguments = (config, f"configs/ds/zero{place.stage}.json")
    lines = set(run_ranks(_refused, place.world_size, *arguments, init=False))
    assert len(lines) == 1
    return lines.pop()


def _refused(config, ds_config_path) -> str:
    with pytest.raises(ValueError) as error:
        run_training(config, ds_config_path)
    return str(error.value)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


def killed_while_restoring(config, ds_config_path: str) -> int:
    """`run`, of which every rank is killed when half of the state is in place."""
    read, count = StoredOptimizer.read, 0

    def read_or_die(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, *args, **kwargs)

    StoredOptimizer.read = read_or_die
    return run_training(config, ds_config_path)


def test_a_kill_while_restoring_changes_nothing_in_the_checkpoint(runs, tmp_path):
    origin = runs.origin("llama", "fp32", "PP2 TP2")
    begin_at_checkpoint(origin, tmp_path)
    config = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path)
    before = files(tmp_path / "checkpoints")
    with pytest.raises(AssertionError, match="exit -9"):
        train(config, PLACES["ZeRO-1 DP2"], killed_while_restoring)
    assert files(tmp_path / "checkpoints") == before
    train(config, PLACES["ZeRO-1 DP2"])
    assert [r["loss"] for r in tail(config)[0]] == pytest.approx(
        [r["loss"] for r in origin.curve], rel=1e-5
    )


def test_a_parameter_that_is_missing_at_the_new_layout_stops_every_rank(runs, tmp_path):
    begin_at_checkpoint(runs.origin("llama", "fp32", "PP2 TP2"), tmp_path)
    config = runs.config("llama", "fp32", "PP4", tmp_path)
    message = run_ranks(without_a_file, 4, config, "configs/ds/zero1.json", init=False)
    assert len(set(message)) == 1
    assert "has no state of parameter" in message[0]


def without_a_file(config, ds_config_path: str) -> str:
    """The checkpoint as a writer would have left it that forgot what the last stage holds."""
    read = stored_optimizer._read_runs

    def forgetful(path):
        return {n: r for n, r in read(path).items() if not n.startswith("block_3")}

    stored_optimizer._read_runs = forgetful
    return _refused(config, ds_config_path)


def with_one_step_less(config, ds_config_path: str) -> str:
    """The checkpoint as ZeRO-0 writes it when a parameter got no gradient in one of its steps."""
    read = stored_optimizer._read_runs

    def changed(path):
        runs = read(path)
        name = "head.norm.weight"
        if name in runs:
            runs[name] = runs[name].model_copy(update={"step": SAVED - 1})
        return runs

    stored_optimizer._read_runs = changed
    return _refused(config, ds_config_path)


def test_step_counts_that_one_zero_stage_cannot_keep_apart_are_refused(runs, tmp_path):
    begin_at_checkpoint(runs.origin("llama", "fp32", "PP2 TP2"), tmp_path)
    config = runs.config("llama", "fp32", "ZeRO-1", tmp_path)
    (message,) = run_ranks(with_one_step_less, 1, config, "configs/ds/zero1.json", init=False)
    assert "parameter 'head.norm.weight' has taken 3 optimizer steps, 'block_0." in message
    assert "resume at the ZeRO stage that wrote the checkpoint" in message


def frozen(factor: float):
    """`run` of a model with one layer that is not trained and begins `factor` times as large."""

    def entry(config, ds_config_path: str) -> int:
        after_each = pretrain.engine._after_each

        def freezing(plan, load_layer):
            finish = after_each(plan, load_layer)

            def freeze_and_finish(spec, layer):
                if spec.name == "block_1":
                    for parameter in layer.requires_grad_(False).parameters():
                        parameter.mul_(factor)
                finish(spec, layer)

            return freeze_and_finish

        pretrain.engine._after_each = freezing
        return saved_again(config, ds_config_path)

    return entry


@pytest.mark.parametrize("new", ["PP2 TP2", "ZeRO-3 DP2"])
def test_frozen_parameters_come_from_the_weights(new, runs, tmp_path):
    old = runs.config("llama", "bf16", "ZeRO-1", tmp_path / "old")
    train(old, PLACES["ZeRO-1"], frozen(2.0))
    begin_at_checkpoint(Origin(tmp_path / "old", [], 0.0), tmp_path / "new")
    train(runs.config("llama", "bf16", new, tmp_path / "new"), PLACES[new], frozen(1.0))
    saved = tmp_path / "old" / "checkpoints" / "step_4"
    assert_same_state(tmp_path / "new" / "copy", saved)
    trained = StoredOptimizer(saved / "optimizer").names()
    assert not any(name.startswith("block_1") for name in trained)


def test_another_global_batch_is_refused_with_both_sizes(runs, tmp_path):
    begin_at_checkpoint(runs.origin("llama", "fp32", "PP2 TP2"), tmp_path)
    twice = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path, training__batch_size=4)
    message = refusal(twice, PLACES["ZeRO-1 DP2"])
    assert "was trained on 8 samples a step, this run would take 16" in message
    assert "set training.gradient_accumulation_steps so that it is 8" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("training__precision", "bf16"), ("training__optimizer", "muon"), ("training__seed", 4)],
)
def test_another_precision_optimizer_or_seed_is_refused(key, value, runs, tmp_path):
    begin_at_checkpoint(runs.origin("llama", "fp32", "PP2 TP2"), tmp_path)
    config = runs.config("llama", "fp32", "ZeRO-1", tmp_path, **{key: value}, training__grad_clip=0)
    message = refusal(config, PLACES["ZeRO-1"])
    assert f"is of another run ({key.replace('__', '.')}: " in message
    assert repr(value) in message


def test_what_only_deepspeed_can_restore_goes_on_at_its_layout_alone(runs, tmp_path):
    place = PLACES["ZeRO-1 DP2"]
    json_file = tmp_path / "round_robin.json"
    json_file.write_text('{"zero_optimization": {"stage": 1, "round_robin_gradients": true}}')
    whole = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path / "whole")
    train(whole, place, ds_config_path=str(json_file))
    for name in ("same", "other"):
        begin_at_checkpoint(Origin(tmp_path / "whole", [], 0.0), tmp_path / name)
    same = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path / "same")
    train(same, place, ds_config_path=str(json_file))
    expected, found = tail(whole), tail(same)
    assert [r["loss"] for r in found[0]] == [r["loss"] for r in expected[0]]
    assert found[1] == expected[1]
    other = runs.config("llama", "fp32", "ZeRO-1", tmp_path / "other")
    message = refusal(other, PLACES["ZeRO-1"])
    assert "is in DeepSpeed's own files, which fit only the layout that wrote them" in message
    assert "resume at the layout of the checkpoint" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_moves_into_host_memory(stage, runs, tmp_path):
    json_file = tmp_path / "offload.json"
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    json_file.write_text(json.dumps({"zero_optimization": zero}))
    origin = runs.origin("llama", "bf16", "ZeRO-1")
    begin_at_checkpoint(origin, tmp_path / "offloaded")
    offloaded = runs.config("llama", "bf16", "ZeRO-1 DP2", tmp_path / "offloaded")
    train(offloaded, PLACES["ZeRO-1 DP2"], saved_again, ds_config_path=str(json_file))
    assert_same_state(tmp_path / "offloaded" / "copy", origin.run_dir / "checkpoints" / "step_4")
    losses = [record["loss"] for record in tail(offloaded)[0]]
    assert losses == pytest.approx([record["loss"] for record in origin.curve], rel=1e-2)


def spoiled_master(config, ds_config_path: str) -> str:
    """`run`, in which a weight is changed behind the optimizer's back before it is saved."""
    save = TrainLoop._save_optimizer

    def spoil_and_save(self, directory):
        next(self.engine.module.parameters()).data.view(-1)[0] += 1
        return save(self, directory)

    TrainLoop._save_optimizer = spoil_and_save
    return _refused(config, ds_config_path)


def test_weights_that_are_not_their_master_are_not_saved(runs, tmp_path):
    config = runs.config("llama", "bf16", "ZeRO-1", tmp_path)
    (message,) = run_ranks(spoiled_master, 1, config, "configs/ds/zero1.json", init=False)
    assert "step_4 was not saved, rank 0: parameter 'embedding.tokens.weight'" in message
    assert "the weights differ from their fp32 master" in message
    assert not list((tmp_path / "checkpoints").iterdir())


def on_a_full_disk(config, ds_config_path: str) -> str:
    """`run`, in which no file of the second data rank may grow beyond 20 kB."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return _refused(config, ds_config_path)


def test_a_full_disk_on_one_rank_is_told_by_all_and_publishes_nothing(runs, tmp_path):
    config = runs.config("llama", "fp32", "ZeRO-1 DP2", tmp_path)
    messages = run_ranks(on_a_full_disk, 2, config, "configs/ds/zero1.json", init=False)
    assert messages[0] == messages[1]
    assert "step_4 was not saved, rank 1: OSError: [Errno 27] File too large" in messages[0]
    assert not list((tmp_path / "checkpoints").iterdir())
