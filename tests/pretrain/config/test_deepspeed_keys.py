"""The tables of accepted and refused keys, against the installed DeepSpeed."""

from __future__ import annotations

from typing import Any

from pretrain.config.deepspeed_keys import ACCEPTED, REFUSED, STAGE_3_ONLY, ZERO


def _names_below(prefix: str) -> set[str]:
    names = {key.removeprefix(prefix) for key in REFUSED if key.startswith(prefix)}
    return {name for name in names if "." not in name}


def test_no_key_is_both_accepted_and_refused() -> None:
    for key in REFUSED:
        *parents, name = key.split(".")
        section = ACCEPTED
        for parent in parents:
            section = section[parent]
        assert name not in section
    assert ZERO.keys() >= STAGE_3_ONLY


class _Recorder(dict[str, Any]):
    """A configuration that notes every top-level key that is asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Recorder:
        return self


def test_the_top_level_keys_are_those_that_deepspeed_asks_for() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recorder = _Recorder({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(recorder)
    # Asked for only when there is no process group, or not by DeepSpeedConfig itself.
    asked = recorder.asked | {"sequence_parallel_size", "data_parallel_size"}
    assert asked == ACCEPTED.keys() | {key for key in REFUSED if "." not in key}


def test_the_keys_of_sections_are_those_of_deepspeeds_own_models() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    def keys(model: Any) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    assert keys(DeepSpeedZeroConfig) == ZERO.keys() | _names_below("zero_optimization.")
    for name, model in (
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
    ):
        refused = _names_below(f"zero_optimization.{name}.")
        assert keys(model) == ZERO[name].keys() | refused
    assert keys(DeepSpeedBF16Config) == ACCEPTED["bf16"].keys() | _names_below("bf16.")
    assert keys(CommsLoggerConfig) == ACCEPTED["comms_logger"].keys()
    assert keys(DeepSpeedThroughputTimerConfig) == ACCEPTED["timers"]["throughput"].keys()
