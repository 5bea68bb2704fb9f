"""`base_model` as transformers defines it: token ids to the states that the head projects.

Shapes: b batch, s tokens of a call, h hidden.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple, logging

_LOGGER = logging.get_logger(__name__)


class Backbone(nn.Module):
    """The layers of `owner`, a `FamilyForCausalLM`.

    `owner.get_output_embeddings()` makes the logits of its `last_hidden_state` [b, s, h], as in the
    models of transformers. Trainers that take their loss from it leave out what a family adds to
    its cross entropy, which is said once.
    """

    owner: Any

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.model = owner.model
        self.__dict__["owner"] = owner  # which is no submodule: it is not registered

    @property
    def config(self) -> Any:
        return self.owner.config

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.owner.get_input_embeddings()
        return embeddings

    @can_return_tuple
    def forward(self, *arguments: Any, **options: Any) -> BaseModelOutputWithPast:
        """Arguments are those of the owner's `forward`.

        Raises:
            ValueError: labels, which belong to the head.
        """
        if options.get("labels") is not None:
            raise ValueError("labels: base_model has no loss; give them to the model itself")
        asked = options.pop("output_hidden_states", None)
        if asked is None:
            asked = getattr(self.config, "output_hidden_states", None)
        # Not the owner's attribute, which trainers replace by what calls this one.
        owner_class: Any = type(self.owner)
        if self.owner.training and self.owner.has_auxiliary_loss:
            _LOGGER.warning_once(
                f"a loss from the hidden states of base_model has none of the terms that a "
                f"{self.config.model_type} model adds in training; train with the model's own loss "
                "to keep them"
            )
        output = owner_class.forward(
            self.owner, *arguments, output_hidden_states=True if asked else [-1], **options
        )
        return BaseModelOutputWithPast(
            last_hidden_state=output.hidden_states[-1],
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states if asked else None,
        )
