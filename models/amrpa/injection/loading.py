"""Loading of a model with AMRPA that transformers' `save_pretrained` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor

from models.amrpa.config import AMRPAConfig
from models.amrpa.injection.architectures import Architecture
from models.amrpa.injection.inject import inject_amrpa

# In the names of the memory's parameters, and of no others.
_MARK = ".amrpa."


def from_pretrained(path: str | Path, adapter: Architecture | None = None, **options: Any) -> Any:
    """Load a model with AMRPA from a directory that its `save_pretrained` wrote.

    The class is that of the saved model. `adapter`: as for `inject_amrpa`. `options`: those of the
    model's `from_pretrained`.

    Raises:
        ValueError: the directory holds no AMRPA, or weights are missing, left over, or of another
            shape.
    """
    config = transformers.AutoConfig.from_pretrained(path)
    settings = getattr(config, "amrpa_config", None)
    if settings is None:
        raise ValueError(f"{path} has no amrpa_config in its config.json; load it as any model")
    amrpa_config = AMRPAConfig.from_dict(settings)
    load = _saved_class(config, path).from_pretrained
    # Weights of another shape are reported here, not by the table that transformers prints.
    quietly = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _quiet(load, path, **quietly, **options)
    for name, stored, needed in info["mismatched_keys"]:
        raise _wrong_shape(path, name, stored, needed)
    for name in (*info["missing_keys"], *(k for k in info["unexpected_keys"] if _MARK not in k)):
        raise _left_over(path, name)
    mode: Any = getattr(config, "amrpa_mode", "auto")
    inject_amrpa(model, amrpa_config, mode=mode, adapter=adapter)
    _load_memories(model, Path(path))
    return model.eval()


def _saved_class(config: Any, path: str | Path) -> Any:
    """The class of transformers that a configuration names."""
    names = getattr(config, "architectures", None)
    found = getattr(transformers, str(names[0]), None) if names else None
    if found is None:
        raise ValueError(
            f"{path}: architectures={names!r} in its config.json names no class of transformers; "
            "write there the class that was saved"
        )
    return found


def _left_over(path: str | Path, name: str) -> ValueError:
    return ValueError(
        f"{path}: the weights of {name} are missing or left over; load it with the "
        "configuration that it was saved with"
    )


def _wrong_shape(path: str | Path, name: str, stored: Any, needed: Any) -> ValueError:
    return ValueError(
        f"{path}: {name} has shape {tuple(stored)}, the model needs {tuple(needed)}; load it with "
        "the configuration that it was saved with"
    )


def _load_memories(model: Any, path: Path) -> None:
    num_layers = model.amrpa_state.config.alpha_mlp_layers
    expected = {k: v for k, v in model.state_dict().items() if _MARK in k}
    stored: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if _MARK in name:
                current = _current_name(name, num_layers)
                stored[_local(current, expected)] = weight.view(1) if weight.dim() == 0 else weight
    if stored.keys() != expected.keys():
        raise _left_over(path, min(stored.keys() ^ expected.keys()))
    for name, weight in expected.items():
        if stored[name].shape != weight.shape:
            raise _wrong_shape(path, name, stored[name].shape, weight.shape)
    model.load_state_dict(stored, strict=False)


def _current_name(name: str, num_layers: int) -> str:
    """The name of a weight in a file of an earlier version, whose MLP was a list of layers and
    whose gate had scalars of no dimension."""
    name = name.replace(f".mlp_weights.{num_layers - 1}", ".score_weight")
    return name.replace(".mlp_weights.", ".mlp_weight_").replace(".mlp_biases.", ".mlp_bias_")


def _local(name: str, expected: dict[str, Tensor]) -> str:
    """A stored name as the model spells it: a bare base model has no prefix."""
    shorter = name.partition(".")[2]
    return shorter if name not in expected and shorter in expected else name


def _quiet(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Load without the warning of left-over weights, which are AMRPA's and loaded afterwards."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return load(*args, **kwargs)
    finally:
        transformers.logging.set_verbosity(verbosity)
