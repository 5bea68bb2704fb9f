"""Weights of a Hugging Face directory, one tensor in memory at a time. Safetensors only."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.base import HFMapping, ModelFamily
from models.checkpoint import check_names, check_shape, parameter_table
from models.registry import model_type_owners
from parallel.checkpoint.weights import Weight, write_files

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_PREFIX = "model."
_LONGEST_REASON = 300  # characters
_MOST_LAYERS = 10_000  # each is listed before a tensor is read, which takes memory
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.safetensors")
_WEIGHTS_NAME = re.compile(_SHARD_NAME.pattern + r"(\.index\.json)?")
_INDEX_ENDING = ".safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class ForeignTensor(NamedTuple):
    """A tensor of a safetensors file, of which only the header has been read."""

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]


class ForeignModel(NamedTuple):
    """The family and configuration that a Hugging Face directory describes."""

    directory: Path
    family: ModelFamily
    hf: HFMapping
    config: Any


def read_foreign_config(directory: Path) -> ForeignModel:
    """Find the family for the config.json of `directory`.

    Raises:
        ValueError: no config.json, not one of a known model type, or a setting that the family
            does not have.
    """
    path = directory / "config.json"
    contents = read_contents(path)
    model_type = contents["model_type"]
    owners = model_type_owners()
    if model_type not in owners:
        raise ValueError(
            f"{path}: model_type={model_type!r} cannot be imported; "
            f"known are {', '.join(sorted(owners))}"
        )
    family = owners[model_type]
    hf = family.require_hf()
    return ForeignModel(directory, family, hf, converted(hf.from_config, contents, path=path))


def read_contents(path: Path) -> dict[str, Any]:
    """The contents of a config.json, `model_type` among them.

    Raises:
        ValueError: there is no such file, or it is no model configuration.
    """
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents["model_type"], str):
            raise TypeError(f"model_type={contents['model_type']!r}")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a Hugging Face model directory") from None
    except (KeyError, TypeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a model configuration: no model_type in it") from error
    for name in ("num_hidden_layers", "num_layers", "n_layer"):
        if isinstance(contents.get(name), int) and contents[name] > _MOST_LAYERS:
            raise ValueError(f"{path}: {name}={contents[name]} is more than {_MOST_LAYERS}")
    if quantized := contents.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{path}: quantization_config with quant_method={method!r} cannot be imported; take "
            "the model before quantization"
        )
    return contents


def converted(convert: Callable[..., Any], *arguments: Any, path: Path) -> Any:
    """Call `convert(*arguments)` on the contents of the config.json at `path`.

    Raises:
        ValueError: any error of `convert`, on one line with the path.
    """
    try:
        return convert(*arguments)
    except Exception as error:  # transformers' validation raises errors of many types
        reason = " ".join(_reason(error).split())
        if len(reason) > _LONGEST_REASON:  # what is wrong comes first, the remedy last
            reason = f"{reason[:150]} ... {reason[-140:]}"
        raise ValueError(f"{path} cannot be imported: {reason}") from error


def _reason(error: Exception) -> str:
    """The message of an error, of a setting that pydantic refuses with its name and value."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":  # of a check of ours, which says all of it
        return first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "missing" else f"={first['input']!r}"
    return f"{name}{value}: {first['msg']}; correct it"


def import_weights(model: ForeignModel, output: Path, *, dtype: torch.dtype | None) -> None:
    """Write the weights as files in `output`; `dtype` None keeps theirs.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    names = model.hf.names(model.config)
    with open_foreign_weights(model.directory) as tensors:
        table = parameter_table(model.family, model.config)
        rows = {names[name]: info.shape[0] for name, info in table.items()}
        fused = model.hf.fused(model.config)
        tensors = with_prefix(tensors, [*names.values(), *fused])
        tensors = without_copies(tensors, model.hf, model.config, source=model.directory)
        tensors = split_fused(tensors, fused, rows, source=model.directory)
        check_names(tensors, names.values(), source=model.directory)
        weights = []
        for name, info in table.items():
            foreign = tensors[names[name]]
            check_shape(names[name], foreign.shape, info.shape, source=model.directory)
            target = info.buffer_dtype or dtype or stored_dtype(foreign.dtype)
            # Of a buffer, infinity may be where it starts.
            refuse = torch.isnan if info.buffer_dtype else not_finite
            load = partial(load_sound, names[name], foreign, target, refuse)
            weights.append(Weight(name, tuple(info.shape), target, info.sharding, load))
        write_files(output, weights)


@contextlib.contextmanager
def open_foreign_weights(directory: Path) -> Iterator[dict[str, ForeignTensor]]:
    """Tensors, by name, of the safetensors files that transformers would read in `directory`.

    Raises:
        ValueError: there are no such files, one is damaged, a name occurs twice, or the index is
            wrong.
    """
    declared = _read_index(directory)
    tensors: dict[str, ForeignTensor] = {}
    with contextlib.ExitStack() as stack:
        for path in sorted(declared):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                names = file.keys()
                entries = {name: _entry(file, name, path) for name in names}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
            if twice := sorted(set(entries) & set(tensors)):
                raise ValueError(f"{path}: {twice[0]} is also in another file of the model")
            if declared[path] is not None and declared[path] != set(entries):
                wrong = sorted(set(entries) ^ (declared[path] or set()))[0]
                raise ValueError(f"{path} and {INDEX_NAME} do not agree about {wrong}")
            tensors |= entries
        yield tensors


def _entry(file: Any, name: str, path: Path) -> ForeignTensor:
    header = file.get_slice(name)
    if header.get_dtype() not in _DTYPES:
        raise ValueError(
            f"{path}: {name} is {header.get_dtype()}; {', '.join(_DTYPES)} can be imported, "
            "so take the model before quantization"
        )
    shape, dtype = torch.Size(header.get_shape()), _DTYPES[header.get_dtype()]
    return ForeignTensor(shape, dtype, lambda: file.get_tensor(name))


def _read_index(directory: Path) -> dict[Path, set[str] | None]:
    """Weight files, and the tensor names that the index assigns to each (None: no index).

    In the order of transformers: the file named by config.json, a single file, an index.
    """
    index = directory / (_named_file(directory) or _SINGLE_NAME)
    if index.name == _SINGLE_NAME and not index.is_file():
        index = directory / INDEX_NAME
    if not index.name.endswith(_INDEX_ENDING):
        return {index: None}
    if not index.is_file():
        pickled = sorted(p.name for p in directory.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{directory / pickled[0]} is a pickle, which runs code when it is loaded, and is "
                "never read; take the model's safetensors, or save it again with transformers"
            )
        raise ValueError(f"{directory} has neither {_SINGLE_NAME} nor {INDEX_NAME}")
    files: dict[Path, set[str]] = {}
    try:
        entries = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        for tensor, name in entries.items():
            if not _SHARD_NAME.fullmatch(name):
                raise ValueError(f"{index} names a file {name!r} outside the directory")
            files.setdefault(directory / name, set()).add(tensor)
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: no weight_map in it") from error
    return dict(files)


def _named_file(directory: Path) -> str | None:
    """The file that `transformers_weights` of config.json names.

    Raises:
        ValueError: it names none of the directory, or the weights are those of another one.
    """
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory / 'adapter_config.json'}: transformers loads an adapter on another model; "
            "merge it (merge_and_unload of peft), save the whole model and import that"
        )
    path = directory / "config.json"
    name = read_contents(path).get("transformers_weights") if path.is_file() else None
    if name is None or (isinstance(name, str) and _WEIGHTS_NAME.fullmatch(name)):
        return name
    raise ValueError(
        f"{path}: transformers_weights={name!r} is no safetensors file of the directory; correct it"
    )


def has_unread_index(directory: Path) -> bool:
    """Whether the index of shards is ignored because a single file takes precedence."""
    both = all((directory / name).is_file() for name in (INDEX_NAME, _SINGLE_NAME))
    return both and _named_file(directory) is None


def with_prefix(
    tensors: dict[str, ForeignTensor], expected: Collection[str]
) -> dict[str, ForeignTensor]:
    """Add the prefix `model.` to the tensors of a model that was saved without its head."""
    if any(name.startswith(_PREFIX) for name in tensors):
        return tensors
    known = set(expected)
    return {
        (_PREFIX + name if _PREFIX + name in known else name): tensor
        for name, tensor in tensors.items()
    }


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Map the dtype of a safetensors file to torch.

    Raises:
        ValueError: checkpoints do not support it.
    """
    if dtype == torch.float64:
        raise ValueError("the weights are F64, which checkpoints do not have; give --dtype fp32")
    return dtype


def without_copies(
    tensors: dict[str, ForeignTensor], hf: HFMapping, config: Any, *, source: Path
) -> dict[str, ForeignTensor]:
    """Drop tensors that are no parameters, and second copies of tied tensors.

    Raises:
        ValueError: the copies differ.
    """
    derived = re.compile(hf.derived)
    kept = {name: tensor for name, tensor in tensors.items() if not derived.fullmatch(name)}
    for second, first in hf.tied(config).items():
        if second in kept and first in kept:
            if not torch.equal(kept[first].load(), kept[second].load()):
                raise ValueError(
                    f"{source}: config.json ties {second} to {first}, but they differ; "
                    "set tie_word_embeddings to false in it"
                )
            del kept[second]
    return kept


def split_fused(
    tensors: dict[str, ForeignTensor],
    fused: Mapping[str, Sequence[str]],
    rows: Mapping[str, int],
    *,
    source: Path,
) -> dict[str, ForeignTensor]:
    """Replace tensors by the parts whose rows they hold: `fused` their name -> those of the parts,
    which have `rows`.

    Raises:
        ValueError: a fused tensor is missing, or of another shape.
    """
    inside = {part for parts in fused.values() for part in parts}
    check_names([name for name in tensors if name in fused or name in inside], fused, source=source)
    split = {name: tensor for name, tensor in tensors.items() if name not in fused}
    for name, parts in fused.items():
        whole, start = tensors[name], 0
        expected = torch.Size((sum(rows[part] for part in parts), *whole.shape[1:]))
        check_shape(name, whole.shape, expected, source=source)
        for part in parts:
            shape = torch.Size((rows[part], *whole.shape[1:]))
            split[part] = ForeignTensor(
                shape, whole.dtype, partial(_rows, whole, start, rows[part])
            )
            start += rows[part]
    return split


def _rows(whole: ForeignTensor, start: int, count: int) -> Tensor:
    return whole.load().narrow(0, start, count)


def not_finite(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor)


def load_sound(
    name: str,
    foreign: ForeignTensor,
    dtype: torch.dtype,
    refuse: Callable[[Tensor], Tensor] = not_finite,
) -> Tensor:
    """Load a tensor in `dtype`.

    Raises:
        ValueError: `refuse` is true for some of its values.
    """
    tensor = foreign.load().to(dtype)
    if bool(refuse(tensor).any()):
        raise ValueError(f"{name} holds values that are not finite; the model is damaged")
    return tensor
