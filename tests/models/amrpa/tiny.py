"""Tiny models of every architecture that AMRPA reaches, made offline, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig

from models.amrpa import AMRPAConfig, inject_amrpa

VOCAB = 61
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0}
_BERT = _SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TWO_STACKS = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 4, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _BERT),
    "roberta": ("RobertaForMaskedLM", _BERT),
    "electra": ("ElectraForMaskedLM", _BERT | {"embedding_size": 32}),
    "albert": ("AlbertForMaskedLM", _BERT | {"embedding_size": 16}),
    "albert_groups": (
        "AlbertForMaskedLM",
        _BERT | {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48,
         "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
         "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        _SIZES | {"global_attn_every_n_layers": 2, "local_attention": 6, "cls_token_id": 1,
                  "sep_token_id": 2},
    ),
}  # fmt: skip
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64,
         "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
         "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "llama": ("LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", _GROUPED | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
         "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.3,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _SIZES | {"rotary_pct": 0.5}),
    "gemma3_text": ("Gemma3ForCausalLM", _GROUPED | {
        "sliding_window": 5, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi3": ("Phi3ForCausalLM", _GROUPED | {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
}  # fmt: skip
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4,
         "num_decoder_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 8,
         "relative_attention_max_distance": 16, "initializer_factor": 1.0, "dropout_rate": 0.0,
         "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    ),
    "bart": ("BartForConditionalGeneration", _TWO_STACKS),
    "mbart": ("MBartForConditionalGeneration", _TWO_STACKS),
    "marian": ("MarianMTModel", _TWO_STACKS),
    "pegasus": ("PegasusForConditionalGeneration", _TWO_STACKS),
}  # fmt: skip
ALL = ENCODERS | DECODERS | PAIRS


def plain(name: str, **changes: Any) -> Any:
    """A model without AMRPA in evaluation mode."""
    class_name, settings = ALL[name]
    config = AutoConfig.for_model(name.removesuffix("_groups"), **settings | changes)
    torch.manual_seed(5)
    return getattr(transformers, class_name)(config).eval()


def injected(name: str, changes: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A model with AMRPA whose memory is away from where it starts."""
    model = inject_amrpa(plain(name, **changes or {}), _config(settings))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".amrpa." in parameter_name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.5 * noise.to(parameter.dtype))
    return model


def _config(settings: dict[str, Any]) -> AMRPAConfig:
    tiny = {
        "target_layers": "all", "alpha_mlp_hidden": 12, "memory_noise": 0.1, "dropout": 0.0,
        "freeze_base_model": False, "freeze_embeddings": False,
    }  # fmt: skip
    return AMRPAConfig.from_dict(tiny | settings)


def inputs(name: str, *, length: int = 12, padded: bool = True, seed: int = 1) -> dict[str, Any]:
    """Two rows of tokens, the first padded: encoders on the right, decoders on the left."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (2, length), generator=generator)
    found = {"input_ids": tokens}
    if padded:
        mask = torch.ones_like(tokens)
        padding = slice(0, 3) if name in DECODERS else slice(length - 3, length)
        mask[0, padding] = 0
        found = {"input_ids": tokens * mask, "attention_mask": mask}
    if name in PAIRS:
        found["decoder_input_ids"] = torch.randint(3, VOCAB, (2, length - 2), generator=generator)
    return found
