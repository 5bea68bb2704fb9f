"""Image and audio encoders, the source of the modality path.

Shapes: b batch, h hidden, m tokens of a modality. Encoded tokens are [m, b, h] and whole on every
tensor rank. They carry their positions, so attention to them has no rotary embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.init import replicated
from models.common.norms import RMSNorm
from models.daria_former.config import DariaFormerConfig
from models.daria_former.modulation import ZERO
from parallel.context import ParallelContext
from parallel.sharding import Normal


class ImageEncoder(nn.Module):
    """`norm(W patches + positions)`: [b, c, height, width] -> [m, b, h], one token per patch.

    Sides must be multiples of the patch; positions are interpolated for another size than the
    configured one.
    """

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.patch, self.channels = config.image_patch_size, config.image_channels
        self.grid = config.image_size // config.image_patch_size
        hidden, init = config.hidden_dim, Normal(config.initializer_range)
        self.projection = replicated((hidden, self.channels * self.patch**2), init, ctx)
        self.bias = replicated((hidden,), ZERO, ctx)
        self.positions = replicated((self.grid**2, hidden), init, ctx)
        self.norm = RMSNorm(hidden, eps=config.norm_eps, ctx=ctx)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Raises:
            ValueError: not [b, channels, height, width] with whole patches.
        """
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images of shape {list(images.shape)} must be [batch, {self.channels}, height, "
                "width] (image_channels); convert them first"
            )
        if any(side == 0 or side % self.patch for side in images.shape[2:]):
            raise ValueError(
                f"images of shape {list(images.shape)}: height and width must be multiples of "
                f"image_patch_size={self.patch}; resize or crop them"
            )
        patches = F.unfold(images.to(self.projection.dtype), self.patch, stride=self.patch)
        tokens = F.linear(patches.permute(2, 0, 1), self.projection, self.bias)
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        return self.norm(tokens + self._positions(rows, columns).unsqueeze(1))

    def _positions(self, rows: int, columns: int) -> Tensor:
        if rows == columns == self.grid:
            return self.positions
        grid = self.positions.T.unflatten(1, (self.grid, self.grid)).unsqueeze(0).float()
        resized = F.interpolate(grid, (rows, columns), mode="bilinear", align_corners=False)
        return resized.squeeze(0).flatten(1).T.to(self.positions.dtype)


class AudioEncoder(nn.Module):
    """`norm(W gelu(conv(gelu(conv(mels)))) + positions)`: [b, n_mels, frames] -> [m, b, h].

    The second convolution has stride 2: m = ceil(frames / 2).
    """

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.num_mels, self.max_frames = config.audio_n_mels, config.audio_max_len
        hidden, width = config.hidden_dim, config.audio_conv_channels
        init = Normal(config.initializer_range)
        self.first = replicated((width, self.num_mels, 3), init, ctx)
        self.first_bias = replicated((width,), ZERO, ctx)
        self.second = replicated((width, width, 3), init, ctx)
        self.second_bias = replicated((width,), ZERO, ctx)
        self.projection = replicated((hidden, width), init, ctx)
        self.positions = replicated((-(-self.max_frames // 2), hidden), init, ctx)
        self.norm = RMSNorm(hidden, eps=config.norm_eps, ctx=ctx)

    def forward(self, mels: Tensor) -> Tensor:
        """Encode log-mel spectrograms.

        Raises:
            ValueError: not [b, n_mels, frames], or more frames than there are positions.
        """
        if mels.dim() != 3 or mels.shape[1] != self.num_mels:
            raise ValueError(
                f"audio of shape {list(mels.shape)} must be [batch, {self.num_mels}, frames] "
                "(audio_n_mels); compute that many mel bands"
            )
        if not 0 < mels.shape[2] <= self.max_frames:
            raise ValueError(
                f"audio of {mels.shape[2]} frames must have 1 to audio_max_len={self.max_frames}; "
                "cut it, or raise audio_max_len"
            )
        x = F.conv1d(mels.to(self.first.dtype), self.first, self.first_bias, padding=1)
        x = F.conv1d(F.gelu(x), self.second, self.second_bias, stride=2, padding=1)
        tokens = F.linear(F.gelu(x).permute(2, 0, 1), self.projection)
        return self.norm(tokens + self.positions[: len(tokens)].unsqueeze(1))


class ModalityEncoder(nn.Module):
    """Images and audio of a batch as one sequence of tokens [m, b, h], images first."""

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.image = ImageEncoder(config, ctx=ctx) if config.image_enabled else None
        self.audio = AudioEncoder(config, ctx=ctx) if config.audio_enabled else None

    def forward(self, images: Tensor | None, audio: Tensor | None, batch: int) -> Tensor | None:
        """Encode the given modalities; None if there are none.

        Raises:
            ValueError: a modality that the model does not have, or of another batch size.
        """
        encoded = []
        for name, encoder, values in (("image", self.image, images), ("audio", self.audio, audio)):
            if values is None:
                continue
            if encoder is None:
                raise ValueError(
                    f"{name} input was given to a model with {name}_enabled=False; "
                    f"set config.{name}_enabled=True before building it"
                )
            if len(values) != batch:
                raise ValueError(
                    f"{name} input of batch {len(values)} with {batch} rows of tokens; give one "
                    "input for every row"
                )
            encoded.append(encoder(values))
        return torch.cat(encoded) if encoded else None
