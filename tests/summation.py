"""Matrix products that sum in another order, for `pytest --reorder-sums`.

A matrix product promises the same bits for the same shapes, strides and number of threads, and
nothing more: on another processor, or with another library, a row alone, a transposed operand or
half of a joint weight may sum in another order. `reorder_sums` makes every product on this machine
behave like that. It cuts the sum over K in two parts, at a place that depends on the shapes and
strides, so a test that expects equal bits from different products fails here as it would there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []


def reorder_sums() -> None:
    """Replace mm, bmm, addmm and baddbmm on CPU for this process and those that it forks.

    Attention is sent through its plain form, which consists of such products.
    """
    if _libraries:
        return
    library = torch.library.Library("aten", "IMPL")
    products = {"mm": _mm, "bmm": _bmm, "addmm": _addmm, "baddbmm": _baddbmm}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verrid", category=UserWarning)
        for name, product in products.items():
            library.impl(name, product, "CPU", allow_override=True)
    _libraries.append(library)  # its end would bring the original products back
    torch.backends.cuda.enable_flash_sdp(False)  # despite its name also the kernel for CPU


def sum_in_own_order() -> None:
    """Bring back the products and the attention of torch."""
    _libraries.clear()
    torch.backends.cuda.enable_flash_sdp(True)


@contextmanager
def in_own_order() -> Iterator[None]:
    """Products and attention of torch itself, whatever the option: for a measure of memory, which
    the replaced ones take otherwise."""
    replaced = bool(_libraries)
    sum_in_own_order()
    try:
        yield
    finally:
        if replaced:
            reorder_sums()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    cut = _cut(a, b)
    if not cut:
        return torch.mm(a, b, out=out)
    torch.mm(a[:, :cut], b[:cut], out=out)
    return torch.addmm(out, a[:, cut:], b[cut:], out=out)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    cut = _cut(a, b)
    if not cut:
        return torch.bmm(a, b, out=out)
    torch.bmm(a[..., :cut], b[:, :cut], out=out)
    return torch.baddbmm(out, a[..., cut:], b[:, cut:], out=out)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(bias, _mm(a, b), beta, alpha)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _added(bias, _bmm(a, b), beta, alpha)


def _added(bias: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    if alpha != 1:
        product.mul_(alpha)
    return product if beta == 0 else product.add_(bias, alpha=beta)


def _cut(a: Tensor, b: Tensor) -> int:
    """Position at which the sum over K is cut in two; 0: not at all."""
    *_, rows, k = a.shape
    mixed = 7 * rows + 13 * b.shape[-1] + 3 * (a.stride(-1) == 1) + 5 * (b.stride(-1) == 1)
    return mixed % k if k > 1 else 0
