"""The corpus of tiny runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.tiny_run import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the corpora that `tiny_run` reads."""
    directory = tmp_path_factory.mktemp("corpus")
    write_data(directory)
    return directory
