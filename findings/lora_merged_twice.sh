#!/usr/bin/env bash
# peft: a LoRA that ensure_weight_tying shares between embedding and head is merged twice
#
# Seen with   peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11
# Behaviour   with ensure_weight_tying=True a LoRA on embed_tokens of a model with a tied head serves
#             the head too, as it should. merge_and_unload then adds the product once for each of the
#             two layers to the one matrix that both share: the merged model is another than the one
#             that was trained. A warning says that merging a tied layer may be complicated, not this.
# Output seen
#   RESULT trained: logits are off by 2.4e-07 from the product added once, by 1.3e+00 from the product added twice
#   RESULT merged: logits are off by 1.3e+00 from the product added once, by 2.4e-07 from the product added twice
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""Logits of a small Llama with tied embeddings against base matrix + k times the product of its LoRA."""
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SIZE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2}
IDS = torch.arange(8)[None]


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)).eval()


def by_hand(product, times):
    """Logits of a model without peft whose tied matrix has had the product added that often."""
    model = base()
    model.model.embed_tokens.weight += times * product
    return model(IDS).logits


@torch.no_grad()
def main():
    lora = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(base(), lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1)  # as if trained: one of the two factors starts as zeros
    product = model.get_base_model().model.embed_tokens.get_delta_weight("default").clone()
    trained = model(IDS).logits
    merged = model.merge_and_unload()(IDS).logits
    off = {}
    for name, logits in (("trained", trained), ("merged", merged)):
        off[name] = [(logits - by_hand(product, times)).abs().max().item() for times in (1, 2)]
        print(f"RESULT {name}: logits are off by {off[name][0]:.1e} from the product added once, "
              f"by {off[name][1]:.1e} from the product added twice")
    exact, wrong = (off["trained"][0], off["merged"][1]), (off["trained"][1], off["merged"][0])
    sys.exit(not (max(exact) < 1e-4 and min(wrong) > 0.1))


if __name__ == "__main__":
    main()
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
