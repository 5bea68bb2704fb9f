"""A family of this project as a transformers model, for families that transformers does not have.

`models.hf_bundle` writes this module, a family's own entry and what they reach into the exported
`modeling_*.py`, so it must not depend on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from parallel.carry import LayerSpec, SequentialModel
from parallel.context import ParallelContext


class FamilyPreTrainedConfig(PreTrainedConfig):
    """A family's configuration, whole, under `family_config`, beside what transformers reads."""

    family_config: dict | None = None
    family_config_class: ClassVar[Any] = None

    def parsed(self) -> Any:
        """The family's own configuration class.

        Raises:
            ValueError: a setting is missing, unknown or out of its range.
        """
        return type(self).family_config_class.model_validate(self.family_config or {})


class FamilyCache:
    """The state of a generation: what every layer keeps, and how many tokens it has seen."""

    is_compileable = False

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def crop(self, max_length: int) -> None:
        """Forget the tokens from `max_length` on, or the last -`max_length` ones.

        Raises:
            ValueError: the layers do not keep enough to go back that far.
        """
        length = max_length if max_length >= 0 else self.length + max_length
        if length < self.length:
            for layer in self.layers.values():
                layer.rollback(length)
            self.length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("the cache of this model has no beams; use num_beams=1 or use_cache=False")


class FamilyForCausalLM(PreTrainedModel, GenerationMixin):
    """A SequentialModel behind the interface of transformers' causal language models.

    Rows may be padded on the left in a call without cache; the padding is then a document of its
    own, and nothing of it is seen. With a cache rows must have equal lengths.
    """

    supports_gradient_checkpointing = True
    _is_stateful = True  # the cache cannot be taken back token by token for contrastive search
    family_specs: ClassVar[Callable[..., list[LayerSpec]]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        device = torch.get_default_device()
        # Weights that are about to be loaded are not drawn.
        seed = None if device.type == "meta" else torch.initial_seed() % (1 << 31)
        specs = type(self).family_specs(config.parsed())
        self.model = SequentialModel(specs, ParallelContext.single(device=device), seed=seed)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Every parameter is drawn by the layers themselves."""

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        self.model.recompute = enable

    def new_cache(self, batch_size: int, max_length: int) -> FamilyCache:
        """Empty state for rows of up to `max_length` tokens."""
        return FamilyCache(self.model.new_cache(batch_size, max_length))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: FamilyCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, V] of `input_ids` [b, s]; `labels` as in transformers, shifted inside.

        `inputs`: what else the family's first layer takes, by its names.

        Raises:
            ValueError: padding that cannot be left out exactly.
        """
        segments = _padding_as_document(attention_mask, input_ids, past_key_values)
        first = self.model.layers[0]
        first.segmented = segments is not None  # type: ignore[assignment]
        given = type(self).family_inputs(input_ids, segments, **inputs)
        if past_key_values is None:
            output = self.model(given)
        else:
            output = self.model(given, past_key_values.layers)
            past_key_values.length += input_ids.shape[1]
        logits = output.logits.transpose(0, 1).contiguous()
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by `generate`: the family's own cache in place of transformers'."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} has no effect: "
                "this model has its own cache; remove it"
            )
        if generation_config.num_beams > 1:
            raise ValueError(
                f"num_beams={generation_config.num_beams}: the cache of this model has no beams; "
                "use num_beams=1 or use_cache=False"
            )
        rows = batch_size * generation_config.num_return_sequences
        model_kwargs["past_key_values"] = self.new_cache(rows, max_cache_length + 1)


def _padding_as_document(
    attention_mask: Tensor | None, input_ids: Tensor, cache: FamilyCache | None
) -> Tensor | None:
    """Segment ids int32 [b, s] that put left padding into a document of its own; None without."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    if mask.shape != input_ids.shape or cache is not None:
        raise ValueError(
            "attention_mask has padding, which a generation with a cache cannot leave out exactly; "
            "generate rows of one length together, or use use_cache=False"
        )
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask has padding on the right; pad on the left")
    return mask.int()
