"""Parameters and FLOPs of the Daria-Former family, from the configuration alone. No torch.

H hidden, n heads, g key/value heads, d head dimension, K = g d, F feed-forward, E emotion, P paths.
"""

from __future__ import annotations

from models.common.decoder_counts import mean_keys
from models.daria_former.config import DariaFormerConfig


def num_parameters(config: DariaFormerConfig) -> int:
    """Every parameter; a tied head counts once."""
    blocks = config.num_layers * _block(config)
    sites = 1 + sum(config.has_update_site(i) for i in range(config.num_layers))
    first = _gates(config) * config.emotion_dim**2  # the first site has no previous state to read
    return _embedding(config) + blocks + sites * _site(config) - first + _head(config)


def forward_flops_per_token(config: DariaFormerConfig, seq_length: int) -> float:
    """Forward FLOPs per token of one row of `seq_length` tokens, two per multiply-add of matmuls.

    Attention counts the keys visible to a query: (s + 1) / 2 tokens on average in the long path, at
    most a window in the local one. Work per segment (scoring slots) or per row (projecting the
    learned slots) is spread over its tokens. Look-ups, norms, rotations, recurrences, softmax and
    training noise are not counted.
    """
    per_token = config.num_layers * (_block_matmul(config) + _attention(config, seq_length))
    if config.norm_type == "rms":  # the gains of both norms are a column of their matrices
        per_token += config.num_layers * 2 * config.hidden_dim
    sites = 1 + sum(config.has_update_site(i) for i in range(config.num_layers))
    per_token += sites * _site_matmul(config) + _router_matmul(config) + _head_matmul(config)
    per_token -= _gates(config) * config.emotion_dim**2  # the first site has no previous state
    once = config.num_layers * _slots_matmul(config)
    if config.has("persona"):
        once += config.hidden_dim * config.persona_dim
    return 2.0 * (per_token + once / seq_length)


def _kv(config: DariaFormerConfig) -> int:
    return config.num_kv_heads * config.head_size


def _width(config: DariaFormerConfig) -> int:
    """Width of all heads together."""
    return config.num_heads * config.head_size


def _gates(config: DariaFormerConfig) -> int:
    return {"mingru": 2, "gru": 3}[config.esv_mode]


def _num_slots(config: DariaFormerConfig) -> int:
    return 2 * config.persistent_memory_slots * config.has("memory") + _persona(config)


def _token_paths(config: DariaFormerConfig) -> int:
    return len(config.paths) - config.has("persona")


# Matmul parameters applied to every token.


def _block_matmul(config: DariaFormerConfig) -> int:
    h, e, paths = config.hidden_dim, config.emotion_dim, len(config.all_paths)
    attention = 2 * h * _width(config) + 2 * _token_paths(config) * h * _kv(config)
    attention += h * config.num_heads * paths * config.is_gated
    attention += h * config.num_kv_heads * config.has("memory")
    attention += _adapted(config, "q_proj") + _adapted(config, "o_proj")
    attention += _token_paths(config) * (_adapted(config, "k_proj") + _adapted(config, "v_proj"))
    matrices = 3 if config.ffn_activation == "swiglu" else 2
    ffn = matrices * h * config.ffn_size + (e + 1) * config.ffn_size
    ffn += sum(_adapted(config, name) for name in ("gate_proj", "up_proj", "down_proj"))
    rank = config.rhythm_rank or h
    rhythm = (h + 2) * rank + h * config.rhythm_rank
    return attention + ffn + rhythm + 9 * h + 4 * h * e + e


def _site_matmul(config: DariaFormerConfig) -> int:
    e, gates = config.emotion_dim, _gates(config)
    recurrent = e if config.esv_mode == "gru" else 0
    return gates * e * (config.hidden_dim + e + recurrent)


def _router_matmul(config: DariaFormerConfig) -> int:
    return config.num_priors * config.hidden_dim


def _head_matmul(config: DariaFormerConfig) -> int:
    h, e, c = config.hidden_dim, config.emotion_dim, config.emotion_categories
    rank = config.rhythm_rank or h
    return config.vocab_size * h + h * e + c * (h + e) + 2 * rank * h + h + e


def _slots_matmul(config: DariaFormerConfig) -> int:
    """Keys and values of the learned slots, once per row; of the modality path nothing is counted
    when nothing is given."""
    keys = config.hidden_dim * _kv(config) + _adapted(config, "k_proj")
    values = config.hidden_dim * _kv(config) + _adapted(config, "v_proj")
    persistent = config.persistent_memory_slots * config.has("memory")
    return (keys + values) * (persistent + _persona(config))


def _adapted(config: DariaFormerConfig, target: str) -> int:
    """Elements of A and B at one linear layer of that name."""
    if target not in config.lora_targets:
        return 0
    inner = {"q_proj": _width, "k_proj": _kv, "v_proj": _kv, "o_proj": _width}
    width = inner[target](config) if target in inner else config.ffn_size
    return config.lora_rank * (config.hidden_dim + width)


def _persona(config: DariaFormerConfig) -> int:
    """The persona's slots are projected to keys and to values, persistent ones have two banks."""
    return config.persona_memory_slots * config.has("persona")


def _attention(config: DariaFormerConfig, length: int) -> float:
    """Multiply-adds per token and layer: scores and weighted values of every path."""
    keys = 0.0  # visible to a token on average
    if config.has("long"):
        keys += config.num_global_tokens + mean_keys(length)
    if config.has("local"):
        keys += mean_keys(length, window=config.sliding_window_size)
    if config.has("persona"):
        keys += config.persona_memory_slots + 1
    if config.has("modality"):
        keys += 1
    scoring = 0.0
    if config.has("memory"):
        for start in range(0, length, config.segment_len):
            candidates = _candidates(config, start)
            tokens = min(config.segment_len, length - start)
            keys += (min(config.memory_top_k, candidates) + 1) * tokens / length
            scoring += candidates * _kv(config) / length
    return 2 * keys * _width(config) + scoring


def _candidates(config: DariaFormerConfig, start: int) -> int:
    """Number of slots visible to a segment that begins at token `start`."""
    return (
        min(start // config.working_stride, config.working_memory_slots)
        + min(start // config.episodic_stride, config.episodic_memory_slots)
        + config.persistent_memory_slots
    )


# Parameters.


def _site(config: DariaFormerConfig) -> int:
    return config.hidden_dim + _site_matmul(config) + _gates(config) * config.emotion_dim


def _embedding(config: DariaFormerConfig) -> int:
    h = config.hidden_dim
    router = _router_matmul(config) + (config.num_priors + h if config.num_priors else 0)
    persona = (h * config.persona_dim + config.persona_dim) * config.has("persona")
    bank = _num_slots(config) * h
    return config.vocab_size * h + router + bank + persona + _encoders(config)


def _block(config: DariaFormerConfig) -> int:
    h, width, kv = config.hidden_dim, _width(config), _kv(config)
    paths = len(config.all_paths)
    slots_kv = 2 * h * kv + _adapted(config, "k_proj") + _adapted(config, "v_proj")
    slots_kv *= paths - _token_paths(config)  # persona and modality
    heads = config.num_heads * paths * config.is_gated + paths * (2 * width + kv)
    if config.has("long"):
        heads += 2 * config.num_global_tokens * kv
    if config.has("memory"):
        heads += config.num_kv_heads + (kv if config.persistent_memory_slots else 0)
    norms = 2 * h * (2 if config.norm_type == "layer" else 1)
    biases = 3 + h  # of fusion and of rhythm
    return _block_matmul(config) + slots_kv + heads + norms + biases


def _head(config: DariaFormerConfig) -> int:
    h = config.hidden_dim
    table = 0 if config.weight_tying else config.vocab_size * h
    noise = 2 * (config.rhythm_rank or h) * h if config.rhythm_noise_std else 0
    return _head_matmul(config) - config.vocab_size * h + table + noise + h + 2 * h


def _encoders(config: DariaFormerConfig) -> int:
    h, total = config.hidden_dim, 0
    if config.image_enabled:
        patch = config.image_channels * config.image_patch_size**2
        tokens = (config.image_size // config.image_patch_size) ** 2
        total += h * patch + h + tokens * h + h
    if config.audio_enabled:
        width = config.audio_conv_channels
        total += width * (config.audio_n_mels + width) * 3 + 2 * width
        total += h * width + -(-config.audio_max_len // 2) * h + h
    return total
