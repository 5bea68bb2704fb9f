"""`python -m models.agiformer.test_recall_fixed`: see models/agiformer/standalone/cli.py."""

from __future__ import annotations

import sys

from models.agiformer.standalone.cli import recall_test

if __name__ == "__main__":
    sys.exit(recall_test())
