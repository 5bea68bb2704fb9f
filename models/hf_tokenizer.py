"""Tokenizer files of a Hugging Face directory, written from those of training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

# What a tokenizer may consist of in a Hugging Face directory.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",  # which may be the only one to name the end token
    "vocab.json",
    "merges.txt",
)
# Each line is one that conversions have got wrong: prefixes, runs of spaces, bytes, specials.
_SAMPLES = (
    "The quick brown fox jumps over 12345 lazy dogs.",
    " leading and trailing ",
    "def f(x):\n\n    return  x\t# tab\r\n",
    "h\u00e9llo \u65e5\u672c \U0001f600 \u2581",
    "</s> <s> <|endoftext|> <unk> [EOS]",
)


def export_tokenizer(
    source: Path, output: Path, *, eod_id: int | None, encode: Callable[[str], list[int]]
) -> None:
    """Write tokenizer.json and tokenizer_config.json so that AutoTokenizer loads them.

    `source`: a tokenizer.json or a SentencePiece .model. `encode`: the tokenizer of training, with
    which the result is compared on samples.

    Raises:
        ValueError: the file has no equal among fast tokenizers.
    """
    if source.suffix == ".model":
        _from_sentencepiece(source, output / "tokenizer.json")
    else:
        shutil.copyfile(source, output / "tokenizer.json")
    _write_config(source.with_name("tokenizer_config.json"), output, eod_id=eod_id)
    _compare(source, output, encode)


def copy_tokenizer(source: Path, output: Path) -> bool:
    """Copy the tokenizer files of a Hugging Face directory; False when there are none to use."""
    present = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    names = {path.name for path in present}
    if (
        not names & {"tokenizer.json", "tokenizer.model"}
        and not {"vocab.json", "merges.txt"} <= names
    ):
        return False
    output.mkdir()
    for path in present:
        shutil.copyfile(path, output / path.name)
    return True


def _from_sentencepiece(source: Path, target: Path) -> None:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    extractor = SentencePieceExtractor(str(source))
    trainer, rules = extractor.proto.trainer_spec, extractor.proto.normalizer_spec
    if trainer.model_type != trainer.BPE or rules.precompiled_charsmap:
        raise ValueError(
            f"{source}: only byte-pair SentencePiece models without normalization can be exported; "
            "pass --no-tokenizer to export the model without it"
        )
    parts = extractor.extract(BPE)
    tokenizer = Tokenizer(
        BPE(
            vocab=parts["vocab"],
            merges=parts["merges"],
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    prefix = rules.add_dummy_prefix
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    added = parts["additional_special_tokens"]
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.save(str(target))


def _write_config(source: Path, output: Path, *, eod_id: int | None) -> None:
    """tokenizer_config.json: that of the source where there is one, otherwise the least needed."""
    target = output / "tokenizer_config.json"
    if source.is_file():
        shutil.copyfile(source, target)
        return
    from tokenizers import Tokenizer

    contents: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if eod_id is not None:
        tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
        contents["eos_token"] = tokenizer.id_to_token(eod_id)
    target.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="ascii")


def _compare(source: Path, output: Path, encode: Callable[[str], list[int]]) -> None:
    from transformers import AutoTokenizer

    # False and not the default, with which transformers asks a person at the terminal.
    loaded = AutoTokenizer.from_pretrained(output, local_files_only=True, trust_remote_code=False)
    for sample in _SAMPLES:
        ids = loaded.encode(sample, add_special_tokens=False, split_special_tokens=True)
        if ids != encode(sample):
            raise ValueError(
                f"{source}: its export encodes {sample!r} differently, so it would not be the same "
                "tokenizer; pass --no-tokenizer to export the model without it"
            )
