"""`inspect_corpus --run --steps` names the samples that every rank of a real run was given."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.inspect_corpus import main
from data_tools.loading.batch import IGNORED_LABEL
from data_tools.loading.loader import TrainLoader
from data_tools.sampling.order_record import ORDER_NAME
from pretrain.config import RunConfig
from pretrain.loop import TrainLoop
from tests.data_tools.corpora import write_counting_corpus
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

VOCAB, FIRST_OF = 3100, {"a": 0, "b": 1000, "c": 2000}
SENTINELS = {3097, 3098, 3099}
FIM = {"rate": 0.5, "level": "window", "prefix": 3097, "suffix": 3098, "middle": 3099}
Row = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_data(directory)
    for name, first in FIRST_OF.items():
        write_counting_corpus(directory / name, 1000, first=first, vocab_size=VOCAB)
    return directory


def _config(data: Path, run_dir: Path, weights: dict[str, float], **changes: Any) -> RunConfig:
    values = {
        "run_dir": str(run_dir),
        "model__vocab_size": VOCAB,
        "model__num_layers": 2,
        "data__train": [{"path": str(data / n), "weight": w} for n, w in weights.items()],
        "data__reset_at_documents": True,
        "data__fim": FIM,
        "training__batch_size": 2,
        "training__gradient_accumulation_steps": 4,
        "training__log_interval": 3,
        "checkpoint__interval": 100,
        "checkpoint__keep": 1,
        "evaluation__interval": 100,
        "evaluation__max_windows": 4,
    }
    return tiny_run(data, **(values | changes))


def _recorded(config: RunConfig, ds_config_path: str) -> list[tuple[int, int, list[Row]]]:
    """Train; returns (step, data rank, rows) of every batch that this rank was given."""
    found: list[tuple[int, int, list[Row]]] = []
    step_now = 0
    train = TrainLoop._train
    draw = TrainLoader.__next__

    def noted(self, step, *args):
        nonlocal step_now
        step_now = step
        return train(self, step, *args)

    def drawn(self):
        batch = draw(self)
        rows = list(zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True))
        found.append((step_now, self._data_rank, rows))
        return batch

    TrainLoop._train = noted  # type: ignore[method-assign]
    TrainLoader.__next__ = drawn  # type: ignore[method-assign]
    assert run_training(config, ds_config_path) == 0
    return found


def _rows_by_step(config: RunConfig, ranks: int, *, data_size: int) -> dict[int, list[Row]]:
    """The rows of every step in the order of their samples: round by round over data ranks."""
    results = run_ranks(_recorded, ranks, config, "configs/ds/zero1.json", init=False)
    rounds: dict[tuple[int, int], list[list[Row]]] = {}
    for result in results:
        if result and (result[0][0], result[0][1]) not in rounds:  # one rank of each data rank
            for step, rank, rows in result:
                rounds.setdefault((step, rank), []).append(rows)
    steps = sorted({step for step, _ in rounds})
    return {
        step: [
            row
            for batches in zip(*(rounds[step, rank] for rank in range(data_size)), strict=True)
            for rows in batches
            for row in rows
        ]
        for step in steps
    }


def _inspect(capsys: pytest.CaptureFixture[str], run_dir: Path, steps: str, *options: str):
    main(["--run", str(run_dir), "--steps", steps, "--json", *options])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _assert_named(samples: list[dict[str, Any]], rows: dict[int, list[Row]], data: Path) -> None:
    assert [each["step"] for each in samples] == [step for step, of in rows.items() for _ in of]
    all_rows = [row for of in rows.values() for row in of]
    corpora = {name: IndexedDataset(data / name) for name in FIRST_OF}
    rearranged = 0
    for sample, (tokens, labels) in zip(samples, all_rows, strict=True):
        ids = [token for piece in sample["pieces"] for token in piece["ids"]]
        assert ids[:-1] == tokens
        assert all(b in (a, IGNORED_LABEL) for a, b in zip(ids[1:], labels, strict=True))
        for piece in sample["pieces"]:
            document = corpora[sample["source"]].document(piece["document"]).tolist()
            text = document[piece["begin"] : piece["end"]]
            if SENTINELS & set(piece["ids"]):
                rearranged += 1
                assert set(piece["ids"]) - SENTINELS <= set(text)
            else:
                assert piece["ids"] == text
    assert rearranged, "no document of these steps was rearranged"


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory) -> tuple[Path, dict[int, list[Row]], dict[int, list[Row]]]:
    """A run with stages and a ramp on two data ranks, then with another mix on a pipeline."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    stages = [
        {"until_step": 2, "weights": {"a": 1}, "sequence_length": 16},
        {"weights": {"a": 1, "b": 2}},
    ]
    first = _config(
        data,
        run_dir,
        {"a": 1.0, "b": 1.0},
        data__stages=stages,
        training__batch_ramp=[{"until_tokens": 400, "sequences_per_step": 8}],
        training__max_steps=5,
    )
    before = _rows_by_step(first, 2, data_size=2)
    second = _config(
        data,
        run_dir,
        {"c": 3.0, "a": 1.0},
        parallel__pipeline=2,
        training__gradient_accumulation_steps=3,
        training__max_steps=9,
        stability__skip_steps=[[8, 8]],
    )
    after = _rows_by_step(second, 2, data_size=1)
    assert list(before) == [1, 2, 3, 4, 5]
    assert list(after) == [6, 7, 9]
    assert [len(of) for of in (*before.values(), *after.values())] == [8, 8, 8, 16, 16, 6, 6, 6]
    return run_dir, before, after


def test_steps_are_named_as_every_rank_was_given_them(resumed, data, capsys):
    run_dir, before, after = resumed
    _assert_named(_inspect(capsys, run_dir, "1:5"), before, data)
    named = _inspect(capsys, run_dir, "6:9")
    skipped = [each for each in named if each["step"] == 8]
    assert len(skipped) == 6
    assert all(each["is_skipped"] for each in skipped)
    _assert_named([each for each in named if each["step"] != 8], after, data)
    assert len(_inspect(capsys, run_dir, "5:6")) == 16 + 6  # across the resume


def test_the_text_form_names_source_and_document(resumed, capsys):
    run_dir, before, _ = resumed
    main(["--run", str(run_dir), "--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step 1  sample ") for line in lines) == len(before[1])
    assert lines[0].startswith("step 1  sample 0  source a  epoch 0  tokens ")
    assert lines[1].startswith("  document ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--steps", "9:10"], ("--steps", "9:10", "up to 9", "--planned")),
        (["--steps", "9:10", "--planned"], ("--steps", "9:10", "up to 9", "earlier")),
        (["--steps", "0:3"], ("--steps", "0:3", "FIRST:LAST", "120:124")),
        (["--steps", "4:x"], ("--steps", "4:x", "FIRST:LAST", "120:124")),
        ([], ("--run", "--steps", "FIRST:LAST", "both")),
        (["--steps", "1", "--source", "z=/x"], ("--source", "z=/x", "source", "a, b, c")),
        (["--steps", "1", "--source", "a"], ("--source", "a", "NAME=PATH", "path")),
        (["--steps", "1", "--tokenizer", "bytes"], ("--tokenizer", "bytes", "data source", "pass")),
        (["--steps", "1", "--tokenizer", "no.model"], ("--tokenizer", "no.model", "no", "")),
    ],
)
def test_what_cannot_be_named_is_one_line(arguments, parts, resumed):
    with assert_refused(*parts, error=DataError):
        main(["--run", str(resumed[0]), *arguments])


def test_a_moved_corpus_is_found_where_the_user_says_and_a_changed_one_is_refused(
    data, tmp_path, capsys
):
    shutil.copytree(data, tmp_path / "data")
    config = _config(tmp_path / "data", tmp_path / "run", {"a": 1.0}, training__max_steps=2)
    assert run_ranks(run_training, 1, config, "configs/ds/zero0.json", init=False) == [0]
    expected = _inspect(capsys, tmp_path / "run", "1:2")
    moved = tmp_path / "elsewhere"
    (tmp_path / "data").rename(moved)
    with _refused(
        "a.idx", value="no such file", constraint="no", remedy=("--source NAME=PATH", "(a)")
    ):
        main(["--run", str(tmp_path / "run"), "--steps", "1"])
    assert _inspect(capsys, tmp_path / "run", "1:2", "--source", f"a={moved / 'a'}") == expected
    with _refused(
        "data source", value="a", constraint=("recorded", "after 0"), remedy="--source a=PATH"
    ):
        main(["--run", str(tmp_path / "run"), "--steps", "1", "--source", f"a={moved / 'b'}"])


def test_a_directory_without_a_run_or_of_an_earlier_version_is_refused(resumed, tmp_path):
    with _refused(str(tmp_path), value="config.yaml", constraint="no", remedy="run_dir"):
        main(["--run", str(tmp_path), "--steps", "1"])
    shutil.copytree(resumed[0], tmp_path / "run")
    records = (tmp_path / "run" / ORDER_NAME).read_text().splitlines()
    assert len(records) == 2
    (tmp_path / "run" / ORDER_NAME).write_text(records[1] + "\n")
    with _refused("--steps", value="5:6", constraint="step 6", remedy="later"):
        main(["--run", str(tmp_path / "run"), "--steps", "5:6"])
    os.unlink(tmp_path / "run" / ORDER_NAME)
    with _refused("run", value="data_order.jsonl", constraint="no", remedy="start"):
        main(["--run", str(tmp_path / "run"), "--steps", "1"])
