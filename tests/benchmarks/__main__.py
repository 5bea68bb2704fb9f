"""`python -m tests.benchmarks [NAME ...]`: run all benchmarks, or those named, in turn.

`--json FILE` also writes a list of all results, one object a benchmark.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.timing import machine

NAMES = (
    "step",
    "step_costs",
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables there")
    arguments = parser.parse_args()
    names = arguments.names or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; choose from {', '.join(NAMES)}")
    code, results = _run_each(names) if len(names) > 1 else (0, [_run(names[0])])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return code


def _run(name: str) -> dict[str, Any]:
    benchmark = importlib.import_module(f"tests.benchmarks.{name}")
    device, tables = machine(), []
    print(f"## {name}\n\n{device}\n", flush=True)
    for table in benchmark.tables():
        print(f"{table}\n", flush=True)
        tables.append(table._asdict())
    return {"benchmark": name, "machine": device, "tables": tables}


def _run_each(names: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
    code, results = 0, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        for name in names:
            path.unlink(missing_ok=True)
            command = [sys.executable, "-m", "tests.benchmarks", name, "--json", str(path)]
            code = max(code, subprocess.run(command).returncode)
            if path.exists():  # it ran to its end
                results += json.loads(path.read_text())
    return code, results


if __name__ == "__main__":
    sys.exit(main())
