"""The pretrained form: its equations, its history on the wire, its random numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from models.amrpa.carry import AUX
from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.model import FAMILY
from models.amrpa.targets import plan_layers
from models.base import TokenInputs, logits_of
from models.common.rope import RotaryTable, Rotation
from parallel.carry import schema_after
from parallel.context import Axis, ParallelContext
from parallel.precision import Precision
from parallel.wire import Wire
from tests.equivalence import build
from tests.models.amrpa.oracle import oracle
from tests.tolerance import FP64

VOCAB = 31
_NAMES = {
    "embedding.tokens.weight": "model.embed_tokens.weight",
    "head.norm.weight": "model.norm.weight",
    "head.output.weight": "lm_head.weight",
}
_PARTS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def _config(**changes) -> AMRPALlamaConfig:
    settings = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_layers": 5,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "max_position_embeddings": 64,
        "rope_theta": 10.0, "init_std": 0.4, "target_layers": [1, 2, 4], "memory_noise": 0.1,
        "alpha_mlp_hidden": 10,
    }  # fmt: skip
    return AMRPALlamaConfig(**(settings | changes))


def _model(config: AMRPALlamaConfig, *, segmented: bool = False):
    specs = FAMILY.layer_specs(config, segmented=segmented)
    return build(specs, ParallelContext.single(), seed=3, noise=0.3).double()


def _their_name(name: str) -> str:
    """A parameter's name in a Llama of transformers with AMRPA."""
    if name in _NAMES:
        return _NAMES[name]
    block, _, path = name.partition(".")
    layer = int(block.removeprefix("block_"))
    if path.startswith("memory.heads."):
        path = path.replace("memory.heads", f"self_attn.amrpa.{layer}")
    else:
        part, _, last = path.rpartition(".")
        path = f"{_PARTS[part]}.{last}"
    return f"model.layers.{layer}.{path}"


@pytest.fixture
def _angles_in_fp64(monkeypatch):
    """The table of rotary angles is fp32 in a model of any dtype."""

    def compute(self, device):
        half = self.head_dim // 2
        frequencies = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(self.max_positions, dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    monkeypatch.setattr(RotaryTable, "_compute", compute)


@pytest.mark.usefixtures("_angles_in_fp64")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"detach_history": False, "gate_activation": "relu", "gate_bias": 0.3},
        {"history_kind": "pattern", "alpha_mlp_layers": 3, "adaptive_window": False},
    ],
)
def test_logits_losses_and_every_gradient_are_those_of_the_equations(changes):
    config = _config(**changes)
    settings = SimpleNamespace(**config.model_dump(), granularity="head")
    model = _model(config).eval()
    tokens = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    output = model(TokenInputs(tokens))
    total, terms = FAMILY.loss(output, labels, config=config, ctx=model.ctx)
    parameters = {_their_name(n): p for n, p in model.named_parameters()}
    theirs = SimpleNamespace(
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_theta": config.rope_theta},
    )
    reads = plan_layers(config, config.num_layers).reads
    found = oracle(parameters, theirs, settings, tokens, reads)

    torch.testing.assert_close(output.logits.transpose(0, 1), found.logits, **FP64)
    for term in terms.keys() - {"lm_loss"}:
        torch.testing.assert_close(terms[term], getattr(found, term).detach().mean(), **FP64)
    expected = cross_entropy(found.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected = expected + config.diversity_weight * found.diversity_loss.mean()
    expected = expected + config.gate_reg_weight * found.gate_loss.mean()
    ours = torch.autograd.grad(total, list(parameters.values()))
    wanted_ones = torch.autograd.grad(expected, list(parameters.values()))
    for name, own, wanted in zip(parameters, ours, wanted_ones, strict=True):
        torch.testing.assert_close(own, wanted, **FP64, msg=lambda m, p=name: f"{p}: {m}")
        assert wanted.abs().max() > 0, name


@torch.no_grad()
def test_queries_and_keys_give_what_the_stored_pattern_gives_in_documents_and_in_decoding():
    """And what attends to earlier layers' values, an approximation, does not."""
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(12) >= 5).int().expand(2, -1).contiguous()
    found = {}
    for kind in ("qk", "pattern", "context"):
        config = _config(history_kind=kind)
        packed, alone = _model(config, segmented=True).eval(), _model(config).eval()
        cache = alone.new_cache(2, 12)
        decoded = [
            logits_of(alone(TokenInputs(part.contiguous()), cache))
            for part in tokens.split([7, 1, 4], dim=1)
        ]
        found[kind] = (logits_of(packed(TokenInputs(tokens, segments))), torch.cat(decoded))
    for other in (0, 1):
        torch.testing.assert_close(found["qk"][other], found["pattern"][other], **FP64)
        assert (found["qk"][other] - found["context"][other]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["qk", "context"])
@pytest.mark.parametrize(
    ("targets", "scope", "most"), [("last_4", "all", 4), ("3::4", "all", 4), ("3::4", "targets", 3)]
)
def test_history_crosses_a_boundary_only_for_later_targets(kind, targets, scope, most):
    """Bytes of every boundary: (n + g) d / t of a token for qk and n d / t for context, in bf16,
    for each remembered layer on this side that a target on the other side reads."""
    tensor, seq, batch, num_layers = 2, 8, 3, 16
    config = _config(
        num_layers=num_layers, target_layers=targets, history_kind=kind, history_scope=scope
    )
    ctx = _ranks(tensor)
    schema = FAMILY.carry_schema(config, ctx, micro_batch_size=batch, seq_length=seq)
    reads = plan_layers(config, num_layers).reads
    heads = {"qk": 4 + 2, "context": 4}[kind]
    counts = []
    for boundary in range(num_layers):
        needed = {
            (layer)
            for target, layers in reads.items()
            for layer in layers
            if layer <= boundary < target
        }
        plain = Wire(schema_after(schema, "embedding"))
        wire = Wire(schema, after=f"block_{boundary}")
        per_layer = seq * batch * heads // tensor * config.head_size * 2
        assert wire.forward_bytes - plain.forward_bytes == len(needed) * per_layer
        assert wire.backward_bytes == plain.backward_bytes  # it is detached
        counts.append(len(needed))
    assert max(counts) == most
    assert counts[-1] == 0
    if targets == "last_4":
        assert [i for i, count in enumerate(counts) if count] == list(range(8, 15))


def _ranks(tensor: int) -> ParallelContext:
    ctx = ParallelContext.single(device="meta", precision=Precision("bf16"))
    return replace(ctx, tensor=Axis(size=tensor, rank=0, group=None))


def test_a_new_model_selects_among_all_the_layers_that_it_reads():
    """The temperature of 0.25 does not choose for it: entropy above a twentieth of ln w."""
    config = _config(init_std=0.02, alpha_mlp_hidden=384, target_layers=[4])
    specs = FAMILY.layer_specs(config)
    model = build(specs, ParallelContext.single(), seed=3, noise=0.0).eval()
    aux = model(TokenInputs(torch.arange(24).view(2, 12))).aux
    entropy = aux[:, AUX.index("alpha_diversity")]
    assert (entropy > 0.05 * math.log(3)).all()
