"""Text of an exported model in the modes that transformers does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from models.dart.config import DARTConfig
from models.dart.modes import Request, continue_rows, row_lengths, sampling_of
from parallel.carry import SequentialModel

# Settings of a GenerationConfig that these modes follow, and its notes.
_FOLLOWED = frozenset(
    (
        "max_length",
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "guidance_scale",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "return_dict_in_generate",
    )
)
_NOTES = frozenset({"transformers_version", "_from_model_config"})


def write_text(
    model: SequentialModel,
    config: DARTConfig,
    tokens: Tensor,
    settings: GenerationConfig,
    *,
    mode: Any,
    num_steps: int | None,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue rows int64 [b, s] with the settings of a GenerationConfig: int64 [b, length], rows
    filled after their end with `pad_token_id`, or `eos_token_id` where there is none.

    Raises:
        ValueError: a setting that this mode does not follow, or that is out of its range.
    """
    _check_settings(settings, mode)
    eos_id = _single(settings.eos_token_id, mode)
    request = Request(
        mode,
        _length(settings, tokens.shape[1], config),
        sampling_of(
            temperature=1.0 if settings.temperature is None else settings.temperature,
            top_k=settings.top_k or None,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty or 1.0,
            do_sample=bool(settings.do_sample),
            generator=None,
        ),
        1.0 if settings.guidance_scale is None else settings.guidance_scale,
        eos_id,
        num_steps,
    )
    rows = continue_rows(model, config, tokens, request).tokens
    if eos_id is not None and settings.pad_token_id is not None:
        ends = row_lengths(rows, tokens.shape[1], eos_id).unsqueeze(1)
        after = torch.arange(rows.shape[1], device=rows.device) >= ends
        rows = rows.masked_fill(after, settings.pad_token_id)
    return GenerateDecoderOnlyOutput(sequences=rows) if settings.return_dict_in_generate else rows


def _length(settings: GenerationConfig, prompt: int, config: DARTConfig) -> int:
    if settings.max_new_tokens is not None:
        return prompt + int(settings.max_new_tokens)
    if settings.max_length is not None:
        return int(settings.max_length)
    return config.max_position_embeddings


def _single(eos_token_id: int | list[int] | None, mode: str) -> int | None:
    if isinstance(eos_token_id, list) and len(eos_token_id) > 1:
        raise ValueError(
            f"eos_token_id={eos_token_id} with mode={mode}: it ends rows at one token; give one"
        )
    return eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id


def _check_settings(settings: GenerationConfig, mode: str) -> None:
    idle = settings._get_default_generation_params()
    for name, value in settings.to_dict().items():
        # Whatever is off by default is None or False.
        if name in _FOLLOWED | _NOTES or not value or value == idle.get(name):
            continue
        raise ValueError(
            f"{name}={value!r} has no effect with mode={mode}, which follows "
            f"{', '.join(sorted(_FOLLOWED))}; leave it out or use mode=ar"
        )
