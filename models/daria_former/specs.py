"""The ordered layers of a Daria-Former."""

from __future__ import annotations

from models.common.decoder import decoder_specs
from models.daria_former.config import DariaFormerConfig
from models.daria_former.layers import DACBlock, DariaEmbedding, DariaHead
from models.daria_former.paths import Rotaries
from parallel.carry import LayerSpec


def layer_specs(config: DariaFormerConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `block_0` ... `block_{L-1}`, `head`."""
    rotaries = Rotaries.of(config)
    blocks = [
        LayerSpec(f"block_{i}", DACBlock, {"config": config, "layer": i, "rotaries": rotaries})
        for i in range(config.num_layers)
    ]
    return decoder_specs(
        config,
        blocks,
        segmented=segmented,
        tied=config.weight_tying,
        embedding=DariaEmbedding,
        head=DariaHead,
    )
