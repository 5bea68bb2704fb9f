"""Run files, groups and overrides: their search order, and one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.registry import get_family
from pretrain.config import RunConfig, parse_config, resolved
from pretrain.config.compose import compose_config
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.config.layout import check_layout
from pretrain.config.run_length import plan_run
from pretrain.errors import ConfigError
from pretrain.files import CONFIGS

# `base` has corpora by name, which must be there to count epochs (test_published_commands).
RUN_FILES = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"base"})
SIZES = sorted(path.stem for path in (CONFIGS / "model" / "llama").glob("*.yaml"))
LAYOUTS = sorted(path.stem for path in (CONFIGS / "parallel").glob("*.yaml"))

# Processes that each run file is meant for, as its first line says.
_SIZES = {"125m": 8, "350m": 8, "1b3": 8, "7b": 64, "13b": 128, "70b": 512}
_WORLD = {
    f"{name}_{size}": world
    for name in ("agiformer", "amrpa", "llama", "dart", "daria")
    for size, world in _SIZES.items()
}


@pytest.fixture
def user_dir(tmp_path: Path) -> Path:
    """A folder of run files and groups as a user would add it."""
    _write(tmp_path / "mine.yaml", "defaults: [demo, _self_]\nrun_dir: runs/mine\n")
    _write(tmp_path / "model/llama/wide.yaml", _model(hidden_size=512))
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _model(**changes: Any) -> str:
    values = resolved(compose_config("demo", overrides=["model=llama/demo"]))["model"] | changes
    return "".join(f"{key}: {value}\n" for key, value in values.items() if value is not None)


def _error(name: str = "demo", *overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        compose_config(name, config_dir=config_dir, overrides=overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", RUN_FILES)
def test_every_run_file_fits_the_processes_that_it_is_meant_for(name: str) -> None:
    config = compose_config(name)
    layout = check_layout(config, _WORLD.get(name, 1))
    curriculum = plan_run(config, data_size=layout.data)
    assert curriculum.total_steps > config.training.warmup_steps
    stage = 0 if name.startswith("demo") else 1  # fp32 in one process has nothing to shard
    assert resolve_ds_config(None, config, data_size=layout.data).zero_stage == stage
    assert config.run_dir == f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "tokens_per_step"),
    [
        (f"{name}_{size}", tokens)
        for name in ("amrpa", "llama", "dart", "daria")
        for size, tokens in {
            "125m": 2**19,
            "350m": 2**19,
            "1b3": 2**20,
            "7b": 2**22,
            "13b": 2**22,
            "70b": 2**22,
        }.items()
    ]
    + [
        (f"agiformer_{size}", bytes_)
        for size, bytes_ in {
            "125m": 2**21,
            "350m": 2**21,
            "1b3": 2**22,
            "7b": 2**24,
            "13b": 2**24,
            "70b": 2**24,
        }.items()
    ],
)
def test_the_batch_of_a_run_file_is_the_one_that_its_first_line_states(
    name: str, tokens_per_step: int
) -> None:
    config = compose_config(name)
    curriculum = plan_run(config, data_size=check_layout(config, _WORLD[name]).data)
    assert curriculum.tokens_after(1) == tokens_per_step


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("demo", 2.41),
        ("demo_wide", 3.02),
        ("125m", 134),
        ("350m", 374),
        ("1b3", 1350),
        ("7b", 6740),
        ("13b", 13000),
        ("70b", 69000),
        ("qwen2_0b5", 494),
        ("qwen2_7b", 7620),
        ("qwen3_0b6", 596),
        ("qwen3_8b", 8190),
        ("mistral_7b", 7240),
        ("phi3_mini", 3820),
        ("olmo2_7b", 7300),
        ("gemma_2b", 2510),
    ],
)
def test_a_size_file_has_as_many_parameters_as_its_comment_says(size: str, millions: float) -> None:
    assert size in SIZES
    config = compose_config("demo", overrides=[f"model=llama/{size}"])
    count = get_family("llama").num_parameters(config.model)
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_file_is_valid(layout: str) -> None:
    config = compose_config("llama_70b", overrides=[f"parallel={layout}"])
    assert check_layout(config, 512).data * config.parallel.tensor * config.parallel.pipeline == 512


def test_the_demonstration_runs_at_every_layout_up_to_pipeline_4_and_tensor_2() -> None:
    for tensor in (1, 2):
        for pipeline in (1, 2, 4):
            config = compose_config(
                "demo", overrides=[f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
            )
            assert check_layout(config, tensor * pipeline).data == 1


def test_the_name_may_end_in_yaml() -> None:
    assert compose_config("demo.yaml") == compose_config("demo")


def _override(*overrides: str) -> RunConfig:
    return compose_config("demo", overrides=overrides)


def test_a_setting_that_the_file_does_not_mention_needs_no_prefix() -> None:
    config = _override("training.weight_decay=0.02", "logging.wandb.mode=offline", "resume=never",
                    "logging.wandb.project=p", "data.num_workers=0")  # fmt: skip
    assert config.training.weight_decay == 0.02
    assert config.logging.wandb.mode == "offline"
    assert config.resume == "never"
    assert config.data.num_workers == 0


def test_overrides_have_the_types_of_yaml() -> None:
    config = _override("training.lr=1e-4", "training.betas=[0.8,0.9]", "training.compile=true",
                    "run_dir=/tmp/a b/c", "evaluation.max_windows=null",
                    "training.lr_multipliers={embedding: 0.5}", "data.train=[a/x,{path: b/y,weight: 2}]")  # fmt: skip # noqa: E501
    assert config.training.lr == 1e-4
    assert config.training.betas == (0.8, 0.9)
    assert config.training.compile is True
    assert config.run_dir == "/tmp/a b/c"
    assert config.evaluation.max_windows is None
    assert config.training.lr_multipliers == {"embedding": 0.5}
    assert [(source.path, source.weight) for source in config.data.train] == [
        ("a/x", 1),
        ("b/y", 2),
    ]


def test_an_override_chooses_a_file_of_a_group_that_the_run_file_mentions_or_not() -> None:
    assert _override("model=llama/125m").model.num_layers == 12
    assert _override("parallel=tp2").parallel.tensor == 2
    config = compose_config(
        "llama_125m", overrides=["data=demo", "data.num_workers=3", "data.sequence_length=64"]
    )
    # The run file's own values stay on top of the group's; overrides win over both.
    assert config.data.sequence_length == 64
    assert config.data.num_workers == 3


def test_a_section_can_be_given_as_a_whole() -> None:
    assert _override("parallel={tensor: 2}").parallel.tensor == 2


def test_the_prefixes_of_hydra_still_work() -> None:
    assert _override("++training.seed=5", "+training.eps=1e-6").training.eps == 1e-6
    assert _override("~training.warmup_steps").training.warmup_steps == 0


def test_files_of_the_user_are_found_beside_ours(user_dir: Path) -> None:
    config = compose_config("mine", config_dir=user_dir, overrides=["model=llama/wide"])
    assert config.run_dir == "runs/mine"
    assert config.model.model_dump(mode="json")["hidden_size"] == 512
    assert config.data == compose_config("demo").data


def test_files_of_the_user_win_over_ours(user_dir: Path) -> None:
    _write(user_dir / "model/llama/demo.yaml", _model(hidden_size=128))
    config = compose_config("demo", config_dir=user_dir, overrides=["model=llama/demo"])
    assert config.model.model_dump(mode="json")["hidden_size"] == 128
    _write(user_dir / "demo.yaml", "defaults: [/llama_125m, _self_]\nrun_dir: theirs\n")
    assert compose_config("demo", config_dir=user_dir).run_dir == "theirs"


def test_a_config_dir_may_have_blanks_and_quotes_in_its_name(user_dir: Path) -> None:
    odd = user_dir / "it's a, folder"
    _write(odd / "model/llama/odd.yaml", _model(num_layers=7))
    config = compose_config("demo", config_dir=odd, overrides=["model=llama/odd"])
    assert config.model.num_layers == 7


def test_composing_leaves_no_trace_in_the_working_directory(tmp_path: Path) -> None:
    code = "from pretrain.config.compose import compose_config; compose_config('demo')"
    root = str(CONFIGS.parent)
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
        cwd=tmp_path,
        check=True,
    )
    assert list(tmp_path.iterdir()) == []


def test_the_resolved_configuration_composes_to_itself(tmp_path: Path) -> None:
    config = compose_config("llama_7b")
    assert parse_config(resolved(config)) == config


@pytest.mark.parametrize(
    ("name", "overrides", "parts"),
    [
        ("demmo", [], ["'demmo'", "did you mean 'demo'?"]),
        ("qqqqq", [], ["'qqqqq'", "llama_13b, llama_1b3"]),
        ("../pyproject", [], ["not a run file"]),
        ("demo", ["model=llama/126m"], ["model=llama/126m", "did you mean model=llama/125m?"]),
        ("demo", ["data=zzz"], ["data=zzz", "known are blend, bytes, curriculum, demo, named"]),
        ("demo", ["training.lr"], ["'training.lr'", "has no value", "training.lr=VALUE"]),
        ("demo", ["training.lr="], ["training.lr=''"]),
        ("demo", ["training.lr=[1"], ["training.lr=[1", "cannot be parsed", "quote"]),
        ("demo", ["run_dir=a=b"], ["run_dir=a=b", "cannot be parsed", "quote"]),
        ("demo", ["training..lr=1"], ["training..lr=1", "section.key=VALUE"]),
        ("demo", ["model="], ["model=", "not a file", "llama/125m"]),
        ("demo", ["training.learning_rate=1"], ["training.learning_rate=1", "training.lr?"]),
        ("demo", ["trianing.lr=1"], ["unknown key trianing", "did you mean training?"]),
        ("demo", ["modle=llama/125m"], ["unknown key modle", "did you mean model?"]),
        ("demo", ["~training.zzz"], ["training.zzz", "does not exist"]),
        ("demo", ["run_dir=${nothing}"], ["nothing"]),
        ("demo", ["run_dir=${run_dir}"], ["demo.yaml"]),
        ("demo", ["hydra.run.dir=x"], ["hydra.run.dir=x", "no effect"]),
        ("demo", ["training.lr=1,2"], ["training.lr=1,2", "several values"]),
        ("demo", ["run_dir=???"], ["run_dir"]),
        ("demo", ["~training"], ["training is missing"]),
    ],
)
def test_what_cannot_be_composed_is_refused_in_one_line(
    name: str, overrides: list[str], parts: list[str]
) -> None:
    message = _error(name, *overrides)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run_dir: a\nrun_dir: b\n", ["duplicate key run_dir", "line 2"]),
        ("training: {lr: 1, lr: 2}\n", ["duplicate key lr"]),
        ("training: [1\n", ["bad.yaml", "line 2"]),
        ("- 1\n", ["bad.yaml"]),
        ("defaults: [nothing]\n", ["nothing"]),
        ("defaults: [{model: llama/126m}]\n", ["bad.yaml", "did you mean model=llama/125m?"]),
        ("x: !!python/object/apply:os.system [echo]\n", ["bad.yaml", "python/object"]),
        ("", ["is missing"]),
        ("\x00", ["bad.yaml"]),
    ],
)
def test_a_damaged_run_file_is_refused_with_its_place(
    user_dir: Path, text: str, parts: list[str]
) -> None:
    _write(user_dir / "bad.yaml", text)
    message = _error("bad", config_dir=user_dir)
    for part in parts:
        assert part in message
    assert "/tmp/tmp" not in message


def test_a_config_dir_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    message = _error(config_dir=tmp_path / "nowhere")
    assert "nowhere" in message
    assert "not a directory" in message
