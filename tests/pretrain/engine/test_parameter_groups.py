"""The treatment of a parameter follows from its name and its role, at any layout."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from parallel.carry import LayerSpec, SequentialModel, build_layers, canonical_names
from parallel.context import ParallelContext
from parallel.sharding import Normal, Sharding, declare
from pretrain.config import TrainingConfig, parse_config
from pretrain.engine.parameter_groups import (
    Treatment,
    check_multipliers,
    describe_groups,
    parameter_groups,
    treatment_of,
)
from pretrain.errors import ConfigError
from tests.models.families import CASES
from tests.pretrain.run_values import run_values
from tests.refusals import assert_refused

META = ParallelContext.single(device="meta")
TIED = [
    name for name, case in CASES.items() if canonical_names(case.family.layer_specs(case.config))
]


def _training(**changes: Any) -> TrainingConfig:
    changes = {f"training__{name}": value for name, value in changes.items()}
    return parse_config(run_values(**changes)).training


def _whole(name: str) -> SequentialModel:
    return SequentialModel(CASES[name].family.layer_specs(CASES[name].config), META)


def _stage(specs: list[LayerSpec], start: int, stop: int) -> nn.Module:
    """Some layers, as a pipeline stage holds them: tied ones as copies."""
    module = nn.Module()
    module.specs = tuple(specs)
    for name, layer in build_layers(specs[start:stop], META, seed=None).items():
        module.add_module(name, layer)
    return module


def _treatments(module: nn.Module, training: TrainingConfig) -> dict[str, Treatment]:
    """Name of a parameter in this module -> the settings of its group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: Treatment(*(group[field] for field in Treatment._fields))
        for group in parameter_groups(module, training)
        for parameter in group["params"]
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "multipliers",
    [{"head": 0.5}, {"embedding": 0.1}, {"output": 0.2, "tokens": 0.0}, {"": 0.3, "head.o": 0.7}],
)
@pytest.mark.parametrize("name", TIED)
def test_copies_of_a_tied_parameter_are_trained_as_the_one_of_the_whole_model(
    name, multipliers, optimizer
):
    training = _training(lr_multipliers=multipliers, optimizer=optimizer, grad_clip=0.0)
    whole = _treatments(_whole(name), training)
    specs = CASES[name].family.layer_specs(CASES[name].config)
    owners = canonical_names(specs)
    copies = 0
    for start, stop in ((0, 1), (1, len(specs) - 1), (len(specs) - 1, len(specs))):
        for copy, treatment in _treatments(_stage(specs, start, stop), training).items():
            copies += copy in owners
            assert treatment == whole[owners.get(copy, copy)], copy
    assert copies == len(owners)


def test_the_longest_key_in_a_name_wins():
    training = _training(lr_multipliers={"": 0.5, "mlp": 0.1, "mlp.gate": 2.0})
    found = _treatments(_whole("llama"), training)
    assert found["block_0.mlp.gate.weight"].lr_multiplier == 2.0
    assert found["block_0.mlp.up.weight"].lr_multiplier == 0.1
    assert found["head.norm.weight"].lr_multiplier == 0.5


# Linear layers from features to features, and stacked experts.
_MATRIX = re.compile(
    r".*\.(attention\.(paths\.\w+\.)?(query|key|value|output|[qkvo]_proj)"
    r"|(mlp|prior|layer_\d+|block_\d+)\.(gate|up|down)|ffn\.(gate|up|down)_proj)\.weight"
    r"|.*\.experts\.(gate|up|down)"
    r"|.*\.memory\.heads\.((gate|memory|selection)_weight|mlp_weight_\d)"
    r"|(.*\.)?(memory\.(query|key|value)|fusion\.(attention|memory|output)|exchange\.(up|down)"
    r"|encoder\.mix|reasoning\.(up|down)|head\.(hidden|project))\.weight"
)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("awkward")])
def test_muon_gets_what_maps_features_to_features_and_nothing_else(name):
    """No embedding, head, router, gate, gain, bias, slot, modulation or adapter."""
    found = _treatments(_whole(name), _training(optimizer="muon"))
    for parameter, treatment in found.items():
        is_matrix = _MATRIX.fullmatch(parameter) is not None
        assert (treatment.optimizer == "muon") == is_matrix, parameter


def test_no_vector_decays_whatever_its_number_of_dimensions():
    training = _training(weight_decay=0.1)
    found = _treatments(_whole("daria_former"), training)
    block = "block_0.attention"
    for gain in ("paths.local.query_gain", "paths.memory.key_gain", "gate_bias"):
        assert found[f"{block}.{gain}"].weight_decay == 0.0
    assert found[f"{block}.q_proj.weight"].weight_decay == 0.1
    assert found[f"{block}.gate.weight"].weight_decay == 0.1
    assert found["block_0.attention_norm.weight"].weight_decay == 0.0
    experts = _treatments(_whole("mod_experts"), training)
    assert experts["layer_0.block.mlp.experts.down"].weight_decay == 0.1
    assert experts["layer_0.block.mlp.router.weight"].weight_decay == 0.1


def test_a_group_has_one_treatment_and_every_trained_parameter_one_group():
    model = _whole("mod_experts")
    model.get_parameter("layer_0.block.mlp.router.weight").requires_grad_(False)
    training = _training(optimizer="muon", lr_multipliers={"router": 10.0})
    groups = parameter_groups(model, training)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_multiplier_without_effect_is_refused_and_a_tied_name_explained():
    check_multipliers(_whole("llama"), {"head.output": 0.5})
    with assert_refused(
        "training.lr_multipliers",
        value="'router'",
        constraint="no parameter",
        remedy="embedding.tokens.weight",
        error=ConfigError,
    ):
        check_multipliers(_whole("llama"), {"router": 0.5})
    parts = ("training.lr_multipliers.head.output", "tied", "embedding.tokens.weight", "use")
    with assert_refused(*parts, error=ConfigError):
        check_multipliers(_whole("llama_qwen2_shape"), {"head.output": 0.5})


def test_the_groups_are_told_with_layers_of_equal_names_once():
    training = _training(
        optimizer="muon", weight_decay=0.1, lr_multipliers={"router": 10.0}, grad_clip=0.0
    )
    lines = describe_groups(_whole("mod_experts"), training).splitlines()
    adam_vectors, score, adam, router, muon = lines
    assert adam_vectors.startswith("trained by adamw, weight decay 0: ")
    assert adam.startswith("trained by adamw, weight decay 0.1: ")
    assert "embedding.tokens.weight" in adam
    assert "head.output.weight" in adam
    assert score.startswith("trained by adamw, weight decay 0, lr x 10: ")
    assert score.endswith("layer_*.router.score.weight")
    assert router.startswith("trained by adamw, weight decay 0.1, lr x 10: ")
    assert router.endswith(
        "layer_*.block.mlp.router.weight, layer_*.dynamic.block.mlp.router.weight"
    )
    assert muon.startswith("trained by muon, weight decay 0.1: ")
    assert "layer_*.block.mlp.experts.gate" in muon
    counts = [int(line.split(": ")[1].split(" ")[0].replace(",", "")) for line in lines]
    assert sum(counts) == sum(p.numel() for p in _whole("mod_experts").parameters())


class _Layer(nn.Module):
    """One parameter, declared as asked."""

    def __init__(self, *, ctx: ParallelContext, **declared: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4, device=ctx.device))
        frozen = declared.pop("frozen", False)
        declare(self.weight, declared.pop("sharding", Sharding()), Normal(1.0), **declared)
        self.weight.requires_grad_(not frozen)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"role": "matrix"}, {"role": "head"}),
        ({"role": "vector"}, {}),
        ({}, {"frozen": True}),
        ({}, {"sharding": Sharding(dim=0, full_size=4)}),
        ({}, {"sharding": Sharding(partial_gradient=True)}),
    ],
)
def test_what_would_train_differently_cannot_be_tied(first, second):
    specs = [
        LayerSpec("a", _Layer, first),
        LayerSpec("b", _Layer, second, tied={"weight": "a.weight"}),
    ]
    with assert_refused("tie weight", value="vector", constraint="matrix", remedy="declare"):
        SequentialModel(specs, META)


def test_an_embedding_and_a_head_can_be_tied_and_not_through_a_third_layer():
    tied = {"weight": "a.weight"}
    specs = [
        LayerSpec("a", _Layer, {"role": "embedding"}),
        LayerSpec("b", _Layer, {"role": "head"}, tied=tied),
        LayerSpec("c", _Layer, tied=tied),
    ]
    model = SequentialModel(specs, META)
    assert len(list(model.parameters())) == 1
    assert canonical_names(specs) == {"b.weight": "a.weight", "c.weight": "a.weight"}
    chained = [*specs[:2], LayerSpec("c", _Layer, tied={"weight": "b.weight"})]
    with assert_refused("b.weight", value="tied", constraint="tied", remedy="a.weight"):
        canonical_names(chained)


def test_a_parameter_that_declares_nothing_has_no_treatment():
    with assert_refused(
        "parameter x", value=(2, 2), constraint="sharding", remedy="declare_replicated"
    ):
        treatment_of("x", nn.Parameter(torch.empty(2, 2)), _training())
