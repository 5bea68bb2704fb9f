"""`python -m pretrain.prove.exported MODEL TOKENS LOGITS`: transformers alone, in a fresh process.

Loads an exported directory in fp64 with the code in it, and writes its logits for saved tokens.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(directory: str, tokens: str, logits: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float64
    )
    output = model.eval()(torch.load(tokens, weights_only=True), use_cache=False)
    torch.save(output.logits, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
