from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import wandb
from torch.utils.data import DataLoader, TensorDataset

from models.daria_former import DariaFormerModel
from models.daria_former.standalone.checkpoint_io import load_checkpoint, write_checkpoint
from models.daria_former.standalone.lora import LoRAManager
from models.daria_former.standalone.training import Trainer
from tests.distributed import run_ranks
from tests.models.daria_former.shrunk import shrunk
from tests.models.daria_former.standalone.torch_checkpoints import write_torch_checkpoint
from tests.refusals import assert_refused

OPTIONS = {"lr": 1e-3, "warmup_steps": 2, "log_every": 1}
STREAM = torch.randint(0, 16, (6, 25), generator=torch.Generator().manual_seed(0))
BATCHES = [
    {"input_ids": STREAM[i : i + 2, :-1], "labels": STREAM[i : i + 2, 1:]} for i in (0, 2, 4)
]


def _trainer(batches=BATCHES, *, seed: int = 0, **options) -> Trainer:
    torch.manual_seed(seed)
    config = shrunk()
    options = OPTIONS | {"max_steps": 6} | options
    return Trainer(DariaFormerModel(config), config, batches, **options)


class _Corrupted(TensorDataset):
    """Rows whose first token is drawn from torch's generator each time."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = super().__getitem__(index)
        return torch.cat((torch.randint(0, 257, (1,)), tokens[1:])), labels


def _masked() -> list[dict[str, torch.Tensor]]:
    """Batches that score 4, 30 and 48 tokens."""
    batches = [{name: tensor.clone() for name, tensor in batch.items()} for batch in BATCHES]
    batches[0]["labels"][:, 2:] = -100
    batches[1]["labels"][:, 15:] = -100
    return batches


def _joined(batches) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_a_continued_training_equals_an_undisturbed_one(tmp_path):
    whole = _trainer(save_dir=tmp_path / "a", save_every=4)
    expected = whole.train()
    rest = _trainer(seed=7, resume_from=tmp_path / "a" / "checkpoint-4")
    found = rest.train()
    for name in ("loss", "lr", "grad_norm"):
        assert [r[name] for r in found] == [r[name] for r in expected[4:]]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(rest.model.get_parameter(name), parameter), name
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("step", [2, 3, 5])  # inside an epoch of 3 batches, at its end, in the next
def test_a_shuffled_order_and_random_data_go_on_where_they_were(tmp_path, own_generator, step):
    def trainer(seed: int, **options) -> Trainer:
        torch.manual_seed(0)
        model = DariaFormerModel(shrunk())
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        data = _Corrupted(STREAM[:, :-1], STREAM[:, 1:])
        loader = DataLoader(data, batch_size=2, shuffle=True, generator=generator)
        return Trainer(model, model.config, loader, lr=1e-2, max_steps=8, log_every=1, **options)

    expected = trainer(0, save_dir=tmp_path, save_every=step).train()
    found = trainer(99, resume_from=tmp_path / f"checkpoint-{step}").train()
    assert [r["loss"] for r in found] == [r["loss"] for r in expected[step:]]


def test_accumulated_batches_equal_one_batch_of_all():
    (expected,) = _trainer([_joined(BATCHES)], max_steps=1).train()
    (found,) = _trainer(max_steps=1, gradient_accumulation_steps=3).train()
    for name in ("loss", "lm_loss", "memory_loss", "repetition_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def _gradients_of_a_step(batches) -> tuple[dict[str, float], list[torch.Tensor]]:
    """What is logged of a step in fp64 over `batches`, whose losses weigh 1, and its gradients."""
    weights = {f"{n}_loss_weight": 1.0 for n in ("emotion", "repetition", "memory", "rhythm")}
    torch.manual_seed(0)
    config = shrunk(gate_balance_weight=1.0, **weights)
    model = DariaFormerModel(config).double()
    options = {"max_steps": 1, "gradient_accumulation_steps": len(batches), "log_every": 1}
    trainer = Trainer(model, config, batches, max_grad_norm=0.0, **options)
    gradients: list[torch.Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in model.parameters() if p.requires_grad)
    )
    (logged,) = trainer.train()
    return logged, gradients


def test_rows_count_by_their_scored_tokens_however_unequal_batches_are(monkeypatch):
    """Every logged term and every gradient, also of the hinges, which are of rows."""
    monkeypatch.setattr("models.daria_former.losses.LEAST_GATE", 0.2)
    monkeypatch.setattr("models.daria_former.losses.FREE_SIMILARITY", 0.0)
    whole = _joined(_masked())
    logged, gradients = _gradients_of_a_step([whole])
    assert min(logged["gate_loss"], logged["repetition_loss"], logged["memory_loss"]) > 0
    for sizes in ([2, 2, 2], [1, 5], [3, 1, 1, 1]):
        parts = [
            dict(zip(whole, rows, strict=True))
            for rows in zip(*(column.split(sizes) for column in whole.values()), strict=True)
        ]
        found, own = _gradients_of_a_step(parts)
        assert found == pytest.approx(logged, rel=1e-6)  # the log is in fp32
        for one, other in zip(own, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def _train_a_share(save_dir, resume_from=None) -> tuple[list[dict[str, float]], float, list]:
    rank, batches = dist.get_rank(), _masked()
    batches += batches[:1]
    # Another seed on each rank: they begin with the weights of rank 0 all the same.
    options = {"save_dir": save_dir, "save_every": 2, "max_steps": 3, "resume_from": resume_from}
    trainer = _trainer(batches[rank::2], seed=rank, eval_dataloader=batches[rank::2], **options)
    history = trainer.train()
    return history, trainer.evaluate(), [p.detach() for p in trainer.model.parameters()]


def test_two_ranks_equal_one_and_go_on_together(tmp_path):
    ranks = run_ranks(_train_a_share, 2, tmp_path)
    batches = _masked()
    pairs = [_joined(batches[:2]), _joined([batches[2], batches[0]])]
    alone = _trainer(pairs, max_steps=3, eval_dataloader=pairs)
    expected = alone.train()
    for history, nats, parameters in ranks:
        for one, two in zip(expected, history, strict=True):
            for name in ("loss", "lm_loss", "grad_norm"):
                assert two[name] == pytest.approx(one[name], rel=1e-3), name
        assert nats == pytest.approx(alone.evaluate(), rel=1e-4)
        for mine, theirs in zip(parameters, ranks[0][2], strict=True):
            assert torch.equal(mine, theirs)
    for history, _, parameters in run_ranks(_train_a_share, 2, None, tmp_path / "checkpoint-2"):
        assert history == ranks[0][0][2:]
        assert all(map(torch.equal, parameters, ranks[0][2]))
    with assert_refused("checkpoint-2", value=2, constraint="1", remedy="start 2"):
        _trainer(resume_from=tmp_path / "checkpoint-2")


def test_a_checkpoint_that_is_there_is_replaced(tmp_path):
    for lr in (1e-3, 1e-2):
        trainer = _trainer(save_dir=tmp_path, max_steps=1, lr=lr)
        trainer.train()
    (folder,) = tmp_path.iterdir()
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert sorted(files) == [
        "manifest.json",
        "training/rank_00.safetensors",
        "training/state.safetensors",
        "weights/pp_00_tp_00.safetensors",
    ]
    loaded, tokenizer, _ = load_checkpoint(folder, device="cpu")
    assert tokenizer is None
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_a_norm_of_zero_clips_nothing_and_a_small_one_does():
    def moved(**options) -> float:
        trainer = _trainer(max_steps=1, warmup_steps=0, **options)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        after = trainer.model.parameters()
        return sum((a - b).abs().sum().item() for a, b in zip(after, before, strict=True))

    assert moved(max_grad_norm=0.0) == moved(max_grad_norm=1e9) > 0
    # With a gradient far below eps, AdamW hardly moves.
    assert moved(max_grad_norm=1e-12) < 0.1 * moved(max_grad_norm=0.0)


def test_images_of_a_batch_reach_the_model():
    config = shrunk(image_enabled=True, image_size=32)
    losses = []
    for value in (0.0, 5.0):
        torch.manual_seed(0)
        model = DariaFormerModel(config)
        batch = {**BATCHES[0], "images": value * torch.rand(2, 3, 32, 32)}
        trainer = Trainer(model, config, [batch], lr=1e-2, max_steps=3, log_every=3)
        losses.append(trainer.train()[-1]["loss"])
        assert trainer.optimizer.state[model.image_encoder.projection]["exp_avg"].any() == (
            value > 0
        )
    assert losses[0] != losses[1]


def test_runs_are_logged_to_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = _trainer(use_wandb=True, wandb_project="tiny", save_dir=tmp_path, max_steps=2)
    trainer.train()
    wandb.teardown()  # else an offline run may not be on disk yet
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"memory_loss" in log.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps=0"),
        ({"log_every": 0}, "log_every=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"resume_from": "/nowhere"}, "/nowhere .*checkpoint-N"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _trainer(**options)


def test_bad_data_is_refused():
    with pytest.raises(ValueError, match="no batches"):
        _trainer([]).train()
    with assert_refused("eval_dataloader", value="given", constraint="not", remedy="Trainer"):
        _trainer().evaluate()
    with assert_refused("eval_dataloader", value="token", constraint="no", remedy="labels"):
        _trainer(eval_dataloader=[]).evaluate()
    with assert_refused("step", value=2, constraint="nan", remedy="lr"):
        _trainer(lr=1e30, warmup_steps=0).train()


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    _trainer(max_steps=1, save_dir=tmp_path).train()
    folder = tmp_path / "checkpoint-1"
    config = shrunk(num_layers=1, esv_sites=1)
    with assert_refused(
        "checkpoint-1", value="configuration", constraint="another", remedy="model"
    ):
        Trainer(DariaFormerModel(config), config, BATCHES, resume_from=folder)
    with assert_refused(
        "config", value="model.config", constraint="differs", remedy="model.config"
    ):
        Trainer(DariaFormerModel(config), shrunk(), BATCHES)
    model = DariaFormerModel(shrunk())
    LoRAManager(model, rank=2).inject()
    with assert_refused(
        "weights", value="DariaFormerModel", constraint="lora.primary.A", remedy="adapters"
    ):
        Trainer(model, shrunk(), BATCHES, resume_from=folder)
    for name in ("training/state.safetensors", "weights/pp_00_tp_00.safetensors"):
        path = folder / name
        content = path.read_bytes()
        for damaged, message in (
            (content[:1000], "bytes, expected"),
            (content[:-1] + bytes([content[-1] ^ 1]), "is damaged: sha256"),
        ):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{name}.* {message}"):
                _trainer(resume_from=folder)
        path.write_bytes(content)
    _trainer(resume_from=folder)


@pytest.mark.parametrize("weight_tying", [True, False])
def test_a_checkpoint_of_the_version_before_continues_exactly(tmp_path, weight_tying):
    def trainer(**options) -> Trainer:
        config = shrunk(weight_tying=weight_tying, dropout=0.1)
        return Trainer(DariaFormerModel(config), config, BATCHES, **OPTIONS, **options)

    torch.manual_seed(0)
    whole = trainer(max_steps=6)
    expected = whole.train()
    torch.manual_seed(0)
    first = trainer(max_steps=6)
    while first.step < 4:
        first._advance()
    write_torch_checkpoint(first, tmp_path / "old")
    torch.manual_seed(7)
    rest = trainer(max_steps=6, resume_from=tmp_path / "old")
    assert rest.train() == expected[4:]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(rest.model.get_parameter(name), parameter), name
    loaded, *_ = load_checkpoint(tmp_path / "old", device="cpu")
    for name, parameter in first.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


def test_a_damaged_or_hostile_checkpoint_of_the_version_before_is_refused(tmp_path):
    trainer = _trainer()
    write_torch_checkpoint(trainer, tmp_path / "old")
    for name in ("training_state.pt", "model.safetensors"):
        path = tmp_path / "old" / name
        content = path.read_bytes()
        path.write_bytes(content[:1000])
        with assert_refused(name, "damaged", "read", "copy"):
            _trainer(resume_from=path.parent)
        path.write_bytes(content)
    # What would run code is not unpickled.
    torch.save({"ranks": [Counter()], "step": exec}, tmp_path / "old" / "training_state.pt")
    with assert_refused("training_state.pt", value="damaged", constraint="read", remedy="copy"):
        _trainer(resume_from=tmp_path / "old")


@torch.no_grad()
def test_a_checkpoint_with_adapters_is_read_and_merged(tmp_path):
    trainer = _trainer(save_dir=tmp_path / "run", max_steps=2)
    manager = LoRAManager(trainer.model, rank=2)
    manager.inject()
    for parameter in manager.lora_parameters():
        parameter += 0.05
    trainer.save(tmp_path / "checkpoint-0")
    expected = trainer.model.eval()(STREAM)["logits"]
    model, *_ = load_checkpoint(tmp_path / "checkpoint-0", device="cpu")
    torch.testing.assert_close(model(STREAM)["logits"], expected)
    with pytest.raises(ValueError, match="use --merge_lora"):
        write_checkpoint(model, tmp_path / "step_0", tokenizer=None, merge=False)
    write_checkpoint(model, tmp_path / "step_1", tokenizer=None, merge=True)
    merged, *_ = load_checkpoint(tmp_path / "step_1", device="cpu")
    assert not any(".lora." in name for name in merged.state_dict())
    torch.testing.assert_close(merged(STREAM)["logits"], expected, rtol=1e-4, atol=1e-5)
