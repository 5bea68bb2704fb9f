"""The kernel of the recurrence in Triton's interpreter, against fp64: a command of
`test_scan_kernel.py`, since Triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import inspect
import sys

import torch
from torch import Tensor

from models.common import scan
from models.common.scan import scan_gradient_kernel, scan_kernel
from tests.models.common.scan_oracle import assert_recurrence


def _keep(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """By channel: in (0, 1) with a document that begins, nearly 0 and 1, tiny, and 1."""
    raw = torch.randn(shape, generator=generator)
    between = raw.sigmoid()
    between[shape[0] // 2] = 0.0
    kinds = torch.stack((between, (30 * raw).sigmoid(), 1e-30 * between, torch.ones(shape)))
    kind = torch.arange(shape[1] * shape[2]).view(shape[1:]) % len(kinds)
    return kinds.gather(0, kind.expand(1, *shape)).squeeze(0)


def main(length: int) -> None:
    # Triton 3.7 runs a function with its globals but without its closure, which it compiles
    # (triton/runtime/interpreter.py, FunctionRewriter._compile_and_exec).
    vars(scan).update(inspect.getclosurevars(scan._kernel().fn).nonlocals)
    generator = torch.Generator().manual_seed(length)
    for rows, channels in ((1, 1), (3, 7), (2, 8)):
        shape = (length, rows, channels)
        # Rows and tokens exchanged, half of a projection, the gradient of a mean.
        keep = _keep(shape, generator).transpose(0, 1).contiguous().transpose(0, 1)
        write = torch.randn(length, rows, 2 * channels, generator=generator).chunk(2, -1)[1]
        upstream = torch.randn(1, rows, channels, generator=generator).expand(shape)
        states = scan_kernel(keep, write)
        found = (states, *scan_gradient_kernel(keep, states, upstream))
        assert_recurrence(keep, write, upstream, found)


if __name__ == "__main__":
    main(int(sys.argv[1]))
