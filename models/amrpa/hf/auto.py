"""`AMRPALlamaForCausalLM`, known to transformers' Auto classes once this module is imported."""

from __future__ import annotations

from models.amrpa.hf.config import AMRPALlamaHFConfig
from models.amrpa.hf.modeling import AMRPALlamaForCausalLM
from models.hf.auto import register

__all__ = ["AMRPALlamaForCausalLM", "AMRPALlamaHFConfig"]

register(AMRPALlamaForCausalLM)
