#!/usr/bin/env python3
"""Stand-in for the interpreter of a job: records how it was called, imports nothing.

As torchrun it records its arguments and environment in LOG_DIR and ends the run at once; as the
trainer it answers what job scripts ask before a run.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    if argv[:2] == ["-m", "torch.distributed.run"]:
        return record(argv)
    settings = dict(word.split("=", 1) for word in argv if "=" in word and word[0] != "-")
    if "--print-run-dir" in argv:
        print(settings["run_dir"])
    else:
        print(f"recorded: {argv}")
    return 0


def record(argv: list[str]) -> int:
    host = socket.gethostname()
    description = {"argv": argv, "environment": dict(os.environ), "host": host}
    text = json.dumps(description, ensure_ascii=True)
    Path(os.environ["LOG_DIR"], f"recorded-{host}.json").write_text(text)
    if os.environ["SLURM_PROCID"] == "0":
        Path(os.environ["RUN_DIR"], "DONE").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
