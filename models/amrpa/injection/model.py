"""The class of an injected model: that of the model, with a forward pass that adds the losses."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from models.amrpa.config import AMRPAConfig
from models.amrpa.injection.attention import register
from models.amrpa.injection.state import StackState, wrap_checkpointing
from models.amrpa.memory import Measured


class AMRPAState:
    """The state of an injected model's memory.

    `measured`: that of the last forward pass, by layer that read others; None before the first.
    `num_readers`: how many layers with memory the stacks of that pass have.
    """

    def __init__(self, config: AMRPAConfig, stacks: list[StackState]) -> None:
        self.config = config
        self.stacks = stacks
        self.measured: list[Measured] | None = None
        self.num_readers = 0

    def metric(self, name: str) -> Tensor:
        """A measurement of every row, averaged over the layers that read: fp32 [b].

        Raises:
            ValueError: there was no forward pass, or no layer read.
        """
        share = len(self.measured or ()) / max(self.num_readers, 1)
        return self._mean(name).detach() * (share if name == "using_memory" else 1)

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """Both losses with their weights, summed over rows with `weights` [b], or averaged; 0 where
        every layer with memory was dropped (LayerDrop)."""
        if self.measured is not None and not self.measured:
            return torch.zeros(())
        rows = self.config.diversity_weight * self._mean("diversity_loss")
        rows = rows + self.config.gate_reg_weight * self._mean("gate_loss")
        return rows.mean() if weights is None else (rows * weights).sum()

    def _mean(self, name: str) -> Tensor:
        if not self.measured:
            raise ValueError("no forward pass has been measured; run the model first")
        return torch.stack([getattr(each, name) for each in self.measured]).mean(dim=0)

    def start(self, arguments: dict[str, Any], *, pair: bool) -> None:
        """Begin a forward pass of the model with these arguments; `pair`: of an encoder and a
        decoder."""
        for stack in self.stacks:
            decodes = pair and stack.name != "encoder"
            mask = arguments.get("decoder_attention_mask" if decodes else "attention_mask")
            stack.attention_mask = _mask_of_rows(mask, arguments)
            stack.begin()
            stack.began = False

    def finish(self, *, training: bool) -> None:
        """Take the measurements of the pass, and release its history.

        Raises:
            RuntimeError: a stack ran and its attention did not come here.
        """
        self.measured, self.num_readers = [], 0
        for stack in self.stacks:
            began = stack.began
            ended = stack.end()
            # In training LayerDrop may leave all layers out.
            if ended.routed != ended.called or (began and not ended.called and not training):
                raise RuntimeError(
                    f"the attention of the {stack.name} was not routed through AMRPA; keep the "
                    "model's attn_implementation='amrpa'"
                )
            self.measured += ended.measured.values()
            self.num_readers += len(stack.plan.reads) if began else 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model starts without measurements."""
        return self.__dict__ | {"measured": None}


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
        self.amrpa_state.start(arguments, pair="decoder_attention_mask" in signature.parameters)
        # Without try: torch.compile takes no graph break of the model inside of one.
        output = original(self, *args, **kwargs)
        self.amrpa_state.finish(training=self.training)
        return _with_losses(self, output, arguments)

    def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        parent._set_gradient_checkpointing(self, *args, **kwargs)
        for stack in self.amrpa_state.stacks:
            for layers in stack.layers:
                wrap_checkpointing(layers, stack)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _empty, (model_class,), self.__dict__

    names = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "_set_gradient_checkpointing": _set_gradient_checkpointing,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    subclass: type = type(model_class.__name__, (model_class,), names)
    return subclass


def _empty(model_class: type) -> Any:
    """An injected model without state, to be filled by pickle or copy."""
    register()
    subclass: Any = injected_class(model_class)
    return subclass.__new__(subclass)


def _mask_of_rows(mask: Any, arguments: dict[str, Any]) -> Tensor | None:
    """The mask [b, s] of tokens that are no padding; a model for multiple choice makes a row of
    every choice [b, choices, s]."""
    if not isinstance(mask, Tensor):
        return None
    tokens = arguments.get("input_ids")
    if mask.dim() == 3 and isinstance(tokens, Tensor) and tokens.dim() == 3:
        return mask.flatten(0, 1)
    return mask if mask.dim() == 2 else None


def _refuse_attentions(config: Any, arguments: dict[str, Any]) -> None:
    asked = arguments.get("output_attentions")
    if asked or (asked is None and getattr(config, "output_attentions", False)):
        raise ValueError(
            "output_attentions=True: AMRPA runs fused attention, which returns no weights; "
            "set output_attentions=False"
        )


def _with_losses(model: Any, output: Any, arguments: dict[str, Any]) -> Any:
    """In training, add the losses to the loss of the model's output, if it has one."""
    if not model.training or not model.amrpa_state.measured:
        return output
    if isinstance(output, tuple):
        # The first of a tuple is a loss or a tensor of rows.
        if output[0].dim():
            return output
        return (output[0] + _weighted_losses(model, arguments), *output[1:])
    if getattr(output, "loss", None) is not None:
        output.loss = output.loss + _weighted_losses(model, arguments)
    return output


def _weighted_losses(model: Any, arguments: dict[str, Any]) -> Tensor:
    state: AMRPAState = model.amrpa_state
    rows = (state.measured or [])[0].gate_impact
    labels, total = arguments.get("labels"), arguments.get("num_items_in_batch")
    if not isinstance(labels, Tensor):
        return state.loss()
    return state.loss(_row_weights(model, labels, total, rows))


def _row_weights(model: Any, labels: Tensor, total: Any, rows: Tensor) -> Tensor:
    """The weight of each of `rows`, in their dtype: its share of the scored tokens of the step, as
    in the cross entropy.

    With `num_items_in_batch`, which the Trainer passes, a step is the same sum in any number of
    accumulated micro-batches. A label of several rows (choices) is shared among them.
    """
    if labels.dim() < 2 or labels.is_floating_point():
        counts = labels.new_ones(len(labels))
    else:
        scored = (labels[..., 1:] if _shifts_labels(model) else labels) != -100
        counts = scored.flatten(0, -2).sum(dim=1)
    if total is None:
        total = counts.sum().clamp(min=1)
    choices = len(rows) // len(counts)
    return (counts.to(rows.dtype) / total).repeat_interleave(choices) / choices


def _shifts_labels(model: Any) -> bool:
    """Whether the first label of a row is scored by nothing; as the Trainer decides it."""
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return loss is ForCausalLMLoss and not model.config.is_encoder_decoder
