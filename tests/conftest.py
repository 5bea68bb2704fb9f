"""What holds for every test: the environment that libraries read while they are imported."""

from __future__ import annotations

from parallel.cpu import prepare_environment

prepare_environment()
