"""Multi-context attention: five paths over different sources, mixed per head and token.

Shapes: s sequence, b batch, h hidden, n query heads, d head dimension, P paths, t tensor size (n is
this rank's share inside a layer).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.common.attention import check_heads
from models.common.counter_rng import uniform
from models.common.history import History
from models.common.init import row_sharded
from models.daria_former.cache import BlockCache
from models.daria_former.config import DariaFormerConfig
from models.daria_former.manual_backward import mix_paths
from models.daria_former.paths import (
    PATH_CLASSES,
    PathReadout,
    Rotaries,
    Sources,
    normed_heads,
)
from parallel.context import ParallelContext
from parallel.layers import ColumnParallelLinear, RowParallelLinear, apply_linear, project_together
from parallel.precision import at_least_fp32
from parallel.regions import copy_to_tensor_region
from parallel.sharding import Constant, Normal

# Initial gates of the paths: the paths over tokens dominate at first.
_INITIAL_GATE = {"local": 1.0, "long": 1.0, "memory": -1.0, "persona": -1.0, "modality": -1.0}


class Attended(NamedTuple):
    """`output` [s/t, b, h], `gates` fp32 [s, b, n, P], the memory path's `readout` [b, n, s, d]."""

    output: Tensor
    gates: Tensor
    readout: Tensor | None


class MultiContextAttention(nn.Module):
    """`W_o sum_p gate_p * gain_p * norm(path_p(x))`, a gate per head and token over the paths.

    The paths are those of models.daria_former.paths. `gate = softmax_p(W_g x + b_g + prior)`, or a
    sigmoid of each; gates are computed from the input, so tensor ranks need no collective for them
    (arXiv 2505.06708). Each path's readout is normalised per head before mixing, which keeps a path
    of small values from losing its gate (arXiv 2411.13676).

    Input [s/t, b, h]. Tensor ranks share the heads; the collectives are those of the first
    projection (one for all projections of x) and of `o_proj`.

    Raises:
        ValueError: the tensor size does not divide the heads or the key and value heads.
    """

    def __init__(
        self,
        config: DariaFormerConfig,
        *,
        rotaries: Rotaries,
        output_init: Normal,
        ctx: ParallelContext,
    ) -> None:
        super().__init__()
        check_heads(ctx, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
        self.config, self.ctx, self.rotaries = config, ctx, rotaries
        hidden, heads = config.hidden_dim, config.num_heads
        width, init = heads * config.head_size, Normal(config.initializer_range)
        names = config.all_paths
        self.q_proj = ColumnParallelLinear(hidden, width, ctx=ctx, init=init)
        self.o_proj = RowParallelLinear(width, hidden, ctx=ctx, init=output_init)
        if config.is_gated:
            num_gates = heads * len(names)
            self.gate = ColumnParallelLinear(
                hidden, num_gates, ctx=ctx, init=Constant(0.0), role="gate"
            )
            start = partial(_initial_gates, paths=names)
            self.gate_bias = row_sharded(heads, (len(names),), start, ctx, role="vector")
        self.paths = nn.ModuleDict(
            {name: PATH_CLASSES[name](config, rotaries=rotaries, ctx=ctx) for name in names}
        )
        for table in rotaries:
            table.on(ctx.device)

    def new_cache(self, batch_size: int, max_length: int, *, emotion: History | None) -> BlockCache:
        """Empty state for generation; `emotion` belongs to the block's update site.

        Raises:
            ValueError: there are no rotary angles for that many positions.
        """
        self.rotaries.long.check(max_length)
        paths: dict[str, Any] = dict(self.paths.items())
        return BlockCache(
            long=paths["long"].new_cache(max_length) if "long" in paths else None,
            local=paths["local"].new_cache() if "local" in paths else None,
            memory=paths["memory"].new_cache() if "memory" in paths else None,
            emotion=emotion,
            max_rollback=self.config.segment_len,
            num_sinks=self.config.num_global_tokens,
        )

    def forward(
        self, x: Tensor, sources: Sources, strength: Tensor, cache: BlockCache | None = None
    ) -> Attended:
        """x [s/t, b, h]; `strength` fp32 [s, b, 1], a factor of the output; with `cache` it
        continues the tokens already seen."""
        linears = [self.q_proj]
        for path in self.paths.values():
            linears += path.token_projections()  # type: ignore[operator]
        if self.config.is_gated:  # the last: keys and values then begin at multiples of a head
            linears.append(self.gate)
        projections = list(project_together(x, *linears, joined=True))
        gate = projections.pop() if self.config.is_gated else None
        projected = iter(projections)
        if sources.priors is not None:
            sources = sources._replace(priors=copy_to_tensor_region(sources.priors, ctx=self.ctx))
        queries = normed_heads(next(projected), self.config)
        if gate is not None:
            gates = self._gates(gate, sources)
        else:
            batch, heads, length, _ = queries.shape
            gates = queries.new_ones((length, batch, heads, 1), dtype=torch.float32)
        read: dict[str, PathReadout] = {}
        for name, path in self.paths.items():
            own = [next(projected) for _ in path.token_projections()]  # type: ignore[operator]
            read[name] = path(queries, own, sources, cache)
        if cache is not None:
            cache.length += queries.shape[2]
        readouts, gains = zip(*read.values(), strict=True)
        # A factor of the gates is one of the output, and costs no pass over it.
        scaled = gates * copy_to_tensor_region(strength, ctx=self.ctx).unsqueeze(-1)
        mixed = mix_paths(readouts, scaled.permute(1, 2, 0, 3), gains, eps=self.config.norm_eps)
        memory = read["memory"].values if "memory" in read else None
        return Attended(apply_linear(self.o_proj, mixed.flatten(2)), gates, memory)

    def _gates(self, x: Tensor, sources: Sources) -> Tensor:
        """fp32 [s, b, n, P]; a path that is switched off or dropped gets none."""
        num_paths = len(self.paths)
        logits = at_least_fp32(x.unflatten(-1, (-1, num_paths))) + at_least_fp32(self.gate_bias)
        assert sources.priors is not None
        logits = logits + sources.priors[..., :num_paths].unsqueeze(-2)
        closed = self._closed(sources)
        if closed is not None:
            logits = logits.masked_fill(closed, -torch.inf)
        return logits.softmax(dim=-1) if self.config.gate_type == "softmax" else logits.sigmoid()

    def _closed(self, sources: Sources) -> Tensor | None:
        """bool, broadcast to [s, b, 1, P]: paths without a source, and those dropped in training.

        The main path is never dropped.
        """
        names, closed = list(self.paths), None
        if "modality" in names and sources.modality is None:
            device = self.gate_bias.device
            closed = torch.tensor([name == "modality" for name in names], device=device)
        if self.training and sources.keys is not None and self.config.path_dropout > 0:
            numbers = uniform(sources.keys.T, len(names), stream=0)
            dropped = numbers < self.config.path_dropout
            dropped[..., names.index("long" if "long" in names else "local")] = False
            dropped = dropped.unsqueeze(-2)
            closed = dropped if closed is None else closed | dropped
        return closed


def _initial_gates(
    shape: torch.Size, generator: torch.Generator, *, paths: tuple[str, ...]
) -> Tensor:
    return torch.tensor([_INITIAL_GATE[path] for path in paths]).expand(shape)
