"""`python -m models.agiformer.test_memory_integrity`: see models/agiformer/standalone/cli.py."""

from __future__ import annotations

import sys

from models.agiformer.standalone.cli import memory_integrity

if __name__ == "__main__":
    sys.exit(memory_integrity())
