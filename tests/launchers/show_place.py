"""Stand-in for pretrain/train.py under any launcher: prints its rank and its arguments."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pretrain.distributed.launcher_env import adopt_launcher  # noqa: E402

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(directory: Path, *arguments: str) -> None:
    adopt_launcher()
    place = {name: os.environ.get(name) for name in NAMES}
    description = {**place, "host": socket.gethostname(), "arguments": arguments}
    (directory / f"{socket.gethostname()}-{os.getpid()}").write_text(json.dumps(description))


if __name__ == "__main__":
    main(Path(sys.argv[-1]), *sys.argv[1:-1])
