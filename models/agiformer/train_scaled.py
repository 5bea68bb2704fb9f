"""`python -m models.agiformer.train_scaled`: see models/agiformer/standalone/cli.py."""

from __future__ import annotations

import sys

from models.agiformer.standalone.cli import train_scaled

if __name__ == "__main__":
    sys.exit(train_scaled())
