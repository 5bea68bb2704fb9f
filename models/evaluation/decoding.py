"""Continuations of prompts of different lengths, in one batch without padding.

The batch begins where its shortest prompt ends. From there on, a row whose prompt goes on takes the
next token of its prompt, and any other row the token that it generates: all rows are of one length
in the layers' caches, and no row sees anything but its own tokens.

Shapes: b batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from models.base import TokenInputs, logits_of
from models.common.sampling import check_sampling
from models.evaluation.scoring import padded
from models.generate import PREFILL_CHUNK, sample
from parallel.carry import SequentialModel
from parallel.layers import gather_logits


def _never(tokens: Sequence[int]) -> bool:
    return False


@torch.inference_mode()
def continue_prompts(
    model: SequentialModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int] = (),
    is_complete: Callable[[Sequence[int]], bool] = _never,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, without the prompt.

    A row ends before a token of `end_ids`, after one with which `is_complete` (called with its new
    tokens) is true, or after `max_new_tokens`. Temperature 0 is greedy decoding; what is drawn
    otherwise depends on the other rows of the batch.

    Raises:
        ValueError: an empty prompt, or a setting out of its range.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0 or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} with prompts of {min(lengths)} tokens and more: both "
            "must be 1 or more; give a prompt, and raise max_new_tokens"
        )
    check_sampling(temperature, top_k=top_k, top_p=top_p)
    device = model.ctx.device
    tokens, ends = padded(prompts, device=device), torch.tensor(lengths, device=device)
    cache = model.new_cache(len(prompts), max(lengths) + max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    column = min(lengths)
    for chunk in tokens[:, :column].split(PREFILL_CHUNK, dim=1):
        logits = logits_of(model(TokenInputs(chunk), cache))
    while True:
        scores = gather_logits(logits[-1], ctx=model.ctx)
        token = sample(
            scores, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        if column < tokens.shape[1]:
            token = torch.where(column < ends, tokens[:, column], token)
        for row, value in enumerate(token.tolist()):
            if column < lengths[row] or ended[row]:
                continue
            if value in end_ids:
                ended[row] = True
                continue
            new[row].append(value)
            ended[row] = len(new[row]) == max_new_tokens or is_complete(new[row])
        if all(ended):
            return new
        column += 1
        logits = logits_of(model(TokenInputs(token.unsqueeze(1)), cache))
