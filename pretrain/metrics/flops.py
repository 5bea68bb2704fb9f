"""Model FLOPs of training and the peak of the hardware; their ratio is the MFU."""

from __future__ import annotations

from typing import Any, NamedTuple

from models.base import ModelFamily

TERA = 1e12


def training_flops_per_token(family: ModelFamily, config: Any, seq_length: int) -> float:
    """Training FLOPs per token: a forward pass, and a backward pass of twice its cost.

    F_train = 3 F_forward, with F_forward counting matrix products only. Recomputed activations are
    not counted: they make a run slower, not the model larger (PaLM, appendix B).
    """
    return 3.0 * family.flops(config, seq_length)


class _Peak(NamedTuple):
    """Dense TFLOP/s of one device; `fp8`: None without FP8 units."""

    bf16: float
    fp8: float | None
    fp32: float


# torch.cuda.get_device_name() -> NVIDIA's data sheet of that product, without sparsity. fp32 is
# that of the CUDA cores: torch multiplies float32 without TF32 by default.
_PEAKS = {
    "NVIDIA A100-SXM4-40GB": _Peak(312, None, 19.5),
    "NVIDIA A100-SXM4-80GB": _Peak(312, None, 19.5),
    "NVIDIA A100-PCIE-40GB": _Peak(312, None, 19.5),
    "NVIDIA A100 80GB PCIe": _Peak(312, None, 19.5),
    "NVIDIA H100 80GB HBM3": _Peak(989.4, 1978.9, 66.9),  # SXM5
    "NVIDIA H100 PCIe": _Peak(756, 1513, 51.2),
    "NVIDIA H100 NVL": _Peak(835.5, 1671, 60),
    "NVIDIA H200": _Peak(989.4, 1978.9, 66.9),
    "NVIDIA H200 NVL": _Peak(835.5, 1671, 60),
    "NVIDIA GH200 120GB": _Peak(989.4, 1978.9, 66.9),
    "NVIDIA GH200 480GB": _Peak(989.4, 1978.9, 66.9),
    "NVIDIA B200": _Peak(2250, 4500, 75),
    "NVIDIA GB200": _Peak(2500, 5000, 80),
    "NVIDIA L40S": _Peak(362.05, 733, 91.6),
}


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """Peak FLOP/s of one device for dense matrix products in `precision`.

    None for hardware that is not in the table (a CPU, a MIG slice, a card of another clock): a MFU
    against a guessed peak would mean nothing, so none is reported there.
    """
    peak = _PEAKS.get(device_name or "")
    if peak is None:
        return None
    value = {"bf16": peak.bf16, "fp8": peak.fp8, "fp32": peak.fp32}[precision]
    return None if value is None else value * TERA


_USUAL_MFU = 0.4  # of dense models of this size on these devices; nobody knows it before


def describe_cost(*, tokens: int, flops: float, peak: float | None, num_devices: int) -> str:
    """The cost of training on `tokens` tokens with `flops` FLOPs, on one line: before it starts.

    `peak`: FLOP/s of all devices together; None: unknown, and then nothing is said of time.
    """
    text = f"{_short(tokens)} tokens, {flops:.2g} FLOPs"
    if peak is None:
        return text
    hours = flops / (_USUAL_MFU * peak) / 3600
    time = f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} hours"
    return (
        f"{text}: at a MFU of {_USUAL_MFU:.0%} {time} on {num_devices:,} devices, "
        f"{hours * num_devices:,.0f} GPU-hours"
    )


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:g}"


def device_name() -> str | None:
    """Name of this process's CUDA device as given by the driver; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
