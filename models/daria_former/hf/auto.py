"""`DariaFormerForCausalLM`, known to transformers' Auto classes once this module is imported."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from models.daria_former.hf.config import DariaFormerHFConfig
from models.daria_former.hf.modeling import DariaFormerForCausalLM

__all__ = ["DariaFormerForCausalLM", "DariaFormerHFConfig"]

AutoConfig.register(DariaFormerHFConfig.model_type, DariaFormerHFConfig)
AutoModelForCausalLM.register(DariaFormerHFConfig, DariaFormerForCausalLM)
