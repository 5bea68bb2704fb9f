"""A DART as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from models.dart.config import DARTConfig
from models.dart.hf.config import DARTHFConfig
from models.dart.hf.generate_file import GENERATE_FILE, GENERATE_SOURCE
from models.dart.hf.generation import write_text
from models.dart.layers import DARTPair
from models.dart.model import layer_specs
from models.hf.arguments import StateReader
from models.hf.modeling import FamilyForCausalLM
from parallel.carry import LayerSpec


class DARTForCausalLM(FamilyForCausalLM):
    """The layers of a DART with `generate`, `from_pretrained` and `save_pretrained`.

    `generate` and the loss are those of the causal stream, which reads a plan of every block; other
    modes of generation are `generate(..., custom_generate=directory, mode=...)`. The hidden states
    are those of the blocks in their order, in `trunk="dual"` a diffusion block and a causal one by
    turns. The layers' names are those of the project, under `model.`.
    """

    config: DARTHFConfig
    config_class = DARTHFConfig
    layers_take_any_length = False

    def layer_specs(self, settings: DARTConfig) -> list[LayerSpec]:
        return layer_specs(settings)

    def readers_of(self, layer: nn.Module) -> list[StateReader]:
        """Of the pair's diffusion block, where it is a layer of its own, and of the causal one."""
        causal = super().readers_of(layer)
        if not isinstance(layer, DARTPair) or layer.diffusion is None:
            return causal
        return [StateReader(layer, lambda arguments, output: output.noised), *causal]

    def state_readers(self) -> list[StateReader]:
        """As in `FamilyForCausalLM`; the head's projection serves both streams, its norm one."""
        norm = self.model.get_submodule("head.norm")
        return [*super().state_readers()[:-1], StateReader(norm, lambda arguments, output: output)]

    def generate_in_mode(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *arguments: Any,
        mode: str = "ar",
        num_diffusion_steps: int | None = None,
        **options: Any,
    ) -> Any:
        """Continue rows int64 [b, s]; arguments and results are those of `generate`.

        ar: `generate` of transformers. diffusion: blocks in `num_diffusion_steps` passes each, by
        default one per token. speculative: the law of ar, from drafts of the diffusion stream.
        Without `max_length` and `max_new_tokens` these two fill every position of the model.

        Raises:
            ValueError: an argument or a setting that the mode does not follow.
        """
        if mode == "ar" and num_diffusion_steps is None:
            return super().generate(inputs, generation_config, *arguments, **options)
        given = generation_config or self.generation_config
        lengths = (given.max_length, given.max_new_tokens, options.get("max_new_tokens"))
        if lengths == (None, None, None):
            options.setdefault("max_length", self.config.max_position_embeddings)
        settings, rest = self._prepare_generation_config(generation_config, **options)
        tokens = inputs if inputs is not None else rest.pop("input_ids", None)
        _check_rest(rest, arguments, mode)
        if tokens is None:
            if settings.bos_token_id is None:
                raise ValueError("inputs=None begins with bos_token_id; give one of the two")
            tokens = torch.tensor([[settings.bos_token_id]], device=self.device)
        return write_text(
            self.model,
            self.settings(),
            tokens,
            settings,
            mode=mode,
            num_steps=num_diffusion_steps,
        )

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As in transformers, and the file of the other modes of generation."""
        super().save_pretrained(save_directory, *arguments, **options)
        path = Path(save_directory) / GENERATE_FILE
        if not path.exists():  # transformers copies the files that config.json names alone
            path.parent.mkdir(exist_ok=True)
            path.write_text(GENERATE_SOURCE, encoding="utf-8")


def _check_rest(rest: dict[str, Any], arguments: tuple[Any, ...], mode: str) -> None:
    """Check that nothing is left but a mask without padding.

    Raises:
        ValueError: something else is.
    """
    others = {name: value for name, value in rest.items() if value is not None}
    mask = others.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            f"attention_mask has zeros with mode={mode}, whose rows have no padding; group rows by "
            "length or use mode=ar"
        )
    names = sorted(others) + [f"argument {i + 3}" for i, x in enumerate(arguments) if x is not None]
    if names:
        raise ValueError(
            f"{', '.join(names)}: not used with mode={mode}; leave it out or use mode=ar"
        )
