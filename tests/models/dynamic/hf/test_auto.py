"""Another model with a router of its own, registered as users do."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from models.common.rope import RotaryTable
from models.dynamic import BaseDynamicCausalLM, MoDForCausalLM, model_classes, register
from models.dynamic.block import RoutedBlock
from models.dynamic.carry import DynamicCarry
from models.dynamic.config import DynamicConfig, MoDConfig
from models.dynamic.hf.config import DynamicHFConfig
from models.dynamic.model import mod_layer_specs
from models.dynamic.token_gather import Selection
from parallel.carry import LayerSpec
from parallel.context import ParallelContext
from parallel.sharding import Constant, declare_replicated

TOKENS = torch.randint(0, 61, (4, 32), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 64,
}


class StrideConfig(DynamicConfig):
    """Every `stride`-th token is computed in the routed layers."""

    family: Literal["stride"] = "stride"
    stride: int = 2


class StrideRouter(nn.Module):
    """Chooses by position, and learns how much the block counts."""

    def __init__(self, config: StrideConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.stride = config.stride
        self.strength = nn.Parameter(torch.empty(1, device=ctx.device))
        declare_replicated(self.strength, Constant(0.5), ctx=ctx)

    def forward(self, x: Tensor) -> tuple[Tensor, Selection]:
        indices = torch.arange(0, x.shape[0], self.stride, device=x.device)
        gate = self.strength.float().expand(x.shape[0], x.shape[1])
        return gate, Selection(indices.expand(x.shape[1], -1))


class StrideLayer(nn.Module):
    def __init__(self, config: StrideConfig, *, rotary: RotaryTable, ctx: ParallelContext) -> None:
        super().__init__()
        self.router = StrideRouter(config, ctx=ctx)
        self.dynamic = RoutedBlock(config, rotary=rotary, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> Any:
        return self.dynamic.new_cache(batch_size, max_length)

    def forward(self, carry: DynamicCarry, cache: Any = None) -> DynamicCarry:
        x = carry.hidden
        token_positions = self.dynamic.token_positions(x, carry.positions, cache)
        gate, selection = self.router(x)
        if cache is not None:
            chosen = token_positions.positions % self.router.stride == 0
            return carry._replace(hidden=self.dynamic.forward_cached(x, gate, chosen, cache))
        y, _ = self.dynamic(x, gate, selection, token_positions)
        return carry._replace(hidden=y)


class StrideHFConfig(DynamicHFConfig):
    model_type = "stride"
    model_class = "StrideForCausalLM"
    settings_class = StrideConfig


@register
class StrideForCausalLM(BaseDynamicCausalLM):
    config_class = StrideHFConfig

    def setup_dynamic_layers(self, settings: StrideConfig) -> list[LayerSpec]:
        """The plain stack of `mod`, every second layer of it replaced."""
        shared = settings.model_dump(include=set(MoDConfig.model_fields) - {"family"})
        specs = mod_layer_specs(MoDConfig(**shared))
        for i in range(2, len(specs) - 1, 2):
            kwargs = {"config": settings, "rotary": specs[i].kwargs["rotary"]}
            specs[i] = LayerSpec(specs[i].name, StrideLayer, kwargs)
        return specs


def _model(**changes: Any) -> BaseDynamicCausalLM:
    torch.manual_seed(0)
    return model_classes["stride"](StrideHFConfig(**{**SIZES, **changes}))


def test_the_registered_model_trains():
    model = _model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_thresholds()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    strength = model.model.get_parameter("layer_1.router.strength")
    assert float(strength.detach()) != 0.5
    output = model.model(model.inputs(TOKENS, {}))
    torch.testing.assert_close(
        model.compute_loss(output, TOKENS), model(TOKENS, labels=TOKENS).loss
    )


@torch.no_grad()
def test_the_registered_model_leaves_tokens_out_and_generates():
    model = _model(init_std=0.3).eval()
    every = _model(init_std=0.3, stride=1).eval()
    assert not torch.allclose(model(TOKENS).logits, every(TOKENS).logits, atol=1e-3)
    options = {"attention_mask": torch.ones_like(TOKENS), "do_sample": False, "pad_token_id": 0}
    cached = model.generate(TOKENS, max_new_tokens=9, **options)
    assert torch.equal(cached, model.generate(TOKENS, max_new_tokens=9, use_cache=False, **options))


@torch.no_grad()
def test_the_registered_model_is_saved_and_found_by_the_auto_classes(tmp_path):
    model = _model(stride=3).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is StrideForCausalLM
    assert again.config.stride == 3
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_the_registered_model_begins_with_the_weights_of_a_base(tmp_path):
    names = DynamicHFConfig.attribute_map
    sizes = {names.get(name, name): value for name, value in SIZES.items()}
    base = Qwen2ForCausalLM(Qwen2Config(**sizes))
    base.save_pretrained(tmp_path)
    model = StrideForCausalLM.from_pretrained(tmp_path, {"stride": 1})
    for name, parameter in model.named_parameters():
        if name.endswith("router.strength"):
            parameter.fill_(1.0)
    expected = base.eval()(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_name_is_registered_once():
    assert model_classes["mod"] is MoDForCausalLM
    with pytest.raises(ValueError, match="model_type='stride' of StrideHFConfig is taken"):
        register(StrideForCausalLM)
