"""`AgiformerForCausalLM`, known to transformers' Auto classes once this module is imported."""

from __future__ import annotations

from models.agiformer.hf.config import AgiformerHFConfig
from models.agiformer.hf.modeling import AgiformerForCausalLM
from models.hf.auto import register

__all__ = ["AgiformerForCausalLM", "AgiformerHFConfig"]

register(AgiformerForCausalLM)
