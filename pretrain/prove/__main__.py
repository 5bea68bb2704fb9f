"""`python -m pretrain.prove`."""

import sys

from pretrain.prove.command import main

if __name__ == "__main__":
    sys.exit(main())
