"""`python -m pretrain.prove`."""

import sys

from pretrain.prove.command import main

sys.exit(main())
