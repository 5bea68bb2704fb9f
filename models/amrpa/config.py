"""Settings of AMRPA. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from models.amrpa.settings import MemorySettings
from models.amrpa.targets import plan_layers, resolve_targets
from models.common.config import DecoderConfig

# Settings that only training or the first step reads.
_TRAINING = frozenset({"dropout", "diversity_weight", "gate_reg_weight", "detach_history"})
_INITIAL = frozenset({"gate_sensitivity", "gate_bias"})


class AMRPAConfig(MemorySettings):
    """Settings of an injection.

    * `freeze_base_model`, `freeze_embeddings`: what injection freezes.
    * `track_metrics`, `metric_device`: whether measurements are kept, and where they are read.
    * `granularity`: one selection per `head`, or one per `token` over all heads.
    * `inject_cross_attention`: whether the target layers of a decoder also correct the queries of
      their cross-attention, by the cross-attention of earlier layers.

    Raises:
        ValueError: a setting is unknown or outside of its range.
    """

    freeze_base_model: bool = True
    freeze_embeddings: bool = True
    track_metrics: bool = True
    metric_device: str = "cpu"
    granularity: Literal["head", "token"] = "head"
    inject_cross_attention: bool = False

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in type(self).model_fields:
                nearest = difflib.get_close_matches(name, type(self).model_fields, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else "remove it"
                raise ValueError(f"{name!r} is no setting of AMRPAConfig; {hint}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            first, *others = error.errors()
            name = str(first["loc"][0])
            rest = [each["msg"] for each in others if each["loc"][0] == name]
            problem = " or ".join(dict.fromkeys([first["msg"], *rest]))
            raise ValueError(
                f"{name}={values.get(name)!r} of AMRPAConfig is invalid: {problem}"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings of `to_dict`.

        Raises:
            ValueError: a setting is unknown or outside of its range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"amrpa_config={values!r} is no mapping of settings; use that of `to_dict`"
            )
        return cls(**values)


class AMRPALlamaConfig(MemorySettings, DecoderConfig):
    """A decoder of Llama or Qwen2 shape (`qkv_bias`) whose target layers read earlier layers.

    One selection per head, so that tensor ranks share the heads and exchange nothing. Without
    dropout unless it is set: pretraining sees a text once.
    """

    family: Literal["amrpa"] = "amrpa"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        plan_layers(self, self.num_layers)
        return self

    @property
    def is_random(self) -> bool:
        """Whether layers draw random numbers in training."""
        return self.memory_noise > 0 or self.dropout > 0

    def function(self) -> dict[str, Any]:
        """As in `DecoderConfig`; without settings of training and initial values, which are learnt.

        Layers are named by their numbers, whatever form `target_layers` has.
        """
        settings = super().function()
        rest = {k: v for k, v in settings.items() if k not in _TRAINING | _INITIAL}
        return rest | {"target_layers": resolve_targets(self.target_layers, self.num_layers)}
