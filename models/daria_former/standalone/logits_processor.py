"""The variability system, by its published name."""

from __future__ import annotations

from models.daria_former.config import DariaFormerConfig
from models.daria_former.standalone.repetition import RepetitionControl


class ReactionVariabilitySystem(RepetitionControl):
    """`RepetitionControl` (a logits processor) with the settings of a configuration."""

    def __init__(self, config: DariaFormerConfig) -> None:
        super().__init__(
            config.vocab_size,
            ngram=config.variability_ngram_size,
            weight=config.variability_penalty_weight,
        )
