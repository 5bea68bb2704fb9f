"""The steps of tests/models/test_contributing.py in a copy of the project with the guide's family:
the commands of CONTRIBUTING.md, and those of docs/tutorial.md, small.

Not collected by itself: in the project there is no such family.
"""

from __future__ import annotations

import json
import sys
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
from pretrain.__main__ import main
from pretrain.config import RunConfig
from pretrain.config.compose import compose_config
from pretrain.config.resolve import resolve_run
from pretrain.errors import EXIT_COMPLETED
from tests.distributed import run_ranks
from tests.equivalence import Measured, measure
from tests.models.families import CASES
from tests.models.hf.alone import computed_alone
from tests.models.test_contract import BOUNDS
from tests.models.test_contributing import commands, tutorial_commands
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


def _tutorial(name: str, **has: str) -> list[str]:
    """The command `manyformer NAME` of the tutorial whose option `--config-name` is `has`."""
    wanted = [part for key, value in has.items() for part in (f"--{key.replace('_', '-')}", value)]
    [found] = [
        line[1:]
        for line in tutorial_commands()
        if line[:2] == ["manyformer", name] and set(wanted) <= set(line)
    ]
    return found


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["manyformer", *arguments])
    return main()


@pytest.fixture(scope="module")
def single(trained) -> RunConfig:
    """The run that the tutorial trains in one process."""
    _, option, name, *overrides = _tutorial("train")
    assert (option, name) == ("--config-name", "demo")
    config = _config(overrides)
    assert run_ranks(run_training, 1, config, ZERO, init=False) == [EXIT_COMPLETED]
    return config


def test_scaled_trains_in_two_stages_of_two_ranks_as_in_one_process(command, trained, single):
    assert [each for each in command if not each.startswith("parallel.")] == ["model=scaled/demo"]
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


def test_the_run_of_the_tutorial_is_drawn_continued_as_text_and_exported(
    single, monkeypatch, capsys
):
    assert _call(monkeypatch, *_tutorial("plot")) == 0
    assert Path(single.run_dir, "loss.png").is_file()
    # The corpus of this test has no tokenizer.
    text = ("--tokenizer", "bytes", "--max-new-tokens", "3")
    assert _call(monkeypatch, *_tutorial("generate"), *text) == 0
    assert "def main(" in capsys.readouterr().out
    assert _call(monkeypatch, *_tutorial("convert")) == 0
    assert Path("exported_scaled", "config.json").is_file()


def test_the_tutorial_proves_the_family_of_two_tensor_ranks(monkeypatch, capsys):
    arguments = _tutorial("prove", config_name="demo")
    assert "parallel.tensor=2" in arguments
    assert _call(monkeypatch, *arguments) == 0


def test_the_layout_of_the_tutorial_passes_the_doctor_but_for_the_corpus(monkeypatch, capsys):
    """What is left to the machine of the job: its corpus, and its GPUs."""
    _call(monkeypatch, *_tutorial("doctor"), "--json")
    findings = json.loads(capsys.readouterr().out)["findings"]
    errors = [each for each in findings if each["severity"] == "error"]
    assert {each["section"] for each in errors} == {"data"}, errors
    assert all("data/corpus" in each["what"] for each in errors), errors


@pytest.mark.parametrize("launcher", ["deepspeed", "sbatch", "prove"])
def test_the_run_of_eight_gpus_is_the_control_with_another_model(launcher):
    [line] = [
        each for each in tutorial_commands() if launcher in each[:2] and "model=scaled/125m" in each
    ]
    overrides = [each for each in line if "=" in each and not each.startswith("--")]
    config = compose_config("llama_125m", overrides=overrides)
    control = compose_config("llama_125m")
    sizes = config.model.model_dump(exclude={"family"})
    assert sizes == {name: getattr(control.model, name) for name in sizes}
    assert (config.model.family, config.training) == ("scaled", control.training)
    resolve_run(config, None, world_size=8)
