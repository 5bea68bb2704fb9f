"""The configuration of a DART in transformers."""

from __future__ import annotations

from typing import ClassVar

from models.dart.config import DARTConfig
from models.hf.decoder_config import DecoderPreTrainedConfig


class DARTHFConfig(DecoderPreTrainedConfig):
    """The settings of `DARTConfig` as attributes; sizes under the names of Llama."""

    model_type = "dart"
    model_class = "DARTForCausalLM"
    settings_class = DARTConfig
    attribute_map: ClassVar[dict[str, str]] = {
        **DecoderPreTrainedConfig.attribute_map,
        "max_seq_length": "max_position_embeddings",
    }
