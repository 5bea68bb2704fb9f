"""Initial weights from a checkpoint of any layout, such as a converted model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from data_tools.loading.sources import corpus_tokenizer
from data_tools.tokenization.tokenizers import tokenizer_fingerprint
from models.checkpoint import (
    ParameterInfo,
    StoredModel,
    check_names,
    check_shape,
    open_checkpoint,
    parameter_table,
)
from models.registry import get_family
from parallel.carry import LayerSpec
from parallel.checkpoint.manifest import load_manifest
from parallel.checkpoint.newest import find_manifest
from parallel.checkpoint.weight_slices import WeightSlices, WeightsTable
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from parallel.context import ParallelContext
from parallel.layer_state import persistent_buffers
from parallel.sharding import Sharding
from pretrain.config import ConfigError, RunConfig
from pretrain.config.errors import nearest, show
from pretrain.distributed.consensus import RankGroup

Table = Mapping[str, ParameterInfo]
TOKENIZER = "data.tokenizer"
logger = logging.getLogger(__name__)


class InitialWeights:
    """Fills layer after layer with this rank's slices of stored weights.

    Unlike resuming, optimizer, step and data position start afresh. A rank opens only the files
    that hold a part of its slices; `stored`: which those are in the weights directory.
    """

    def __init__(
        self, directory: Path, stored: WeightsTable, table: Table, ctx: ParallelContext
    ) -> None:
        self._slices = WeightSlices(directory, stored, tensor=ctx.tensor)
        self._table = table
        self._expert = ctx.expert

    @torch.no_grad()
    def load(self, spec: LayerSpec, layer: nn.Module) -> None:
        """Overwrite every parameter and persistent buffer of a layer that has just been built."""
        for path, parameter in layer.named_parameters():
            if path in spec.tied and parameter.numel() == 0:
                continue  # an earlier layer's, already loaded and partitioned by ZeRO-3
            name = spec.tied.get(path, f"{spec.name}.{path}")
            sharding = self._table[name].sharding
            parameter.copy_(self._slices.read(name, sharding, expert=self._expert))
        for path, buffer in persistent_buffers(layer).items():
            buffer.copy_(self._slices.read(f"{spec.name}.{path}", Sharding()))


def initial_weights(
    config: RunConfig, ctx: ParallelContext, ranks: RankGroup
) -> InitialWeights | None:
    """The weights that `training.init_from` names; None without it (collective).

    Raises:
        CheckpointError: the weights are missing, damaged, or of another model.
    """
    if config.training.init_from is None:
        return None
    path = Path(config.training.init_from)
    table = parameter_table(get_family(config.model.family), config.model)
    directory, stored = ranks.run_on_rank0(lambda: _check(path, config, table))
    return InitialWeights(directory, stored, table, ctx)


def _check(path: Path, config: RunConfig, table: Table) -> tuple[Path, WeightsTable]:
    """Compare checksums, family, names, shapes and function, reading no tensor into memory.

    Returns the weights directory, and which file of it holds which weight. `path` is looked up here
    alone: the run in it may publish a newer checkpoint at any time.
    """
    try:
        stored = open_checkpoint(path)
    except ValueError as error:
        raise ConfigError(f"training.init_from: {error}") from error
    if stored.family.name != config.model.family:
        raise ConfigError(
            f"training.init_from={path} holds weights of family {stored.family.name}, the run "
            f"trains {config.model.family}; choose weights of the same family"
        )
    with ShardedWeightsReader(stored.weights) as reader:
        check_names(reader.names(), table, source=path)
        for name, info in table.items():
            check_shape(name, reader.shape(name), info.shape, source=path)
        files = reader.table()
    _check_function(path, config, stored)
    return stored.weights, files


def _check_function(path: Path, config: RunConfig, stored: StoredModel) -> None:
    """Refuse settings with which the weights compute something else, unless they are declared."""
    theirs, ours = stored.config.function(), config.model.function()
    differing = {
        f"model.{name}": f"{show(theirs.get(name))} there, {show(ours.get(name))} here"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    }
    if (difference := _tokenizers(path, config, stored)) is not None:
        differing[TOKENIZER] = difference
    named = {
        n if n == TOKENIZER else f"model.{n.removeprefix('model.')}": n
        for n in config.training.init_from_changes
    }
    unsaid = {key: text for key, text in differing.items() if key not in named}
    if unsaid:
        names = ", ".join(key.removeprefix("model.") for key in (*named, *unsaid))
        raise ConfigError(
            f"training.init_from={path} is of a model that computes something else: "
            f"{'; '.join(f'{key}: {text}' for key, text in unsaid.items())}; restore these values "
            f"(model=checkpoint takes all of a model), or set training.init_from_changes=[{names}]"
        )
    for key, name in named.items():
        if key not in differing:
            is_setting = key == TOKENIZER or key.removeprefix("model.") in ours
            guess = None if is_setting else nearest(key, differing)
            remedy = f"did you mean {guess.removeprefix('model.')}?" if guess else "remove it"
            raise ConfigError(
                f"training.init_from_changes names {name}, which is not different from "
                f"training.init_from={path}; {remedy}"
            )


def _tokenizers(path: Path, config: RunConfig, stored: StoredModel) -> str | None:
    """Describe how the tokenizers of the weights and of the data differ; None if they agree or
    one of them is unknown."""
    ours = corpus_tokenizer(config.data)
    theirs = load_manifest(find_manifest(stored.weights)).fingerprints.get(TOKENIZER)
    if theirs is None and stored.tokenizer is not None:
        theirs = _fingerprint(stored)
    if theirs is None and stored.tokenizer is not None and ours is not None:
        logger.warning(
            "training.init_from=%s: its tokenizer %s no longer exists, so it cannot be compared "
            "with that of the data",
            path,
            stored.tokenizer,
        )
    if theirs is None or ours is None or theirs == ours:
        return None
    return f"{stored.tokenizer} ({theirs[:12]}) there, {ours[:12]} in the data here"


def _fingerprint(stored: StoredModel) -> str | None:
    """Fingerprint of the tokenizer at its recorded path, or beside weights that were moved."""
    assert stored.tokenizer is not None
    for spec in (stored.tokenizer, str(stored.weights.parent / "tokenizer")):
        with contextlib.suppress(ValueError, OSError):
            return tokenizer_fingerprint(spec)
    return None
