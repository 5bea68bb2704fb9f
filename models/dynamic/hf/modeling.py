"""Base class of both families' models in transformers.

Shapes: b batch, s tokens of a call, V vocabulary.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutputWithPast

from models.dynamic.carry import DynamicOutput
from models.dynamic.hf.config import DynamicHFConfig
from models.dynamic.hf.names import file_name, is_added, is_plain
from models.dynamic.model import loss_weights
from models.dynamic.pair import DTFPair
from models.hf.arguments import StateReader
from models.hf.modeling import FamilyForCausalLM
from parallel.carry import LayerSpec
from parallel.context import Axis
from parallel.layer_state import layer_state_owners, update_layer_states

# What says where a directory is, among the options of from_pretrained.
_HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download", "subfolder")


class BaseDynamicCausalLM(FamilyForCausalLM):
    """A decoder whose layers compute only some tokens, with `generate` and `from_pretrained`.

    A subclass says its `config_class` and, in `setup_dynamic_layers`, its layers. Parameters have
    the project's names under `model.`; files have Qwen2's for the plain part.

    While it trains, call `update_thresholds` after every optimizer step, or give
    `ThresholdUpdates()` to transformers' Trainer: what chooses tokens outside of training is
    learnt there. Until then every token is computed. Padding changes nothing for a row: in
    training, too, it neither competes for the row's capacity nor adds to its losses.
    """

    config: DynamicHFConfig
    # What the entries of `aux` are that the head returns beside logits; empty where it has none.
    aux_names: ClassVar[tuple[str, ...]] = ()
    # A threshold is an average over many steps, which would not change in bf16.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["tau", "offset"]

    def __init__(self, config: DynamicHFConfig) -> None:
        super().__init__(config)
        # What save_pretrained reverts; from_pretrained leaves the same here.
        self._weight_conversions = [
            WeightRenaming(theirs, ours) for theirs, ours in _patterns(self.state_dict()).items()
        ]

    @abstractmethod
    def setup_dynamic_layers(self, settings: Any) -> list[LayerSpec]:
        """The layers: `embedding`, those of the family, `head`."""

    def layer_specs(self, settings: Any) -> list[LayerSpec]:
        return self.setup_dynamic_layers(settings)

    def readers_of(self, layer: nn.Module) -> list[StateReader]:
        """Readers for a layer; a pair has two, since the state between its layers is no output."""
        after = super().readers_of(layer)
        if not isinstance(layer, DTFPair):
            return after
        between = StateReader(layer.decision, lambda arguments, output: arguments[0] + output.delta)
        return [between, *after]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        config_dict: Mapping[str, Any] | None = None,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The model of a directory, or one that begins with the weights of a Qwen2 model, in
        evaluation. A name is looked up in the hub's cache or the hub.

        `config_dict`: other settings than those of the directory.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape, or the sizes of a Qwen2
                model are changed.
        """
        given = kwargs.get("config")
        if given is None:
            hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            contents, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            if contents.get("model_type") != cls.config_class.model_type:
                return cls._from_base(pretrained_model_name_or_path, config_dict or {}, kwargs)
            given, kwargs = cls.config_class.from_pretrained(
                pretrained_model_name_or_path,
                return_unused_kwargs=True,
                **{**kwargs, **(config_dict or {})},
            )
            kwargs["config"] = given
        kwargs["key_mapping"] = _patterns(cls._tensor_names(given))
        model, loading = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if loading[problem]:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {problem.replace('_', ' ')} "
                    f"{sorted(map(str, loading[problem]))[:10]}; load it with the configuration "
                    "that it was saved with"
                )
        return (model, loading) if output_loading_info else model

    @classmethod
    def _from_base(cls, source: Any, changes: Mapping[str, Any], options: dict[str, Any]) -> Any:
        base, loading = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **options
        )
        if any(loading.values()):
            raise ValueError(f"{source} is not of its own configuration: {loading}")
        model = cls(cls.config_class.from_base(base.config.to_dict(), changes)).to(base.dtype)
        model.copy_base_weights(base)
        return model.eval()

    @torch.no_grad()
    def copy_base_weights(self, base: PreTrainedModel) -> dict[str, str]:
        """Copy the weights of a Qwen2 model into the plain part; routers and priors stay as they
        are, and of more layers the first ones are taken. Returns our names -> theirs.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """
        self.config.check_base(base.config.to_dict())
        theirs = dict(base.named_parameters())
        taken, tensors = {}, dict(self.named_parameters())
        for ours in tensors:
            name = file_name(ours.removeprefix("model."))
            if is_plain(name):
                taken[ours] = name
            elif not is_added(name):
                raise ValueError(f"{name} has no counterpart in {type(base).__name__}; train it")
        surplus = [name for name in sorted(set(theirs) - set(taken.values())) if self._has(name)]
        lacking = sorted(set(taken.values()) - set(theirs))
        if surplus or lacking:
            raise ValueError(
                f"{type(base).__name__} lacks {lacking[:10]} and has unexpected {surplus[:10]}: it "
                "is no base of this model"
            )
        for ours, name in taken.items():
            tensors[ours].copy_(theirs[name])
        return taken

    def _has(self, name: str) -> bool:
        """Whether a tensor of a Qwen2 model belongs to a layer that is used."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return layer is None or int(layer[1]) < self.config.num_hidden_layers

    def compute_loss(self, output: DynamicOutput, labels: Tensor) -> Tensor:
        """The cross entropy of labels int64 [b, s], each from the tokens before it, and the losses
        of routers and priors, weighted."""
        logits = output.logits.transpose(0, 1)
        return self._loss(logits, labels, None, self.auxiliary_loss(output))

    @property
    def has_auxiliary_loss(self) -> bool:
        return bool(self.aux_names)

    def auxiliary_loss(self, output: DynamicOutput) -> Tensor | None:
        if not self.aux_names:
            return None
        entries = dict(zip(self.aux_names, output.aux.unbind(dim=-1), strict=True))
        weights = self.loss_weights(self.settings())
        return torch.stack([weight * entries[name] for name, weight in weights.items()]).sum(dim=0)

    def loss_weights(self, settings: Any) -> Mapping[str, float]:
        """Entry of `aux` -> its weight in the loss."""
        return loss_weights(settings)

    def update_thresholds(self) -> None:
        """Let the thresholds follow the scores since the last call.

        Collective where processes have been started: each is taken to have other rows.
        """
        ctx = self.model.ctx
        if dist.is_available() and dist.is_initialized():
            ctx = replace(ctx, data=Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD))
        update_layer_states(layer_state_owners(self.model), ctx=ctx)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load tensors under our names or those of files."""
        ours = {file_name(name.removeprefix("model.")): name for name in self.state_dict()}
        renamed = {ours.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, *args, **kwargs)

    @classmethod
    def _tensor_names(cls, config: DynamicHFConfig) -> list[str]:
        """The names of a model's parameters and buffers; no memory, no arithmetic."""
        with torch.device("meta"):
            return list(cls(config).state_dict())

    def run(
        self,
        tokens: Any,
        given: Mapping[str, Tensor | None],
        *,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """See `FamilyForCausalLM.run`.

        Raises:
            ValueError: padding where the rule looks at later tokens, which would not ignore it.
        """
        looks_ahead = self.config.causal_router == "topk" and not self.training
        if looks_ahead and attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "causal_router=topk chooses among all columns of a row, padding too; pass rows of "
                "one length without padding, or use threshold, predictor or aux"
            )
        return super().run(tokens, given, attention_mask=attention_mask, **options)


class ThresholdUpdates(TrainerCallback):
    """Calls `update_thresholds` after every optimizer step of transformers' Trainer."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        getattr(model, "module", model).update_thresholds()


def _patterns(names: Any) -> dict[str, str]:
    """Regular expressions for the names in files -> our names, of a model's tensors."""
    return {f"^{re.escape(file_name(name.removeprefix('model.')))}": name for name in names}
