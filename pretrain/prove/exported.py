"""An exported model in a fresh process: transformers alone, with the code beside it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def write_logits(directory: str, tokens: str, logits: str) -> None:
    """Load an exported directory in fp64, and write its logits for saved tokens."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float64
    )
    output = model.eval()(torch.load(tokens, weights_only=True), use_cache=False)
    torch.save(output.logits, logits)
