"""The model in one process, with the interface that was published.

Shapes: B batch, N patches, P patch size, V byte values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.agiformer.carry import AUX, AgiformerCarry, dropped
from models.agiformer.config import AgiformerConfig
from models.agiformer.model import FAMILY, set_plasticity
from models.agiformer.standalone.settings import check_model_file, published_config
from models.common.counter_rng import prefix_keys
from models.common.sampling import check_sampling
from models.generate import sample
from models.standalone.model import StandaloneModel, check_tensor, check_tokens
from models.standalone.settings_file import checked_settings


class AGIFORMER(StandaloneModel):
    """The published model of these sizes, fusion `triple`, with the causal head of this project."""

    def __init__(
        self,
        d_model: int = 512,
        n_layers: int = 6,
        num_heads: int = 8,
        patch_size: int = 4,
        window_size: int = 128,
        vocab_size: int = 256,
        dropout: float = 0.1,
        thinking_steps: int = 3,
        *,
        device: torch.device | str = "cpu",
        **settings: Any,
    ) -> None:
        """`settings`: others of AgiformerConfig.

        Raises:
            ValueError: one of them is unknown or out of range.
        """
        config = published_config(
            d_model=d_model,
            n_layers=n_layers,
            num_heads=num_heads,
            patch_size=patch_size,
            window_size=window_size,
            vocab_size=vocab_size,
            dropout=dropout,
            thinking_steps=thinking_steps,
            **settings,
        )
        super().__init__(FAMILY, config, device=device)

    def set_plasticity(self, alpha: float) -> None:
        """Set the plasticity of every memory, in (0, 1]."""
        set_plasticity(self.body, alpha)

    def forward(
        self, x: Tensor, target_bytes: Tensor | None = None, temperature: float = 0.0
    ) -> Tensor:
        """Logits [B, N, P, V] of the patches after each patch of `x`, bytes [B, N P].

        `target_bytes` [B, N P]: those patches, whose bytes the head conditions on. Without them
        each is drawn at `temperature`, most probable bytes at 0.

        Raises:
            ValueError: bytes that are no whole patches or outside the vocabulary.
        """
        x = self._checked(x, "x")
        projected = self._projected(x)  # [N, P, B, m]
        if target_bytes is None:
            check_sampling(temperature)
            return self._drawn(projected, temperature)
        target = self._checked(target_bytes, "target_bytes")
        if target.shape != x.shape:
            raise ValueError(
                f"target_bytes of shape {list(target.shape)} must be {list(x.shape)}, as x: the "
                "patch after each of its patches"
            )
        size, head = self.config.patch_size, self._head
        before = F.pad(target[:, :-1], (size - 1, 0))
        places = torch.arange(size, device=x.device).repeat(x.shape[1] // size)
        logits = head.decode(projected.flatten(0, 1), before, places.expand(len(x), -1))
        return logits.transpose(0, 1).unflatten(1, (-1, size))

    @property
    def _head(self) -> Any:
        return self.body.layers[-1]

    def _projected(self, x: Tensor) -> Tensor:
        """The head's projections of patches of x, the last byte of each being the last it sees."""
        layers: list[Any] = self.body.layers
        encoder, *blocks, head = layers
        last = self.config.patch_size - 1
        windows = encoder.windows(encoder.tokens(x).transpose(0, 1), first=last)
        hidden, keys = encoder.latents(windows), None
        if self.training and self.config.dropout > 0:
            keys = prefix_keys(x, None)[:, last :: self.config.patch_size].contiguous()
            hidden = dropped(hidden, keys, self.config.dropout, stream=0, ctx=self.body.ctx)
        aux = windows.new_zeros(len(x), len(AUX))
        carry = AgiformerCarry(hidden, aux, x, keys=keys)
        for layer in blocks:
            carry = layer(carry)
        by_place: Tensor = head._by_place(head.project(carry.hidden))
        return by_place

    def _drawn(self, projected: Tensor, temperature: float) -> Tensor:
        """Draw every patch byte by byte; the logits that its bytes were drawn from."""
        size, head = self.config.patch_size, self._head
        count, _, batch, _ = projected.shape
        drawn = torch.zeros(count * batch, 0, dtype=torch.int64, device=projected.device)
        logits = []
        for place in range(size):
            places = torch.full((count * batch, 1), place, device=drawn.device)
            before = F.pad(drawn, (size - 1 - place, 0))
            own = head.decode(projected[:, place].flatten(0, 1).unsqueeze(0), before, places)[0]
            logits.append(own.unflatten(0, (count, batch)).transpose(0, 1))
            byte = sample(own.detach(), temperature=temperature)
            drawn = torch.cat((drawn, byte.unsqueeze(1)), dim=1)
        return torch.stack(logits, dim=2)

    def _checked(self, x: Tensor, name: str) -> Tensor:
        check_tensor(name, x)
        if x.is_floating_point():
            raise ValueError(
                f"{name} of {str(x.dtype).removeprefix('torch.')} must hold bytes of an integer "
                "type; use uint8 or int64"
            )
        x = x.long()
        check_tokens(x, vocab_size=self.config.vocab_size, name=name)
        size = self.config.patch_size
        if x.shape[1] % size:
            raise ValueError(
                f"{name} has {x.shape[1]} bytes, which are no whole patches of {size}; cut it to "
                f"{x.shape[1] // size * size}, or use models.generate, which takes any length"
            )
        return x


def save_model(model: StandaloneModel, path: Path) -> None:
    """Write weights, plasticity among them, and configuration; readable without unpickling."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.body.state_dict().items()}
    partial = path.with_name(path.name + ".part")
    torch.save({"state_dict": weights, "config": model.config.model_dump()}, partial)
    partial.replace(path)


def load_model(path: Path, *, device: torch.device | str = "cpu") -> AGIFORMER:
    """The model of a file that `save_model` wrote.

    Raises:
        ValueError: it is no such file, or its weights and its settings do not fit together.
    """
    check_model_file(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = stored["config"], stored["state_dict"]
    except Exception as error:  # torch raises errors of many types for damaged files
        raise ValueError(f"{path} is no model of this family; it cannot be read") from error
    try:
        settings = checked_settings(AgiformerConfig, config).model_dump(exclude={"family"})
        sizes = settings.pop("hidden_size"), settings.pop("num_layers")
        model = AGIFORMER(*sizes, device=device, **settings)
        model.body.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the model of its own settings: {reason}") from error
    return model.eval()
