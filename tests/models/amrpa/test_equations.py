"""The whole of AMRPA in a small Llama against the equations, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from models.amrpa import AMRPAConfig, get_amrpa_loss, get_amrpa_metrics, inject_amrpa
from tests.models.amrpa.oracle import Found, oracle
from tests.tolerance import FP64

READS = {1: (0,), 2: (1, 0), 4: (3, 2, 1)}
CASES = {
    "default": {},
    "token": {"granularity": "token"},
    "attached": {"detach_history": False},
    "pattern": {"history_kind": "pattern"},
    "pattern_attached": {"history_kind": "pattern", "detach_history": False},
    "tanh_linear": {"gate_activation": "tanh", "alpha_mlp_layers": 1},
    "relu_three": {"gate_activation": "relu", "alpha_mlp_layers": 3, "gate_bias": 0.3},
}


def _model(**changes):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, initializer_range=0.4,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},
    )  # fmt: skip
    settings = {
        "target_layers": [1, 2, 4], "memory_noise": 0.1, "alpha_mlp_hidden": 10,
        "freeze_base_model": False, "freeze_embeddings": False,
    }  # fmt: skip
    amrpa = AMRPAConfig.from_dict(settings | changes)
    model = inject_amrpa(LlamaForCausalLM(config).double(), amrpa).eval()
    with torch.no_grad():  # away from where they start
        for name, parameter in model.named_parameters():
            if ".amrpa." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, config, amrpa


@pytest.fixture
def _fp64_throughout(monkeypatch):
    """transformers computes norms and angles in fp32 in a model of any dtype."""

    def norm(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def angles(self, x, position_ids):
        half = 3
        frequencies = torch.tensor([10.0 ** (-i / half) for i in range(half)], dtype=x.dtype)
        angle = position_ids.unsqueeze(-1) * torch.cat((frequencies, frequencies))
        return angle.cos(), angle.sin()

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", angles)


@pytest.mark.usefixtures("_fp64_throughout")
@pytest.mark.parametrize("name", CASES)
def test_logits_losses_measurements_and_every_gradient_are_those_of_the_equations(name):
    model, config, amrpa = _model(**CASES[name])
    tokens = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(1))
    output = model(tokens)
    found = oracle(dict(model.named_parameters()), config, amrpa, tokens, READS)

    metrics = get_amrpa_metrics(model)
    torch.testing.assert_close(output.logits, found.logits, **FP64)
    for metric in set(Found._fields) & set(metrics):
        torch.testing.assert_close(metrics[metric], getattr(found, metric).detach(), **FP64)
    assert metrics["using_memory"].tolist() == [1.0, 1.0]

    def total(logits, penalty):
        scored = logits[:, :-1].flatten(0, 1)
        return cross_entropy(scored, tokens[:, 1:].flatten()) + 10 * penalty

    penalty = 0.005 * found.diversity_loss.mean() + 0.05 * found.gate_loss.mean()
    torch.testing.assert_close(get_amrpa_loss(model), penalty, **FP64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(total(output.logits, get_amrpa_loss(model)), parameters)
    expected = torch.autograd.grad(total(found.logits, penalty), parameters)
    for parameter, own, wanted in zip(names, ours, expected, strict=True):
        torch.testing.assert_close(own, wanted, **FP64, msg=lambda m, p=parameter: f"{p}: {m}")
        assert wanted.abs().max() > 0, parameter
