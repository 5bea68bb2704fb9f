"""Experts behind routed depth: a layer computes some tokens, and of them each some experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.dynamic.carry import EXPERT_AUX, MOD_AUX
from models.dynamic.counts import forward_flops_per_token, num_parameters
from tests.distributed import run_ranks
from tests.models.dynamic.cases import CTX, config_of, family_of, model_of, tokens_of
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run, write_data
from tests.refusals import assert_refused

RUN = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "max_position_embeddings": 32, "init_std": 0.1, "num_experts": 4,
    "tau_momentum": 0.5,
}  # fmt: skip


def _measured(model: Any, config: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = tokens_of(25, batch=2)
    output = model(TokenInputs(tokens[:, :-1]))
    total, _ = family_of(config).loss(output, tokens[:, 1:], config=config, ctx=CTX)
    total.backward()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["mod", "dtf"])
def test_one_expert_is_the_dense_layer_in_loss_and_every_gradient(family):
    weights = {"expert_balance_loss_weight": 0.0, "expert_z_loss_weight": 0.0}
    single = config_of(family, num_experts=1, experts_per_token=1, **weights)
    plain, experts = model_of(config_of(family)), model_of(single)
    state = plain.state_dict()
    ours = {}
    for name, tensor in experts.state_dict().items():
        dense = name.replace(".mlp.experts.", ".mlp.")
        if ".mlp.experts." in name:
            ours[name] = state[f"{dense}.weight"].unsqueeze(0)
        else:
            ours[name] = tensor if ".mlp.router." in name else state[name]
    experts.load_state_dict(ours)
    (loss, gradients), (expected, wanted) = (
        _measured(experts, single), _measured(plain, config_of(family)),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    for name, gradient in gradients.items():
        if ".mlp.router." in name:
            assert not gradient.any()  # one expert is certain
        elif ".mlp.experts." in name:
            dense = f"{name.replace('.mlp.experts.', '.mlp.')}.weight"
            torch.testing.assert_close(gradient[0], wanted[dense], rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_losses_of_experts_are_means_over_all_layers():
    config = config_of("mod", num_experts=4)
    model, tokens = model_of(config), tokens_of(24, batch=2)
    found: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(
                lambda _, __, moe: found.append(torch.stack([moe[1], moe[2]]))
            )
    aux = dict(zip(MOD_AUX, model(TokenInputs(tokens)).aux.unbind(dim=1), strict=True))
    assert len(found) == config.num_layers
    expected = torch.stack(found).mean(dim=0)
    torch.testing.assert_close(torch.stack([aux[name] for name in EXPERT_AUX]), expected)


def test_parameters_grow_with_experts_and_flops_with_those_of_a_token():
    plain = config_of("mod")
    for count, chosen in ((4, 1), (8, 1), (8, 2)):
        config = config_of("mod", num_experts=count, experts_per_token=chosen)
        own = 3 * plain.hidden_size * plain.intermediate_size
        router = config.num_layers * count * plain.hidden_size
        grown = num_parameters(config) - num_parameters(plain)
        assert grown == config.num_layers * (count - 1) * own + router
        per_token = config.num_layers * 0.75  # half of the layers compute half of the tokens
        more = forward_flops_per_token(config, 64) - forward_flops_per_token(plain, 64)
        expected = per_token * ((chosen - 1) * own + count * plain.hidden_size)
        assert more == pytest.approx(2 * expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    write_data(directory)
    return directory


def _run(data: Path, folder: Path, family: str, *, world: int) -> list[dict[str, float]]:
    run = tiny_run(
        data,
        run_dir=str(folder / "run"),
        model={"family": family, **RUN},
        training__batch_size=4 // world,
        parallel__expert=world,
    )
    run_ranks(run_training, world, run, init=False)
    return metrics(run)[0]


@pytest.mark.parametrize("family", ["mod", "dtf"])
def test_a_run_at_expert_size_2_equals_one_process(family, data, tmp_path):
    alone = _run(data, tmp_path / "alone", family, world=1)
    shared = _run(data, tmp_path / "shared", family, world=2)
    for name in ("loss", "grad_norm", *EXPERT_AUX):
        found = [record[name] for record in shared]
        assert found == pytest.approx([record[name] for record in alone], rel=2e-5), name


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"experts_per_token": 1}, ("experts_per_token", 1, "experts", "num_experts")),
        (
            {"expert_capacity_factor": 1.0},
            ("expert_capacity_factor", 1.0, "experts", "num_experts"),
        ),
        (
            {"num_experts": 2, "experts_per_token": 3},
            ("experts_per_token", 3, "num_experts=2", "fewer"),
        ),
    ],
)
def test_settings_of_experts_that_cannot_be_meant_are_refused(changes, parts):
    with assert_refused(*parts):
        config_of("mod", **changes)
