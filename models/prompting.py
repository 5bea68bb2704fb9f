"""Tokenization of prompts in the same way as the documents that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from data_tools.tokenization.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from parallel.checkpoint.manifest import TextRecord


class Prompting(NamedTuple):
    """The tokenization of prompts, and the token that ends a continuation."""

    tokenizer: Tokenizer
    bos_ids: tuple[int, ...]
    eod_id: int | None

    def encode(self, prompt: str, *, vocab_size: int) -> list[int]:
        """Encode a prompt; an empty one becomes the token that begins or precedes a document.

        Raises:
            ValueError: the model lacks one of the ids, there are none, or the prompt is no text and
                the tokenizer not one of bytes.
        """
        ids = [*self.bos_ids, *self._ids(prompt)]
        if not ids and self.eod_id is not None:
            ids = [self.eod_id]  # a document follows the end token of the one before
        if not ids:
            raise ValueError(
                "the prompt is empty, and no token is known to begin or end a document; give a "
                "prompt, or name the end token with --eod"
            )
        if max(ids) >= vocab_size:
            raise ValueError(
                f"the prompt has id {max(ids)} ({self.tokenizer.id_to_token(max(ids))}), the model "
                f"{vocab_size} ids; write it without that token, or give the tokenizer of the "
                "model's data with --tokenizer"
            )
        return ids

    def _ids(self, prompt: str) -> list[int]:
        # A command line with bytes that are no UTF-8, half a character for example, reaches Python
        # as a text with surrogates in their place.
        try:
            typed = prompt.encode(errors="surrogateescape")
            if self.tokenizer.name == ByteTokenizer.name:
                return list(typed)
            typed.decode()
        except UnicodeError as error:
            raise ValueError(
                f"the prompt {prompt!r} is not UTF-8; write it in UTF-8, as tokenizers of text "
                "read it"
            ) from error
        return self.tokenizer.encode(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text without special tokens."""
        return self.tokenizer.decode([i for i in ids if i != self.eod_id])


def load_prompting(
    spec: str,
    text: TextRecord,
    *,
    eod: str | None = None,
    add_bos: bool | None = None,
    special_tokens: Literal["parse", "plain"] | None = None,
) -> Prompting:
    """Load a tokenizer with the settings of a model's training data unless overridden.

    Settings given by neither follow transformers' handling of the tokenizer's files.

    Raises:
        ValueError: there is no such tokenizer, or it lacks a requested token.
    """
    tokenizer = load_tokenizer(
        spec,
        eod=text.eod_id if eod is None else eod,
        special_tokens=special_tokens or text.special_tokens,
    )
    if text.bos_ids and add_bos is not False:
        bos_ids = text.bos_ids
    else:
        known = False if add_bos is None and text.bos_ids is not None else add_bos
        bos_ids = tokenizer.boundary_tokens.bos_ids(known)
    return Prompting(tokenizer, bos_ids, tokenizer.eod_id)
