"""Arguments and settings that transformers documents for every causal model.

Arguments that a family's `forward` does not name are checked here: each is honoured, is without
effect, or is refused; none is silently ignored.

Shapes: b batch, s tokens of a call, h hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from parallel.carry import SequentialModel
from parallel.cross_entropy import logits_of_last

_COUNTED = ("position_ids", "cache_position")
# `generate` of transformers hands tokenizers on to the model although it alone uses them.
_KNOWN = ("output_hidden_states", "tokenizer", "assistant_tokenizer", *_COUNTED)
_REFUSED = {
    "output_attentions": "attention weights are never stored; leave it out",
    "output_router_logits": "routers report in the loss alone; leave it out",
    "inputs_embeds": "the layers depend on token ids, not on embeddings alone; give input_ids",
    "is_causal": "the layers are causal; leave it out",
}


class StateReader(NamedTuple):
    """A hidden state [s, b, h] of a call of `module`: `read(arguments, output)`."""

    module: nn.Module
    read: Callable[[tuple[Any, ...], Any], Tensor]


def check_arguments(
    others: Mapping[str, Any], config: Any, *, first: int, tokens: Any, mask: Tensor | None
) -> None:
    """Check the arguments of a call that a model's `forward` does not name.

    `first`: the number of columns before those of `tokens` [b, s] in a cache.

    Raises:
        ValueError: an argument asks for something unsupported, or there are no tokens.
    """
    asked = {"output_attentions": getattr(config, "output_attentions", None)} | dict(others)
    for name, value in asked.items():
        if name in _KNOWN or value is None or value is (name == "is_causal"):
            continue
        reason = _REFUSED.get(name, "this model has no such argument; leave it out")
        raise ValueError(f"{name}: {reason}")
    if tokens is None:
        raise ValueError("input_ids is missing: the layers need token ids")
    for name in _COUNTED:
        value = others.get(name)
        if value is not None and not _as_counted(name, value, first, tokens, mask):
            raise ValueError(
                f"{name} differs from what the model counts itself, from 0 at the first token of "
                "every row, or without cache and padding of every document of a row; leave it out"
            )


def _as_counted(name: str, value: Tensor, first: int, tokens: Tensor, mask: Tensor | None) -> bool:
    columns = torch.arange(first, first + tokens.shape[1], device=value.device)
    if name == "cache_position" or mask is None:
        return value.shape[-1] == len(columns) and bool((value == columns).all())
    seen = mask.to(value.device)[:, first:] != 0
    counted = (mask.to(value.device) != 0).cumsum(dim=1)[:, first:] - 1
    return value.shape[-1] == seen.shape[1] and bool(((value == counted) | ~seen).all())


def packed_documents(
    others: Mapping[str, Any], tokens: Any, mask: Tensor | None
) -> tuple[Tensor | None, dict[str, Any]]:
    """The documents of rows [b, s] without padding whose `position_ids` begin anew with each.

    Returns segment ids int32 [b, s], or None where each row is one document, and the arguments
    without `position_ids` and those for other kernels that say the same of the documents.
    """
    rest = dict(others)
    places = others.get("position_ids")
    if places is None or tokens is None or places.shape != tokens.shape:
        return None, rest
    starts = places == 0
    columns = torch.arange(places.shape[1], device=places.device).expand_as(places)
    counted = columns - columns.where(starts, 0).cummax(dim=1).values
    padded = mask is not None and not bool(mask.all())
    if padded or not bool(starts[:, 0].all()) or not bool((counted == places).all()):
        return None, rest
    bounds = [*starts.flatten().nonzero().squeeze(1).tolist(), places.numel()]
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in rest and torch.as_tensor(rest[name]).flatten().tolist() == bounds:
            del rest[name]
    for name in ("max_length_q", "max_length_k"):
        if name in rest and int(rest[name]) == longest:
            del rest[name]
    del rest["position_ids"]
    segments = starts.cumsum(dim=1).to(tokens.device, torch.int32)
    numbers = rest.get("seq_idx")
    if numbers is not None and torch.equal(numbers.to(segments), segments - 1):
        del rest["seq_idx"]
    return (segments if bool(starts[:, 1:].any()) else None), rest


@contextmanager
def segmented(model: nn.Module) -> Iterator[None]:
    """Let layers built for rows of one document take rows of several inside the block."""
    layers = [module for module in model.modules() if hasattr(module, "segmented")]
    before = [layer.segmented for layer in layers]
    try:
        for layer in layers:
            layer.segmented = True  # type: ignore[assignment]
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.segmented = value


def wanted_states(others: Mapping[str, Any], config: Any, count: int) -> frozenset[int]:
    """The indices of the `count` hidden states requested by `output_hidden_states`, as an argument
    or in the configuration: all, one or several (negative ones count from the end), or none."""
    wanted = others.get("output_hidden_states")
    if wanted is None:
        wanted = getattr(config, "output_hidden_states", None)
    if wanted is None or isinstance(wanted, bool):
        return frozenset(range(count) if wanted else ())
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    return frozenset(i % count for i in numbers if -count <= i < count)


@contextmanager
def recording(readers: Sequence[StateReader]) -> Iterator[list[Tensor]]:
    """Record the hidden states of calls inside the block, as read by `readers`: [b, s, h] each."""
    states: list[Tensor] = []

    def hook(read: Callable[[tuple[Any, ...], Any], Tensor]) -> Callable[..., None]:
        def append(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            states.append(read(arguments, output).transpose(0, 1))

        return append

    handles = [module.register_forward_hook(hook(read)) for module, read in readers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def computing_last(count: int, readers: Sequence[StateReader]) -> AbstractContextManager[None]:
    """Let the head compute the last `count` logits alone, 0 for all, if no state is read there.

    A program computes all in any case, and torch._dynamo does not trace how the number is handed
    over.
    """
    if count == 0 or readers or torch.compiler.is_compiling():
        return nullcontext()
    return logits_of_last(count)


def kept_columns(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The index of the logits that `logits_to_keep` asks for."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


class FixedEmbeddings:
    """transformers' embedding interface for a model whose vocabulary size is fixed by its layers.

    The embeddings are the layers' `embedding.tokens` and `head.output`.
    """

    model: SequentialModel
    config: Any
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "model.head.output.weight": "model.embedding.tokens.weight"
    }

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule("embedding.tokens")

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_submodule("head.output")

    def set_input_embeddings(self, value: nn.Module) -> NoReturn:
        """Refuse to replace the embedding, which belongs to the layers.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the embeddings of this model cannot be replaced; change the values of "
            "get_input_embeddings().weight in place"
        )

    def set_output_embeddings(self, new_embeddings: nn.Module) -> NoReturn:
        """Refuse to replace the head, as `set_input_embeddings`.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the head of this model cannot be replaced; change the values of "
            "get_output_embeddings().weight in place"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to resize the vocabulary, which is a setting of the layers.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the vocabulary of this model is fixed at vocab_size={self.config.vocab_size}; use a "
            "tokenizer of at most that size"
        )
