"""Generation in a mode by name, for every interface of the family.

Shapes: b batch, s tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.dart.config import DARTConfig
from models.dart.generation import Generated, causal, fill_in, speculative
from models.dart.sampling import Sampling
from parallel.carry import SequentialModel

Mode = Literal["ar", "diffusion", "speculative"]


class Request(NamedTuple):
    """A generation of rows of `length` tokens, the prompt included.

    ar: one token per pass. diffusion: blocks of `block_size` tokens in `num_steps` passes each,
    None being one per token. speculative: the law of ar, from drafts of the diffusion stream, row
    by row. `guidance_scale` 1 is none. `eos_id` ends a row after its prompt.
    """

    mode: Mode
    length: int
    sampling: Sampling
    guidance_scale: float = 1.0
    eos_id: int | None = None
    num_steps: int | None = None


def continue_rows(
    model: SequentialModel, config: DARTConfig, tokens: Tensor, request: Request
) -> Generated:
    """Continue rows int64 [b, s] as `request` says; a row is filled with `eos_id` after its end.

    Raises:
        ValueError: a setting out of its range or without effect.
    """
    mode, length, scale = request.mode, request.length, request.guidance_scale
    check_request(config, tokens, length, mode, scale, request.num_steps)
    sampling, eos_id = request.sampling, request.eos_id
    sampling.check()
    check_id(config, "eos_token_id", eos_id)
    guided: dict[str, Any] = {"sampling": sampling, "guidance_scale": scale}
    with torch.no_grad(), evaluating(model):
        if mode == "ar":
            return causal(model, config, tokens, length=length, eos_id=eos_id, **guided)
        if mode == "diffusion":
            prompt, room = tokens.shape[1], (0, length - tokens.shape[1])
            known = F.pad(torch.ones_like(tokens, dtype=torch.bool), room, value=False)
            steps = request.num_steps or config.block_size
            blank = F.pad(tokens, room)
            filled = fill_in(model, config, blank, known, num_steps=steps, **guided)
            return filled._replace(tokens=_ended(filled.tokens, prompt, eos_id))
        rows = [
            speculative(model, config, row, length=length, sampling=sampling, eos_id=eos_id)
            for row in tokens.split(1)
        ]
    longest = max(row.tokens.shape[1] for row in rows)
    padded = [F.pad(r.tokens, (0, longest - r.tokens.shape[1]), value=eos_id) for r in rows]
    return Generated(torch.cat(padded), sum(row.num_passes for row in rows))


@contextmanager
def evaluating(model: SequentialModel) -> Iterator[None]:
    """Evaluation mode, where every block is hidden and nothing is random."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_id(config: DARTConfig, name: str, token_id: int | None) -> None:
    """Check that the token of this setting is in the vocabulary.

    Raises:
        ValueError: it is not.
    """
    if token_id is None:
        return
    if not isinstance(token_id, Integral):
        raise ValueError(f"{name}={token_id!r} is no single token; give one id, or None for none")
    if not 0 <= token_id < config.vocab_size:
        raise ValueError(
            f"{name}={token_id} is no token of vocab_size={config.vocab_size}; give one from 0 to "
            f"{config.vocab_size - 1}"
        )


def check_request(
    config: DARTConfig,
    tokens: Tensor,
    length: int,
    mode: str,
    guidance_scale: float,
    num_steps: int | None,
) -> None:
    """Check that rows `tokens` can be continued to `length` tokens in this mode.

    Raises:
        ValueError: a setting is out of its range or has no effect.
    """
    longest = config.max_position_embeddings
    if mode not in ("ar", "diffusion", "speculative"):
        raise ValueError(f"mode={mode!r} is unknown; choose ar, diffusion or speculative")
    if tokens.numel() == 0 or tokens.dim() != 2:
        raise ValueError(f"input_ids of shape {list(tokens.shape)} must be [batch, 1 or more]")
    prompt = tokens.shape[1]
    if prompt >= longest:
        raise ValueError(
            f"input_ids hold a prompt of {prompt} tokens, and max_position_embeddings={longest} "
            "leaves no room after it; shorten the prompt"
        )
    if not isinstance(length, Integral) or not prompt < length <= longest:
        raise ValueError(
            f"max_length={length} with a prompt of {prompt} tokens must be a whole number above "
            f"that and at most max_position_embeddings={longest}; the prompt is counted in it"
        )
    check_guidance(guidance_scale)
    if guidance_scale != 1.0 and mode == "speculative":
        raise ValueError(
            f"guidance_scale={guidance_scale} with mode=speculative, which has the law of the "
            "model without guidance; use mode=ar or guidance_scale=1"
        )
    check_steps(mode, num_steps)


def check_guidance(scale: float) -> None:
    """Raises ValueError: the scale is below 1 or not finite."""
    if not 1.0 <= scale < float("inf"):
        raise ValueError(f"guidance_scale={scale} must be finite and 1 or more; use 1 for none")


def check_steps(mode: str, num_steps: int | None) -> None:
    """Raises ValueError: a number of passes a block below 1, or in a mode without them."""
    if num_steps is None:
        return
    if mode != "diffusion" or not isinstance(num_steps, Integral) or num_steps < 1:
        raise ValueError(
            f"num_diffusion_steps={num_steps} with mode={mode} must be a whole number of 1 or more "
            "in mode=diffusion; leave it at None for one pass per token"
        )


def sampling_of(
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    do_sample: bool,
    generator: torch.Generator | None,
) -> Sampling:
    """The sampling of settings under their published names; without `do_sample` the most probable
    token.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if do_sample and not 0.0 < temperature < float("inf"):
        raise ValueError(
            f"temperature={temperature} must be above 0; for the most probable token use "
            "do_sample=False"
        )
    return Sampling(temperature if do_sample else 0.0, top_k, top_p, repetition_penalty, generator)


def row_lengths(tokens: Tensor, prompt: int, eos_id: int | None) -> Tensor:
    """Tokens of every row, int64 [b], up to and including the first `eos_id` after the prompt."""
    num_new = torch.full((len(tokens),), tokens.shape[1] - prompt, device=tokens.device)
    if eos_id is not None and tokens.shape[1] > prompt:
        is_end = tokens[:, prompt:] == eos_id
        first = is_end.int().argmax(dim=1) + 1
        num_new = torch.where(is_end.any(dim=1), first, num_new)
    return prompt + num_new


def _ended(tokens: Tensor, prompt: int, eos_id: int | None) -> Tensor:
    """Rows filled with `eos_id` from its first place after the prompt on, cut where all are."""
    if eos_id is None:
        return tokens
    after = (tokens[:, prompt:] == eos_id).cumsum(dim=1) > 0
    tokens = torch.cat((tokens[:, :prompt], tokens[:, prompt:].masked_fill(after, eos_id)), dim=1)
    return tokens[:, : int(row_lengths(tokens, prompt, eos_id).max())]
