"""Sampling with penalties for repetition."""

from __future__ import annotations

import torch
from torch import Tensor

from models.daria_former.carry import DariaInputs
from models.daria_former.standalone.logits_processor import ReactionVariabilitySystem
from models.daria_former.standalone.model import DariaFormerModel, check_length
from models.daria_former.standalone.repetition import RepetitionScores
from models.generate import generate
from models.standalone.model import check_tokens


class DariaGenerator:
    """Sampling over the model's caches, with the variability system between logits and choice.

    The temperature of the model's emotion state is part of its logits and is not applied again.
    """

    def __init__(self, model: DariaFormerModel) -> None:
        self.model = model

    @property
    def variability(self) -> ReactionVariabilitySystem:
        return self.model.variability

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
        self._check(input_ids, max_new_tokens, temperature)
        control = self.variability if use_variability else None
        was_training = self.model.training
        try:
            return generate(
                self.model.eval().body,
                input_ids,
                max_new_tokens=max_new_tokens,
                temperature=1.0 if do_sample else 0.0,  # the processor has divided by it
                top_k=top_k if do_sample else None,
                top_p=top_p if do_sample else None,
                eos_id=eos_token_id,
                generator=generator,
                make_inputs=lambda x: DariaInputs(x, images=images, audio=audio, persona=persona),
                processor=RepetitionScores(control, temperature if do_sample else None),
            )
        finally:
            self.model.train(was_training)

    def _check(self, input_ids: Tensor, max_new_tokens: int, temperature: float) -> None:
        if not 0.0 < temperature < float("inf"):
            raise ValueError(
                f"temperature={temperature} must be more than 0; for the most probable token use "
                "do_sample=False"
            )
        check_tokens(input_ids, vocab_size=self.model.config.vocab_size)
        check_length(input_ids.shape[1] + max_new_tokens, self.model.config)
