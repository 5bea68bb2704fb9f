"""The command line of a run: its output, one line per mistake, and how soon."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from pretrain.config import parse_config
from pretrain.errors import EXIT_STOPPED
from pretrain.files import CONFIGS
from pretrain.train import main
from tests.refusals import assert_refused

ROOT = CONFIGS.parent


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MANYFORMER_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `main` in this process; every argument list here ends before training starts."""

    def _call(*argv: str) -> Outcome:
        code = main(argv)
        return Outcome(code, *capsys.readouterr())

    return _call


def _script(*argv: str, cwd: Path) -> Outcome:
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain" / "train.py"), *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_tasks_need_lm_eval_before_anything_is_started(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    monkeypatch.setattr("pretrain.missing_data.missing_data", lambda data: [])
    code, _, err = call("--config-name", "demo", "evaluation.tasks=[arc_easy,piqa]")
    assert code == 2
    assert err.count("\n") == 1
    with assert_refused(
        "evaluation.tasks", "arc_easy,piqa", "not installed", "pip install 'lm_eval"
    ):
        raise ValueError(err.removeprefix("error: ").rstrip("\n"))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--config-name", "demmo"], ["'demmo'", "did you mean 'demo'?"]),
        (["--config-name", "demo", "training.lrr=1"], ["training.lrr=1", "training.lr?"]),
        (["--config-name", "demo", "training.lr=-1"], ["training.lr=-1", "greater than 0"]),
        (["--config-name", "demo", "model.num_layer=3"], ["model.num_layer=3", "num_layers?"]),
        (["--config-name", "demo", "parallel.tensor=2"], ["tensor=2", "world size 1", "1 x 1"]),
        (["--config-name", "demo", "parallel.tensor=4"], ["tensor=4", "num_kv_heads=2", "1, 2"]),
        (
            ["--config-name", "demo", "--ds_config", "no.json"],
            ["no.json' (--ds_config) in ", "zero1.json"],
        ),
        (["--config-name", "demo", "--config-dir", "nowhere"], ["nowhere", "not a directory in "]),
        (["--config-name", "demo", "--lr", "3"], ["--lr", "--help"]),
        (["--config-name"], ["--config-name", "--help"]),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(
    call: Call, argv: list[str], parts: list[str]
) -> None:
    outcome = call(*argv)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.err


def test_a_contradiction_of_the_deepspeed_file_is_one_line(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}')
    outcome = call("--config-name", "demo", "--ds_config", str(file))
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {file}: gradient_clipping=0.5 contradicts")
    assert outcome.err.count("\n") == 1


def test_the_layout_is_checked_against_the_world_of_the_launcher(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    outcome = call("--config-name", "demo", "parallel.pipeline=2")
    assert "does not divide the world size 3" in outcome.err
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "WORLD_SIZE='many'" in call("--config-name", "demo").err


def test_only_the_first_rank_reports_a_mistake(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert call("--config-name", "demmo") == Outcome(2, "", "")


def test_debugging_shows_where_a_mistake_was_found(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYFORMER_DEBUG", "1")
    outcome = call("--config-name", "demmo")
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")


def test_help_fits_a_screen_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 24
    assert "deepspeed pretrain/train.py --config-name demo" in text


def test_the_printed_configuration_is_the_resolved_one(call: Call) -> None:
    outcome = call("training.lr=1e-4", "--print-config", "--config-name", "demo", "parallel=tp2")
    assert outcome.code == 0
    assert outcome.err == ""
    config = parse_config(yaml.safe_load(outcome.out))
    assert config.training.lr == 1e-4
    assert config.parallel.tensor == 2


def test_the_run_directory_is_printed_once_the_settings_fit_the_processes(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--config-name", "demo", "parallel=tp2", "--print-run-dir")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert call(*arguments) == (0, f"{Path.cwd()}/runs/demo\n", "")
    assert call(*arguments, "run_dir='/a/b c$(d)'") == (0, "/a/b c$(d)\n", "")
    monkeypatch.setenv("WORLD_SIZE", "3")
    outcome = call(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "3" in outcome.err


@pytest.mark.parametrize(("reads_markers", "code"), [("1", 0), (None, 75)])
def test_only_a_launcher_that_reads_markers_is_told_zero_for_a_stop(
    reads_markers: str | None,
    code: int,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _touch_demo_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pretrain.run.run", lambda settings, **kwargs: EXIT_STOPPED)
    if reads_markers is not None:
        monkeypatch.setenv("MANYFORMER_READS_MARKERS", reads_markers)
    assert call("--config-name", "demo").code == code


def test_a_run_says_a_word_before_it_imports_torch(tmp_path: Path) -> None:
    _touch_demo_data(tmp_path)
    (tmp_path / "torch.py").write_text(
        "import os\n"
        "names = ('CUDA_DEVICE_MAX_CONNECTIONS', 'PYTORCH_CUDA_ALLOC_CONF')\n"
        "raise SystemExit(f'torch was imported {[os.environ.get(name) for name in names]}')\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from pretrain.train import main\n"
        "sys.exit(main(['--config-name', 'demo', 'run_dir=somewhere']))"
    )
    environment = dict(os.environ, PYTORCH_CUDA_ALLOC_CONF="backend:native")
    environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # What CUDA reads when it starts is set by then, and what the user has set is kept.
    assert done.stderr == "torch was imported ['1', 'backend:native']\n"
    assert done.stdout.startswith("somewhere: settings checked")


def test_the_argument_of_the_deepspeed_launcher_is_accepted(call: Call) -> None:
    outcome = call("--local_rank=0", "--config-name", "demo", "--print-config")
    assert outcome.code == 0


def test_the_script_runs_from_any_directory(tmp_path: Path) -> None:
    outcome = _script("--config-name", "demo", "--print-config", cwd=tmp_path)
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.startswith("run_dir: runs/demo\n")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    # A package of this name would be imported instead of torch, and say so.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from pretrain.train import main\n"
        "sys.exit(main(['--config-name', 'demo', 'parallel.pipeline=3']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: parallel.tensor=1 x parallel.pipeline=3")


@pytest.mark.parametrize(
    ("argv", "setting", "file", "remedy"),
    [
        (["--config-name", "demo"], "data.train", "data/demo/train.idx", "demo_corpus"),
        (["--config-name", "demo", "data.train=a/b"], "data.train", "a/b.idx", "preprocess"),
        (
            ["--config-name", "demo", "data=bytes", "data.train=texts/*.txt"],
            "data.train",
            "texts/*.txt",
            "text files",
        ),
        (["--config-name", "demo", "data.tokenizer=no.model"], "data.tokenizer", "no.model", "set"),
        # A run of epochs, whose number of steps is planned over the data.
        ([], "data.train", "data/wikitext/train.idx", "preprocess"),
    ],
)
def test_data_that_is_not_there_is_one_line_before_torch_is_imported(
    argv: list[str],
    setting: str,
    file: str,
    remedy: str,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "pretrain.run.run", lambda settings, **kwargs: pytest.fail("the run has begun")
    )
    if setting == "data.tokenizer":
        _touch_demo_data(tmp_path)
    outcome = call(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {setting}")
    assert outcome.err.count("\n") == 1
    problem, _, advice = outcome.err.partition("; ")
    assert file in problem
    assert remedy in advice


def _touch_demo_data(directory: Path) -> None:
    """Files by the names that the demonstration reads."""
    folder = directory / "data" / "demo"
    folder.mkdir(parents=True)
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.model"):
        (folder / name).touch()
