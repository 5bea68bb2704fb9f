"""Text of evaluations as tokens: as the documents that a model was trained on, and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

from models.checkpoint import StoredModel
from models.hf.declared import OwnTokens, declared_of, generation_contents
from models.prompting import Prompting, load_prompting


class Texts(NamedTuple):
    """`prefix_id`: the token before a text that has none before it. `end_ids`: tokens that end a
    generated text. `end_text`: the end token as text, "" where it has none. `remarks`: for the
    user, on what others do with an export of the model."""

    prompting: Prompting
    vocab_size: int
    prefix_id: int
    end_ids: frozenset[int]
    end_text: str
    remarks: tuple[str, ...] = ()

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Encode a text, with the begin tokens that training put before documents (`begin`) unless
        the text spells them.

        Raises:
            ValueError: the model lacks one of the ids.
        """
        ids = self.prompting.tokenizer.encode(text)
        bos = list(self.prompting.bos_ids)
        if begin and ids[: len(bos)] != bos:
            ids = [*bos, *ids]
        _check_ids(ids, self.prompting, self.vocab_size)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text without special tokens."""
        return self.prompting.decode(ids)

    def described(self) -> dict[str, Any]:
        """The part of the results of an evaluation that is about its texts."""
        return {
            "tokenizer": self.prompting.tokenizer.name,
            "begin_ids": self.prompting.bos_ids,
            "prefix_token_id": self.prefix_id,
            "end_ids": sorted(self.end_ids),
            "remarks": self.remarks,
        }


def load_texts(
    stored: StoredModel,
    *,
    tokenizer: str | None = None,
    eod: str | None = None,
    add_bos: bool | None = None,
    special_tokens: Literal["parse", "plain"] | None = None,
) -> Texts:
    """Load the tokenizer of a checkpoint, or `tokenizer`, with the settings of its training data
    unless overridden.

    The token before a text is what preceded a document of training: its begin token, or else the
    end token of the document before. Where that is not known, it is the begin token that the
    tokenizer's files declare, or else the end token, as in transformers.

    Raises:
        ValueError: there is no such tokenizer, it lacks a requested token, or no token is known
            that could precede a text.
    """
    spec = tokenizer or stored.tokenizer
    if spec is None:
        raise ValueError(f"{stored.weights.parent} names no tokenizer; give one with --tokenizer")
    prompting = load_prompting(
        spec, stored.text, eod=eod, add_bos=add_bos, special_tokens=special_tokens
    )
    return texts_of(
        prompting,
        known=stored.text.bos_ids is not None,
        vocab_size=stored.config.vocab_size,
        end_ids=_end_ids(stored, prompting.eod_id),
    )


def texts_of(
    prompting: Prompting,
    *,
    known: bool,
    vocab_size: int,
    end_ids: Collection[int] = (),
    eod_setting: str = "--eod",
) -> Texts:
    """The texts of a tokenizer; `known`: whether the begin tokens of training are.

    Raises:
        ValueError: no token is known that could precede a text, or the model lacks it.
    """
    prefix, end = _prefix_id(prompting, known=known), prompting.eod_id
    if prefix is None:
        raise ValueError(
            f"tokenizer {prompting.tokenizer.name}: no token is known to begin or end a document, "
            "and the first token of a text is scored given one; name the end token with "
            f"{eod_setting}"
        )
    _check_ids([prefix, *prompting.bos_ids], prompting, vocab_size)
    return Texts(
        prompting,
        vocab_size,
        prefix,
        frozenset(end_ids),
        "" if end is None else prompting.tokenizer.id_to_token(end) or "",
        _remarks(prompting, prefix),
    )


def _prefix_id(prompting: Prompting, *, known: bool) -> int | None:
    declared = prompting.tokenizer.boundary_tokens.bos
    if prompting.bos_ids:
        return prompting.bos_ids[-1]
    if declared is not None and (prompting.eod_id is None or not known):
        return declared.ids[0]
    return prompting.eod_id


def _end_ids(stored: StoredModel, end: int | None) -> frozenset[int]:
    """As an export declares them: the end token of training, and those of an imported model."""
    declared, _ = declared_of(stored)
    ids = generation_contents(declared, OwnTokens(end)).generation.get("eos_token_id")
    return frozenset(i for i in (ids if isinstance(ids, list) else [ids]) if i is not None)


def _remarks(prompting: Prompting, prefix: int) -> tuple[str, ...]:
    """Arguments with which lm_eval's hf backend does the same with an export, where needed."""
    theirs = prompting.tokenizer.boundary_tokens
    arguments = []
    if bool(prompting.bos_ids) != theirs.adds_bos:
        arguments.append(f"add_bos_token={bool(prompting.bos_ids)}")
    usual = theirs.eod_id if theirs.bos is None else theirs.bos.ids[0]
    if prefix != usual:
        arguments.append(f"prefix_token_id={prefix}")
    if not arguments:
        return ()
    return (
        "texts begin as the documents of training did, not as the tokenizer's files say; "
        f"lm_eval's hf backend does so with --model_args ...,{','.join(arguments)}",
    )


def _check_ids(ids: Collection[int], prompting: Prompting, vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        text = prompting.tokenizer.id_to_token(max(ids))
        raise ValueError(
            f"a text has id {max(ids)} ({text}), the model {vocab_size} ids; give the tokenizer of "
            "the model's data with --tokenizer"
        )
