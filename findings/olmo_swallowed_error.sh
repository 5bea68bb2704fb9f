#!/usr/bin/env bash
# OLMo-core's memmap_to_write swallows the error of its body where the file was there before
#
# Seen with   ai2-olmo-core 3.0.0, torch 2.13.0 (CPU), Python 3.11
# Behaviour   memmap_to_write hands out a temporary file and moves it to its place at the end. If the body
#             raises, it removes the temporary file and goes on: a writer of tokens that fails over the
#             file of an earlier run raises nothing and leaves the old tokens. Where there was no file,
#             the caller sees a FileNotFoundError in place of what happened.
# Output seen
#   RESULT a.npy, tokens [1, 2, 3], succeeds: raises nothing, leaves [1, 2, 3]
#   RESULT a.npy, tokens [4, 5, 6], fails: raises nothing, leaves [1, 2, 3]
#   RESULT b.npy, tokens [4, 5, 6], fails: raises FileNotFoundError, leaves no file
# Ends with 0 while this is so, and with another code once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 ai2-olmo-core==3.0.0
export OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/case.py" <<'PY'
"""What a caller of memmap_to_write sees of an error in its body, and what lies on disk then."""
import sys
from pathlib import Path

import numpy as np
from olmo_core.data.utils import memmap_to_write


def write(path, tokens, fail):
    with memmap_to_write(path, shape=(len(tokens),), dtype=np.uint16) as array:
        array[:] = tokens
        if fail:
            raise ValueError("the tokenizer failed")


def outcome(path, tokens, fail):
    try:
        write(path, tokens, fail)
        raised = "nothing"
    except Exception as error:
        raised = type(error).__name__
    content = np.fromfile(path, np.uint16).tolist() if path.exists() else "no file"
    print(f"RESULT {path}, tokens {tokens}, {'fails' if fail else 'succeeds'}: raises {raised}, leaves {content}")
    return raised, content


if __name__ == "__main__":
    first = outcome(Path("a.npy"), [1, 2, 3], fail=False)
    again = outcome(Path("a.npy"), [4, 5, 6], fail=True)
    alone = outcome(Path("b.npy"), [4, 5, 6], fail=True)
    sys.exit(not (first == ("nothing", [1, 2, 3]) and again == first
                  and alone == ("FileNotFoundError", "no file")))
PY
cd "$folder"
python case.py 2> "$folder/stderr" | tee "$folder/stdout" | grep '^RESULT' || { tail -n 20 "$folder/stderr" >&2; exit 1; }
exit "${PIPESTATUS[0]}"
