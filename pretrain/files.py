"""Location of the files that are not code: run files (`configs/`), job scripts (`launchers/`).

They lie beside the packages, both in a clone and in an installed wheel:

    cp -r "$(manyformer files)/launchers" .
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the folder that holds configs/ and launchers/."""
    parser = argparse.ArgumentParser(
        prog="manyformer files",
        description=main.__doc__,
        epilog='example:\n  cp -r "$(manyformer files)/launchers" .',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    print(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
