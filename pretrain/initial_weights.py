"""Begin training with the weights of a checkpoint of any layout, such as a converted model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from models.checkpoint import (
    ParameterInfo,
    check_names,
    check_shape,
    open_checkpoint,
    parameter_table,
)
from models.registry import get_family
from parallel.carry import LayerSpec
from parallel.context import ParallelContext
from parallel.layer_state import persistent_buffers
from parallel.sharding import split
from parallel.weights_io import ShardedWeightsReader
from pretrain.config import ConfigError, RunConfig
from pretrain.ranks import Ranks

Table = Mapping[str, ParameterInfo]


class InitialWeights:
    """Fills one layer after the other with this rank's slices of stored weights.

    Optimizer, step and data position start anew: that is what distinguishes it from resuming.
    """

    def __init__(self, path: Path, table: Table, ctx: ParallelContext) -> None:
        self._reader = ShardedWeightsReader(path)
        self._table = table
        self._tensor = ctx.tensor
        self._expert = ctx.expert

    @torch.no_grad()
    def load(self, spec: LayerSpec, layer: nn.Module) -> None:
        """Overwrite every parameter and persistent buffer of a layer that has just been built."""
        for path, parameter in layer.named_parameters():
            if path in spec.tied and parameter.numel() == 0:
                continue  # an earlier layer's, already loaded and partitioned by ZeRO-3
            name = spec.tied.get(path, f"{spec.name}.{path}")
            sharding = self._table[name].sharding
            full = self._reader.full(name)
            place = {"size": self._tensor.size, "rank": self._tensor.rank}
            parameter.copy_(split(full, sharding, **place, expert=self._expert))
        for path, buffer in persistent_buffers(layer).items():
            buffer.copy_(self._reader.full(f"{spec.name}.{path}"))


def initial_weights(run: RunConfig, ctx: ParallelContext, ranks: Ranks) -> InitialWeights | None:
    """The weights that `training.init_from` names; None without it (collective).

    Raises:
        CheckpointError: there are none, they are damaged, or they are of another model.
    """
    if run.training.init_from is None:
        return None
    path = Path(run.training.init_from)
    table = parameter_table(get_family(run.model.family), run.model)
    ranks.on_first(lambda: _check(path, run, table))
    return InitialWeights(path, table, ctx)


def _check(path: Path, run: RunConfig, table: Table) -> None:
    """Compare checksums, family, names and shapes, reading no tensor into memory."""
    family = open_checkpoint(path).family.name
    if family != run.model.family:
        raise ConfigError(
            f"training.init_from={path} holds weights of family {family}, the run trains "
            f"{run.model.family}; choose weights of the same family"
        )
    with ShardedWeightsReader(path) as reader:
        check_names(reader.names(), table, source=path)
        for name, info in table.items():
            check_shape(name, reader.shape(name), info.shape, source=path)
