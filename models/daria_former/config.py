"""Configuration of the Daria-Former family. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from models.common.config import PositiveFloat, PositiveInt, check_grouped_heads

PATHS = ("local", "long", "memory", "persona", "modality")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PathName = Literal["local", "long", "memory", "persona"]
_OUTSIDE = frozenset({
    "dropout", "emotion_loss_weight", "gate_balance_weight", "initializer_range", "lora_dropout",
    "max_seq_len", "memory_loss_weight", "path_dropout", "repetition_loss_weight",
    "rhythm_loss_weight", "rhythm_noise_std", "rhythm_target_var", "variability_ngram_size",
    "variability_penalty_weight",
})  # fmt: skip
# YAML has lists where the schema has tuples.
Names = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class DariaFormerConfig(BaseModel):
    """Sizes and switches of a Daria-Former; the defaults are those of `small()`.

    Settings may be changed until a model is built from them, and are checked at every change.
    The names are those of the published project; `0` for `head_dim` and `ffn_hidden_dim` means the
    usual size (`head_size`, `ffn_size`).
    """

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)

    family: Literal["daria_former"] = "daria_former"

    # Trunk
    vocab_size: PositiveInt = 32_000
    hidden_dim: PositiveInt = 768
    num_layers: PositiveInt = 12
    num_heads: PositiveInt = 12
    num_kv_heads: PositiveInt = 4
    head_dim: Count = 0
    ffn_hidden_dim: Count = 0
    ffn_activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    norm_type: Literal["rms", "layer"] = "rms"
    norm_eps: PositiveFloat = 1e-6
    weight_tying: bool = True
    initializer_range: Annotated[float, Field(gt=0, le=1)] = 0.02
    dropout: Fraction = 0.0

    # Positions
    max_seq_len: PositiveInt = 8192
    rope_base: PositiveFloat = 10_000.0
    rope_base_long: PositiveFloat = 500_000.0
    rope_scaling_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0

    # Multi-context attention
    paths: Annotated[tuple[PathName, ...], Names] = ("local", "long", "memory", "persona")
    sliding_window_size: PositiveInt = 1024
    num_global_tokens: Count = 64
    qk_norm: bool = True
    gate_type: Literal["softmax", "sigmoid"] = "softmax"
    path_dropout: Fraction = 0.05

    # Memory
    segment_len: PositiveInt = 64
    working_stride: PositiveInt = 4
    episodic_stride: PositiveInt = 64
    working_memory_slots: PositiveInt = 512
    episodic_memory_slots: PositiveInt = 256
    persistent_memory_slots: Count = 128
    persona_memory_slots: PositiveInt = 64
    memory_top_k: PositiveInt = 32
    persona_dim: PositiveInt = 64

    # Emotion, rhythm, variability
    emotion_dim: PositiveInt = 64
    emotion_categories: PositiveInt = 8
    esv_mode: Literal["mingru", "gru"] = "mingru"
    esv_sites: PositiveInt = 4
    rhythm_rank: Count = 64
    rhythm_noise_std: Weight = 0.01
    variability_ngram_size: Annotated[int, Field(ge=2)] = 4
    variability_penalty_weight: Weight = 0.1

    # Losses beside the cross entropy
    emotion_loss_weight: Weight = 0.01
    repetition_loss_weight: Weight = 0.01
    rhythm_loss_weight: Weight = 0.001
    memory_loss_weight: Weight = 0.01
    gate_balance_weight: Weight = 0.01
    rhythm_target_var: Weight = 1.0

    # Adapters
    lora_rank: Count = 0
    lora_alpha: PositiveFloat = 16.0
    lora_dropout: Fraction = 0.0
    lora_targets: Annotated[tuple[str, ...], Names] = ("q_proj", "v_proj")

    # Other modalities
    image_enabled: bool = False
    image_size: PositiveInt = 224
    image_patch_size: PositiveInt = 16
    image_channels: PositiveInt = 3
    audio_enabled: bool = False
    audio_n_mels: PositiveInt = 80
    audio_max_len: PositiveInt = 3000
    audio_conv_channels: PositiveInt = 256

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.copy()
        try:
            super().__setattr__(name, value)
        except ValidationError:
            # pydantic (2.14) runs the check below on the changed object and leaves it changed.
            self.__dict__.update(before)
            raise

    @model_validator(mode="after")
    def _check(self) -> DariaFormerConfig:
        _check_heads(self)
        _check_paths(self)
        _check_memory(self)
        _check_adapters(self)
        if self.image_enabled and self.image_size % self.image_patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of image_patch_size="
                f"{self.image_patch_size}; change one of them"
            )
        if self.esv_sites > self.num_layers:
            raise ValueError(
                f"esv_sites={self.esv_sites} is more than num_layers={self.num_layers}; "
                "the emotion state is updated after a layer, so choose at most one site per layer"
            )
        return self

    # The interface of every family's configuration.

    @property
    def max_position_embeddings(self) -> int:
        return self.max_seq_len

    def function(self) -> dict[str, Any]:
        """The settings that determine what the model computes outside of training from its weights.

        Excluded are the standard deviation of initial weights, dropout and noise, the losses beside
        the cross entropy, the number of positions (a position has the same angles in a longer
        table), and settings that only sampling uses.
        """
        settings = self.model_dump(mode="json", exclude=set(_OUTSIDE))
        return settings | {
            "head_dim": self.head_size,
            "ffn_hidden_dim": self.ffn_size,
            "paths": list(self.all_paths),
        }

    def tensor_divisible(self) -> dict[str, int]:
        """The sizes that the tensor axis must divide."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "ffn_hidden_dim": self.ffn_size,
        }

    # Sizes that follow from others.

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_dim // self.num_heads

    @property
    def ffn_size(self) -> int:
        """8/3 of the width for swiglu, rounded to a multiple of 256 (4 times it below 256 and for
        gelu and relu)."""
        if self.ffn_hidden_dim:
            return self.ffn_hidden_dim
        if self.ffn_activation != "swiglu":
            return 4 * self.hidden_dim
        return 256 * round(8 * self.hidden_dim / 3 / 256) or 4 * self.hidden_dim

    @property
    def modality_enabled(self) -> bool:
        return self.image_enabled or self.audio_enabled

    @property
    def all_paths(self) -> tuple[str, ...]:
        """The paths of every block in the order of PATHS."""
        extra = ("modality",) if self.modality_enabled else ()
        return tuple(p for p in PATHS if p in (*self.paths, *extra))

    def has(self, path: str) -> bool:
        return path in self.all_paths

    @property
    def is_gated(self) -> bool:
        """Whether the gates of a block can differ from 1: a softmax over one path cannot."""
        return len(self.all_paths) > 1 or self.gate_type == "sigmoid"

    @property
    def num_priors(self) -> int:
        """Channels of the context router: a gate prior per path, and the segment logit."""
        return len(self.all_paths) * self.is_gated + self.has("memory")

    def has_update_site(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) ends with an update site of the emotion state.

        `esv_sites` updates are spread evenly over the layers, the last one after the last layer.
        """
        sites, layers = self.esv_sites, self.num_layers
        return (layer + 1) * sites // layers > layer * sites // layers

    @property
    def is_noisy(self) -> bool:
        """Whether training draws random numbers."""
        return max(self.path_dropout, self.rhythm_noise_std, self.dropout, self.lora_dropout) > 0

    # Published sizes. Context and vocabulary are part of a size.

    @classmethod
    def small(cls, **changes: Any) -> DariaFormerConfig:
        """122M parameters, context 8K."""
        return cls(**(_SMALL | changes))

    @classmethod
    def base(cls, **changes: Any) -> DariaFormerConfig:
        """351M parameters, context 16K."""
        return cls(**(_BASE | changes))

    @classmethod
    def large(cls, **changes: Any) -> DariaFormerConfig:
        """1.33B parameters, context 32K."""
        return cls(**(_LARGE | changes))

    @classmethod
    def b7(cls, **changes: Any) -> DariaFormerConfig:
        """7.8B parameters, context 8K."""
        return cls(**(_7B | changes))

    @classmethod
    def b13(cls, **changes: Any) -> DariaFormerConfig:
        """14B parameters, context 8K."""
        return cls(**(_13B | changes))

    @classmethod
    def b70(cls, **changes: Any) -> DariaFormerConfig:
        """73B parameters, context 8K."""
        return cls(**(_70B | changes))

    def to_dict(self) -> dict[str, Any]:
        """Every setting, as JSON types."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DariaFormerConfig:
        """The inverse of `to_dict`."""
        return cls.model_validate(values)


def _size(*sizes: int) -> dict[str, Any]:
    names = ("num_layers", "hidden_dim", "num_heads", "num_kv_heads", "ffn_hidden_dim")
    return dict(zip((*names, "emotion_dim"), sizes, strict=True))


_SMALL = _size(12, 768, 12, 4, 2048, 64)
_BASE = _size(24, 1024, 16, 4, 2560, 128) | {"max_seq_len": 16_384}
_LARGE = _size(24, 2048, 32, 8, 5120, 256) | {"max_seq_len": 32_768}
_WIDE = {"vocab_size": 128_256, "weight_tying": False}
_7B = _size(32, 4096, 32, 8, 11_008, 256) | _WIDE
_13B = _size(40, 5120, 40, 8, 13_824, 256) | _WIDE
_70B = _size(80, 8192, 64, 8, 26_624, 512) | _WIDE


def _check_heads(config: DariaFormerConfig) -> None:
    check_grouped_heads(config, width="hidden_dim")
    if config.head_size % 2 or config.head_size < 4:
        raise ValueError(
            f"head_dim={config.head_size} must be even and at least 4, because rotary embeddings "
            "turn pairs of dimensions; choose another head_dim or num_heads"
        )


def _check_paths(config: DariaFormerConfig) -> None:
    if len(set(config.paths)) != len(config.paths):
        raise ValueError(f"paths={list(config.paths)} names a path twice; list each once")
    if not {"local", "long"} & set(config.paths):
        raise ValueError(
            f"paths={list(config.paths)} has no path over the recent tokens; add local or long"
        )


def _check_memory(config: DariaFormerConfig) -> None:
    if not config.has("memory"):
        return
    for name in ("working_stride", "episodic_stride"):
        stride = getattr(config, name)
        if config.segment_len % stride:
            raise ValueError(
                f"segment_len={config.segment_len} is not a multiple of {name}={stride}; "
                "a slot must not reach over the end of a segment, so change one of them"
            )
    slots = (
        config.working_memory_slots + config.episodic_memory_slots + config.persistent_memory_slots
    )
    if config.memory_top_k > slots:
        raise ValueError(
            f"memory_top_k={config.memory_top_k} is more than the {slots} slots of working, "
            "episodic and persistent memory together; lower it or add slots"
        )


def _check_adapters(config: DariaFormerConfig) -> None:
    unknown = [name for name in config.lora_targets if name not in LORA_TARGETS]
    if unknown or not config.lora_targets:
        raise ValueError(
            f"lora_targets={list(config.lora_targets)} may name {', '.join(LORA_TARGETS)} "
            "and needs one at least; correct the list"
        )
    if config.lora_rank == 0 and config.lora_dropout > 0:
        raise ValueError(
            f"lora_dropout={config.lora_dropout} has no effect with lora_rank=0; "
            "set a rank or remove it"
        )
    gated = config.ffn_activation == "swiglu"
    if config.lora_rank and "gate_proj" in config.lora_targets and not gated:
        raise ValueError(
            f"lora_targets={list(config.lora_targets)}: gate_proj exists with ffn_activation="
            f"swiglu only, not with {config.ffn_activation}; remove it"
        )
