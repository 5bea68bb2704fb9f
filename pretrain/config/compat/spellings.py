"""Other spellings of our settings, as data: accepted ones, and ones recognised only in errors.

A model family has more of its own: `aliases` of its configuration class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Alias(NamedTuple):
    """`owner`: the setting, dotted. `values`: a value of the alias -> that of the owner."""

    owner: str
    values: Mapping[Any, Any] | None = None


_PRECISIONS = {"bf16": "bf16", "fp8": "fp8", "no": "fp32"}

# Accepted: aliases with exactly the same meaning.
ALIASES = {
    "data.block_size": Alias("data.sequence_length"),
    "data.max_length": Alias("data.sequence_length"),
    "model.num_attention_heads": Alias("model.num_heads"),
    "model.num_hidden_layers": Alias("model.num_layers"),
    "model.num_key_value_heads": Alias("model.num_kv_heads"),
    "system.compile": Alias("training.compile"),
    "system.mixed_precision": Alias("training.precision", _PRECISIONS),
    "training.compile_model": Alias("training.compile"),
    "training.gradient_checkpointing": Alias(
        "training.activation_recomputation", {True: "full", False: "none"}
    ),
    "training.mixed_precision": Alias("training.precision", _PRECISIONS),
    "training.num_epochs": Alias("training.max_epochs"),
}

# Not accepted: names in other trainers. An error about such a key suggests our setting, which
# is too different in spelling to be guessed.
_SYNONYMS = {
    "accumulation_steps": "gradient_accumulation_steps",
    "clip_grad": "grad_clip",
    "dropout_seed": "seed",
    "ffn_hidden_size": "intermediate_size",
    "gradient_clipping": "grad_clip",
    "iterations_to_skip": "skip_steps",
    "learning_rate": "lr",
    "max_grad_norm": "grad_clip",
    "micro_batch_size": "batch_size",
    "n_embd": "hidden_size",
    "n_head": "num_heads",
    "n_layer": "num_layers",
    "output_dir": "run_dir",
    "per_device_train_batch_size": "batch_size",
    "pipeline_model_parallel_size": "pipeline",
    "pp": "pipeline",
    "seq_length": "sequence_length",
    "tensor_model_parallel_size": "tensor",
    "tp": "tensor",
    "train_iters": "max_steps",
    "train_micro_batch_size_per_gpu": "batch_size",
}
_KNOWN = _SYNONYMS | {
    name.rpartition(".")[2]: alias.owner.rpartition(".")[2] for name, alias in ALIASES.items()
}


def our_name(name: str) -> str:
    """Our name for the setting `name` of another trainer; `name` itself if it is unknown."""
    return _KNOWN.get(name, name)
