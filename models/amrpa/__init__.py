"""AMRPA: attention that reads the attention of earlier layers."""

from __future__ import annotations

from models.lazy_names import lazy_names

_MODULES = {
    "AMRPAConfig": "config",
    "AMRPALlamaConfig": "config",
    "AMRPALlamaForCausalLM": "hf.auto",
    "AMRPALlamaHFConfig": "hf.auto",
    "FAMILY": "model",
    "resolve_targets": "targets",
    "QueryMemory": "memory",
    "Architecture": "injection.architectures",
    "Stack": "injection.architectures",
    "inject_amrpa": "injection.inject",
    "get_amrpa_loss": "injection.inject",
    "get_amrpa_metrics": "injection.inject",
    "reset_amrpa_history": "injection.inject",
    "from_pretrained": "injection.loading",
}

__all__ = list(_MODULES)
__getattr__ = lazy_names(__name__, _MODULES)
