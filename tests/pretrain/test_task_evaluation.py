"""Tasks of lm_eval during training: the numbers of `models.evaluate`, and no trace in training."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import signal
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.loading.sources import read_text_rules
from models.evaluate import evaluate_checkpoint
from parallel.checkpoint.errors import AgreedError
from pretrain.config import RunConfig
from pretrain.distributed.consensus import RankGroup
from pretrain.engine.engine import PlainEngine
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED
from pretrain.loop import TrainLoop
from pretrain.metrics.writers import read_metrics
from pretrain.task_evaluation import TaskEvaluation, open_tasks
from tests.distributed import run_ranks
from tests.models.evaluation.local_tasks import write_tasks
from tests.pretrain.run_training import run_training
from tests.pretrain.spiking_run import run_spiking
from tests.pretrain.tiny_run import curve, final_weights, tiny_run
from tests.refusals import assert_refused
from tests.tolerance import FP32_LOSS

pytestmark = pytest.mark.ecosystem
TASKS = ("local_choice", "local_letters", "local_text")
LENGTH = 64  # less than the longest questions
LAYOUTS = {
    "one process": (1, {}, 0),
    "tensor 2 x pipeline 2 x data 2": (8, {"parallel__tensor": 2, "parallel__pipeline": 2}, 1),
    "data 2, ZeRO-3": (2, {}, 3),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")  # of packages that miss what no test needs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, and text to train on as bytes."""
    folder = tmp_path_factory.mktemp("data")
    write_tasks(folder / "tasks")
    for name, lines in (("train", 200), ("validation", 12)):
        text = "".join(f"{i} river stone carries cold water {i * i}\n" for i in range(lines))
        (folder / f"{name}.txt").write_text(text)
    # Imported before ranks are forked.
    importlib.import_module("models.evaluation.harness")
    return folder


def run_of(data: Path, run_dir: Path, **changes: Any) -> RunConfig:
    model = tiny_run(data).model.model_dump(mode="json")
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {**model, "vocab_size": 257, "max_position_embeddings": LENGTH},
        "data__kind": "bytes",
        "data__train": str(data / "train.txt"),
        "data__validation": str(data / "validation.txt"),
        "data__sequence_length": LENGTH,
        "training__batch_size": 2,
        "checkpoint__keep": 4,
        "evaluation__tasks": list(TASKS),
        "evaluation__include_path": str(data / "tasks"),
    }
    return tiny_run(data, **{**values, **changes})


def train(config: RunConfig, size: int, zero: int) -> None:
    ends = run_ranks(run_training, size, config, f"configs/ds/zero{zero}.json", init=False)
    assert ends == [EXIT_COMPLETED] * size


def of_tasks(config: RunConfig) -> dict[float, dict[str, float]]:
    """Step -> the record of its tasks."""
    records = read_metrics(Path(config.run_dir, "metrics.jsonl"))
    return {r["step"]: r for r in records if any("/" in name for name in r)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tasks_have_the_numbers_of_the_checkpoint_and_leave_training_as_it_is(
    layout: str, data: Path, tmp_path: Path
) -> None:
    size, changes, zero = LAYOUTS[layout]
    config = run_of(data, tmp_path / "run", **changes)
    train(config, size, zero)
    records = of_tasks(config)
    assert list(records) == [2, 4]
    for step, record in records.items():
        run = Path(config.run_dir)
        written = json.loads((run / "tasks" / f"step_{step}.json").read_text())
        expected = evaluate_checkpoint(
            run / "checkpoints" / f"step_{step}",
            TASKS,
            include_path=data / "tasks",
            bootstrap_iters=0,
            device="cpu",
        )
        assert written["manyformer"]["step"] == step
        for name in ("tokenizer", "prefix_token_id", "max_length", "family", "precision"):
            assert written["manyformer"][name] == expected["manyformer"][name], name
        assert written["n-samples"] == expected["n-samples"]
        for task in TASKS:
            for key, value in expected["results"][task].items():
                if isinstance(value, float):
                    assert written["results"][task][key] == pytest.approx(value, rel=BOUND), key
                    assert record[f"{task}/{key.removesuffix(',none')}"] == pytest.approx(
                        value, rel=BOUND
                    )
    assert {"local_choice/acc", "local_text/word_perplexity"} < records[4].keys()
    without = run_of(
        data, tmp_path / "without", **changes, evaluation__tasks=[], evaluation__include_path=None
    )
    train(without, size, zero)
    assert curve(config) == curve(without)
    weights, expected_weights = final_weights(config), final_weights(without)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name


# A perplexity is e to the mean of losses: of words, of about 20 nats here.
BOUND = 30 * FP32_LOSS


def test_tasks_have_an_interval_a_limit_and_examples_of_their_own_without_held_out_text(
    data: Path, tmp_path: Path
) -> None:
    config = run_of(
        data,
        tmp_path / "run",
        data__validation=[],
        evaluation={
            "tasks": "local_letters",
            "include_path": str(data / "tasks"),
            "task_interval": 3,
            "task_limit": 2,
            "num_fewshot": 1,
        },
        logging__tensorboard=True,
    )
    train(config, 1, 0)
    assert list(of_tasks(config)) == [3, 4]
    written = json.loads(Path(config.run_dir, "tasks", "step_3.json").read_text())
    assert written["n-shot"] == {"local_letters": 1}
    assert written["n-samples"]["local_letters"]["effective"] == 2
    assert [step for step, _ in _chart(config, "eval/local_letters/acc")] == [3, 4]


def _killed_in_the_save_of(
    config: RunConfig, ds_config_path: str | None, steps: tuple[int, ...], *, step: int
) -> None:
    """A spiking run that is killed after it has returned and evaluated `step`, before its save."""
    save = TrainLoop._save

    def killed(self: TrainLoop) -> None:
        if self.rollback.skipped and self.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self)

    TrainLoop._save = killed  # type: ignore[method-assign]  # for good: the process ends
    run_spiking(config, ds_config_path, steps)


def test_steps_that_are_undone_leave_no_numbers_of_tasks(data: Path, tmp_path: Path) -> None:
    """Tasks are evaluated at 2, 4 and 6, the spike of step 7 is seen at 8, from 3 on they are
    evaluated again, a kill costs what is behind the checkpoint of 3, and once more."""
    changes: dict[str, Any] = {
        "parallel__pipeline": 2,
        "evaluation__tasks": ["local_letters", "local_text"],
        "evaluation__task_interval": 2,
        "training__max_steps": 8,
        "training__log_interval": 4,
        "checkpoint__interval": 3,
        "stability__spike": {"sigma": 20.0, "window": 3, "skip_before": 1},
        "logging__tensorboard": True,
    }
    expected = run_of(data, tmp_path / "a", stability__skip_steps=[[6, 8]], **changes)
    config = run_of(data, tmp_path / "b", **changes)
    train(expected, 2, 1)
    killed = partial(_killed_in_the_save_of, step=6)
    with pytest.raises(AssertionError, match="exit -9"):
        run_ranks(killed, 2, config, "configs/ds/zero1.json", (7,), init=False)
    assert list(of_tasks(config)) == [2, 4, 6]
    train(config, 2, 1)
    lines = [
        r
        for r in read_metrics(Path(config.run_dir, "metrics.jsonl"))
        if any("/" in name for name in r)
    ]
    assert [line["step"] for line in lines] == [2, 4, 6, 8], "none is there twice"
    assert of_tasks(config) == of_tasks(expected)
    for run in (config, expected):
        names = sorted(path.name for path in Path(run.run_dir, "tasks").iterdir())
        assert names == [f"step_{step}.json" for step in (2, 4, 6, 8)]
    charts = [_chart(run, "eval/local_text/bits_per_byte") for run in (config, expected)]
    assert charts[0] == charts[1]
    assert [step for step, _ in charts[0]] == [2, 4, 6, 8]


def _asked_to_stop_while_scoring(config: RunConfig, ds_config_path: str | None) -> int:
    """The signal reaches rank 1 alone, after the first part of the first evaluation."""
    scored = PlainEngine.score_part

    def signalled(self: PlainEngine, *arguments: Any, **keywords: Any) -> Any:
        found = scored(self, *arguments, **keywords)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    PlainEngine.score_part = signalled  # type: ignore[method-assign]  # for good, in a fork
    return run_training(config, ds_config_path)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_its_tasks(
    data: Path, tmp_path: Path
) -> None:
    config = run_of(data, tmp_path / "run", evaluation__tasks=["local_choice", "local_text"])
    zero = "configs/ds/zero1.json"
    ends = run_ranks(_asked_to_stop_while_scoring, 2, config, zero, init=False)
    assert ends == [EXIT_STOPPED] * 2
    assert of_tasks(config) == {}
    assert not Path(config.run_dir, "tasks").exists()
    train(config, 2, 1)
    assert list(of_tasks(config)) == [4], "it has gone on after step 3"


def _chart(config: RunConfig, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows under a name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.run_dir, "tensorboard"))).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_the_log_of_a_run_gets_no_progress_bars(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_of(data, tmp_path / "run")
    open_tasks(config, read_text_rules(config.data), RankGroup(), lambda part: None)
    assert "it/s" not in capsys.readouterr().err


def _refused(config: RunConfig) -> str:
    with pytest.raises(AgreedError) as refusal:
        run_training(config)
    return str(refusal.value)


def test_what_cannot_be_asked_is_refused_before_the_model_is_built(
    data: Path, tmp_path: Path
) -> None:
    short = {"data__sequence_length": 16, "model__max_position_embeddings": 16}
    for changes, parts in (
        (
            {"evaluation__tasks": ["local_answer"]},
            ("evaluation.tasks", "local_answer", "generate_until", "leave"),
        ),
        (
            {"evaluation__num_fewshot": 9, "evaluation__tasks": ["local_letters"]},
            ("num_fewshot", 9, "4 examples", "evaluation.num_fewshot"),
        ),
        (
            {"evaluation__include_path": str(tmp_path / "nowhere")},
            ("evaluation.include_path", str(tmp_path / "nowhere"), "no such folder", "give"),
        ),
        (short, ("continuation", 18, "max_length", "data.sequence_length")),
    ):
        config = run_of(data, tmp_path / "run", **changes)
        with assert_refused(*parts, error=AgreedError):
            open_tasks(config, read_text_rules(config.data), RankGroup(), lambda part: None)
    messages = run_ranks(_refused, 2, run_of(data, tmp_path / "run", **short), init=False)
    assert len(set(messages)) == 1, "every rank says the same"
    assert "data.sequence_length" in messages[0]
    assert "ValueError" not in messages[0]
    assert not Path(config.run_dir, "config.yaml").exists()


def _with_overflow(config: RunConfig) -> list[str]:
    """Train with a metric that no number holds in training; the warnings about tasks."""
    ask, found = TaskEvaluation._ask, []
    metrics = importlib.import_module("lm_eval.api.metrics")

    def overflowing(self: TaskEvaluation) -> Any:
        if self._engine is not None:
            metrics.math = SimpleNamespace(exp=lambda value: math.exp(abs(value) + 1000))
        return ask(self)

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logging.getLogger("pretrain.loop").addHandler(Notes())
    TaskEvaluation._ask = overflowing  # type: ignore[method-assign]  # for good, in a fork
    assert run_training(config) == EXIT_COMPLETED
    return [line for line in found if "tasks" in line]


def _with_broken_engine(config: RunConfig) -> None:
    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise ZeroDivisionError

    PlainEngine.score_part = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run_training(config)


def test_a_task_that_fails_in_training_is_reported_and_training_goes_on(
    data: Path, tmp_path: Path
) -> None:
    """Whereas an error of the engine is one of the run."""
    config = run_of(data, tmp_path / "run", evaluation__task_interval=3)
    ((first, second),) = run_ranks(_with_overflow, 1, config, init=False)
    assert first.startswith("step 3")
    assert second.startswith("step 4")
    assert "OverflowError" in first
    assert of_tasks(config) == {}
    run_ranks(_with_broken_engine, 1, run_of(data, tmp_path / "broken"), init=False)
