"""`python -m models.agiformer.inspect_reasoning`: see models/agiformer/standalone/cli.py."""

from __future__ import annotations

import sys

from models.agiformer.standalone.cli import inspect_reasoning

if __name__ == "__main__":
    sys.exit(inspect_reasoning())
