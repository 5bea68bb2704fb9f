"""The command lines of the published Dynamic Transformer compose to the settings that they name."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.registry import get_family
from pretrain.config.compose import compose_config
from pretrain.config.schema import RunConfig
from pretrain.errors import ConfigError
from pretrain.files import CONFIGS

QWEN = 'model.base_model_name="Qwen/Qwen2.5-{}"'
# What follows `train.py`, and some of what it must come to.
COMMANDS: dict[str, dict[str, Any]] = {
    "model_type=dtf model.capacity_gamma=0.5": {"model.num_layers": 24, "data.train": ["wikitext"]},
    "model_type=mod model.capacity_gamma=0.5": {"model.family": "mod", "model.hidden_size": 896},
    f"model_type=dtf {QWEN.format('0.5B')} model.num_hidden_layers=6 model.hidden_size=512 "
    "model.intermediate_size=1536 model.num_attention_heads=8 model.capacity_gamma=0.5 "
    "data.dataset_name=wikitext training.num_epochs=10 training.batch_size=8 "
    "training.gradient_accumulation_steps=4 training.lr=1e-3 training.warmup_steps=1000": {
        "model.num_heads": 8, "model.num_kv_heads": 2, "training.max_epochs": 10.0,
    },
    f"model_type=dtf {QWEN.format('0.5B')} model.capacity_gamma=0.5 model.beta_ce_init=-0.3 "
    "model.beta_cu_init=-0.6 data.mixed=true "
    """data.dataset_names='["wikitext","openwebtext","pile-subset"]' """
    "data.dataset_weights='[0.2,0.5,0.3]' training.num_epochs=3 training.batch_size=4 "
    "training.gradient_accumulation_steps=8 training.lr=5e-4 training.warmup_steps=2000": {
        "data.train": ["wikitext", "openwebtext", "pile-subset"], "model.hidden_size": 896,
    },
    f"model_type=dtf {QWEN.format('1.5B')} model.capacity_gamma=0.5 training.batch_size=2 "
    "training.gradient_accumulation_steps=16 training.lr=2e-4": {"model.hidden_size": 1536},
    f"model_type=dtf {QWEN.format('3B')} model.capacity_gamma=0.25 training.batch_size=1 "
    "training.gradient_accumulation_steps=32 training.lr=1e-4 training.use_flash_attention=true": {
        "model.num_layers": 36, "model.capacity_gamma": 0.25,
    },
    f"model_type=dtf {QWEN.format('7B')} model.capacity_gamma=0.125 training.batch_size=1 "
    "training.gradient_accumulation_steps=64 training.lr=5e-5 training.use_flash_attention=true "
    "training.gradient_checkpointing=true": {
        "model.vocab_size": 152064, "training.activation_recomputation": "full",
    },
    "model_type=dtf data.dataset_name=wikitext data.mixed=false": {"data.train": ["wikitext"]},
    """model_type=dtf data.mixed=true data.dataset_names='["wikitext","openwebtext"]' """
    "data.dataset_weights='[0.3,0.7]'": {"data.train": ["wikitext", "openwebtext"]},
    "model_type=dtf data.mixed=true data.dataset_weights='[0.1,0.3,0.2,0.2,0.2]' "
    """data.dataset_names='["wikitext","openwebtext","pile-subset","c4-subset","redpajama-subset"]'"""
    " data.max_length=2048": {"data.sequence_length": 2048},
    f"model_type=dtf {QWEN.format('1.5B')} training.batch_size=16 "
    "training.gradient_accumulation_steps=1 training.use_flash_attention=true "
    """training.mixed_precision="bf16" training.compile_model=true""": {
        "training.compile": True, "training.precision": "bf16",
    },
}  # fmt: skip
CUSTOM = """
model_type: "dtf"
model:
  base_model_name: "Qwen/Qwen2.5-0.5B"
  capacity_gamma: 0.5
  beta_ce_init: -0.3
  beta_cu_init: -0.6
  prior_loss_weight: 0.05

data:
  dataset_name: "wikitext"
  max_length: 1024
  mixed: false

training:
  num_epochs: 5
  batch_size: 4
  gradient_accumulation_steps: 8
  lr: 5e-4
  warmup_steps: 1000
  lr_multipliers:
    base_model: 1.0
    router: 10.0
    prior: 10.0
"""


def _value(config: RunConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return [source.name for source in value] if path == "data.train" else value


@pytest.mark.parametrize("command", COMMANDS)
def test_a_published_command_is_understood(command: str) -> None:
    config = compose_config("base", overrides=shlex.split(command))
    for path, expected in COMMANDS[command].items():
        assert _value(config, path) == expected, path


def test_a_published_run_file_goes_on_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "my_training.yaml").write_text(CUSTOM)
    config = compose_config("my_training", config_dir=tmp_path)
    assert config.model.family == "dtf"
    assert (config.training.max_epochs, config.training.lr) == (5.0, 5e-4)
    assert config.training.lr_multipliers == {"": 1.0, "router": 10.0, "prior": 10.0}
    (tmp_path / "mine.yaml").write_text("model_type: mod\ntraining: {num_epochs: 1}\n")
    assert compose_config("mine", config_dir=tmp_path).model.family == "mod"
    other = compose_config("mine", config_dir=tmp_path, overrides=["model_type=dtf"])
    assert other.model.family == "dtf"  # the command line wins over the file


def test_the_small_model_from_scratch_has_the_parameters_that_its_sizes_give() -> None:
    """It is called a model of 50M: 18.5M and an embedding of 77.8M."""
    command = next(command for command in COMMANDS if "num_hidden_layers=6" in command)
    config = compose_config("base", overrides=shlex.split(command)).model
    embedding = 151_936 * 512
    others = get_family("dtf").num_parameters(config) - embedding
    assert (embedding, round(others / 1e6, 1)) == (77_791_232, 18.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.base_model_name=Qwen/Qwen2.5-0.6B", "did you mean 'Qwen/Qwen2.5-0.5B'"),
        ("model.base_model_name=.", "convert it with python -m models.convert from-hf"),
        ("model.pretrained_model_name=x", "base_model_name and model.pretrained_model_name differ"),
        ("model_type=dft", "did you mean model_type=dtf"),
        ("training.mixed_precision=fp16", "mixed_precision='fp16' is not one of 'bf16'"),
        ("training.optimizer={lr: 1.0}", "training.optimizer.lr=1.0 is another spelling of"),
    ],
)
def test_a_name_that_is_not_known_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config("base", overrides=[override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_base_model_has_its_sizes_in_both_families() -> None:
    sizes = yaml.safe_load((CONFIGS / "base_models" / "qwen2.5.yaml").read_text())
    millions = {
        "0.5B": 494.0, "1.5B": 1543.7, "3B": 3085.9, "7B": 7615.6, "14B": 14770.0,
        "32B": 32763.9, "72B": 72706.2,
    }  # fmt: skip
    assert {name.removeprefix("Qwen/Qwen2.5-") for name in sizes} == millions.keys()
    for name in sizes:
        for family in ("mod", "dtf"):
            overrides = [f"model_type={family}", f"model.base_model_name={name}"]
            config = compose_config("base", overrides=[*overrides, "model.capacity_gamma=1.0"])
            count = get_family(family).num_parameters(config.model) / 1e6
            assert count == pytest.approx(millions[name.removeprefix("Qwen/Qwen2.5-")], abs=0.06)
