"""The shared trainer with families that publish no interface of their own."""

from __future__ import annotations

import shutil

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from models.checkpoint import load_model, open_checkpoint
from models.convert import to_hf
from models.generate import main as generate_command
from models.standalone.checkpoint import TrainingState, load_training_state, save_training
from models.standalone.model import StandaloneModel
from models.standalone.optimizer import build_optimizer
from models.standalone.trainer import Trainer, TrainerSettings, average_gradients
from parallel.layer_state import persistent_buffers
from tests.distributed import run_ranks
from tests.hostile.surfaces import vouch_for
from tests.models.families import CASES
from tests.refusals import assert_refused

# A threshold of mod's routers is layer state: it learns beside the parameters.
FAMILIES = ("llama_qwen2_shape", "mod")
STREAM = torch.randint(0, 90, (8, 25), generator=torch.Generator().manual_seed(0))
BATCHES = [(STREAM[i : i + 2, :-1], STREAM[i : i + 2, 1:]) for i in range(0, 8, 2)]


def _trainer(case: str, batches=BATCHES, *, seed: int = 0, **settings) -> Trainer:
    torch.manual_seed(seed)
    config = CASES[case].config.model_copy(update={"vocab_size": 257})  # of bytes
    model = StandaloneModel(CASES[case].family, config)
    settings = {"max_steps": 4, "log_every": 1, "warmup_steps": 1} | settings
    return Trainer(
        model,
        TrainerSettings(**settings),
        batches,
        batches,
        optimizer=build_optimizer(model, lr=1e-2),
    )


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_trains_and_continues_exactly(case, tmp_path):
    whole = _trainer(case, save_dir=tmp_path, save_every=2)
    expected = whole.train()
    assert expected[-1]["loss"] < expected[0]["loss"]
    rest = _trainer(case, seed=7)
    rest.load(tmp_path / "checkpoint-2")
    assert rest.train() == expected[2:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("case", FAMILIES)
def test_generation_and_conversion_read_its_checkpoints(case, tmp_path, capsys):
    trainer = _trainer(case, save_dir=tmp_path, max_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    capsys.readouterr()
    loaded = load_model(open_checkpoint(folder), device="cpu")
    trained = trainer.model.body.eval()
    for name, tensor in (*trained.named_parameters(), *persistent_buffers(trained).items()):
        assert torch.equal(loaded.state_dict()[name], tensor), name
    options = ["--tokenizer", "bytes", "--max-new-tokens", "3", "--device", "cpu"]
    assert generate_command(["--checkpoint", str(folder), "--prompt", "A", *options]) == 0
    assert capsys.readouterr().out.startswith("A")
    to_hf(folder, tmp_path / "hf", with_tokenizer=False)
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def _train_a_share(case: str):
    rank = dist.get_rank()
    trainer = _trainer(case, BATCHES[rank::2], seed=rank)
    return trainer.train(), trainer.model.state_dict()


@pytest.mark.parametrize("case", FAMILIES)
def test_two_processes_equal_one_also_in_what_layers_learn_beside_parameters(case):
    pairs = [tuple(map(torch.cat, zip(*BATCHES[i : i + 2], strict=True))) for i in (0, 2)]
    alone = _trainer(case, pairs)
    initial = {name: b.clone() for name, b in persistent_buffers(alone.model).items()}
    expected = alone.train()
    for history, state in run_ranks(_train_a_share, 2, case):
        for one, two in zip(expected, history, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        buffers = persistent_buffers(alone.model)
        assert bool(buffers) == (case == "mod")
        for name, buffer in buffers.items():
            assert not torch.equal(buffer, initial[name]), name
            torch.testing.assert_close(state[name], buffer, rtol=1e-3, atol=1e-5)


def _average_and_watch() -> tuple[bool, bool]:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    rank = dist.get_rank()
    for parameter in model[0].parameters():
        parameter.grad = torch.full_like(parameter, float(rank))
    if rank == 0:  # the other process had no batch that reaches these
        for parameter in model[1].parameters():
            parameter.grad = torch.ones_like(parameter)
    reduced, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda x, **kw: (reduced.append(x.data_ptr()), all_reduce(x, **kw))[1]
    average_gradients(model)
    gradients = [p.grad for p in model.parameters()]
    in_place = reduced == [gradient.data_ptr() for gradient in gradients]
    return in_place, all(bool((gradient == 0.5).all()) for gradient in gradients)


def test_gradients_are_averaged_where_they_lie_also_where_a_process_has_none():
    assert run_ranks(_average_and_watch, 2) == [(True, True)] * 2


def test_a_nested_state_survives_its_files(tmp_path):
    model = _trainer("llama_qwen2_shape").model
    shared = {"step": 3, "list": [1, None, {"a": torch.arange(3), "b": "text"}], "none": None}
    own = {"scalar": torch.tensor(2.5), "bytes": torch.tensor([1, 255], dtype=torch.uint8)}
    save_training(tmp_path / "checkpoint-3", model, TrainingState(shared, own), step=3)
    found = load_training_state(tmp_path / "checkpoint-3")
    assert torch.equal(found.shared["list"][2].pop("a"), torch.arange(3))
    assert found.shared["list"] == [1, None, {"b": "text"}]
    assert (found.shared["step"], found.shared["none"]) == (3, None)
    assert found.own["scalar"].shape == ()
    assert all(torch.equal(found.own[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": [1]}', '{"step": {"$tensor": "none"}}'])
def test_a_forged_state_is_refused(tmp_path, text):
    _trainer("mod", save_dir=tmp_path, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    path = folder / "training" / "state.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"state": text})
    vouch_for(folder)
    with assert_refused("state.safetensors", value="damaged", constraint="read", remedy="copy"):
        _trainer("mod").load(folder)


def test_an_incomplete_or_foreign_checkpoint_is_refused(tmp_path):
    _trainer("llama_qwen2_shape", save_dir=tmp_path, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    with assert_refused(
        "checkpoint-1", value="configuration", constraint="another", remedy="model"
    ):
        _trainer("mod").load(folder)
    shutil.copytree(folder, tmp_path / "short")
    (tmp_path / "short" / "training" / "rank_00.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rank_00.safetensors' is missing"):
        _trainer("llama_qwen2_shape").load(tmp_path / "short")
    (tmp_path / "short" / "training" / "state.safetensors").unlink()
    with assert_refused(
        str(tmp_path / "short"), value="Trainer", constraint="checkpoint", remedy="checkpoint-N"
    ):
        _trainer("llama_qwen2_shape").load(tmp_path / "short")


def test_tokens_outside_the_vocabulary_are_refused():
    trainer = _trainer("llama_qwen2_shape", [(STREAM + 1000, STREAM)])
    with assert_refused("input_ids", value=1000, constraint="vocab_size=257", remedy="tokenizer"):
        trainer.train()
