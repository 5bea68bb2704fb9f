"""`python -m models.agiformer.overfit_test`: see models/agiformer/standalone/cli.py."""

from __future__ import annotations

import sys

from models.agiformer.standalone.cli import overfit_test

if __name__ == "__main__":
    sys.exit(overfit_test())
