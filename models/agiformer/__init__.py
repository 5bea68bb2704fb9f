"""AGIFORMER: bytes in patches, Hebbian memory, adaptive computation."""

from __future__ import annotations

from models.lazy_names import lazy_names

_MODULES = {
    "AgiformerConfig": "config",
    "FAMILY": "model",
    "ByteLatentEncoder": "encoder",
    "HebbianMemory": "block",
    "HybridBlock": "block",
    "LocalAutoregressiveHead": "head",
    "RecurrentReasoningBlock": "reasoning",
    "SlidingWindowAttention": "block",
    "SwiGLU": "block",
    "AGIFORMER": "standalone.model",
    "CurriculumDataLoader": "standalone.data",
    "AgiformerForCausalLM": "hf.auto",
    "AgiformerHFConfig": "hf.auto",
}

__all__ = list(_MODULES)
__getattr__ = lazy_names(__name__, _MODULES)
