"""Export of the training tokenizer as tokenizer files of a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from models.hf.declared import OwnTokens
from models.hf.tokenizer_files.check import Loaded, Training, difference, load_alone, sample_of
from models.hf.tokenizer_files.sentencepiece import write_sentencepiece

_CONFIG = "tokenizer_config.json"
# Files of a tokenizer in a Hugging Face directory, besides its own.
_COMPANIONS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_TEMPLATES = "additional_chat_templates"
_FURTHER_TOKENS = ("additional_special_tokens", "extra_special_tokens")
# The class with which transformers takes tokenizer.json as it is; others build parts of it anew.
_GENERIC_CLASS = "PreTrainedTokenizerFast"
_END_OF_DOCUMENT = "<|endoftext|>"


class Exported(NamedTuple):
    """`remarks` for the user, and the tokens that the exported files name."""

    remarks: list[str]
    tokens: OwnTokens


def export_tokenizer_files(
    source: Path, output: Path, training: Training, *, eod_id: int | None
) -> Exported:
    """Write the files with which AutoTokenizer loads the tokenizer of training from `output`.

    `source`: a tokenizer.json, a SentencePiece .model, or a vocab.json with merges.txt beside it.
    What a process with transformers alone loads from `output` is compared with `training`
    (models.hf.tokenizer_files.check), so that other files on which loading depends, such as
    config.json, must already be there.

    Raises:
        ValueError: transformers would load another tokenizer.
    """
    _copy_companions(source.parent, output)
    marked: list[str] = []
    if source.suffix == ".model":
        shutil.copyfile(source, output / "tokenizer.model")
        marked = write_sentencepiece(source, output / "tokenizer.json", training)
    elif source.name == "vocab.json" and training.save is not None:
        training.save(output / "tokenizer.json")
    else:
        shutil.copyfile(source, output / "tokenizer.json")
    remarks = _write_config(source.with_name(_CONFIG), output, eod_id=eod_id)
    return _checked_export(str(source), output, marked, training, remarks, eod_id)


def export_byte_tokenizer(output: Path, training: Training) -> Exported:
    """Write a tokenizer of UTF-8 bytes, ids 0..255, and 256 for the end of a document.

    Raises:
        ValueError: transformers would load another tokenizer.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END_OF_DOCUMENT])
    tokenizer.save(str(output / "tokenizer.json"))
    remarks = _write_config(None, output, eod_id=len(vocabulary))
    return _checked_export("bytes", output, [], training, remarks, len(vocabulary))


def copy_tokenizer(source: Path, output: Path) -> bool:
    """Copy the tokenizer files of a Hugging Face directory; False when there are none to use."""
    present = {path.name for path in source.iterdir() if path.is_file()}
    kinds = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"})
    if not any(kind <= present for kind in kinds):
        return False
    output.mkdir()
    for name in present & {"tokenizer.json", _CONFIG}:
        shutil.copyfile(source / name, output / name)
    _copy_companions(source, output)
    return True


def _copy_companions(source: Path, output: Path) -> None:
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    for path in sorted((source / _TEMPLATES).glob("*.jinja")):
        (output / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, output / _TEMPLATES / path.name)


def _checked_export(
    source: str,
    output: Path,
    marked: list[str],
    training: Training,
    remarks: list[str],
    eod_id: int | None,
) -> Exported:
    """Compare what transformers loads with the training tokenizer; if the declared class changes
    it, declare the class that leaves tokenizer.json unchanged."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    beside = declared_tokens(output)
    sample = sample_of(tokenizer, [*marked, *beside])
    named = {token: number for token, number in beside.items() if number is not None}
    sample = sample._replace(special=sample.special | named)
    loaded = load_alone(output, sample)
    wrong = difference(loaded, sample, training)
    if wrong is not None and _take_generic_class(output):
        first = loaded
        loaded = load_alone(output, sample)
        other = difference(loaded, sample, training)
        if other is None:
            remarks.append(
                f"tokenizer_class is {_GENERIC_CLASS} now: as {first.name} transformers {wrong}"
            )
        wrong = other
    if wrong is not None:
        raise ValueError(f"{source}: {_refusal(output, loaded, wrong)}")
    return Exported(remarks, OwnTokens(eod_id, loaded.bos_token_id, loaded.pad_token_id))


def declared_tokens(folder: Path) -> dict[str, int | None]:
    """Tokens named by the files beside a tokenizer, with the ids of special ones if declared."""
    config = _read_json(folder / _CONFIG)
    named = config | _read_json(folder / "special_tokens_map.json")
    values = [value for name, value in named.items() if name.endswith("_token")]
    for name in _FURTHER_TOKENS:
        further = named.get(name) or []
        values += further.values() if isinstance(further, dict) else further
    contents = [value.get("content") if isinstance(value, dict) else value for value in values]
    # Settings such as add_bos_token are named like tokens and are none.
    found: dict[str, int | None] = dict.fromkeys(c for c in contents if c and isinstance(c, str))
    found |= dict.fromkeys(_read_json(folder / "added_tokens.json"))
    for number, token in config.get("added_tokens_decoder", {}).items():
        found[token["content"]] = int(number) if token.get("special") else None
    return found


def _refusal(output: Path, loaded: Loaded, wrong: str) -> str:
    text = f"the exported tokenizer would be another one: as {loaded.name} transformers {wrong}"
    declared = _read_json(output / _CONFIG).get("tokenizer_class")
    if declared == _GENERIC_CLASS and loaded.name not in (_GENERIC_CLASS, "TokenizersBackend"):
        kind = _read_json(output / "config.json").get("model_type")
        text += f", a class that it takes for every model of type {kind}"
    return f"{text}; pass --no-tokenizer to export the model without it"


def chat_template(folder: Path) -> str | None:
    """The template of chats that the files beside a tokenizer declare, if it is one alone."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    declared = _read_json(folder / _CONFIG).get("chat_template")
    return declared if isinstance(declared, str) else None


def _take_generic_class(output: Path) -> bool:
    """Declare the generic class in tokenizer_config.json; False if it is declared already."""
    contents = _read_json(output / _CONFIG)
    if contents.get("tokenizer_class") == _GENERIC_CLASS:
        return False
    _write_json(output / _CONFIG, contents | {"tokenizer_class": _GENERIC_CLASS})
    return True


def _write_config(source: Path | None, output: Path, *, eod_id: int | None) -> list[str]:
    """Write tokenizer_config.json: that of the source, or else the minimum."""
    if source is not None and source.is_file():
        contents = _read_json(source)
        code = contents.pop("auto_map", None)
        _write_json(output / _CONFIG, contents)
        if code is None:
            return []
        return [f"{source}: auto_map names code of the tokenizer's own, which is not exported"]
    from tokenizers import Tokenizer

    contents = {"tokenizer_class": _GENERIC_CLASS, "clean_up_tokenization_spaces": False}
    if eod_id is not None:
        tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
        contents["eos_token"] = tokenizer.id_to_token(eod_id)
    _write_json(output / _CONFIG, contents)
    return []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        contents: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object; repair it") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a JSON object; repair it")
    return contents


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    text = json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
