"""The ordered layers of a Daria-Former."""

from __future__ import annotations

from typing import Any

from models.daria_former.config import DariaFormerConfig
from models.daria_former.layers import DACBlock, DariaEmbedding, DariaHead
from models.daria_former.paths import Rotaries
from parallel.carry import LayerSpec


def layer_specs(config: DariaFormerConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `block_0` ... `block_{L-1}`, `head`."""
    rotaries = Rotaries.of(config)
    tied = {"output.weight": "embedding.tokens.weight"} if config.weight_tying else {}
    first = {"config": config, "segmented": segmented}
    return [
        LayerSpec("embedding", DariaEmbedding, first, recompute=False),
        *(
            LayerSpec(f"block_{i}", DACBlock, _block_arguments(config, i, rotaries))
            for i in range(config.num_layers)
        ),
        LayerSpec("head", DariaHead, {"config": config}, tied=tied, recompute=False),
    ]


def _block_arguments(config: DariaFormerConfig, layer: int, rotaries: Rotaries) -> dict[str, Any]:
    """Without the number of the layer, so that equal blocks have equal specs."""
    return {
        "config": config,
        "updates_emotion": config.updates_emotion_after(layer),
        "is_last": layer + 1 == config.num_layers,
        "rotaries": rotaries,
    }
