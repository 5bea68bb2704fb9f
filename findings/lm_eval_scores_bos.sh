#!/usr/bin/env bash
# lm-eval counts the prediction of BOS from BOS into perplexities of tokenizers that add BOS
#
# Seen with   lm-eval 0.4.13, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11
# Behaviour   loglikelihood_rolling puts BOS before a text as its first context, and a tokenizer that adds
#             BOS, as Llama's does, puts another one into the text itself. The second is scored like a
#             token of the text, which no training ever asked for: bits per byte of short texts rise.
#             Only add_bos_token=False, which reads as if there were no BOS, gives the text after one.
# Output seen
#   RESULT log probability of the text after BOS -18.0583, of BOS and the text after BOS -21.3390
#   RESULT loglikelihood_rolling with add_bos_token=None: -21.3390
#   RESULT loglikelihood_rolling with add_bos_token=False: -18.0583
#   RESULT loglikelihood_rolling with add_bos_token=True: -21.3390
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 lm_eval==0.4.13
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""The score of a short text in lm-eval, and the sum of its tokens' log probabilities after one BOS."""
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "abcabc"
VOCAB = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}


def tokenizer():
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def sum_after(model, context, ids):
    logits = model(torch.tensor([[context, *ids[:-1]]])).logits[0].log_softmax(-1)
    return sum(logits[place, token].item() for place, token in enumerate(ids))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32,
                                         num_hidden_layers=1, num_attention_heads=2,
                                         initializer_range=0.5)).eval()
    ids = [VOCAB[letter] for letter in TEXT]
    text, doubled = sum_after(model, 0, ids), sum_after(model, 0, [0, *ids])
    print(f"RESULT log probability of the text after BOS {text:.4f}, of BOS and the text after BOS {doubled:.4f}")
    found = {}
    for add_bos in (None, False, True):
        harness = HFLM(model, tokenizer=tokenizer(), backend="causal", add_bos_token=add_bos, batch_size=1)
        request = Instance("loglikelihood_rolling", {}, (TEXT,), 0)
        (found[add_bos],) = harness.loglikelihood_rolling([request], disable_tqdm=True)
        print(f"RESULT loglikelihood_rolling with add_bos_token={add_bos}: {found[add_bos]:.4f}")
    sys.exit(not (abs(found[False] - text) < 1e-4 and doubled < text - 0.1
                  and all(abs(found[add_bos] - doubled) < 1e-4 for add_bos in (None, True))))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
