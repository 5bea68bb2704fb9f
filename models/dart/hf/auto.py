"""`DARTForCausalLM`, known to transformers' Auto classes once this module is imported."""

from __future__ import annotations

from models.dart.hf.config import DARTHFConfig
from models.dart.hf.modeling import DARTForCausalLM
from models.hf.auto import register

__all__ = ["DARTForCausalLM", "DARTHFConfig"]

register(DARTForCausalLM)
