"""The quick starts of the published package run as printed, in a folder that holds the models.

What a line calls `roberta-base` is a folder of that name: a tiny one, twelve layers deep.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from models.amrpa import AMRPAConfig
from tests.models.amrpa.tiny import inputs, plain

BASIC = """
from amrpa import inject_amrpa
from transformers import AutoModel

# Load your model
model = AutoModel.from_pretrained('roberta-base')

# Inject AMRPA with defaults
model = inject_amrpa(model)

# Use the model normally
outputs = model(**inputs)
"""
CUSTOM = """
from amrpa import inject_amrpa, AMRPAConfig

# Create custom configuration
config = AMRPAConfig(
    memory_decay=0.95,          # Decay factor for older patterns
    memory_noise=0.001,          # Noise level
    target_layers='last_6',      # Inject into last 6 layers
    gate_sensitivity=2.5,        # Gate scaling factor
    alpha_temperature=0.3        # Selection temperature
)

# Inject with custom config
model = inject_amrpa(model, config=config)
"""
# Each for a model of its own: a model is injected once.
TARGETS = {
    "model = inject_amrpa(model, target_layers=[8, 9, 10, 11])": [8, 9, 10, 11],
    "model = inject_amrpa(model, target_layers='last_4')": [8, 9, 10, 11],
    "model = inject_amrpa(model, target_layers='first_3')": [1, 2],
    "model = inject_amrpa(model, target_layers='middle_6')": [3, 4, 5, 6, 7, 8],
    "model = inject_amrpa(model, target_layers='6:10')  # Slice notation": [6, 7, 8, 9],
}
METRICS = """
from amrpa import get_amrpa_metrics, reset_amrpa_history

# Reset history before each batch
reset_amrpa_history(model)

# Forward pass
outputs = model(**inputs)

# Collect metrics
metrics = get_amrpa_metrics(model)
print(f"Gate impact: {metrics['gate_impact'].mean():.4f}")
print(f"Alpha diversity: {metrics['alpha_diversity'].mean():.4f}")
"""
TRAINING = """
from transformers import Trainer

# Inject AMRPA
model = inject_amrpa(model, config=config)

# Train normally
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset
)

trainer.train()
"""


def printed(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names after running `code` with those in `names`; the import path alone differs."""
    exec(code.replace("from amrpa import", "from models.amrpa import"), names)
    return names


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return plain("roberta", num_hidden_layers=12)


def test_basic_usage_and_metrics(model, capsys):
    model.base_model.save_pretrained("roberta-base")
    names = printed(BASIC, {"inputs": inputs("roberta")})
    expected = model.base_model(**inputs("roberta")).last_hidden_state
    assert torch.equal(names["outputs"].last_hidden_state, expected)
    printed(METRICS, names)
    gate, diversity = capsys.readouterr().out.splitlines()[-2:]
    assert 0 < float(gate.removeprefix("Gate impact: ")) < 1
    assert 0 < float(diversity.removeprefix("Alpha diversity: ")) <= 1.3863  # ln 4


def test_a_custom_configuration(model):
    config = printed(CUSTOM, {"model": model})["model"].config.amrpa_config
    assert (config["memory_decay"], config["target_layers"]) == (0.95, "last_6")
    assert [len(stack.plan.reads) for stack in model.amrpa_state.stacks] == [6]


@pytest.mark.parametrize("line", TARGETS)
def test_specific_layers(line, model):
    injected = printed("from amrpa import inject_amrpa\n" + line, {"model": model})["model"]
    assert list(injected.amrpa_state.stacks[0].plan.reads) == TARGETS[line]


def test_training(model):
    rows = [{"input_ids": row, "labels": row} for row in inputs("roberta")["input_ids"]]
    arguments = TrainingArguments(
        ".", max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    names = {
        "model": model, "config": AMRPAConfig(), "training_args": arguments,
        "train_dataset": rows, "eval_dataset": rows,
    }  # fmt: skip
    printed("from amrpa import inject_amrpa" + TRAINING, names)
    assert names["trainer"].state.global_step == 1
    moved = [p.abs().max() for n, p in model.named_parameters() if n.endswith("memory_weight")]
    assert len(moved) == 4
    assert all(step > 0 for step in moved)
