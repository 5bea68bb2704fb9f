"""The kernel of the recurrence compiled for a generation of devices, on a machine without one: a
command of `test_scan_kernel.py`, since a process has one target.

The launch is the one that a step makes, up to the driver: argument types, alignment and constants
are those that Triton takes from real tensors. Prints what each program takes, and its offsets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from models.common import scan

SHAPES = ((2048, 4, 64), (1, 4, 64), (1000, 3, 7))
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_OFFSETS = re.compile(r"tt\.addptr [^:]*: tensor<[^,]*>, tensor<(?:\d+x)*(\w+)>")


class _Driver:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and local memory, where registers spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main(capability: int) -> None:
    driver.set_active(_Driver(capability))
    kernel, built = scan._kernel(), []
    run = kernel.run

    def compile_only(*args: Any, **kwargs: Any) -> None:
        built.append(run(*args, **kwargs | {"warmup": True}))

    kernel.run = compile_only
    for shape in SHAPES:
        x = torch.empty(shape)
        scan.scan_kernel(x, x)
        scan.scan_gradient_kernel(x, x, x)
    found = [
        {
            "name": program.metadata.name,
            "program": program.hash,
            "offsets": sorted(set(_OFFSETS.findall(program.asm["ttir"]))),
            **resources(program.asm["cubin"]),
        }
        for program in built
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
