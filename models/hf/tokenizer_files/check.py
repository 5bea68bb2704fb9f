"""Check that a directory's tokenizer, as transformers loads it, equals the training tokenizer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Typical mistakes of conversions: prefixes, runs of spaces, bytes, special tokens.
_LINES = (
    "",
    "The quick brown fox jumps over 12345 lazy dogs.",
    " leading and trailing ",
    "def f(x):\n\n    return  x\t# tab\r\n",
    "h\u00e9llo \u65e5\u672c \U0001f600 \u2581",
    "e\u0301 \ufb01 \u212b \u200d \u00a0 \u3000 \ufeff",
    "</s> <s> <|endoftext|> <unk> [EOS]",
    "import os\n  x = 1",
    "word " * 3000,
)
_BLANKS = (" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0")
_WORDS, _MIXTURES, _LONGEST_MIXTURE = 2000, 3000, 12
# Runs without torch, which a tokenizer does not need and which takes seconds to import.
_SCRIPT = """
import json, sys
sys.modules["torch"] = None
from transformers import AutoTokenizer
given = json.load(sys.stdin)
# False and not the default, with which transformers asks a person at the terminal.
options = {"local_files_only": True, "trust_remote_code": False}
tokenizer = AutoTokenizer.from_pretrained(given["directory"], **options)
plain = {"add_special_tokens": False, "split_special_tokens": True}
ids = [tokenizer.encode(text, **plain) for text in given["texts"]]
whole = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
result = {
    "name": type(tokenizer).__name__,
    "ids": ids,
    "texts": [tokenizer.decode(row, **whole) for row in ids],
    "special": [tokenizer.encode(text, add_special_tokens=False) for text in given["special"]],
    "splits_special": tokenizer.split_special_tokens,
    "bos_token_id": tokenizer.bos_token_id,
    "pad_token_id": tokenizer.pad_token_id,
}
json.dump(result, sys.stdout)
"""


class Training(NamedTuple):
    """The tokenizer of training, for which special tokens are plain text.

    `decode` None: only encodings are compared. `save`: writes it as one tokenizer.json.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str] | None = None
    save: Callable[[Path], None] | None = None


class Loaded(NamedTuple):
    """A tokenizer loaded by transformers in a separate process, and its results for `texts`."""

    name: str
    ids: list[list[int]]
    texts: list[str]
    special: list[list[int]]
    splits_special: bool
    bos_token_id: int | None
    pad_token_id: int | None


class Sample(NamedTuple):
    """`texts` to encode as plain text; `special`: tokens and the ids that they are parsed to where
    special tokens are not plain text."""

    texts: list[str]
    special: dict[str, int]


def sample_of(tokenizer: Any, marked: Iterable[str] = ()) -> Sample:
    """Texts on which two forms of a `tokenizers.Tokenizer` can differ.

    Every added token, and every one of `marked`, alone and between blanks and letters; all single
    bytes; random mixtures of these, of runs of blanks and of what the vocabulary spells.
    """
    added = tokenizer.get_added_tokens_decoder()
    tokens = sorted({token.content for token in added.values()} | set(marked))
    special = {token.content: number for number, token in added.items() if token.special}
    texts = [*_LINES, *map(chr, range(256))]
    for token in tokens:
        texts += [token, f" {token}", f"{token} ", f"a{token}b", f"a {token} b", 2 * token]
    texts += _mixtures([*tokens, *_BLANKS, *_LINES[1:-1]], _spelt(tokenizer))
    return Sample(texts, special)


def _spelt(tokenizer: Any) -> list[str]:
    """Texts of single tokens, for a part of the vocabulary; without partial characters."""
    number = tokenizer.get_vocab_size()
    chosen = random.Random(1).sample(range(number), min(number, _WORDS))
    texts = (tokenizer.decode([i], skip_special_tokens=False) for i in chosen)
    return [text for text in texts if text and "\ufffd" not in text] or ["a"]


def _mixtures(fragments: list[str], words: list[str]) -> list[str]:
    numbers = random.Random(2)
    singles = [*map(chr, range(256)), "\u65e5", "\U0001f600", "\u0301"]
    pools = (fragments, words, words, words, singles, _BLANKS)
    return [
        "".join(
            numbers.choice(numbers.choice(pools))
            for _ in range(numbers.randint(2, _LONGEST_MIXTURE))
        )
        for _ in range(_MIXTURES)
    ]


def load_alone(directory: Path, sample: Sample) -> Loaded:
    """Load the tokenizer of `directory` with transformers, and nothing else, in a new process.

    Raises:
        ValueError: transformers cannot load it.
    """
    given = {
        "directory": str(directory.absolute()),
        "texts": sample.texts,
        "special": list(sample.special),
    }
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    # -P: what lies in the working directory is not imported.
    done = subprocess.run(
        [sys.executable, "-P", "-c", _SCRIPT],
        input=json.dumps(given),
        env=os.environ | quiet,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise ValueError(f"transformers cannot load the exported tokenizer: {reason}")
    return Loaded(**json.loads(done.stdout))


def difference(loaded: Loaded, sample: Sample, training: Training) -> str | None:
    """Describe the first difference between the loaded and the training tokenizer, or None."""
    for text, ids, back in zip(sample.texts, loaded.ids, loaded.texts, strict=True):
        expected = training.encode(text)
        if ids != expected:
            return f"encodes {_short(text)} as {_short(ids)}, training as {_short(expected)}"
        if training.decode is not None and (there := training.decode(ids)) != back:
            return f"decodes {_short(ids)} to {_short(back)}, training to {_short(there)}"
    for (token, number), ids in zip(sample.special.items(), loaded.special, strict=True):
        if ids != [number] and not loaded.splits_special:
            return f"reads the special token {_short(token)} as {_short(ids)}, not as {number}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
