"""The published class: its arguments, its shape, and the same numbers as the family's layers."""

from __future__ import annotations

import inspect

import pytest
import torch

from models.agiformer import AGIFORMER, CurriculumDataLoader
from models.agiformer.standalone.model import load_model, save_model
from models.base import TokenInputs
from tests.equivalence import perturb
from tests.models.agiformer.oracle import block as oracle_block
from tests.models.agiformer.oracle import rms, said, thought
from tests.refusals import assert_refused
from tests.tolerance import FP64

SIZES = {"d_model": 32, "n_layers": 2, "num_heads": 2, "window_size": 3}


def _model(**changes) -> AGIFORMER:
    torch.manual_seed(0)
    model = AGIFORMER(**{**SIZES, **changes})
    for name, layer in model.body.named_children():
        perturb(layer, seed=1, prefix=name, tensor_rank=0, std=0.3)
    return model.double().eval()


def _bytes(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(count))


def test_positional_arguments_are_the_published_ones_with_their_values():
    parameters = inspect.signature(AGIFORMER).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == [
        ("d_model", 512), ("n_layers", 6), ("num_heads", 8), ("patch_size", 4),
        ("window_size", 128), ("vocab_size", 256), ("dropout", 0.1), ("thinking_steps", 3),
    ]  # fmt: skip
    forward = inspect.signature(AGIFORMER.forward).parameters
    assert list(forward)[1:] == ["x", "target_bytes", "temperature"]


def test_logits_of_the_next_patch_are_those_of_the_equations():
    """Latents end with the patches of x here, and one byte into them in the family's own form."""
    model, text = _model(), _bytes(28)
    x, target = text[:, :-4], text[:, 4:]
    logits = model(x, target_bytes=target)
    assert logits.shape == (2, 6, 4, 256)
    weights, config = dict(model.body.state_dict()), model.config
    for row in range(2):
        found = [_latent(weights, config, x[row, : 4 * (i + 1)].tolist()) for i in range(6)]
        for n in range(2):
            prefix = f"block_{n}."
            own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
            found = oracle_block(own, config, found)
        own = {k.removeprefix("reasoning."): w for k, w in weights.items() if "reasoning." in k}
        for i, latent in enumerate(found):
            z = thought(own, config, latent)[0]
            for k in range(4):
                # A text in which the target patch follows the one byte that begins a patch.
                told = [0, *target[row, 4 * i : 4 * i + k].tolist()]
                torch.testing.assert_close(
                    logits[row, i, k], said(weights, config, z, told, k), **FP64
                )


def _latent(w, config, seen: list[int]) -> torch.Tensor:
    kernel = [torch.zeros(config.byte_size).double()] * 6 + [
        w["encoder.tokens.weight"][b] for b in seen
    ]
    mixed = w["encoder.mix.weight"] @ torch.stack(kernel[-6:], dim=1).flatten()
    return rms(mixed + w["encoder.mix.bias"], config) * w["encoder.norm.weight"]


@torch.no_grad()
def test_without_targets_every_patch_is_drawn_byte_by_byte():
    model, x = _model(), _bytes(16)
    logits = model(x)
    drawn = logits.argmax(dim=-1).flatten(1)
    torch.testing.assert_close(model(x, target_bytes=drawn), logits, **FP64)
    assert model(x, temperature=1.0).shape == (2, 4, 4, 256)


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_published_forward_drops_out_in_training_alone(dropout):
    model, text = _model(dropout=dropout), _bytes(28)
    x, target = text[:, :-4], text[:, 4:]
    evaluated = model(x, target_bytes=target)
    assert torch.equal(model.train()(x, target_bytes=target), evaluated) == (dropout == 0.0)
    assert torch.equal(model.eval()(x, target_bytes=target), evaluated)


def test_bytes_that_are_no_whole_patches_or_none_at_all_are_refused():
    model = _model()
    with assert_refused("x", value=10, constraint="4", remedy=("cut", "models.generate")):
        model(_bytes(10))
    with assert_refused("x", value=300, constraint="vocab_size=256", remedy="tokenizer"):
        model(torch.full((1, 4), 300))
    with assert_refused("x", value="list", constraint="tensor", remedy="torch.tensor"):
        model([[1, 2, 3, 4]])
    with assert_refused("labels", value=511, constraint="vocab_size=256", remedy="tokenizer"):
        model.loss(_bytes(8), torch.full((2, 8), 511))
    with assert_refused("labels", value="int64[2, 7]", constraint="int64[2, 8]", remedy="-100"):
        model.loss(_bytes(8), _bytes(7))
    with assert_refused("target_bytes", value=[2, 4], constraint="[2, 8]", remedy=()):
        model(_bytes(8), target_bytes=_bytes(4))
    with assert_refused("x", value="float32", constraint="integer", remedy=("uint8", "int64")):
        model(_bytes(8).float())
    for temperature in (-1.0, float("nan")):
        with assert_refused("temperature", value=temperature, constraint="finite", remedy="0"):
            model(_bytes(8), temperature=temperature)


@torch.no_grad()
def test_a_file_holds_the_model_with_its_plasticity(tmp_path):
    model = _model(vocab_size=256).float()
    model.set_plasticity(0.25)
    save_model(model, tmp_path / "a.pth")
    other = load_model(tmp_path / "a.pth")
    x = TokenInputs(_bytes(13))
    assert torch.equal(other.body(x).logits, model.body(x).logits)
    assert other.body.block_1.memory.plasticity.tolist() == [0.25]
    (tmp_path / "b.pth").write_bytes(b"no")
    with assert_refused("b.pth", value="model", constraint="family", remedy=()):
        load_model(tmp_path / "b.pth")
    with assert_refused(
        "c.pth", value="file", constraint="no", remedy=("train_scaled", "train_curriculum")
    ):
        load_model(tmp_path / "c.pth")
    stored = torch.load(tmp_path / "a.pth", weights_only=True)
    for name, value, reason in (
        ("byte_head", "independent", "head.table"),  # weights of the other kind of head
        ("plasticity", 0, "plasticity=0.*; change plasticity"),
    ):
        torch.save(stored | {"config": stored["config"] | {name: value}}, tmp_path / "d.pth")
        with pytest.raises(ValueError, match=rf"d\.pth.*{reason}"):
            load_model(tmp_path / "d.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thinking_steps": 0}, "thinking_steps=0 .* 0; change thinking_steps"),
        ({"plasticity": 1.5}, "plasticity=1.5 .* 1; change plasticity"),
        ({"num_heads": 5}, "d_model=32 .*num_heads=5; change"),
        ({"byte_head": "gru"}, "byte_head='gru' must be 'causal' or 'independent'; change"),
    ],
)
def test_a_setting_that_cannot_be_is_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        AGIFORMER(**{**SIZES, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_trains_under_autocast(dtype):
    model, text = AGIFORMER(**SIZES), _bytes(33)
    seen = []
    model.body.block_0.register_forward_hook(lambda _, given, out: seen.append(out.hidden.dtype))
    with torch.autocast("cpu", dtype=dtype):
        loss = model.loss(text[:, :-1], text[:, 1:]).total
        loss = loss + model(text[:, :28], target_bytes=text[:, 4:32]).float().mean()
    assert seen == 2 * [torch.float32]  # the residual stream, in either form
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def _write(folder, **sizes: int):
    for name, size in {"dictionary": 70, "stories": 90, "wiki": 200, "val": 43, **sizes}.items():
        (folder / f"{name}.txt").write_bytes(bytes([ord(name[0])]) * size)


def test_the_curriculum_goes_through_its_texts_at_the_published_shares(tmp_path):
    _write(tmp_path)
    loader = CurriculumDataLoader(tmp_path, 2, 8, 20)
    firsts = [chr(int(inputs[0, 0])) for inputs, _ in loader]
    assert "".join(firsts) == "d" * 3 + "s" * 5 + "w" * 12
    changes = [step for step in range(20) if loader.check_stage_change(step)]
    assert changes == [0, 3, 8]  # back from the last stage first
    assert [loader.stage_of(s).plasticity for s in (2, 3, 7, 8)] == [0.1, 0.5, 0.5, 0.99]
    assert loader.get_plasticity_alpha() == 0.99
    scored = sum(int((labels != -100).sum()) for _, labels in loader.get_loader("val"))
    assert scored == 42  # every byte of the held-out file but the first, once


def test_a_curriculum_too_short_for_its_stages_is_refused(tmp_path):
    _write(tmp_path)
    with assert_refused("max_steps", value=3, constraint="stage", remedy="4"):
        CurriculumDataLoader(tmp_path, 2, 8, 3)
    firsts = [chr(int(inputs[0, 0])) for inputs, _ in CurriculumDataLoader(tmp_path, 2, 8, 4)]
    assert "".join(firsts) == "dsww"


def test_the_seed_decides_the_order_of_the_windows(tmp_path):
    _write(tmp_path)
    (tmp_path / "wiki.txt").write_bytes(bytes(range(200)))
    orders = []
    for seed in (0, 0, 1):
        loader = CurriculumDataLoader(tmp_path, 1, 8, 30, seed=seed)
        orders.append([int(inputs[0, 0]) for inputs, _ in loader])
    assert orders[0] == orders[1]
    assert orders[0][12:] != orders[2][12:]


def test_a_missing_text_is_an_error_and_no_other_takes_its_place(tmp_path):
    _write(tmp_path)
    (tmp_path / "stories.txt").unlink()
    with assert_refused("stories.txt", value="missing", constraint="missing", remedy="put"):
        CurriculumDataLoader(tmp_path, 2, 8, 20)
