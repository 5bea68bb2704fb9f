"""What holds for every test: the environment that libraries read while they are imported."""

from __future__ import annotations

import signal

from parallel.cpu import prepare_environment

prepare_environment()
# A shell starts what runs in its background with SIGINT ignored, and every process that a test
# starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
