"""`DariaFormerForCausalLM`, known to transformers' Auto classes once this module is imported."""

from __future__ import annotations

from models.daria_former.hf.config import DariaFormerHFConfig
from models.daria_former.hf.modeling import DariaFormerForCausalLM
from models.hf.auto import register

__all__ = ["DariaFormerForCausalLM", "DariaFormerHFConfig"]

register(DariaFormerForCausalLM)
