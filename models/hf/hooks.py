"""Calls by transformers while it loads a model, prepares generation or sets up training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from transformers import GenerationConfig

from parallel.carry import SequentialModel


class LoadingHooks:
    """Methods of transformers' models that a `FamilyForCausalLM` answers in its own way."""

    model: SequentialModel
    config: Any
    gradient_checkpointing: bool
    new_cache: Callable[[int], Any]
    named_parameters: Callable[[], Any]
    named_modules: Callable[[], Any]

    def to(self, *arguments: Any, **options: Any) -> Self:
        """As in torch.

        Raises:
            ValueError: a parameter has no values, as after loaders that do not rename weights.
        """
        try:
            moved: Self = super().to(  # type: ignore[misc]
                *arguments, **options
            )
        except NotImplementedError:
            empty = [name for name, parameter in self.named_parameters() if parameter.is_meta]
            raise ValueError(
                f"{empty[0] if empty else 'a buffer'} has no values to move; load the weights with "
                "from_pretrained, which knows the names in the files of this model"
            ) from None
        return moved

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot be chosen:"
                " this model has a cache of its own; leave it out"
            )
        given = model_kwargs.get("past_key_values") is not None
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit={generation_config.assistant_early_exit}: the layers of "
                "this model cannot be left early; give a smaller model as assistant_model"
            )
        if given or generation_config.use_cache is False:
            return
        longest = self.config.max_position_embeddings
        if generation_config.is_assistant:  # called again and again with the same cache
            max_cache_length = longest
        # Prompt lookup may propose tokens beyond the requested length.
        drafted = max_cache_length + (generation_config.prompt_lookup_num_tokens or 0)
        room = max(max_cache_length, min(drafted, longest))
        model_kwargs["past_key_values"] = self.new_cache(room)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant") or every_n_layers != 1:
            raise ValueError(
                f"gradient checkpointing with {options} and every_n_layers={every_n_layers}: this "
                "model recomputes every block, without reentrance; leave the options out"
            )
        self.model.recompute = self.gradient_checkpointing = enable

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Check that every parameter was loaded; parallel.random initialises new ones.

        Raises:
            ValueError: weights that were loaded lack a parameter of the model.
        """
        for name, parameter in module.named_parameters(recurse=False):
            # A parameter of the layers declares its initialisation, one that loading created none.
            if not hasattr(parameter, "init") and not getattr(
                parameter, "_is_hf_initialized", False
            ):
                path = next(path for path, other in self.named_modules() if other is module)
                raise ValueError(
                    f"{path}.{name} is missing from the weights; load them with the configuration "
                    "that they were saved with"
                )
