"""The DeepSpeed JSON: values that are filled in, and values that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import parse_config
from pretrain.config.deepspeed import DeepSpeedSettings, resolve_ds_config
from pretrain.errors import ConfigError
from pretrain.files import CONFIGS
from tests.pretrain.run_values import run_values


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes values (or raw text) as a DeepSpeed file and returns its path."""

    def _write(values: dict[str, Any] | str) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return _write


def _resolve(path: Path | None, data_size: int = 1, **changes: Any) -> DeepSpeedSettings:
    return resolve_ds_config(path, parse_config(run_values(**changes)), data_size=data_size)


def _error(path: Path | None, **changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        _resolve(path, **changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def _zero_file(stage: int) -> Path:
    return CONFIGS / "ds" / f"zero{stage}.json"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_auto_values_are_filled_from_the_run_configuration(stage: int) -> None:
    ds_config = _resolve(_zero_file(stage), data_size=3, training__gradient_accumulation_steps=4)
    config = ds_config.values
    assert ds_config.zero_stage == config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == 2 * 4 * 3
    assert config["bf16"]["enabled"] is False
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize("name", ["zero2.json", "configs/ds/zero2.json", "./configs/ds/zero2.json"])
def test_a_file_of_the_project_is_found_from_any_directory(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = parse_config(run_values())
    monkeypatch.chdir(tmp_path)
    assert resolve_ds_config(name, config, data_size=1).zero_stage == 2
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text(json.dumps(_zero(1)))
    ds_config = resolve_ds_config(name, config, data_size=1)
    assert ds_config.zero_stage == 1, "a file of the user's own comes first"


@pytest.mark.parametrize("name", ["ds/zero2.json", "/configs/ds/zero2.json", "../ds/zero2.json"])
def test_no_other_path_stands_for_a_file_of_the_project(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    message = _error(Path(name))
    assert repr(name) in message
    assert "No such file" in message


def test_a_file_need_not_mention_what_the_run_configuration_owns(write: Any) -> None:
    assert _resolve(write(_zero(1))).values["train_batch_size"] == 2


@pytest.mark.parametrize(("precision", "enabled"), [("bf16", True), ("fp32", False)])
def test_bf16_follows_the_precision_of_the_run(precision: str, enabled: bool) -> None:
    config = _resolve(None, training__precision=precision).values
    assert config["bf16"]["enabled"] is enabled


def test_fp8_is_bf16_for_deepspeed() -> None:
    config = _resolve(None, training__precision="fp8", training__fp8_recipe="mxfp8").values
    assert config["bf16"]["enabled"] is True


def test_the_loop_clips_exactly_where_deepspeed_reports_no_norm(write: Any) -> None:
    for stage in (0, 1, 2, 3):
        ds_config = _resolve(write({**_zero(stage), "gradient_clipping": 0.7}), **_CLIP)
        assert ds_config.clip_in_loop == (stage == 0)
        assert ds_config.values["gradient_clipping"] == (0.0 if stage == 0 else 0.7)


_CLIP = {"training__grad_clip": 0.7}


def test_gradients_are_summed_in_fp32_unless_the_file_says_otherwise(write: Any) -> None:
    bf16 = {"training__precision": "bf16"}
    assert _resolve(None, **bf16).values["communication_data_type"] == "fp32"
    path = write({**_zero(1), "communication_data_type": "bf16"})
    assert _resolve(path, **bf16).values["communication_data_type"] == "bf16"


def test_timers_that_fail_in_pipelines_are_refused_there(write: Any) -> None:
    path = write({**_zero(1), "wall_clock_breakdown": True})
    assert _resolve(path).values["wall_clock_breakdown"] is True
    assert "wall_clock_breakdown=true with parallel.p" in _error(path, parallel__pipeline=2)


def test_pipeline_messages_are_never_partitioned() -> None:
    config = _resolve(None, parallel__pipeline=2).values
    assert config["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}


def test_deepspeed_neither_prints_nor_waits_for_the_device_unless_it_is_asked_to(
    write: Any,
) -> None:
    config = _resolve(None).values
    assert config["steps_per_print"] > 10**6
    assert config["timers"] == {"throughput": {"enabled": False}}
    loud = {**_zero(1), "steps_per_print": 5, "timers": {"throughput": {"enabled": True}}}
    config = _resolve(write(loud)).values
    assert config["steps_per_print"] == 5
    assert config["timers"] == {"throughput": {"enabled": True}}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"gradient_clipping": 0.5}, ["gradient_clipping=0.5", "training.grad_clip", "1.0"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["per_gpu=4", "training.batch_size", "gives 2"]),
        ({"gradient_accumulation_steps": 8}, ["=8", "training.gradient_accumulation_steps"]),
        ({"train_batch_size": 7}, ["train_batch_size=7", "training.batch_size x"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "training.precision", "gives False"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype='bf16'", "'fp32'"]),
        ({"pipeline": {"pipe_partitioned": True}}, ["pipe_partitioned=True", "False"]),
    ],
)
def test_a_value_that_contradicts_the_run_configuration_names_both_places_and_values(
    write: Any, values: dict[str, Any], parts: list[str]
) -> None:
    path = write({**_zero(1), **values})
    message = _error(path)
    assert str(path) in message
    assert "contradicts" in message
    for part in parts:
        assert part in message


def test_an_equal_value_in_both_places_is_accepted(write: Any) -> None:
    assert _resolve(write({**_zero(1), "gradient_clipping": 1})).values["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"gradient_cliping": 1.0}, ["gradient_cliping", "did you mean gradient_clipping?"]),
        ({"zero_optimisation": {}}, ["did you mean zero_optimization?"]),
        (_zero(1, reduce_bucket=5), ["zero_optimization.reduce_bucket", ".reduce_bucket_size?"]),
        ({"bf16": {"enable": True}}, ["bf16.enable", "bf16.enabled?"]),
        (
            _zero(3, offload_optimizer={"devise": "cpu"}),
            ["zero_optimization.offload_optimizer.devise", "offload_optimizer.device?"],
        ),
        ({"timers": {"throughput": {"on": True}}}, ["timers.throughput.on", "synchronized"]),
        ({"qqq": 1}, ["unknown key qqq", "valid keys are", "zero_optimization"]),
    ],
)
def test_an_unknown_key_at_any_depth_is_refused_with_the_nearest_valid_one(
    write: Any, values: dict[str, Any], parts: list[str]
) -> None:
    message = _error(write(values))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"optimizer": {"type": "AdamW"}}, ["optimizer", "training.optimizer"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "training.schedule"]),
        ({"fp16": {"enabled": True}}, ["fp16", "training.precision=bf16"]),
        (_zero(2, zenflow={}), ["zero_optimization.zenflow", "changes the weights"]),
        ({"compile": {"deepcompile": True}}, ["compile", "training.compile"]),
        ({"pipeline": {"stages": 2}}, ["pipeline.stages", "parallel.pipeline"]),
        ({"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor", "needs no scaling"]),
        (_zero(3, zero_quantized_gradients=True), ["zero_quantized_gradients", "8 bits"]),
        (_zero(3, offload_optimizer={"ratio": 0.5}), ["offload_optimizer.ratio", "all of"]),
        ({"aio": {"queue_depth": 8}}, ["aio", "NVMe"]),
    ],
)
def test_what_others_own_or_what_trains_wrongly_is_refused_with_a_remedy(
    write: Any, values: dict[str, Any], parts: list[str]
) -> None:
    message = _error(write(values))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"gradient_clipping": -1.0}, ["gradient_clipping=-1.0", "number >= 0"]),
        ({"steps_per_print": "often"}, ["steps_per_print='often'", "whole number"]),
        ({"train_batch_size": True}, ["train_batch_size=True", "whole number"]),
        (_zero(4), ["zero_optimization.stage=4", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage=True", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": "auto"}}, ["stage is 'auto'", "0, 1, 2 or 3"]),
        ({"zero_optimization": True}, ["zero_optimization=True", "object"]),
        (_zero(1, reduce_bucket_size=0.5), ["reduce_bucket_size=0.5", "whole number"]),
        (_zero(1, reduce_bucket_size="auto"), ["reduce_bucket_size is 'auto'", "nothing fills"]),
        (_zero(1, stage3_max_live_parameters=1), ["max_live_parameters", "no effect", "stage=1"]),
        (_zero(0, overlap_comm=True), ["overlap_comm", "no effect", "stage=0"]),
        (_zero(2, offload_param={"device": "cpu"}), ["offload_param.device", "no effect"]),
        (_zero(3, offload_param={"device": "nvme"}), ["device='nvme'", "'none', 'cpu'"]),
        ({"communication_data_type": "fp16"}, ["communication_data_type='fp16'", "'bf16'"]),
        ({"communication_data_type": "bf16"}, ["training.precision=fp32", "remove the key"]),
    ],
)
def test_an_unusable_value_is_refused_with_key_value_and_constraint(
    write: Any, values: dict[str, Any], parts: list[str]
) -> None:
    message = _error(write(values))
    for part in parts:
        assert part in message


def test_bucket_sizes_may_be_written_as_5e8(write: Any) -> None:
    config = _resolve(write(_zero(1, reduce_bucket_size=5e8))).values
    assert config["zero_optimization"]["reduce_bucket_size"] == 500_000_000


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"gradient_clipping": 1.0, "gradient_clipping": 2.0}', ["twice", "1.0", "2.0"]),
        ('{"bf16": {"enabled": true, "enabled": false}}', ["'enabled' occurs twice"]),
        ('{"gradient_clipping": NaN}', ["NaN"]),
        ('{"gradient_clipping": 1.0,}', ["not usable JSON", "line 1"]),
        ("", ["not usable JSON"]),
        ("[1]", ["must be an object"]),
        ("[" * 100_000, ["not usable JSON"]),
    ],
)
def test_a_file_that_is_not_proper_json_is_refused(write: Any, text: str, parts: list[str]) -> None:
    message = _error(write(text))
    for part in parts:
        assert part in message


def test_a_missing_file_is_refused_with_the_files_that_exist(tmp_path: Path) -> None:
    message = _error(tmp_path / "zero9.json")
    assert "zero9.json" in message
    assert "No such file" in message
    assert "zero0.json, zero1.json, zero2.json, zero3.json" in message


@pytest.mark.parametrize(("stage", "why"), [(0, "norm"), (2, "gradients"), (3, "parameters")])
def test_pipelines_run_under_zero_1_only(stage: int, why: str) -> None:
    message = _error(_zero_file(stage), parallel__pipeline=2)
    assert f"stage={stage} with parallel.pipeline=2" in message
    assert why in message
    assert "zero1.json" in message


def test_bf16_without_zero_is_refused() -> None:
    message = _error(_zero_file(0), training__precision="bf16")
    assert "stage=0 with training.precision=bf16" in message
    assert "zero1.json" in message


def test_an_optimizer_of_the_device_is_refused_under_host_offload(write: Any) -> None:
    path = write(_zero(2, offload_optimizer={"device": "cpu"}))
    message = _error(path, training__optimizer="fused_adam")
    assert "training.optimizer=fused_adam" in message
    assert "cpu_adam" in message
    assert _resolve(path, training__optimizer="cpu_adam").zero_stage == 2


_MUON = {"training__optimizer": "muon"}


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_runs_only_where_the_gradient_is_clipped_and_measured(
    stage: int, precision: str, grad_clip: float
) -> None:
    changes = {
        **_MUON,
        "training__precision": precision,
        "training__grad_clip": grad_clip,
    }
    if (stage, precision) in ((0, "fp32"), (1, "bf16")):
        assert _resolve(_zero_file(stage), **changes).zero_stage == stage
    elif (stage, precision) == (0, "bf16"):
        assert "stage=0 with training.precision=bf16" in _error(_zero_file(stage), **changes)
    else:
        message = _error(_zero_file(stage), **changes)
        assert f"stage={stage} with training.optimizer=muon and training.p" in message
        assert "zero1.json with training.precision=bf16, configs/ds/zero0.json" in message


def test_muon_runs_in_pipelines_in_bf16() -> None:
    pipeline = {**_MUON, "parallel__pipeline": 2}
    assert _resolve(_zero_file(1), **pipeline, training__precision="bf16").zero_stage == 1
    assert "zero1.json with training.precision=bf16 or" in _error(_zero_file(1), **pipeline)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_parses_what_we_resolve(stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig(_resolve(_zero_file(stage)).values)
    assert parsed.zero_optimization_stage == stage
    assert parsed.gradient_clipping == (0.0 if stage == 0 else 1.0)
    assert parsed.timers_config.enabled is False


@pytest.mark.parametrize(
    ("changes", "data_size", "stage"),
    [
        ({}, 1, 0),
        ({}, 2, 1),
        ({"training__precision": "bf16"}, 1, 1),
        ({"parallel__pipeline": 2}, 1, 1),
        (_MUON, 2, 0),
        ({**_MUON, "training__precision": "bf16"}, 2, 1),
    ],
)
def test_the_default_is_zero_1_unless_it_would_shard_nothing(
    changes: dict[str, Any], data_size: int, stage: int
) -> None:
    config = parse_config(run_values(**changes))
    assert resolve_ds_config(None, config, data_size=data_size).zero_stage == stage
