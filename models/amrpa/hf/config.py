"""The configuration of an AMRPALlama in transformers."""

from __future__ import annotations

from models.amrpa.config import AMRPALlamaConfig
from models.hf.decoder_config import DecoderPreTrainedConfig


class AMRPALlamaHFConfig(DecoderPreTrainedConfig):
    """The settings of `AMRPALlamaConfig` as attributes; sizes under the names of Llama."""

    model_type = "amrpa"
    model_class = "AMRPALlamaForCausalLM"
    settings_class = AMRPALlamaConfig
