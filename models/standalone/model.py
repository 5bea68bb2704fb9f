"""A family as one module in one process, for scripts; published interfaces build on it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import LossOutput, ModelFamily, TokenInputs
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.cross_entropy import IGNORED_LABEL

Cache = dict[str, Any]


class StandaloneModel(nn.Module):
    """Every layer of a family, as `body`.

    Weights are drawn from torch's seed. A parameter is named as in a training run, behind `body.`.
    A subclass may add modules and buffers of its own, which checkpoints keep (`checkpoint.py`).
    """

    # Optional entries of a training batch besides `input_ids` and `labels`.
    optional_inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, family: ModelFamily, config: Any, *, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.family = family
        self.config = config.model_copy()  # the caller may change theirs for the next model
        seed = torch.initial_seed() % (1 << 31)
        ctx = ParallelContext.single(device=device)
        self.body = SequentialModel(family.layer_specs(self.config), ctx, seed=seed)

    def make_inputs(self, input_ids: Tensor, **optional: Any) -> Any:
        """Build the first layer's inputs from `input_ids` int64 [b, s] and `optional_inputs`.

        Raises:
            ValueError: tokens outside the vocabulary.
        """
        check_tokens(input_ids, vocab_size=self.config.vocab_size)
        return TokenInputs(input_ids, **optional)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        num_scored: Tensor | None = None,
        **optional: Any,
    ) -> LossOutput:
        """The training loss and its terms; `labels` int64 [b, s], -100: not scored.

        `num_scored`: the divisor of the sum over tokens (models.base.ModelFamily).

        Raises:
            ValueError: tokens or labels outside the vocabulary, or other labels than tokens.
        """
        inputs = self.make_inputs(input_ids, **optional)
        check_labels(labels, input_ids, vocab_size=self.config.vocab_size)
        output = self.body(inputs)
        return self.family.loss(
            output, labels, config=self.config, ctx=self.body.ctx, num_scored=num_scored
        )

    def count_parameters(self, trainable_only: bool = True) -> int:
        """The number of parameter elements; a tied head counts once."""
        counted = (p for p in self.parameters() if p.requires_grad or not trainable_only)
        return sum(parameter.numel() for parameter in counted)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the blocks in backward instead of keeping their activations."""
        self.body.recompute = True

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Empty state for generating up to `max_length` tokens, prompt included."""
        return self.body.new_cache(batch_size, max_length)

    def rollback(self, kv_cache: Cache, length: int) -> None:
        """Forget the tokens from number `length` on, as when a draft is rejected.

        Raises:
            ValueError: the cache cannot go back that far.
        """
        for layer in kv_cache.values():
            layer.rollback(length)


def check_tensor(name: str, value: Any) -> None:
    """Raises ValueError: `value` is no tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} of type {type(value).__name__} must be a tensor; write torch.tensor({name})"
        )


def check_tokens(tokens: Tensor, *, vocab_size: int, name: str = "input_ids") -> None:
    """Check shape, dtype and range of token ids.

    Raises:
        ValueError: they are no tensor int64 [b, s >= 1], or outside the vocabulary.
    """
    check_tensor(name, tokens)
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(f"{name} {_form(tokens)} must be int64[batch, tokens >= 1]")
    _check_range(tokens, vocab_size=vocab_size, name=name)


def check_labels(labels: Tensor, tokens: Tensor, *, vocab_size: int) -> None:
    """Check the labels of `tokens`, which are checked themselves; some labels may be -100.

    Raises:
        ValueError: they are no tensor of the shape of the tokens, or outside the vocabulary.
    """
    check_tensor("labels", labels)
    if labels.shape != tokens.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"labels {_form(labels)} must be {_form(tokens)}, one for each of input_ids; pad "
            f"them with {IGNORED_LABEL}"
        )
    _check_range(
        labels.masked_fill(labels == IGNORED_LABEL, 0), vocab_size=vocab_size, name="labels"
    )


def _check_range(tokens: Tensor, *, vocab_size: int, name: str) -> None:
    if tokens.device.type != "cpu":
        return  # reading them would wait for the device
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"{name} hold {lowest} ... {highest}, and the model has vocab_size={vocab_size} "
            "tokens from 0; use the tokenizer of its data"
        )


def _form(tensor: Tensor) -> str:
    """`int64[2, 8]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
