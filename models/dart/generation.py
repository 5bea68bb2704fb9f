"""Generation of a DART: token by token, block by block, or with drafts that are verified.

Shapes: b batch, s tokens, B block size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import TokenInputs
from models.dart.config import DARTConfig
from models.dart.denoising import Block, levels_down, reverse, unmask
from models.dart.layers import BlockInputs, DARTEmbedding
from models.dart.sampling import Sampling, accept_drafts, guided
from parallel.carry import SequentialModel


class Generated(NamedTuple):
    """`tokens` int64 [b, s]; `num_passes`: sequential forward passes that they took."""

    tokens: Tensor
    num_passes: int


class Stream:
    """The causal stream of some rows so far, behind which blocks are denoised."""

    def __init__(self, model: SequentialModel, config: DARTConfig, batch: int, room: int) -> None:
        self.model, self.config = model, config
        self.cache: dict[str, Any] = model.new_cache(batch, room)
        self.length = 0
        self.num_passes = 0

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits [s, b, V] of the tokens that follow each of `tokens` int64 [b, s]."""
        self.length += tokens.shape[1]
        self.num_passes += 1
        logits: Tensor = self.model(TokenInputs(tokens), self.cache).logits
        return logits

    def denoise(self, start: int, inputs: BlockInputs) -> Tensor:
        """Logits [b, B, V] of the block at place `start`, which the stream has reached.

        The place is computed again: its plan is off where the block shows tokens, as in training.
        """
        self.num_passes += 1
        cache = {name: each.prefix(start) for name, each in self.cache.items()}
        drafts: Tensor = self.model(inputs, cache).draft_logits.transpose(0, 1)
        return drafts

    def rollback(self, length: int) -> None:
        for cache in self.cache.values():
            cache.rollback(length)
        self.length = length


def causal(
    model: SequentialModel,
    config: DARTConfig,
    tokens: Tensor,
    *,
    length: int,
    sampling: Sampling,
    guidance_scale: float = 1.0,
    eos_id: int | None = None,
) -> Generated:
    """Continue rows [b, s] to `length` tokens, one by one.

    With guidance the unconditional rows begin at the last token of the prompt, as documents do in
    training. A row that has produced `eos_id` is filled with it.
    """
    batch = len(tokens)
    stream = Stream(model, config, batch, length)
    other = Stream(model, config, batch, length) if guidance_scale != 1.0 else None
    new, last = tokens, tokens[:, -1:]
    ended = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    while tokens.shape[1] < length and not bool(ended.all()):
        logits = stream.advance(new)[-1]
        if other is not None:
            logits = guided(logits, other.advance(last)[-1], guidance_scale)
        token = sampling.draw(sampling.probabilities(logits, tokens))
        if eos_id is not None:
            token = token.masked_fill(ended, eos_id)
            ended |= token == eos_id
        new = last = token.unsqueeze(1)
        tokens = torch.cat((tokens, new), dim=1)
    return Generated(tokens, stream.num_passes)


def fill_in(
    model: SequentialModel,
    config: DARTConfig,
    tokens: Tensor,
    known: Tensor,
    *,
    num_steps: int,
    sampling: Sampling,
    guidance_scale: float = 1.0,
) -> Generated:
    """Fill in the tokens of rows int64 [b, s] that are not `known` bool [b, s], block by block.

    A block sees every token before it and the known ones in it, and is denoised in at most
    `num_steps` passes (models.dart.denoising). The first token is known. With guidance the
    unconditional pass sees nothing before the block, and of the known tokens in it the first;
    with gaussian noise it sees those in the block.
    """
    size, length = config.block_size, tokens.shape[1]
    tokens = tokens.clone()
    stream = Stream(model, config, len(tokens), length)
    for start in range(0, length - 1, size):
        stop = min(start + size, length - 1)
        places = slice(start + 1, stop + 1)  # of the tokens that the block predicts
        if bool(known[:, places].all()):
            continue
        if stream.length < start:
            stream.advance(tokens[:, stream.length : start])
        other = None
        if guidance_scale != 1.0:
            other = Stream(model, config, len(tokens), size)
        beyond = (0, size - (stop - start))
        block = Block(
            tokens=F.pad(tokens[:, places], beyond),
            is_known=F.pad(known[:, places], beyond, value=False),
            is_inside=F.pad(torch.ones_like(known[:, places]), beyond, value=False),
        )
        draw = _Draw(stream, other, tokens[:, : start + 1], block, sampling, guidance_scale)
        if config.diffusion_type == "masked":
            filled = unmask(config, block, draw, num_steps=num_steps, sampling=sampling)
        else:
            embedding = model.get_submodule("embedding")
            assert isinstance(embedding, DARTEmbedding)
            clean = embedding.clean
            filled = reverse(config, block, draw, clean, num_steps=num_steps, sampling=sampling)
        tokens[:, places] = filled[:, : stop - start]
    return Generated(tokens, stream.num_passes)


class _Draw(NamedTuple):
    """A token for every place of the block behind `prefix` int64 [b, start + 1], as the model sees
    the block; `other`: a stream without context, for guidance."""

    stream: Stream
    other: Stream | None
    prefix: Tensor
    block: Block
    sampling: Sampling
    guidance_scale: float

    def __call__(
        self, tokens: Tensor, hidden: Tensor, levels: Tensor, states: Tensor | None = None
    ) -> Tensor:
        inputs = BlockInputs(self.prefix[:, -1:], tokens, hidden, levels, states)
        logits = self.stream.denoise(self.prefix.shape[1] - 1, inputs)
        if self.other is not None:
            if states is None:
                inputs = inputs._replace(hidden=hidden | self.block.is_known)
            logits = guided(logits, self.other.denoise(0, inputs), self.guidance_scale)
        each = self.prefix.repeat_interleave(logits.shape[1], dim=0)
        flat = self.sampling.probabilities(logits.flatten(0, 1), each)
        return self.sampling.draw(flat).view(logits.shape[:2])


def speculative(
    model: SequentialModel,
    config: DARTConfig,
    tokens: Tensor,
    *,
    length: int,
    sampling: Sampling,
    eos_id: int | None = None,
) -> Generated:
    """Continue one row [1, s] to `length` tokens with the law of `causal`.

    A pass of the diffusion stream drafts the rest of the block, a pass of the causal stream
    verifies it; after a rejection the rest is drafted again, behind the tokens that were kept.
    """
    size, prompt = config.block_size, tokens.shape[1]
    stream = Stream(model, config, 1, length)
    while (have := tokens.shape[1]) < length:
        start = (have - 1) // size * size
        if stream.length < start:
            stream.advance(tokens[:, stream.length : start])
        num_drafts = min(start + size, length - 1) - (have - 1)
        drafts, q = _drafted(stream, tokens, start, num_drafts, sampling)
        text = torch.cat((tokens, drafts), dim=1)
        logits = stream.advance(text[:, stream.length :])
        p = torch.stack(
            [
                sampling.probabilities(each, text[:, : have + i])
                for i, each in enumerate(logits[-num_drafts - 1 :])
            ],
            dim=1,
        )
        count, token = accept_drafts(p, q, drafts, sampling)
        kept = int(count)
        tokens = torch.cat((text[:, : have + kept], token.unsqueeze(1)), dim=1)[:, :length]
        stream.rollback(have + kept)
        if eos_id is not None:
            ends = (tokens[0, prompt:] == eos_id).nonzero()
            if len(ends):
                return Generated(tokens[:, : prompt + int(ends[0]) + 1], stream.num_passes)
    return Generated(tokens, stream.num_passes)


def _drafted(
    stream: Stream, tokens: Tensor, start: int, num_drafts: int, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Drafts int64 [1, n] of the tokens after `tokens`, and what they were drawn from [1, n, V]."""
    size, have = stream.config.block_size, tokens.shape[1]
    shown = have - 1 - start
    # With gaussian noise a block shows all of its tokens or none.
    seen = shown if stream.config.diffusion_type == "masked" else 0
    block = torch.zeros(1, size, dtype=tokens.dtype, device=tokens.device)
    block[:, :shown] = tokens[:, start + 1 :]
    hidden = torch.arange(size, device=tokens.device).unsqueeze(0) >= seen
    count = torch.full_like(tokens[:, 0], seen)
    levels = levels_down(stream.config, shown=count, total=size, steps=1)[0]
    inputs = BlockInputs(tokens[:, start : start + 1], block, hidden, levels)
    logits = stream.denoise(start, inputs)[0, shown : shown + num_drafts]
    q = sampling.probabilities(logits, tokens.expand(num_drafts, -1)).unsqueeze(0)
    return sampling.draw(q), q
