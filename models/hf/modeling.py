"""A family's layers as a causal language model of transformers.

Shapes: b batch, s tokens of a call, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from models.base import TokenInputs, logits_of, num_scored_in, scored_mean
from models.hf.arguments import (
    FixedEmbeddings,
    StateReader,
    check_arguments,
    computing_last,
    kept_columns,
    packed_documents,
    recording,
    segmented,
    wanted_states,
)
from models.hf.backbone import Backbone
from models.hf.cache import FamilyCache, row_bounds
from models.hf.config import FamilyPreTrainedConfig
from models.hf.hooks import LoadingHooks
from models.hf.registration import declarations_kept
from parallel.carry import LayerSpec, SequentialModel
from parallel.context import ParallelContext
from parallel.cross_entropy import IGNORED_LABEL, vocab_parallel_cross_entropy

# Tokens of a prompt that go through the layers at a time.
PREFILL_CHUNK = 512


class Computed(NamedTuple):
    """Logits [b, kept, V] of a call, and the requested hidden states, [b, s, h] each."""

    logits: Tensor
    states: tuple[Tensor, ...] = ()


class FamilyForCausalLM(FixedEmbeddings, LoadingHooks, PreTrainedModel, GenerationMixin, ABC):
    """The layers of a family, `model`, behind the interface of transformers.

    A subclass defines `config_class` and `layer_specs`; `of` derives one. A family whose first
    layer takes more than tokens also defines `inputs` and its own `forward`, built on `run`, whose
    signature transformers inspects.
    """

    config: FamilyPreTrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer then gives `num_items_in_batch`
    gradient_checkpointing = False
    has_token_states = True  # False where layers hand on states of something else than tokens
    layers_take_any_length = True  # False where a length decides what an exported program does
    _supports_sdpa = True

    def __init__(self, config: FamilyPreTrainedConfig) -> None:
        super().__init__(config)
        # from_pretrained builds the model on the meta device and in the dtype of its weights.
        ctx = ParallelContext.single(device=torch.get_default_device())
        specs = self.layer_specs(self.settings())
        with declarations_kept():
            self.model = SequentialModel(specs, ctx, seed=torch.initial_seed())
        # Blocks stay whole when accelerate spreads a model over devices.
        self._no_split_modules = sorted({s.module.__name__ for s in specs if s.recompute})
        # Past nn.Module's registration: its layers are those of `model`.
        self.__dict__["_backbone"] = Backbone(self)
        with declarations_kept():
            self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The layers as a model of transformers that returns hidden states in place of logits."""
        backbone: Backbone = self.__dict__["_backbone"]
        return backbone

    @classmethod
    def of(
        cls,
        config_class: type[FamilyPreTrainedConfig],
        layer_specs: Callable[[Any], list[LayerSpec]],
    ) -> type[Self]:
        """The model of a family that takes tokens alone, from its layers."""
        members = {
            "__module__": __name__,
            "__doc__": f"The layers of the {config_class.model_type} family.",
            "config_class": config_class,
            "layer_specs": lambda self, settings: layer_specs(settings),
        }
        return type(config_class.model_class, (cls,), members)

    @abstractmethod
    def layer_specs(self, settings: Any) -> list[LayerSpec]:
        """The family's layers."""

    def settings(self) -> Any:
        """The configuration as the settings class of the layers: transformers imports the files of
        a directory once for its configuration and again for its model."""
        return self.config_class.settings_class(**self.config.settings().model_dump())

    def inputs(
        self, tokens: Tensor, given: Mapping[str, Tensor], lengths: Tensor | None = None
    ) -> Any:
        """Build the first layer's inputs: `tokens` int64 [b, s], and other inputs of the same rows.

        `lengths`: int64 [b], tokens of each row, in training where rows end in padding; for layers
        that look at a row as a whole.
        """
        return TokenInputs(tokens, lengths=lengths)

    def auxiliary_loss(self, output: Any) -> Tensor | None:
        """The training losses beside the cross entropy, per row [b], from the layers' output."""
        return None

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether there are such losses."""
        return False

    def new_cache(self, max_length: int) -> FamilyCache:
        """An empty cache for at most `max_length` tokens, padding included.

        `generate` makes its own; make one here to continue it in later calls.
        """
        return FamilyCache(max_length)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, V] of `input_ids` [b, s]; see `run`."""
        return self.run(
            input_ids,
            {},
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            others=others,
        )

    def run(
        self,
        tokens: Any,
        given: Mapping[str, Tensor | None],
        *,
        attention_mask: Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: int | Tensor | None,
        others: Mapping[str, Any],
    ) -> CausalLMOutputWithPast:
        """`forward` for tokens [b, s] and other inputs of the first layer, `given`; `others`: its
        remaining arguments (models.hf.arguments).

        `position_ids` that begin anew inside of rows without padding mark packed documents; their
        loss is that of the labels, which cross from one to the next unless those are -100.
        `attention_mask` [b, columns]: zeros for padding, before or after a row's tokens, and with a
        cache only before them. Padding changes nothing for the tokens; its own logits mean nothing.
        A call with a cache has no gradient. The loss is the mean cross entropy of each token from
        those before it, and what `auxiliary_loss` adds, rows counting by their scored tokens
        (`models.base.scored_mean`). With `num_items_in_batch`, the scored tokens of a whole step,
        it is this batch's part of the step's loss: the parts of the step add up to it.

        Raises:
            ValueError: a mask, a cache, labels or another argument that does not fit, or too many
                tokens.
        """
        self._check_tracing(tokens)
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(
                f"logits_to_keep={logits_to_keep} is negative; give the number of last tokens, or "
                "0 for all"
            )
        cache = past_key_values
        if use_cache is None and not self.training and labels is None:
            use_cache = getattr(self.config, "use_cache", None)
        if cache is None and use_cache:
            cache = self.new_cache(self.config.max_position_embeddings)
        first = cache.length if isinstance(cache, FamilyCache) else 0
        segments = None
        if cache is None:
            segments, others = packed_documents(others, tokens, attention_mask)
        check_arguments(others, self.config, first=first, tokens=tokens, mask=attention_mask)
        wanted = self._wanted_readers(others)
        readers = [reader for reader in wanted if reader is not None]
        present = {name: value for name, value in given.items() if value is not None}
        auxiliary = None
        if cache is None:
            (logits, states), output = self._whole(
                tokens, present, attention_mask, logits_to_keep, readers, segments
            )
            logits, auxiliary = logits[:, kept_columns(logits_to_keep)], self.auxiliary_loss(output)
        else:
            logits, states = self._continued(
                tokens, present, attention_mask, cache, logits_to_keep, readers
            )
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch, auxiliary)
        found = iter(states)
        chosen = tuple(None if reader is None else next(found) for reader in wanted)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=chosen or None
        )

    def _check_tracing(self, tokens: Any) -> None:
        """Check that a program that is made of this call computes the same for other tokens.

        Raises:
            ValueError: it would not.
        """
        if torch.jit.is_tracing():
            raise ValueError(
                "torch.jit.trace would take what depends on these tokens for constants; use "
                "torch.export.export"
            )
        if self.layers_take_any_length or not torch.compiler.is_exporting():
            return
        if isinstance(tokens, Tensor) and not isinstance(tokens.shape[1], int):
            raise ValueError(
                f"dynamic_shapes of input_ids has a dynamic length, but the layers of a "
                f"{self.config.model_type} model are another program for every length; leave "
                "dimension 1 out of it, and export each length that is needed"
            )

    def _wanted_readers(self, others: Mapping[str, Any]) -> list[StateReader | None]:
        """The readers of the requested hidden states, None for each of the others; empty if none
        is requested.

        Raises:
            ValueError: the layers have no state for every token.
        """
        readers = self.state_readers()
        wanted = wanted_states(others, self.config, len(readers))
        if wanted - {len(readers) - 1} and not self.has_token_states:
            raise ValueError(
                f"output_hidden_states: the layers of a {self.config.model_type} model have no "
                "state for every token but the last one, that of base_model; leave it out"
            )
        return [r if i in wanted else None for i, r in enumerate(readers)] if wanted else []

    def state_readers(self) -> list[StateReader]:
        """Readers of the hidden states: before the first block and after every block; the last one
        after the final norm, as the input of the head's projection."""
        layers = self.model.layers[:-1]
        after = [reader for layer in layers for reader in self.readers_of(layer)]
        head = StateReader(self.get_output_embeddings(), lambda arguments, output: arguments[0])
        return [*after[:-1], head]

    def readers_of(self, layer: nn.Module) -> list[StateReader]:
        """Readers of the hidden states that one layer produces, in order."""
        return [StateReader(layer, lambda arguments, output: output.hidden)]

    def _whole(
        self,
        tokens: Tensor,
        given: Mapping[str, Tensor],
        attention_mask: Tensor | None,
        logits_to_keep: int | Tensor,
        readers: list[StateReader],
        segments: Tensor | None = None,
    ) -> tuple[Computed, Any]:
        """Compute without a cache; also returns the last layer's output.

        `segments` int32 [b, s]: the documents of packed rows, none of which sees another.

        Left-padded rows are rolled to begin at column 0, and the results are rolled back: the
        layers are causal, so that padding after a row's tokens does not affect them. Layers that
        are not causal in training are given the lengths of the rows.
        """
        back, lengths = None, None
        if attention_mask is not None:
            if attention_mask.shape != tokens.shape:
                raise ValueError(
                    f"attention_mask of shape {list(attention_mask.shape)} must be "
                    f"{list(tokens.shape)}, as input_ids"
                )
            starts, stops = row_bounds(attention_mask)
            if self.training and not bool(attention_mask.all()):
                lengths = stops - starts
            if bool(starts.any()):
                columns = torch.arange(tokens.shape[1], device=tokens.device)
                tokens = tokens.gather(1, (columns + starts.unsqueeze(1)) % tokens.shape[1])
                back = (columns - starts.unsqueeze(1)) % tokens.shape[1]
        inputs = self.inputs(tokens, given, lengths)
        if segments is not None:
            inputs = inputs._replace(segment_ids=segments)
        packed = nullcontext() if segments is None else segmented(self.model)
        count = logits_to_keep if isinstance(logits_to_keep, int) and back is None else 0
        with recording(readers) as states, packed, computing_last(count, readers):
            output = self.model(inputs)
        computed = Computed(logits_of(output).transpose(0, 1), tuple(states))
        if back is None:
            return computed, output
        logits, *states = (
            x.gather(1, back.unsqueeze(-1).expand_as(x)) for x in _tensors_of(computed)
        )
        return Computed(logits, tuple(states)), output

    @torch.no_grad()
    def _continued(
        self,
        tokens: Tensor,
        given: Mapping[str, Tensor],
        attention_mask: Tensor | None,
        cache: FamilyCache,
        logits_to_keep: int | Tensor,
        readers: list[StateReader],
    ) -> Computed:
        """Compute tokens that continue a cache; results are 0 where a row has padding."""
        if not isinstance(cache, FamilyCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; this model needs the cache that its "
                "new_cache(max_length) makes"
            )
        batch_size, length = tokens.shape
        chosen = logits_to_keep if isinstance(logits_to_keep, Tensor) else None
        count = length if chosen is not None else min(int(logits_to_keep) or length, length)
        parts = cache.extend(length, attention_mask, self.model.new_cache, batch_size=batch_size)
        whole: list[Tensor] = []
        for group, first in parts:
            if group.rows is None:
                whole = _tensors_of(self._extended(tokens, given, group.layers, count, readers))
                continue
            own = {n: x[group.rows] if len(x) > 1 else x for n, x in given.items()}
            rows = tokens[group.rows, first:]
            kept = min(count, rows.shape[1])
            part = _tensors_of(self._extended(rows, own, group.layers, kept, readers))
            columns = (count, *[length] * len(readers))
            whole = whole or [
                x.new_zeros(batch_size, n, x.shape[-1]) for x, n in zip(part, columns, strict=True)
            ]
            for x, last in zip(whole, part, strict=True):
                x[group.rows, x.shape[1] - last.shape[1] :] = last
        logits, *states = whole
        return Computed(logits if chosen is None else logits[:, chosen], tuple(states))

    def _extended(
        self,
        tokens: Tensor,
        given: Mapping[str, Tensor],
        layers: dict[str, Any],
        count: int,
        readers: list[StateReader],
    ) -> Computed:
        """The last `count` logits, and the states, of tokens that continue the layers' caches."""
        logits, states, to_come = [], [], tokens.shape[1]
        for chunk in tokens.split(PREFILL_CHUNK, dim=1):
            to_come -= chunk.shape[1]
            kept = min(count - to_come, chunk.shape[1])
            with recording(readers) as found, computing_last(max(kept, 1), readers):
                output = self.model(self.inputs(chunk, given), layers)
            given = {}
            states.append(found)
            if kept > 0:
                logits.append(logits_of(output).transpose(0, 1)[:, -kept:])
        return Computed(
            _concatenated_columns(logits),
            tuple(map(_concatenated_columns, zip(*states, strict=True))),
        )

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        num_items_in_batch: int | Tensor | None,
        auxiliary: Tensor | None,
    ) -> Tensor:
        if labels.shape != logits.shape[:2]:
            raise ValueError(
                f"labels of shape {list(labels.shape)} with logits of {list(logits.shape[:2])} "
                "positions; give a label for every token, and no logits_to_keep"
            )
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(logits.device)
        losses = vocab_parallel_cross_entropy(logits.transpose(0, 1), following, ctx=self.model.ctx)
        count = num_scored_in(following) if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=losses.device)
        loss = losses.sum() / count
        return loss if auxiliary is None else loss + scored_mean(auxiliary, following, count)


def _tensors_of(computed: Computed) -> list[Tensor]:
    return [computed.logits, *computed.states]


def _concatenated_columns(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(parts), dim=1) if len(parts) > 1 else parts[0]
