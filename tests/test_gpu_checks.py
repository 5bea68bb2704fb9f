"""The checks that tests/gpu makes on CUDA, here on a CPU with small models; and their limits."""

from __future__ import annotations

import pytest
import torch

from parallel.cpu import widened
from tests.gpu import checks
from tests.gpu.checks import CHOOSING, FAMILIES, Step, packed_tokens, random_tokens, small_case
from tests.tiers import tiered

CPU = torch.device("cpu")
# Operations per layer of a pass and its gradients in bf16, two packed rows of 32 tokens, and MB
# that they read and write: what is measured, and a tenth more. A larger number is more kernels on
# CUDA.
OPERATIONS = {
    "agiformer": (660, 4.4),
    "amrpa": (400, 3.9),
    "daria_former": (1510, 7.1),
    "dart": (355, 2.8),
    "dtf": (316, 1.8),
    "llama": (172, 1.75),
    "mod": (256, 1.6),
}
_ORDINARY = ("llama", "mod")


@pytest.mark.parametrize("name", tiered(FAMILIES, _ORDINARY))
def test_a_layer_takes_no_more_operations_and_bytes_than_it_did(name, monkeypatch):
    monkeypatch.setattr(widened, "_HAS_NO_UNITS", False)  # the products of CUDA
    case = small_case(name)
    batch = packed_tokens(case, CPU, rows=2, length=32)
    step = Step(case, CPU, "bf16", batch)
    counted = checks.operations(step)
    number = case.config.num_layers
    operations, megabytes = counted.names.total() / number, counted.bytes / number / 1e6
    assert operations <= OPERATIONS[name][0]
    assert megabytes <= OPERATIONS[name][1]
    assert "_safe_softmax" not in counted.names
    if name not in checks.ASKS_A_CPU:
        with checks.without_waiting(CPU):
            step()


@pytest.mark.parametrize("name", tiered(FAMILIES, ("llama",)))
def test_bf16_follows_fp32(name):
    case = small_case(name)
    found = checks.bf16_distance(case, CPU, random_tokens(case, CPU, rows=2, length=32))
    assert found.loss < 1e-2
    if name not in CHOOSING:
        assert found.gradient < 0.15


def test_waiting_for_the_device_is_noticed():
    with pytest.raises(AssertionError), checks.without_waiting(CPU):
        bool(torch.ones(3).sum() > 1)


def test_attention_without_a_kernel_is_noticed(monkeypatch):
    case = small_case("llama")
    step = Step(case, CPU, "bf16", random_tokens(case, CPU, rows=1, length=32))
    assert "math" not in checks.attention_kernels(step)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "math" in checks.attention_kernels(step)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_real_size_of_four_layers(name):
    assert checks.real_case(name).config.num_layers == 4


def test_every_family_is_listed():
    from models.registry import family_names

    assert set(FAMILIES) == set(family_names()) == set(OPERATIONS)
