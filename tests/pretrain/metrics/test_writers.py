from __future__ import annotations

import io
import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import LoggingConfig, WandbConfig
from pretrain.metrics.writers import (
    JsonlWriter,
    ProgressLine,
    TensorBoardWriter,
    WandbWriter,
    Writers,
    build_writers,
    read_metrics,
)
from pretrain.plot import main as plot_main
from pretrain.plot import plot_losses
from tests.refusals import assert_refused

TRAINING = {
    "step": 120,
    "loss": 3.4123,
    "lm_loss": 3.4,
    "grad_norm": 0.917,
    "lr": 3e-4,
    "tokens": 120_000,
    "tokens_per_second": 41_234.0,
    "seconds_per_step": 0.405,
}
EVALUATION = {
    "step": 120,
    "eval_loss": 3.2,
    "perplexity": 24.53,
    "bits_per_byte": 1.4321,
    "tokens": 120_000,
}


def test_every_record_is_one_line_of_json_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resumed_step=0)
    writer.write(TRAINING)
    assert json.loads(path.read_text()) == TRAINING
    writer.write({**EVALUATION, "perplexity": math.inf, "eval_loss": math.nan})
    writer.close()
    second = json.loads(path.read_text().splitlines()[1])
    assert second["perplexity"] is None
    assert second["eval_loss"] is None


def test_a_resume_forgets_the_lines_that_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resumed_step=0)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": step / 10})
    writer.write({"step": 2, "eval_loss": 0.5})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a crash

    writer = JsonlWriter(path, resumed_step=2)
    writer.write({"step": 3, "loss": 0.7})
    writer.close()

    expected = [(1, 0.1), (2, 0.2), (2, 0.5), (3, 0.7)]
    assert [(r["step"], r.get("loss", r.get("eval_loss"))) for r in read_metrics(path)] == expected
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_forgets_results_of_tasks_of_later_steps(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("step_2.json", "step_4.json", "step_10.json", "mine.json", "step_best.json"):
        (folder / name).write_text("{}")
    build_writers(
        LoggingConfig(), run_dir=tmp_path, run_config={}, resumed_step=4, total_steps=12
    ).close()
    names = {path.name for path in folder.iterdir()}
    assert names == {"step_2.json", "step_4.json", "mine.json", "step_best.json"}


def test_a_fresh_start_forgets_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    JsonlWriter(path, resumed_step=0).close()
    assert path.read_text() == ""


def test_progress_line_says_what_matters_in_one_line() -> None:
    stream = io.StringIO()
    line = ProgressLine(total_steps=2000, stream=stream)
    line.write({**TRAINING, "mfu": 0.3812})
    line.write({**TRAINING, "step": 2000, "tokens_per_second": 950.0})
    line.write(EVALUATION)
    line.close()
    assert stream.getvalue().splitlines() == [
        "step 120/2000 | loss 3.412 | lr 3.0e-4 | grad 0.92 | 41.2k tok/s | MFU 38.1%"
        " | ETA 0:12:41",
        "step 2000/2000 | loss 3.412 | lr 3.0e-4 | grad 0.92 | 950 tok/s | ETA 0:00:00",
        "step 120/2000 | eval loss 3.2000 | perplexity 24.53 | 1.4321 bits/byte",
    ]


def test_progress_line_is_rewritten_on_a_terminal_and_left_standing_before_an_evaluation() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    line = ProgressLine(total_steps=2000, stream=stream)
    line.write(TRAINING)
    line.write({**TRAINING, "step": 130})
    line.close()
    text = stream.getvalue()
    assert text.startswith("step 120/2000")
    assert "\n" not in text[:-1]
    assert "\r\x1b[2Kstep 130/2000" in text
    assert text.endswith("\n")


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def write(self, record: Mapping[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("service is down")

    def close(self) -> None:
        raise ConnectionError("still down")


def test_a_writer_that_fails_is_reported_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    path = tmp_path / "metrics.jsonl"
    writers = Writers([broken, JsonlWriter(path, resumed_step=0)])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            writers.write(TRAINING)
        writers.close()
    assert broken.calls == 1
    assert len(read_metrics(path)) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "Broken failed (ConnectionError: service is down) and is switched off; training continues"
    ]


def test_only_the_writers_that_were_asked_for_are_imported_and_built(tmp_path: Path) -> None:
    writers = build_writers(
        LoggingConfig(), run_dir=tmp_path, run_config={}, resumed_step=0, total_steps=1
    )
    writers.write({**TRAINING, "step": 1})
    writers.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_holds_the_scalars_and_a_resume_hides_the_steps_it_repeats(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardWriter(tmp_path / "tensorboard", resumed_step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step)})
    first.write(EVALUATION | {"step": 2})
    first.close()
    second = TensorBoardWriter(tmp_path / "tensorboard", resumed_step=2)
    second.write({"step": 3, "loss": 30.0})
    second.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30)]
    assert events.Scalars("eval/loss")[0].value == pytest.approx(EVALUATION["eval_loss"])
    tags = events.Tags()["scalars"]
    assert "eval/perplexity" in tags
    assert not [tag for tag in tags if "eval_" in tag]


def test_wandb_offline_writes_the_numbers_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.setenv("HF_TOKEN", "hf_canary_canary")
    monkeypatch.setattr("sys.argv", ["train.py", "--password=argv_canary"])
    config = WandbConfig(mode="offline", project="manyformer-test")
    writer = WandbWriter(config, run_dir=tmp_path, run_config={"training": {"lr": 0.125}})
    writer.write({"step": 1, "loss": 2.5})
    writer.close()

    files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()]
    content = b"".join(p.read_bytes() for p in files)
    (log,) = [p for p in files if p.suffix == ".wandb"]
    assert b"train/loss" in log.read_bytes()
    assert b"0.125" in log.read_bytes()
    for secret in (canary, "hf_canary", "argv_canary"):
        assert secret.encode() not in content


def _wandb_records(run_dir: Path) -> Iterator[Any]:
    """What the offline runs in a run directory hold, in the order in which they were begun.

    Their files are logs in LevelDB's format: blocks of 32 kB, chunks with a checksum, a length and
    a kind (whole, first, middle, last); each entry is a protocol buffer.
    """
    from wandb.proto.wandb_internal_pb2 import Record as Entry

    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=_made_at):
        raw, entry, place = path.read_bytes(), b"", 7  # after the file's own header
        while place + 7 <= len(raw):
            if 32768 - place % 32768 < 7:  # no room for a chunk
                place += 32768 - place % 32768
                continue
            length, kind = struct.unpack("<HB", raw[place + 4 : place + 7])
            entry += raw[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                yield Entry.FromString(entry)
                entry = b""


def _made_at(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_in_wandb_steps_that_go_back_are_kept_and_drawn_over_the_steps_of_the_run(
    tmp_path: Path,
) -> None:
    """After a kill and after a rollback; W&B itself ignores what does not go on."""
    config = WandbConfig(mode="offline", project="manyformer-test")
    starts = [[1, 2, 3, 10], [3, 4], [2, 3, 20]]
    for steps in starts:
        writer = WandbWriter(config, run_dir=tmp_path, run_config={})
        for step in steps:
            writer.write({"step": step, "loss": float(step)})
            writer.write({"step": step, "eval_loss": 1.0})
            writer.write({"step": step, "some_task/acc": 0.5})
        writer.close()

    records = list(_wandb_records(tmp_path))
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert (axes["train/*"], axes["eval/*"]) == ("step", "step")
    rows = [r.history for r in records if r.HasField("history")]
    values = [{i.nested_key[0]: json.loads(i.value_json) for i in row.item} for row in rows]
    assert [row["step"] for row in values] == [step for steps in starts for step in steps]
    assert all(row["train/loss"] == row["step"] and row["eval/loss"] == 1.0 for row in values)
    assert all(row["eval/some_task/acc"] == 0.5 for row in values)
    assert [row.step.num for row in rows] == [1, 2, 3, 10, 11, 12, 13, 14, 20]
    assert len({r.run.run_id for r in records if r.HasField("run")}) == 1


def test_plot_shows_both_curves_and_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with assert_refused("metrics.jsonl", value="exist", constraint="not", remedy="run_dir"):
        plot_losses(tmp_path, tmp_path / "loss.png")
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_main([str(tmp_path)]) == 2
    assert "has no losses yet" in capsys.readouterr().err

    writer = JsonlWriter(tmp_path / "metrics.jsonl", resumed_step=0)
    for step in range(1, 50):
        writer.write({**TRAINING, "step": step, "lm_loss": 9 / step, "tokens": step * 1000})
    writer.write({**EVALUATION, "step": 49})
    writer.write({**EVALUATION, "step": 49, "eval_loss": math.nan})
    writer.close()
    assert plot_main([str(tmp_path), "--output", str(tmp_path / "deep" / "loss.png")]) == 0
    picture = (tmp_path / "deep" / "loss.png").read_bytes()
    monkeypatch.chdir(tmp_path / "deep")
    assert plot_main([str(tmp_path)]) == 0
    assert (tmp_path / "loss.png").read_bytes() == picture, "beside the metrics by default"
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
