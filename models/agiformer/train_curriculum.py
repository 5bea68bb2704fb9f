"""`python -m models.agiformer.train_curriculum`: see models/agiformer/standalone/cli.py."""

from __future__ import annotations

import sys

from models.agiformer.standalone.cli import train_curriculum

if __name__ == "__main__":
    sys.exit(train_curriculum())
