"""Tensor names in files: Qwen2's for the dense part, so that a Qwen2 loader reads it.

Both layers of a pair keep their index in the plain stack. Beside the plain part a layer may have
`router.*`, `prior.*` and `tau`.
"""

from __future__ import annotations

import re

from models.hf.llama_names import (
    BLOCK_BIAS_NAMES,
    BLOCK_NAMES,
    EMBEDDING_NAME,
    FINAL_NORM_NAME,
    HEAD_NAME,
)

# With Qwen2's weights: a gate of value 1 leaves what layers add as it was, and the first token,
# where attention sinks, is always there.
BASE_DEFAULTS = {"gate_fn": "st", "force_first": True}
_OUTSIDE = dict((EMBEDDING_NAME, FINAL_NORM_NAME, HEAD_NAME))
_PLAIN = BLOCK_NAMES | BLOCK_BIAS_NAMES
# Where a layer's part lies in ours -> its first layer in a pair, and what precedes it in files.
_PARTS = {
    "block.": (0, ""),
    "decision.block.": (0, ""),
    "decision.prior_norm.": (0, "prior.norm."),
    "decision.prior.": (0, "prior."),
    "dynamic.block.": (1, ""),
    "router.choice.": (1, "router."),
    "router.": (1, "router."),
}
_THRESHOLD = {
    "router.choice.tokens.threshold.tau": "tau",
    "router.choice.tokens.threshold.offset": "router.tau_offset",
}


def file_name(name: str) -> str:
    """The name in files of our parameter or buffer `name`.

    Raises:
        ValueError: it is in none of the parts that a layer is known to have.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, _, path = name.partition(".")
    kind, _, number = layer.partition("_")
    index = 2 * int(number) if kind == "pair" else int(number or -1)
    if path in _THRESHOLD:
        return f"model.layers.{index + (kind == 'pair')}.{_THRESHOLD[path]}"
    for part, (second, before) in _PARTS.items():
        if path.startswith(part):
            index += second if kind == "pair" else 0
            rest = path.removeprefix(part)
            return f"model.layers.{index}.{before}{_PLAIN.get(rest, rest)}"
    raise ValueError(f"{name} has no name in a file; add its part to models.dynamic.hf.names")


def is_plain(name: str) -> bool:
    """Whether a name in files is one of Qwen2's."""
    path = re.sub(r"^model\.layers\.\d+\.", "", name)
    return name in _OUTSIDE.values() or path in _PLAIN.values()


def is_added(name: str) -> bool:
    """Whether a name in files belongs to a router, prior or threshold."""
    return re.fullmatch(r"model\.layers\.\d+\.(tau|router\..+|prior\..+)", name) is not None
