"""DeepSpeed's Muon on a CPU: its kernels uncompiled, and batched over matrices of one shape.

DeepSpeed (0.19.8, runtime/zero/muon) compiles its kernels for every shape, which takes a C++
compiler minutes before the first step, and calls them once per matrix. On a CPU they are mostly
small matrix products: batching them halves the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.muon import original_muon
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.muon.original_muon import muon_update
from torch import Tensor


class BatchedMuon(MuonWithAuxAdam):
    """`W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) orthogonalised(momentum)`.

    Groups, state and result (up to rounding) are those of MuonWithAuxAdam. Parameters without a
    gradient are not updated: a step whose gradients were dropped changes nothing.
    """

    @torch.no_grad()
    def step(self, *args: Any, **kwargs: Any) -> Any:
        groups: list[dict[str, Any]] = self.param_groups  # type: ignore[has-type]
        parameters = [p for group in groups for p in group["params"]]
        if all(p.grad is None for p in parameters):
            return None
        with torch.compiler.set_stance("force_eager"):
            if any(p.dim() < 2 for group in groups if group["use_muon"] for p in group["params"]):
                return super().step(*args, **kwargs)  # flat partitions of ZeRO
            for group in groups:
                for alike in _by_shape(group["params"] if group["use_muon"] else ()):
                    self._update(alike, group)
            try:
                self.param_groups = [group for group in groups if not group["use_muon"]]
                return super().step(*args, **kwargs)
            finally:
                self.param_groups = groups

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Step matrices of one shape."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        momenta = torch.stack(buffers)
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        updates = muon_update(
            gradients.flatten(0, -3),  # matrices, or stacks of experts' matrices
            momenta.flatten(0, -3),
            beta=group["momentum"],
            ns_method=group["ns_method"],
            is_expert_group=True,  # a stack of matrices, each on its own
        )
        torch._foreach_copy_(buffers, list(momenta.unbind()))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.view_as(momenta).unbind()), alpha=-group["lr"])


def disable_kernel_compilation() -> None:
    """Run the kernels uncompiled also where DeepSpeed's engines call them, under ZeRO."""
    compiled = original_muon.muon_update
    if compiled.__module__ == __name__:
        return

    def muon_update(*args: Any, **kwargs: Any) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return compiled(*args, **kwargs)

    original_muon.muon_update = muon_update  # the engines import it at the call


def _by_shape(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.Size, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            groups.setdefault(p.shape, []).append(p)
    return list(groups.values())
