"""Hugging Face tokenizers: tokenizer.json, or vocab.json with merges.txt, and the files beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import xxhash

from data_tools.errors import DataError, brief
from data_tools.files import sha256_of
from data_tools.tokenization.boundary_tokens import BoundaryToken, BoundaryTokens, find_eod
from data_tools.tokenization.byte_bpe import FastByteBpe
from data_tools.tokenization.byte_encoders import (
    GPT2_PATTERN,
    QWEN2_PATTERN,
    EncoderName,
    byte_letters,
)
from data_tools.tokenization.special_tokens import SpecialTokens, TokenSpec
from data_tools.tokenization.tokenizer_config import (
    CONFIG,
    TokenizerConfig,
    read_tokenizer_config,
    tokens_to_add,
)

_HASHED_CHARACTERS = 4096  # of a text, by which it is drawn for comparison
VOCAB, MERGES = "vocab.json", "merges.txt"


class DifferentIdsError(DataError):
    """Another library gives other ids for a text of a batch, the one at `number`."""

    def __init__(self, number: int, encoder: str) -> None:
        super().__init__(
            f"ids by {encoder} found, others expected as tokenizers gives them; pass --encoder "
            "tokenizers --overwrite, and report the text"
        )
        self.number, self.encoder = number, encoder


class _ClassRules(NamedTuple):
    """Pre-tokenization of a transformers class, which vocab.json and merges.txt do not record."""

    pattern: str
    is_nfc: bool = False
    end: str = "<|endoftext|>"


# Without a class, or with a generic one, they are read as by Megatron-LM and by the library's own
# ByteLevelBPETokenizer.
_ANY = (None, "PreTrainedTokenizer", "TokenizersBackend")
_CLASS_RULES = {
    **dict.fromkeys(_ANY, _ClassRules(GPT2_PATTERN)),
    "GPT2Tokenizer": _ClassRules(GPT2_PATTERN),
    "CodeGenTokenizer": _ClassRules(GPT2_PATTERN),
    "Qwen2Tokenizer": _ClassRules(QWEN2_PATTERN, is_nfc=True),
}


class HuggingFaceTokenizer:
    """Tokenizer of the `tokenizers` library, with the tokens declared by the files beside it.

    Raises:
        DataError: a file cannot be read, or `eod` is not in the vocabulary.
    """

    def __init__(
        self, path: Path, *, eod: str | int | None, special_tokens: SpecialTokens | None
    ) -> None:
        declared = read_tokenizer_config(path.parent)
        self.name = str(path)
        self._backend = _open(path, declared)
        own = {t.content: t for t in map(_spec, self._backend.get_added_tokens_decoder().values())}
        added = tokens_to_add(declared, own)
        _add(self._backend, added, declared, path)
        self.fingerprint = _fingerprint(path, declared, added)
        default: SpecialTokens = "plain" if declared.splits_special_tokens else "parse"
        self._backend.encode_special_tokens = (special_tokens or default) == "plain"
        self._verify_share, self._is_verified = 0.0, True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self._special = {
            number
            for number, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.boundary_tokens = self._find_boundary_tokens(declared, eod, default)

    @property
    def eod_id(self) -> int | None:
        return self.boundary_tokens.eod_id

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    @property
    def encoder(self) -> str:
        """The library that encodes most text of `encode_batch`."""
        return "tokenizers" if self._fast is None else self._fast.encoder.name

    def choose_encoder(self, name: str | None, *, verify_share: float) -> None:
        """Encode batches with a library, the fastest with the same ids if `name` is None.

        `verify_share`: the share of texts whose ids are compared with those of `tokenizers`.

        Raises:
            DataError: it is not installed, or gives other ids.
        """
        self._verify_share, self._is_verified = verify_share, verify_share == 0
        if name == "tokenizers":
            self._fast = None
        elif name is not None:
            self._fast = FastByteBpe.of(self._backend, cast(EncoderName, name))
            if self._fast is None:
                raise DataError(
                    f"--encoder {name}: it is not installed, or does not give the ids of "
                    f"{self.name}; leave --encoder out"
                )

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Return the ids of texts.

        Raises:
            DifferentIdsError: of a text that is compared, the fast encoder gives other ids.
        """
        none: list[Sequence[int] | None] = [None] * len(texts)
        ids = none if self._fast is None else self._fast.encode_batch(texts)
        compared = {
            number: found
            for number, found in enumerate(ids)
            if found is not None and self._is_compared(texts[number])
        }
        numbers = [
            number for number, found in enumerate(ids) if found is None or number in compared
        ]
        encodings = self._backend.encode_batch_fast(
            [texts[number] for number in numbers], add_special_tokens=False
        )
        for number, encoding in zip(numbers, encodings, strict=True):
            if number in compared and list(compared[number]) != encoding.ids:
                raise DifferentIdsError(number, self.encoder)
            ids[number] = encoding.ids
        return cast(list[Sequence[int]], ids)

    def _is_compared(self, text: str) -> bool:
        """Whether a text is one of `verify_share`, or the first of this process."""
        if self._verify_share == 0:
            return False
        if not self._is_verified:
            self._is_verified = True
            return True
        begin = text[:_HASHED_CHARACTERS].encode("utf-8", "surrogatepass")
        return xxhash.xxh3_64_intdigest(begin) < self._verify_share * 2**64

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token: int) -> str | None:
        return self._backend.id_to_token(token)

    def is_special(self, token: int) -> bool:
        return token in self._special

    def save(self, path: Path) -> None:
        """Write the tokenizer and its added tokens as one tokenizer.json."""
        self._backend.save(str(path))

    @cached_property
    def _fast(self) -> FastByteBpe | None:
        return FastByteBpe.of(self._backend)

    def _find_boundary_tokens(
        self, declared: TokenizerConfig, eod: str | int | None, default: SpecialTokens
    ) -> BoundaryTokens:
        before, after = self._post_processor_ids()
        source = "from its post-processor"
        own = BoundaryToken(after, self._text(after), source) if len(after) == 1 else None
        found = find_eod(self, declared, eod=eod, own=own)
        bos = BoundaryToken(before, self._text(before), source) if before else None
        if bos is None and (named := declared.named.get("bos_token")) is not None:
            token = self.token_to_id(named.token.content)
            if token is not None:
                bos = BoundaryToken((token,), named.token.content, f"declared in {named.file}")
        # The post-processor of a tokenizer.json decides; only other files need this setting.
        adds_bos = declared.adds_bos and Path(self.name).name == VOCAB
        return BoundaryTokens(
            eod=found.token,
            no_eod_reason=found.no_eod_reason,
            bos=bos,
            adds_bos=bool(before) or (adds_bos and bos is not None),
            special_tokens=default,
        )

    def _post_processor_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that the post-processor puts before and after a text."""
        text = next((t for t in ("a", "0", " ", "\n") if self.encode(t)), None)
        if text is None:
            return (), ()
        encoding = self._backend.encode(text, add_special_tokens=True)
        places = [i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
        return tuple(encoding.ids[: places[0]]), tuple(encoding.ids[places[-1] + 1 :])

    def _text(self, ids: Sequence[int]) -> str:
        return "".join(self.id_to_token(token) or "" for token in ids)


def fingerprint_of(path: Path) -> str:
    """Return the fingerprint of `HuggingFaceTokenizer(path)`, if possible without loading it.

    Raises:
        DataError: a file cannot be read.
    """
    declared = read_tokenizer_config(path.parent)
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


def _fingerprint(path: Path, declared: TokenizerConfig, added: Sequence[TokenSpec]) -> str:
    """Return the SHA-256 of the file, extended by the added tokens if there are any."""
    digests = [sha256_of(path)]
    if path.name == VOCAB:
        digests += [sha256_of(path.with_name(MERGES)), str(_rules(path, declared))]
    if not added and len(digests) == 1:
        return digests[0]
    return hashlib.sha256(json.dumps([digests, added]).encode()).hexdigest()


def _open(path: Path, declared: TokenizerConfig) -> Any:
    from tokenizers import Tokenizer

    try:
        if path.name == VOCAB:
            return _open_vocab_and_merges(path, declared)
        return Tokenizer.from_file(str(path))
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise _not_a_tokenizer(path, error) from error


def _open_vocab_and_merges(path: Path, declared: TokenizerConfig) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rules = _rules(path, declared)
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(path.with_name(MERGES))))
    missing = byte_letters().keys() - tokenizer.get_vocab().keys()
    if missing:
        raise DataError(
            f"{path}: no token for {len(missing)} of the 256 bytes, so it is not byte-level; pass "
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


def _rules(path: Path, declared: TokenizerConfig) -> _ClassRules:
    rules = _CLASS_RULES.get(declared.tokenizer_class)
    if rules is None:
        known = ", ".join(name for name in _CLASS_RULES if name and name not in _ANY)
        raise DataError(
            f"{path}: {CONFIG} beside it names {declared.tokenizer_class}, and {VOCAB} with "
            f"{MERGES} is read as {known} only; pass its tokenizer.json"
        )
    return rules


def _add(backend: Any, added: Sequence[TokenSpec], declared: TokenizerConfig, path: Path) -> None:
    from tokenizers import AddedToken

    backend.add_tokens([AddedToken(**token._asdict()) for token in added])
    for number, token in sorted(declared.added.items()):
        found = backend.token_to_id(token.content)
        if found != number:
            raise DataError(
                f"{path}: the files beside it declare {token.content!r} as id {number}, but here "
                f"it is {found}; they do not belong together: download the tokenizer again"
            )


def _spec(token: Any) -> TokenSpec:
    return TokenSpec(*(getattr(token, field) for field in TokenSpec._fields))


def _spec_of_json(token: Mapping[str, Any]) -> TokenSpec:
    return TokenSpec(*(token[field] for field in TokenSpec._fields))


def _not_a_tokenizer(path: Path, error: Exception) -> DataError:
    reason = brief(error)
    if path.name == VOCAB:
        return DataError(f"{path}: not a vocabulary with {MERGES} ({reason}); download both again")
    return DataError(f"{path}: not a tokenizer.json ({reason}); pass the path of one")
