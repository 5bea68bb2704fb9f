"""Freezing of parameters by an injection."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.amrpa.config import AMRPAConfig
from models.amrpa.targets import MemoryPlan


def freeze(
    model: Any,
    config: AMRPAConfig,
    stacks: list[tuple[nn.Module, list[nn.Module], MemoryPlan | None]],
) -> None:
    """Freeze the layers without memory and the embeddings, as far as `config` says.

    `stacks`: the list of layers, the attention of each depth, the plan (None: no memory there).
    Layers with memory, final norms and heads stay trainable. An output layer that is tied to the
    embeddings is frozen with them.
    """
    for layers, attentions, plan in stacks:
        kept = {id(attentions[depth]) for depth in (plan.reads if plan else ())}
        if config.freeze_base_model:
            for layer in layers.children():
                if not any(id(module) in kept for module in layer.modules()):
                    layer.requires_grad_(False)
    if config.freeze_embeddings:
        inside = {id(module) for layers, _, _ in stacks for module in layers.modules()}
        for name, module in model.named_modules():
            is_embedding = isinstance(module, nn.Embedding) or name.endswith("embeddings")
            if is_embedding and id(module) not in inside:
                module.requires_grad_(False)
