#!/usr/bin/env bash
# transformers' Trainer adds up micro-batches of T5 and BERT where it averages those of Llama
#
# Seen with   transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11
# Behaviour   four micro-batches of one row, accumulated, should give the step of one batch of four
#             rows of the same length. They do for Llama. T5 and BERT accept any keyword but never use
#             the token count that Trainer passes them, and Trainer takes its acceptance for a loss that
#             has been divided: their step and the reported loss are as many times too large as
#             there are micro-batches.
# Output seen
#   RESULT Llama: reported loss 4.180 with 1 batch of 4 rows, 4.180 with 4 batches of 1 row, whose step is 1.000 times as long
#   RESULT T5: reported loss 4.713 with 1 batch of 4 rows, 18.852 with 4 batches of 1 row, whose step is 4.000 times as long
#   RESULT BERT: reported loss 4.177 with 1 batch of 4 rows, 16.708 with 4 batches of 1 row, whose step is 4.000 times as long
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""One step of SGD in Trainer: a batch of 4 rows against 4 accumulated batches of 1 row."""
import sys

import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration, Trainer, TrainingArguments

VOCAB, ROWS, LENGTH = 64, 4, 8
SIZE = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5_SIZE = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}

MODELS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, **HEADS)),
    "T5": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZE, dropout_rate=0.0, decoder_start_token_id=0)),
    "BERT": lambda: BertForMaskedLM(BertConfig(**SIZE, **HEADS, **NO_DROPOUT)),
}


def update(build, rows_per_batch):
    """The length of one step of the parameters, and the loss that Trainer reports."""
    torch.manual_seed(0)
    model = build()
    ids = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    arguments = TrainingArguments(
        "out",
        max_steps=1,
        per_device_train_batch_size=rows_per_batch,
        gradient_accumulation_steps=ROWS // rows_per_batch,
        optim="sgd",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    reported = Trainer(model, arguments, train_dataset=data).train().training_loss
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return (after - before).norm().item(), reported


if __name__ == "__main__":
    ratio = {}
    for name, build in MODELS.items():
        (step, loss), (accumulated_step, accumulated_loss) = update(build, ROWS), update(build, 1)
        ratio[name] = accumulated_step / step
        print(f"RESULT {name}: reported loss {loss:.3f} with 1 batch of 4 rows, {accumulated_loss:.3f} with "
              f"4 batches of 1 row, whose step is {ratio[name]:.3f} times as long")
    sys.exit(not (abs(ratio["Llama"] - 1) < 0.01 and min(ratio["T5"], ratio["BERT"]) > 3.9))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
