"""What importing Megatron-Core depends on."""

from __future__ import annotations

import importlib
import sys

import pytest

from parallel import megatron


@pytest.mark.parametrize("error", ["OSError('libcudart.so.13')", "RuntimeError('no extension')"])
def test_a_transformer_engine_that_cannot_be_loaded_is_as_one_that_is_not_there(
    error, tmp_path, monkeypatch, caplog
):
    """For Megatron-Core, which catches ImportErrors; FP8 itself is still told the reason."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    with megatron._without_broken_transformer_engine(), pytest.raises(ImportError):
        importlib.import_module("transformer_engine.pytorch")
    assert "cannot be loaded" in caplog.text
    assert not [name for name in sys.modules if name.startswith("transformer_engine")]
    with pytest.raises((OSError, RuntimeError)):
        importlib.import_module("transformer_engine")


def test_without_transformer_engine_nothing_is_said(caplog):
    with megatron._without_broken_transformer_engine():
        pass
    assert not caplog.records
