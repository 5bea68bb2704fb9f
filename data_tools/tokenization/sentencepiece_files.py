"""SentencePiece models, with the tokens declared by the files beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, brief
from data_tools.files import sha256_of
from data_tools.tokenization.boundary_tokens import BoundaryToken, BoundaryTokens, find_eod
from data_tools.tokenization.special_tokens import SpecialTokens, Splitter, TokenSpec
from data_tools.tokenization.tokenizer_config import (
    TokenizerConfig,
    read_tokenizer_config,
    tokens_to_add,
)

# Appended to a protocol buffer, repeated fields override earlier ones: normalizer_spec (3) with
# add_dummy_prefix (3) false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """Tokenizer from a SentencePiece .model.

    The library ignores tokens added by files beside the model, and never matches control pieces in
    text. Text is split at both here, and the library encodes the parts, with its dummy prefix only
    at the start of the text (before every part if `legacy` is declared).

    Raises:
        DataError: a file cannot be read, or `eod` is not in the vocabulary.
    """

    def __init__(
        self, path: Path, *, eod: str | int | None, special_tokens: SpecialTokens | None
    ) -> None:
        declared = read_tokenizer_config(path.parent)
        self.name = str(path)
        self._backend = _open(path)
        own = _own_tokens(self._backend)
        added = _added_tokens(self._backend, declared, own)
        self.fingerprint = _fingerprint(path, declared, added)
        self._ids = {token.content: number for number, token in added.items()}
        self._names = {number: token.content for number, token in added.items()}
        self._size: int = self._backend.get_piece_size()
        self.vocab_size = max(self._size, 1 + max(added, default=0))
        self._special = {n for n, token in (own | added).items() if token.special}
        self._split_ids = self._special | added.keys()
        default: SpecialTokens = "plain" if declared.splits_special_tokens else "parse"
        is_plain = (special_tokens or default) == "plain"
        self._splitter = Splitter(
            {t: n for n, t in (own | added).items() if not (is_plain and t.special)}
        )
        self._inner_backend = self._backend  # for all parts of a text but the first
        if not declared.is_legacy:
            model = self._backend.serialized_model_proto() + _NO_DUMMY_PREFIX
            self._inner_backend = type(self._backend)(model_proto=model)
        self.boundary_tokens = self._find_boundary_tokens(declared, eod, default)

    @property
    def eod_id(self) -> int | None:
        return self.boundary_tokens.eod_id

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not any(map(self._splitter.occurs_in, texts)):
            return self._backend.encode(list(texts), num_threads=1)
        return [self._encode_parts(text) for text in texts]

    def _encode_parts(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._splitter.split(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self._inner_backend if number else self._backend).encode(part)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ids, without the space of the dummy prefix at the start of the text.

        Ids outside the vocabulary, as from a model with a padded vocabulary, are skipped.
        """
        text = ""
        known = (int(i) for i in ids if i < self._size or i in self._names)
        for is_split, group in groupby(known, self._split_ids.__contains__):
            if is_split:
                text += "".join(self._token_texts(group, skip_special_tokens))
            else:
                text += (self._inner_backend if text else self._backend).decode(list(group))
        return text

    def _token_texts(self, ids: Iterator[int], skip_special_tokens: bool) -> Iterator[str]:
        for token in ids:
            if not (skip_special_tokens and token in self._special):
                yield self.id_to_token(token) or ""

    def token_to_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        # The library returns the id of the unknown piece for tokens that it does not have.
        found: int = self._backend.piece_to_id(token)
        return found if self._backend.id_to_piece(found) == token else None

    def id_to_token(self, token: int) -> str | None:
        if token in self._names:
            return self._names[token]
        return self._backend.id_to_piece(token) if 0 <= token < self._size else None

    def is_special(self, token: int) -> bool:
        return token in self._special

    def _find_boundary_tokens(
        self, declared: TokenizerConfig, eod: str | int | None, default: SpecialTokens
    ) -> BoundaryTokens:
        own = self._control_piece(self._backend.eos_id())
        found = find_eod(self, declared, eod=eod, own=own)
        bos = self._control_piece(self._backend.bos_id())
        if (named := declared.named.get("bos_token")) is not None:
            token = self.token_to_id(named.token.content)
            if token is not None:
                bos = BoundaryToken((token,), named.token.content, f"declared in {named.file}")
        return BoundaryTokens(
            eod=found.token,
            no_eod_reason=found.no_eod_reason,
            bos=bos,
            adds_bos=declared.adds_bos and bos is not None,
            special_tokens=default,
        )

    def _control_piece(self, token: int) -> BoundaryToken | None:
        if token < 0:
            return None
        return BoundaryToken((token,), self._backend.id_to_piece(token), "from the model file")


def fingerprint_of(path: Path) -> str:
    """Return the fingerprint of `SentencePieceTokenizer(path)`.

    Raises:
        DataError: a file cannot be read.
    """
    declared = read_tokenizer_config(path.parent)
    if not (declared.named or declared.extra or declared.added):
        return sha256_of(path)
    backend = _open(path)
    return _fingerprint(path, declared, _added_tokens(backend, declared, _own_tokens(backend)))


def _fingerprint(path: Path, declared: TokenizerConfig, added: dict[int, TokenSpec]) -> str:
    """Return the SHA-256 of the file, extended by added tokens and `legacy` if declared."""
    digest = sha256_of(path)
    if not added and not declared.is_legacy:
        return digest
    content = [digest, sorted(added.items()), declared.is_legacy]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _own_tokens(backend: Any) -> dict[int, TokenSpec]:
    """Return control pieces and the unknown piece, which plain text never encodes to."""
    return {
        number: TokenSpec(backend.id_to_piece(number))
        for number in range(backend.get_piece_size())
        if backend.is_control(number) or backend.is_unknown(number)
    }


def _added_tokens(
    backend: Any, declared: TokenizerConfig, own: dict[int, TokenSpec]
) -> dict[int, TokenSpec]:
    """Return the tokens, by id, that the files beside a model add to its own or change."""
    known = {token.content: token for token in own.values()}
    # The library normalizes the text only after it has been split at the tokens.
    tokens = (token._replace(normalized=False) for token in tokens_to_add(declared, known))
    wanted = [token for token in tokens if known.get(token.content) != token]
    numbers = {token.content: number for number, token in declared.added.items()}
    size = max(backend.get_piece_size(), 1 + max(declared.added, default=0))
    added: dict[int, TokenSpec] = {}
    for token in wanted:
        number = numbers.get(token.content)
        if number is None:
            found = backend.piece_to_id(token.content)
            is_piece = backend.id_to_piece(found) == token.content
            number = found if is_piece else size
            size += not is_piece
        added[number] = token
    return added


def _open(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        reason = brief(error)
        raise DataError(
            f"{path}: not a SentencePiece model ({reason}); pass the path of one"
        ) from error
