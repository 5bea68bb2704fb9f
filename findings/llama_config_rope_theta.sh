#!/usr/bin/env bash
# transformers: a rope_theta that is set on a LlamaConfig is saved, and has no effect
#
# Seen with   transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11
# Behaviour   LlamaConfig(rope_theta=...) changes the rotary frequencies. The same number set on an existing
#             config is accepted and written to config.json, where it stands beside another one in
#             rope_parameters; the model, also one that is loaded from that file, keeps the old base.
# Output seen
#   RESULT LlamaConfig(rope_theta=500000): base 500000
#   RESULT config.rope_theta = 500000: base 10000, loaded again 10000; config.json has rope_theta 500000.0,
#     rope_parameters {'rope_theta': 10000.0, 'rope_type': 'default'}
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""The base of the rotary embedding in effect, by how it was asked for."""
import json
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

SIZE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2}
HEAD, WANTED = 8, 500_000.0


def base(model):
    """inv_freq[i] is base^(-2 i / head)."""
    return round(model.model.rotary_emb.inv_freq[1].item() ** (-HEAD / 2))


def near(found, wanted):
    return abs(found / wanted - 1) < 1e-3


if __name__ == "__main__":
    given = base(LlamaForCausalLM(LlamaConfig(**SIZE, rope_theta=WANTED)))
    print(f"RESULT LlamaConfig(rope_theta={WANTED:.0f}): base {given}")
    config = LlamaConfig(**SIZE)
    config.rope_theta = WANTED
    model = LlamaForCausalLM(config)
    model.save_pretrained("model")
    saved = json.loads(Path("model/config.json").read_text())
    loaded = base(LlamaForCausalLM.from_pretrained("model"))
    print(f"RESULT config.rope_theta = {WANTED:.0f}: base {base(model)}, loaded again {loaded}; config.json "
          f"has rope_theta {saved.get('rope_theta')}, rope_parameters {saved['rope_parameters']}")
    sys.exit(not (near(given, WANTED) and near(base(model), 10_000) and near(loaded, 10_000)
                  and saved.get("rope_theta") == WANTED))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
