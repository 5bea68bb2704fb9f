"""What tests/models/test_contributing.py runs in a copy of the project that has the guide's family.

Not collected by itself: in the project there is no such family.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from models import convert
from models.base import TokenInputs, logits_of
from models.checkpoint import load_model, open_checkpoint
from models.generate import generate
from models.registry import get_family
from parallel.context import ParallelContext
from pretrain.config import RunConfig
from pretrain.config.compose import compose_config
from pretrain.errors import EXIT_COMPLETED
from tests.distributed import run_ranks
from tests.equivalence import Measured, measure
from tests.models.families import CASES
from tests.models.hf.alone import computed_alone
from tests.models.test_contract import BOUNDS
from tests.models.test_contributing import commands
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, write_data
from tests.tolerance import FP32_LOSS, FP32_NORM, FP64, assert_close

STEPS, NEW_TOKENS = 2, 5
ZERO = "configs/ds/zero1.json"
SMALL = {
    "data.tokenizer": "null",
    "data.sequence_length": 32,
    "training.max_steps": STEPS,
    "training.warmup_steps": 1,
    "training.batch_size": 4,
    "training.log_interval": 1,
    "checkpoint.interval": STEPS,
    "evaluation.interval": STEPS,
}


@pytest.fixture(scope="module")
def command() -> list[str]:
    """The settings of the command of the guide that trains."""
    [training] = [line for line in commands() if "pretrain/train.py" in line]
    name = training.index("--config-name")
    assert training[name + 1] == "demo"
    return training[name + 2 :]


@pytest.fixture(scope="module")
def trained(command) -> RunConfig:
    write_data(Path("data/demo"))
    config = _config(command)
    ranks = config.parallel.pipeline * config.parallel.tensor
    assert (config.parallel.pipeline, config.parallel.tensor, ranks) == (2, 2, 4)
    assert run_ranks(run_training, ranks, config, ZERO, init=False) == [EXIT_COMPLETED] * ranks
    return config


def _config(overrides: list[str]) -> RunConfig:
    small = [f"{name}={value}" for name, value in SMALL.items()]
    return compose_config("demo", overrides=[*overrides, *small])


def _measured(tensor: int, cuts: tuple[int, ...] = ()) -> Measured:
    family, config = CASES["scaled"]
    ctx = ParallelContext.single() if tensor == 1 else ParallelContext.from_world(tensor=tensor)
    stream = torch.randint(0, 61, (3, 33), generator=torch.Generator().manual_seed(1))
    inputs, labels = TokenInputs(stream[:, :-1].contiguous()), stream[:, 1:].contiguous()
    return measure(family, config, inputs, labels, ctx, cuts=cuts, seed=7, noise=0.2)


def _cut_and_whole() -> tuple[Measured, Measured]:
    return _measured(2, (3,)), _measured(2)


def test_scaled_has_the_loss_and_gradients_of_one_process_in_two_stages_of_two_ranks():
    """The contract test does the same in fp64, which the wire between stages does not carry."""
    expected = _measured(1)
    assert "block_3.scales" in expected.gradients
    for cut, whole in run_ranks(_cut_and_whole, 2):
        assert torch.equal(cut.loss, whole.loss)
        assert_close(cut.loss, expected.loss, BOUNDS[torch.float32], "loss")
        assert cut.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert torch.equal(cut.gradients[name], whole.gradients[name]), name
            assert_close(cut.gradients[name], gradient, BOUNDS[torch.float32], name)


def test_scaled_trains_in_two_stages_of_two_ranks_as_in_one_process(command, trained):
    alone = [each for each in command if not each.startswith("parallel.")]
    single = _config([*alone, "run_dir=runs/single"])
    assert run_ranks(run_training, 1, single, ZERO, init=False) == [EXIT_COMPLETED]
    (found, found_evaluation), (expected, evaluation) = metrics(trained), metrics(single)
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=FP32_LOSS)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=FP32_NORM)
    assert found_evaluation[-1]["eval_loss"] == pytest.approx(
        evaluation[-1]["eval_loss"], rel=FP32_LOSS
    )


def test_scaled_is_exported_for_transformers_alone(trained, tmp_path):
    [export] = [line[3:] for line in commands() if "models.convert" in line]
    assert export[export.index("--checkpoint") + 1] == trained.run_dir
    assert convert.main(export) == 0
    tokens = torch.randint(0, 2048, (2, 21), generator=torch.Generator().manual_seed(0))
    [result] = computed_alone(
        [Path("exported").absolute()], tokens, new_tokens=NEW_TOKENS, folder=tmp_path
    )
    model = load_model(open_checkpoint("runs/demo"), device="cpu").double()
    with torch.no_grad():
        logits = logits_of(model(TokenInputs(tokens))).transpose(0, 1)
    torch.testing.assert_close(result["logits"], logits, **FP64)
    assert torch.equal(result["again"], result["logits"])
    assert torch.equal(result["greedy"], generate(model, tokens, max_new_tokens=NEW_TOKENS))


def test_scaled_comes_back_bit_for_bit(trained, tmp_path):
    assert convert.main(["from-hf", "--model", "exported", "--output", str(tmp_path / "back")]) == 0
    back, stored = open_checkpoint(tmp_path / "back"), open_checkpoint("runs/demo")
    assert back.config == stored.config
    expected = load_model(stored, device="cpu").state_dict()
    for name, tensor in load_model(back, device="cpu").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_model_of_scaled_is_known_to_transformers_here(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    mapping = get_family("scaled").require_hf()
    model_class = mapping.model_class()
    model = AutoModelForCausalLM.from_pretrained("exported")
    assert type(model) is model_class
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (4, 192)
    model.save_pretrained(tmp_path)
    for name in mapping.code:
        assert (tmp_path / name).read_bytes() == Path("exported", name).read_bytes()
