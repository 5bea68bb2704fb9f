"""`python -m models.agiformer.generate`: see models/agiformer/standalone/cli.py."""

from __future__ import annotations

import sys

from models.agiformer.standalone.cli import generate

if __name__ == "__main__":
    sys.exit(generate())
