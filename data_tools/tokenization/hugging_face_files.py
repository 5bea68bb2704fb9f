"""Hugging Face tokenizers: tokenizer.json, or vocab.json with merges.txt, and what is beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from data_tools.errors import DataError
from data_tools.files import sha256_of
from data_tools.tokenization.byte_bpe import GPT2_PATTERN, QWEN2_PATTERN, FastByteBpe, byte_letters
from data_tools.tokenization.declared import CONFIG, Declared, read_declared, tokens_to_add
from data_tools.tokenization.document_marks import Mark, Marks, find_end
from data_tools.tokenization.special_tokens import SpecialTokens, TokenSpec

VOCAB, MERGES = "vocab.json", "merges.txt"


class _Rules(NamedTuple):
    """How a class of transformers cuts text for vocab.json and merges.txt, which do not say."""

    pattern: str
    is_nfc: bool = False
    end: str = "<|endoftext|>"


# Without a class, or with one of any tokenizer, they are read as Megatron-LM and the library's own
# ByteLevelBPETokenizer read them.
_ANY = (None, "PreTrainedTokenizer", "TokenizersBackend")
_RULES = {
    **dict.fromkeys(_ANY, _Rules(GPT2_PATTERN)),
    "GPT2Tokenizer": _Rules(GPT2_PATTERN),
    "CodeGenTokenizer": _Rules(GPT2_PATTERN),
    "Qwen2Tokenizer": _Rules(QWEN2_PATTERN, is_nfc=True),
}


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, with the tokens that the files beside it declare.

    Raises:
        DataError: a file cannot be read, or `eod` is not in the vocabulary.
    """

    def __init__(
        self, path: Path, *, eod: str | int | None, special_tokens: SpecialTokens | None
    ) -> None:
        declared = read_declared(path.parent)
        self.name = str(path)
        self._backend = _open(path, declared)
        own = {t.content: t for t in map(_spec, self._backend.get_added_tokens_decoder().values())}
        added = tokens_to_add(declared, own)
        _add(self._backend, added, declared, path)
        self.fingerprint = _fingerprint(path, declared, added)
        default: SpecialTokens = "plain" if declared.splits_special_tokens else "parse"
        self._backend.encode_special_tokens = (special_tokens or default) == "plain"
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self._special = {
            number
            for number, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.marks = self._find_marks(declared, eod, default)

    @property
    def eod_id(self) -> int | None:
        return self.marks.eod_id

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        fast = self._fast
        ids = [None if fast is None else fast.encode(text) for text in texts]
        left = [number for number, found in enumerate(ids) if found is None]
        encodings = self._backend.encode_batch_fast(
            [texts[number] for number in left], add_special_tokens=False
        )
        for number, encoding in zip(left, encodings, strict=True):
            ids[number] = encoding.ids
        return cast(list[list[int]], ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token: int) -> str | None:
        return self._backend.id_to_token(token)

    def is_special(self, token: int) -> bool:
        return token in self._special

    def save(self, path: Path) -> None:
        """Write all of it as one tokenizer.json."""
        self._backend.save(str(path))

    @cached_property
    def _fast(self) -> FastByteBpe | None:
        return FastByteBpe.of(self._backend)

    def _find_marks(
        self, declared: Declared, eod: str | int | None, default: SpecialTokens
    ) -> Marks:
        before, after = self._around_text()
        own = None
        if len(after) == 1:
            own = Mark(after, self._text(after), "as its post-processor")
        end = find_end(self, declared, eod=eod, own=own)
        begin = Mark(before, self._text(before), "as its post-processor") if before else None
        if begin is None and (role := declared.named.get("bos_token")) is not None:
            token = self.token_to_id(role.token.content)
            if token is not None:
                begin = Mark((token,), role.token.content, f"declared in {role.file}")
        # A tokenizer.json says itself what is added; only other files need this setting.
        asked = declared.adds_bos and Path(self.name).name == VOCAB
        return Marks(
            end=end.mark,
            no_end=end.reason,
            begin=begin,
            begins_documents=bool(before) or (asked and begin is not None),
            special_tokens=default,
        )

    def _around_text(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts before and after a text."""
        text = next((t for t in ("a", "0", " ", "\n") if self.encode(t)), None)
        if text is None:
            return (), ()
        encoding = self._backend.encode(text, add_special_tokens=True)
        places = [i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
        return tuple(encoding.ids[: places[0]]), tuple(encoding.ids[places[-1] + 1 :])

    def _text(self, ids: Sequence[int]) -> str:
        return "".join(self.id_to_token(token) or "" for token in ids)


def fingerprint_of(path: Path) -> str:
    """The fingerprint of `HuggingFaceTokenizer(path)`, without loading it.

    Raises:
        DataError: a file cannot be read.
    """
    declared = read_declared(path.parent)
    if path.name == VOCAB:
        return HuggingFaceTokenizer(path, eod=None, special_tokens=None).fingerprint
    if not (declared.named or declared.extra or declared.added):
        return sha256_of(path)
    try:
        added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        own = {each["content"]: _spec_of_json(each) for each in added}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _not_a_tokenizer(path, error) from error
    return _fingerprint(path, declared, tokens_to_add(declared, own))


def _fingerprint(path: Path, declared: Declared, added: Sequence[TokenSpec]) -> str:
    """SHA-256 of the file alone where it says everything itself."""
    digests = [sha256_of(path)]
    if path.name == VOCAB:
        digests += [sha256_of(path.with_name(MERGES)), str(_rules(path, declared))]
    if not added and len(digests) == 1:
        return digests[0]
    return hashlib.sha256(json.dumps([digests, added]).encode()).hexdigest()


def _open(path: Path, declared: Declared) -> Any:
    from tokenizers import Tokenizer

    try:
        if path.name == VOCAB:
            return _open_vocab_and_merges(path, declared)
        return Tokenizer.from_file(str(path))
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise _not_a_tokenizer(path, error) from error


def _open_vocab_and_merges(path: Path, declared: Declared) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rules = _rules(path, declared)
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(path.with_name(MERGES))))
    missing = byte_letters().keys() - tokenizer.get_vocab().keys()
    if missing:
        raise DataError(
            f"{path}: no token for {len(missing)} of the 256 bytes, so it is not byte-level; give "
            "a tokenizer.json"
        )
    prefix = declared.adds_prefix_space
    if rules.pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        split = pre_tokenizers.Split(Regex(rules.pattern), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    if rules.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(rules.end) is not None:
        tokenizer.add_special_tokens([rules.end])
    return tokenizer


def _rules(path: Path, declared: Declared) -> _Rules:
    rules = _RULES.get(declared.tokenizer_class)
    if rules is None:
        known = ", ".join(name for name in _RULES if name and name not in _ANY)
        raise DataError(
            f"{path}: {CONFIG} beside it names {declared.tokenizer_class}, and {VOCAB} with "
            f"{MERGES} is read as {known} only; give its tokenizer.json"
        )
    return rules


def _add(backend: Any, added: Sequence[TokenSpec], declared: Declared, path: Path) -> None:
    from tokenizers import AddedToken

    backend.add_tokens([AddedToken(**token._asdict()) for token in added])
    for number, token in sorted(declared.added.items()):
        found = backend.token_to_id(token.content)
        if found != number:
            raise DataError(
                f"{path}: the files beside it declare {token.content!r} as id {number}, but here "
                f"it is {found}; they do not belong together: get the tokenizer again"
            )


def _spec(token: Any) -> TokenSpec:
    return TokenSpec(*(getattr(token, field) for field in TokenSpec._fields))


def _spec_of_json(token: Mapping[str, Any]) -> TokenSpec:
    return TokenSpec(*(token[field] for field in TokenSpec._fields))


def _not_a_tokenizer(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:120]
    if path.name == VOCAB:
        return DataError(f"{path}: not a vocabulary with {MERGES} ({reason}); get both again")
    return DataError(f"{path}: not a tokenizer.json ({reason}); give the path of one")
