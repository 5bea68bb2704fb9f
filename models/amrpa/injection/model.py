"""The class of an injected model: that of the model, with a forward pass that adds the losses."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from models.amrpa.config import AMRPAConfig
from models.amrpa.injection.state import StackState, wrap_checkpointing
from models.amrpa.memory import Measured


class AMRPAState:
    """What an injected model knows of its memory. `measured`: that of the last forward pass."""

    def __init__(self, config: AMRPAConfig, stacks: list[StackState]) -> None:
        self.config = config
        self.stacks = stacks
        self.measured: list[Measured] = []

    def metric(self, name: str) -> Tensor:
        """A measurement of every row, averaged over layers: fp32 [b].

        Raises:
            ValueError: there was no forward pass.
        """
        return self._mean(name).detach()

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """Both losses with their weights, summed over rows with `weights` [b], or averaged."""
        rows = self.config.diversity_weight * self._mean("diversity_loss")
        rows = rows + self.config.gate_reg_weight * self._mean("gate_loss")
        return rows.mean() if weights is None else (rows * weights).sum()

    def _mean(self, name: str) -> Tensor:
        if not self.measured:
            raise ValueError("no forward pass has been measured; run the model first")
        return torch.stack([getattr(each, name) for each in self.measured]).mean(dim=0)

    def start(self, arguments: dict[str, Any]) -> None:
        """Begin a forward pass of the model with these arguments."""
        for stack in self.stacks:
            alone = len(self.stacks) == 1 and "decoder_input_ids" not in arguments
            prefix = "" if alone or stack.name == "encoder" else "decoder_"
            mask = arguments.get(f"{prefix}attention_mask")
            stack.attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            stack.begin()
            stack.began = False

    def finish(self) -> None:
        """Take the measurements of the pass, and release its history.

        Raises:
            RuntimeError: a stack ran and its attention did not come here.
        """
        self.measured = []
        for stack in self.stacks:
            began = stack.began
            ended = stack.end()
            if began and not ended.routed:
                raise RuntimeError(
                    f"the attention of the {stack.name} was not routed through AMRPA; keep the "
                    "model's attn_implementation='amrpa'"
                )
            self.measured += ended.measured.values()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model starts without measurements."""
        return self.__dict__ | {"measured": []}


@functools.cache
def injected_class(model_class: type) -> type:
    """A subclass of a model's class, under the same name, that runs with AMRPA.

    A subclass and no replaced method: copies of the model work, and callers that call `forward`
    itself (PEFT) get the losses.
    """
    parent: Any = model_class
    original = parent.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind_partial(self, *args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        _refuse_attentions(self.config, arguments)
        self.amrpa_state.start(arguments)
        try:
            output = original(self, *args, **kwargs)
        except BaseException:
            for stack in self.amrpa_state.stacks:
                stack.end()
            raise
        self.amrpa_state.finish()
        return _with_losses(self, output, arguments)

    def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        parent._set_gradient_checkpointing(self, *args, **kwargs)
        for stack in self.amrpa_state.stacks:
            for layers in stack.layers:
                wrap_checkpointing(layers, stack)

    names = {
        "forward": forward,
        "_set_gradient_checkpointing": _set_gradient_checkpointing,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    subclass: type = type(model_class.__name__, (model_class,), names)
    return subclass


def _refuse_attentions(config: Any, arguments: dict[str, Any]) -> None:
    asked = arguments.get("output_attentions")
    if asked or (asked is None and getattr(config, "output_attentions", False)):
        raise ValueError(
            "output_attentions=True: AMRPA runs fused attention, which returns no weights; "
            "set output_attentions=False"
        )


def _with_losses(model: Any, output: Any, arguments: dict[str, Any]) -> Any:
    """In training, add the losses to the loss of the model's output, if it has one."""
    labels = arguments.get("labels")
    if not model.training or not model.amrpa_state.measured:
        return output
    if isinstance(output, tuple):
        if labels is None:
            return output
        weights = _row_weights(model, labels, arguments)
        return (output[0] + model.amrpa_state.loss(weights), *output[1:])
    if getattr(output, "loss", None) is not None:
        weights = _row_weights(model, labels, arguments)
        output.loss = output.loss + model.amrpa_state.loss(weights)
    return output


def _row_weights(model: Any, labels: Any, arguments: dict[str, Any]) -> Tensor | None:
    """The weight of each row: its share of the scored tokens of the step, as in the cross entropy.

    With `num_items_in_batch`, which the Trainer passes, a step is the same sum in any number of
    accumulated micro-batches.
    """
    total = arguments.get("num_items_in_batch")
    if not isinstance(labels, Tensor):
        return None
    if labels.dim() != 2 or labels.is_floating_point():
        counts = labels.new_ones(len(labels))
    else:
        counts = ((labels[:, 1:] if _shifts_labels(model) else labels) != -100).sum(dim=1)
    if total is None:
        total = counts.sum().clamp(min=1)
    return counts / total


def _shifts_labels(model: Any) -> bool:
    """Whether the first label of a row is scored by nothing; as the Trainer decides it."""
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return loss is ForCausalLMLoss and not model.config.is_encoder_decoder
