"""Text from a model in one process."""

from __future__ import annotations

import torch
from torch import Tensor

from models.daria_former.standalone.logits_processor import ReactionVariabilitySystem
from models.daria_former.standalone.model import DariaFormerModel, check_length
from models.generate import PREFILL_CHUNK, sample


class DariaGenerator:
    """Sampling over the model's caches, with the variability system between logits and choice.

    The temperature of the model's emotion state is part of its logits and is not applied again.
    """

    def __init__(self, model: DariaFormerModel) -> None:
        self.model = model

    @property
    def variability(self) -> ReactionVariabilitySystem:
        return self.model.variability

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = 0.9,
        do_sample: bool = True,
        eos_token_id: int | None = None,
        images: Tensor | None = None,
        audio: Tensor | None = None,
        persona: Tensor | None = None,
        use_variability: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue every row of `input_ids` int64 [b, s]: [b, s + new].

        A row that has produced `eos_token_id` is filled with it; generation ends when all have.

        Raises:
            ValueError: an empty prompt, a setting out of its range, or a context that is too long.
        """
        _check(input_ids, max_new_tokens, temperature, top_k, top_p)
        check_length(input_ids.shape[1] + max_new_tokens, self.model.config)
        was_training = self.model.training
        self.model.eval()
        try:
            steps = _Steps(self.model, input_ids, max_new_tokens)
            logits, states = steps.prefill(images=images, audio=audio, persona=persona)
            ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            tokens = input_ids
            for remaining in range(max_new_tokens - 1, -1, -1):
                scores, heat = logits.float(), torch.full((1, 1), temperature)
                if use_variability:
                    scores = self.variability(tokens, scores)
                    heat = self.variability.temperature(temperature, tokens, states)
                if do_sample:
                    scores = scores / heat.to(scores.device)
                token = sample(
                    scores,
                    temperature=1.0 if do_sample else 0.0,
                    top_k=top_k,
                    top_p=top_p,
                    generator=generator,
                )
                if eos_token_id is not None:
                    token = token.masked_fill(ended, eos_token_id)
                    ended |= token == eos_token_id
                tokens = torch.cat((tokens, token.unsqueeze(1)), dim=1)
                if remaining == 0 or bool(ended.all()):
                    break
                logits, states = steps.next(token)
            return tokens
        finally:
            self.model.train(was_training)


class _Steps:
    """Logits [b, V] and the hidden states of the last two tokens, one token after another."""

    def __init__(self, model: DariaFormerModel, prompt: Tensor, max_new_tokens: int) -> None:
        self.model, self.prompt = model, prompt
        self.cache = model.new_cache(len(prompt), prompt.shape[1] + max_new_tokens)
        self.last: Tensor | None = None

    def prefill(self, **inputs: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        for chunk in self.prompt.split(PREFILL_CHUNK, dim=1):
            outputs = self.model(chunk, kv_cache=self.cache, **inputs)
            inputs = {}
            hidden = outputs["hidden_states"]
            before = hidden[:, -2] if hidden.shape[1] > 1 else self.last
            self.last = hidden[:, -1]
        states = None if before is None else (before, hidden[:, -1])
        return outputs["logits"][:, -1], states

    def next(self, token: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        outputs = self.model(token.unsqueeze(1), kv_cache=self.cache)
        before, self.last = self.last, outputs["hidden_states"][:, -1]
        assert before is not None
        return outputs["logits"][:, -1], (before, self.last)


def _check(
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids of shape {list(input_ids.shape)} must be [batch, tokens >= 1]")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(
            f"temperature={temperature} must be more than 0; for the most probable token use "
            "do_sample=False"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be 1 or more; None keeps every token")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; None keeps every token")
