"""The chunks of the memory in a fused kernel of the form of flash-linear-attention's, on CUDA.

Shapes: as in `forms`; B batch, or 1 with documents laid end to end, T patches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from models.agiformer.memory.forms import (
    MemoryInputs,
    Remembered,
    chunked_memory,
    positive_features,
    with_normalizer,
)

EQUAL = 1e-5  # relative to the largest value, as the tests hold the chunked form to the recurrence


class Kernel(Protocol):
    """The interface of `fla.ops.simple_gla.chunk_simple_gla`: one log decay `g` [B, T, n] per head.

    q, k [B, T, n, E] and v [B, T, n, E'] to the values read, [B, T, n, E'], and the final states
    [N, n, E, E']. With `cu_seqlens` [N + 1] B is 1 and N documents lie end to end.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...


def fused_memory(
    inputs: MemoryInputs, state: Tensor | None = None, *, kernel: Kernel
) -> Remembered:
    """`chunked_memory` by a kernel. Where documents begin inside of rows, their number is read back
    from the device."""
    q, k, v, g = (x.transpose(1, 2).contiguous() for x in inputs[:4])
    kernel = partial(kernel, scale=1.0, output_final_state=True)
    if inputs.starts is None:
        values, after = kernel(q, k, v, g, initial_state=state, cu_seqlens=None)
        return Remembered(values.transpose(1, 2), after)
    batch, length = inputs.starts.shape
    begins = inputs.starts.clone()
    begins[:, 0] = True
    bounds = begins.flatten().nonzero().squeeze(1)
    document = begins.flatten().cumsum(dim=0) - 1
    first, last = document[::length], document[length - 1 :: length]
    initial = None
    if state is not None:
        initial = state.new_zeros(len(bounds), *state.shape[1:])
        initial[first] = state.masked_fill(inputs.starts[:, :1, None, None], 0.0)
    values, after = kernel(
        *(x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, g)),
        initial_state=initial,
        cu_seqlens=torch.cat((bounds, bounds.new_tensor([batch * length]))),
    )
    return Remembered(values.unflatten(1, (batch, length)).squeeze(0).transpose(1, 2), after[last])


@cache
def load_kernel(device: torch.device) -> Kernel:
    """flash-linear-attention's kernel, compared with the chunked form on `device` first.

    Raises:
        ValueError: it is not installed, or not equal.
    """
    try:
        kernel: Kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"model.cuda_memory_kernel=fla needs flash-linear-attention ({reason}); install "
            "flash-linear-attention, or set model.cuda_memory_kernel=torch"
        ) from error
    check_equal(kernel, device=device)
    return kernel


def check_equal(kernel: Kernel, *, device: torch.device | str) -> None:
    """Compare values, state and every gradient with `chunked_memory`, in fp32.

    Raises:
        ValueError: they differ by more than EQUAL of the largest value.
    """
    for alpha in (0.1, 1.0):
        found, expected = (
            _measured(lambda x: fused_memory(x, kernel=kernel), alpha, device),
            _measured(lambda x: chunked_memory(x, chunk=64), alpha, device),
        )
        for one, other in zip(found, expected, strict=True):
            error = float((one - other).abs().max() / other.abs().max())
            if not error <= EQUAL:
                raise ValueError(
                    f"model.cuda_memory_kernel=fla differs by {error:.1e} from the plain form, and "
                    f"at most {EQUAL:g} is rounding; set TRITON_F32_DEFAULT=ieee for the process "
                    "(products in TF32 differ by about 5e-4), or model.cuda_memory_kernel=torch"
                )


def _measured(
    form: Callable[[MemoryInputs], Remembered], alpha: float, device: torch.device | str
) -> list[Tensor]:
    """Values, state and the gradients of a function of both."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 150, 32, generator=generator).to(device)
    decay = torch.randn(2, 2, 150, generator=generator).to(device)
    log_decay = (alpha * (4.0 + decay).sigmoid()).log()
    leaves = [x.detach().requires_grad_() for x in (q, k, v, log_decay)]
    q, k, v, log_decay = leaves
    features = positive_features(q), positive_features(k), with_normalizer(v)
    with torch.enable_grad():
        values, state = form(MemoryInputs(*features, log_decay))
        weights = torch.linspace(-1, 1, 150, device=device).unsqueeze(-1)
        gradients = torch.autograd.grad((values * weights).sum() + state.sin().sum(), leaves)
    return [values.detach(), state.detach(), *gradients]
