from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.base import TokenInputs
from models.llama.config import LlamaConfig
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from pretrain.metrics.flops import (
    describe_cost,
    device_name,
    peak_flops,
    training_flops_per_token,
)

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=16,
)


def test_training_flops_are_what_torch_counts_in_forward_and_backward() -> None:
    family = get_family("llama")
    ctx = ParallelContext.single()
    model = SequentialModel(family.layer_specs(CONFIG), ctx)
    tokens = torch.randint(0, 64, (3, 16))
    labels = torch.randint(0, 64, (3, 16))

    with FlopCounterMode(display=False) as counter:
        family.loss(model(TokenInputs(tokens)), labels, config=CONFIG, ctx=ctx).total.backward()

    # Whether torch counts its CPU attention kernel depends on the version; the formula counts the
    # causal half of two products of heads x head size x length.
    matmuls = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / tokens.numel()
    keys = sum(range(1, 17)) / 16
    attention = 3 * CONFIG.num_layers * 2 * (2 * CONFIG.hidden_size * keys)
    assert training_flops_per_token(family, CONFIG, 16) == matmuls + attention


def test_training_is_three_forward_passes() -> None:
    family = get_family("llama")
    assert training_flops_per_token(family, CONFIG, 16) == 3 * family.flops(CONFIG, 16)


def test_peaks_are_those_of_the_data_sheets_without_sparsity() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H200", "fp8") == 1978.9e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA B200", "bf16") == 2250e12


def test_hardware_of_unknown_peak_has_none() -> None:
    assert peak_flops(None, "bf16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert peak_flops("Some Accelerator", "bf16") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    if not torch.cuda.is_available():
        assert device_name() is None


def test_tokens_days_and_gpu_hours_of_a_run_are_told() -> None:
    """70B parameters on 2T tokens: 6 N D FLOPs, on 1,024 H100 at 40 % of 989.4 TFLOP/s."""
    peak = 1024 * 989.4e12
    flops = 6 * 70e9 * 2e12
    assert describe_cost(tokens=2 * 10**12, flops=flops, peak=peak, num_devices=1024) == (
        "2T tokens, 8.4e+23 FLOPs: at a MFU of 40% 24.0 days on 1,024 devices, 589,583 GPU-hours"
    )
    assert describe_cost(tokens=12_345, flops=1e12, peak=None, num_devices=2) == (
        "12.3k tokens, 1e+12 FLOPs"
    )
    assert "0.7 hours on 1 devices" in describe_cost(
        tokens=10, flops=1e18, peak=989.4e12, num_devices=1
    )
