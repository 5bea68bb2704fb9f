"""The attention function that transformers calls in place of `sdpa`.

Shapes: b batch, s queries, t keys, n heads, g key and value heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.amrpa.history import visible_mean
from models.amrpa.injection.memories import Corrected
from models.amrpa.injection.state import Remembered, Site
from parallel.precision import at_least_fp32

IMPLEMENTATION = "amrpa"

# Arguments of sdpa that decide what is attended to, and those of them without the position bias.
_OPTIONS = ("scaling", "is_causal", "position_bias")


def register() -> None:
    """Make transformers know the attention function; it builds masks as for sdpa."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, amrpa_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)


def amrpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sdpa` with the query of target layers corrected: [b, n, s, d] to [b, s, n, d].

    Modules without a site are left alone.
    """
    site: Site | None = getattr(module, "amrpa_site", None)
    if site is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    stack = site.stack
    depth = stack.depth(site)
    now = stack.current
    options = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
    reads = [now.history[i] for i in stack.plan.reads.get(depth, ()) if i in now.history]
    if reads:  # none where a layer was dropped (LayerDrop)
        query = query + _correct(
            module, site, depth, reads, query, key, value, attention_mask, options
        )
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    now.routed += 1
    if depth in stack.plan.recorded and not stack.replaying:
        kept = _remember(module, site, query, key, output, attention_mask, options)
        now.history[depth] = kept
    return output, None


def _correct(
    module: nn.Module,
    site: Site,
    depth: int,
    reads: list[Remembered],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    now = site.stack.current
    transported = torch.stack([_transport(module, each, value) for each in reads])
    mean = None
    if site.stack.config.memory_noise:
        mean = _visible_mean(module, query, key, value, mask, options)
    real = now.real if now.real is None else now.real[:, -query.shape[2] :].bool()
    memories: Any = module.amrpa
    corrected: Corrected = memories(_unrotated(query, site), transported, mean, real, layer=depth)
    if not site.stack.replaying:
        now.measured[depth] = corrected.measured
    return _rotated(corrected.query.to(query.dtype), site)


def _visible_mean(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """The mean of the values that each query sees: [b, n, s, d]."""
    if mask is not None:
        # A query of zeros weighs all visible keys alike.
        plain = {name: option for name, option in options.items() if name != "position_bias"}
        return _attend(module, torch.zeros_like(q), k, v, mask, plain)
    heads, length = q.shape[1:3]
    # As sdpa takes no mask: up to the query, or for a single one all; a static cache may have room.
    if length > 1 and options.get("is_causal", getattr(module, "is_causal", True)):
        mean = visible_mean(v[:, :, :length], length, None)
    else:
        mean = at_least_fp32(v).mean(dim=2, keepdim=True).expand(-1, -1, length, -1)
    return mean.to(v.dtype).repeat_interleave(heads // v.shape[1], dim=1)


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention without dropout: [b, n, s, d]."""
    output, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
    return output.transpose(1, 2)


def _transport(module: nn.Module, kept: Remembered, value: Tensor) -> Tensor:
    """`u = A V`: an earlier layer's pattern over this layer's values, [b, n, s, d]."""
    if kept.context is not None:
        return kept.context
    if kept.pattern is not None:
        groups = kept.pattern.shape[1] // value.shape[1]
        return kept.pattern @ value[:, :, : kept.pattern.shape[3]].repeat_interleave(groups, dim=1)
    assert kept.query is not None
    assert kept.key is not None
    assert kept.options is not None
    return _attend(module, kept.query, kept.key, value, kept.mask, kept.options)


def _remember(
    module: nn.Module,
    site: Site,
    query: Tensor,
    key: Tensor,
    output: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Remembered:
    config = site.stack.config
    if config.detach_history:
        query, key, output = query.detach(), key.detach(), output.detach()
        options = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options.items()}
    if config.history_kind == "context":
        return Remembered(context=output.transpose(1, 2))
    if config.history_kind == "pattern":
        return Remembered(pattern=_pattern(module, query, key, mask, options))
    return Remembered(query=query, key=key, mask=mask, options=options)


def _pattern(
    module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """`A`, by attending to the unit vectors as values: [b, n, s, t]."""
    t = k.shape[2]
    units = torch.eye(t, dtype=q.dtype, device=q.device).expand(*k.shape[:2], t, t)
    return _attend(module, q, k, units, mask, options)


def _rotated(x: Tensor, site: Site) -> Tensor:
    """Rotate as the model rotates its queries."""
    if site.rotation is None:
        return x
    cos, sin = (part.unsqueeze(1) for part in site.rotation)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((turned * cos + _half_turn(turned) * sin, rest), dim=-1).to(x.dtype)


def _unrotated(x: Tensor, site: Site) -> Tensor:
    """The inverse of `_rotated`; some models also scale cos and sin."""
    if site.rotation is None:
        return x
    cos, sin = (part.unsqueeze(1) for part in site.rotation)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    back = (turned * cos - _half_turn(turned) * sin) / (cos.square() + sin.square())
    return torch.cat((back, rest), dim=-1).to(x.dtype)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
