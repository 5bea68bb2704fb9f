"""The interface of a model family: layers, carry, loss, counts and Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel
from torch import Tensor

from models.layer_counts import count_flops, count_parameters
from parallel.carry import LayerSpec
from parallel.context import ParallelContext
from parallel.cross_entropy import IGNORED_LABEL, vocab_parallel_cross_entropy

if TYPE_CHECKING:
    from models.hf.code_bundle import CodeFile


class TokenInputs(NamedTuple):
    """Inputs of the first layer of a token model.

    `tokens`: int64 [b, s]. `segment_ids`: int32 [b, s], a different number for every document of a
    row, or None when a row is one document. `lengths`: int64 [b], the number of tokens in each row,
    in columns 0 to lengths - 1; the rest is padding. None without padding, as in pretraining.
    """

    tokens: Tensor
    segment_ids: Tensor | None = None
    lengths: Tensor | None = None


class LossOutput(NamedTuple):
    """`total`: the scalar to minimise. `terms`: named scalars to report, detached."""

    total: Tensor
    terms: dict[str, Tensor]


def num_scored_in(labels: Tensor) -> Tensor:
    """The number of scored tokens of labels int64 [b, s], at least 1: a scalar."""
    return (labels != IGNORED_LABEL).sum().clamp(min=1)


def scored_mean(values: Tensor, labels: Tensor, num_scored: Tensor) -> Tensor:
    """`sum_r n_r v_r / num_scored`, n_r the number of scored tokens of row r.

    Averages losses and measurements that are not sums over tokens (hinges, variances, products of
    means) over a step: each is a value of one row, and rows are weighted by their scored tokens, as
    in the cross entropy. With the `num_scored` of `ModelFamily.loss` the result is the same
    function of the rows of a step however they are split into micro-batches, data ranks and stages.

    `values` [b, ...] of the rows of `labels` int64 [b, s]; returns [...].
    """
    counts = (labels != IGNORED_LABEL).sum(dim=1).to(values.dtype)
    return (counts.view(-1, *(1,) * (values.dim() - 1)) * values).sum(dim=0) / num_scored


def logits_of(output: Any) -> Tensor:
    """The logits [s, b, V/t] of a last layer's output: the output itself, or its field `logits`."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def token_losses(output: Any, labels: Tensor, ctx: ParallelContext) -> Tensor:
    """Cross entropy of every position, fp32 [s, b], 0 where the label is -100.

    `output`: the output of the last layer, logits [s, b, V/t] or a tuple with a field of this name;
    `labels`: int64 [b, s].
    """
    return vocab_parallel_cross_entropy(logits_of(output), labels, ctx=ctx)


def lm_loss(
    output: Any,
    labels: Tensor,
    *,
    config: Any,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    """Sum of the cross entropy divided by `num_scored`, or the mean if None; 0 without labels."""
    if num_scored is None:
        num_scored = num_scored_in(labels)
    total = token_losses(output, labels, ctx).sum() / num_scored
    return LossOutput(total, {"lm_loss": total.detach()})


@dataclass(frozen=True)
class BaseModelMapping:
    """Initialisation of a family from a pretrained transformers model that it contains.

    * `model_types`: the supported base `model_type`s.
    * `from_config(contents, changes)`: the family's configuration for the contents of the base
      model's config.json, with `changes` that add to or override its settings.
    * `defaults`: settings with which a model that has the base weights starts as the same function.
    * `check_sizes(ours, theirs, source)`: raises ValueError where the weights of the second
      configuration do not fit the first. Fewer layers of ours do: the first ones are taken.
    * `names(config)`: our parameter name -> the base model's, for the shared part. Raises
      ValueError for a parameter that neither the base model has nor the family adds.
    * `to_config(config)`: the contents of the base model's config.json for the shared part. Raises
      ValueError if that is a different function than our model with every token computed.
    * `check_same_function(config)`: raises ValueError unless our model is the shared part alone,
      computed for every token, so that it is a decoder of the base model's shape. None: never.
    """

    model_types: tuple[str, ...]
    from_config: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    defaults: Mapping[str, Any]
    check_sizes: Callable[[Any, Any, str], None]
    names: Callable[[Any], dict[str, str]]
    to_config: Callable[[Any], dict[str, Any]]
    check_same_function: Callable[[Any], None] | None = None


def _nothing_fused(config: Any) -> dict[str, tuple[str, ...]]:
    return {}


@dataclass(frozen=True)
class HFMapping:
    """The mapping between a family and its Hugging Face form, as data.

    * `model_types`: the `model_type`s that the family reads.
    * `to_config(config)`: the contents of a config.json. `from_config(contents)`: the inverse.
      Both raise ValueError for settings without an equivalent on the other side.
    * `names(config)`: our parameter name -> theirs, one to one.
    * `tied(config)`: their second name of a tied tensor -> the first one.
    * `fused(config)`: their tensor -> those of `names` whose rows it holds, one after the other.
    * `derived`: regular expression of their tensors that are not learnt.
    * `code`: for a model without a class in transformers, the code files of an exported
      directory -> the sources that models.hf.code_bundle generates them from.
    * `model_class()`: the class of such a model, which transformers' Auto classes then know.
    * `base`: for a family initialised from a pretrained transformers model.
    """

    model_types: tuple[str, ...]
    to_config: Callable[[Any], dict[str, Any]]
    from_config: Callable[[Mapping[str, Any]], Any]
    names: Callable[[Any], dict[str, str]]
    tied: Callable[[Any], dict[str, str]]
    derived: str
    fused: Callable[[Any], dict[str, tuple[str, ...]]] = _nothing_fused
    code: Mapping[str, CodeFile] = field(default_factory=dict)
    model_class: Callable[[], Any] | None = None
    base: BaseModelMapping | None = None


class Counts(NamedTuple):
    """Closed forms of a family's parameters and FLOPs.

    `num_parameters(config)`: a tied parameter counts once. `flops(config, seq_length)`: forward
    FLOPs per token.
    """

    num_parameters: Callable[[Any], int]
    flops: Callable[[Any, int], float]


class ScoreGroups(NamedTuple):
    """Groups of the predicted tokens, whose mean bits an evaluation reports one by one.

    `names(config)`: of the entries of the record. `of(output)`: int64 [b or 1, s], the number of
    the group of every position, from the last layer's output.
    """

    names: Callable[[Any], tuple[str, ...]]
    of: Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A model family: one instance each, `FAMILY` in its `model.py`, or the name that the registry
    gives where a package holds several.

    The functions take the family's configuration as first argument where they have one:

    * `layer_specs(config, *, segmented=False) -> list[LayerSpec]`: the model. With `segmented`
      rows hold several documents and `TokenInputs.segment_ids` is given.
    * `carry_schema(config, ctx, *, micro_batch_size, seq_length, segmented=False)`: the carry's
      class filled with `parallel.carry.Field`s of local shape, or `Varying` ones.
    * `loss(output, labels, *, config, ctx, num_scored=None) -> LossOutput`: `labels` int64 [b, s],
      -100 = not scored. The losses of the scored tokens are summed and divided by `num_scored`, a
      scalar tensor: the average number of scored tokens per micro-batch of this step, so that the
      mean over micro-batches is the mean over tokens however the batch is split. None: divided by
      the number in `labels`. Every other loss and measurement is a value per row, never per
      micro-batch, and is averaged by `scored_mean`. Its terms are `loss_names`.
    * `token_losses(output, labels, ctx)`: fp32 [s, b], 0 where not scored.
    * `score_groups`: tokens that an evaluation also counts apart, or None.

    The default `loss` is the cross entropy alone. `counts`: closed forms; without them parameters
    and FLOPs are counted from the layers (models.layer_counts). `hf` is None for a family that
    cannot be converted. `causal_in_training` is False if a layer in training mode
    (`module.training`) compares a token with later ones; in evaluation mode every family is causal.
    """

    name: str
    config_cls: type[BaseModel]
    layer_specs: Callable[..., list[LayerSpec]]
    carry_schema: Callable[..., Any]
    loss: Callable[..., LossOutput] = lm_loss
    loss_names: tuple[str, ...] = ("lm_loss",)
    token_losses: Callable[..., Tensor] = token_losses
    score_groups: ScoreGroups | None = None
    counts: Counts | None = None
    hf: HFMapping | None = None
    causal_in_training: bool = True

    def num_parameters(self, config: Any) -> int:
        """Parameters of the model; a tied one counts once."""
        if self.counts is not None:
            return self.counts.num_parameters(config)
        return count_parameters(self.layer_specs(config))

    def flops(self, config: Any, seq_length: int) -> float:
        """Forward FLOPs per token of a sequence of `seq_length`.

        Raises:
            ValueError: they cannot be counted from the layers and there are no `counts`.
        """
        if self.counts is not None:
            return self.counts.flops(config, seq_length)
        return count_flops(self.layer_specs(config), seq_length, family=self.name)

    def require_hf(self) -> HFMapping:
        """The family's `hf`, required for a conversion.

        Raises:
            ValueError: the family has none.
        """
        if self.hf is None:
            raise ValueError(
                f"the {self.name} family has no Hugging Face form, so it cannot be converted"
            )
        return self.hf
