"""`python -m tests.benchmarks [NAME ...]`: run all benchmarks, or those named, in turn."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

from tests.benchmarks.timing import machine

NAMES = (
    "llama_step",
    "dynamic_step",
    "daria_step",
    "packed_rows",
    "block_attention",
    "patch_cost",
    "decoding",
    "data.loader",
    "data.byte_path",
    "data.tokenization",
    "data.conversion",
    "wire",
    "saving",
    "restoring",
    "shared_cores",
    "runs.start_up",
    "runs.step_memory",
    "runs.bf16_layouts",
)


def main() -> int:
    """Print the tables of one benchmark; several run each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    names = parser.parse_args().names or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; choose from {', '.join(NAMES)}")
    if len(names) > 1:
        command = [sys.executable, "-m", "tests.benchmarks"]
        return max(subprocess.run([*command, name]).returncode for name in names)
    benchmark = importlib.import_module(f"tests.benchmarks.{names[0]}")
    print(f"## {names[0]}\n\n{machine()}\n", flush=True)
    for table in benchmark.tables():
        print(f"{table}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
