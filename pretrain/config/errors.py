"""One-line, actionable messages from pydantic's validation errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, get_args

from pydantic import BaseModel, ValidationError

from pretrain.config.compat.spellings import our_name
from pretrain.errors import ConfigError

_LONGEST_VALUE = 80
_MOST_LISTED = 8

_CONSTRAINTS = {
    "model_type": "must be a section of settings",
    "model_attributes_type": "must be a section of settings",
    "dict_type": "must be a section of settings",
    "tuple_type": "must be a list",
    "string_type": "must be text",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None."""
    valid = list(valid)
    if our_name(name) in valid:
        return our_name(name)
    return next(iter(difflib.get_close_matches(name, valid, n=1, cutoff=0.6)), None)


def show(value: Any, *, longest: int = _LONGEST_VALUE) -> str:
    """`value` as it would be typed, truncated to fit in a line."""
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def listed(values: Sequence[object]) -> str:
    """The first values of a list, separated by commas."""
    shown = ", ".join(str(value) for value in values[:_MOST_LISTED])
    return shown + ", ..." if len(values) > _MOST_LISTED else shown


def schema_paths(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted path of every setting below `schema`, in the order of the fields."""
    paths = []
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        if _is_section(field.annotation):
            paths += schema_paths(field.annotation, f"{path}.")
        else:
            paths.append(path)
    return paths


def config_error(
    error: ValidationError, schema: type[BaseModel], *, prefix: str = ""
) -> ConfigError:
    """The first error about `schema`, whose settings lie under `prefix`."""
    # A misspelt key also counts as a missing one; report the spelling first.
    details = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    message = _describe(details[0], schema, prefix)
    first, *others = dict.fromkeys(_path(schema, each["loc"], prefix) for each in details)
    # Errors of sections that contain the first one only repeat it.
    others = [path for path in others if not first.startswith(f"{path}.")]
    if others:
        message += f" (and {len(others)} more: {', '.join(others)})"
    return ConfigError(" ".join(message.split()))


def _describe(details: Mapping[str, Any], schema: type[BaseModel], prefix: str) -> str:
    path, value = _path(schema, details["loc"], prefix), details["input"]
    if details["type"] == "extra_forbidden":
        return _unknown_key(path, value, schema, details["loc"], prefix)
    if details["type"] == "missing":
        return f"{path} is missing; set it in the YAML file or with {path}=VALUE"
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_kind(path, details, schema)
    if details["type"] in ("value_error", "assertion_error"):
        return _own_words(str(details["ctx"]["error"]), path, value)
    constraint = _CONSTRAINTS.get(details["type"], details["msg"])
    constraint = constraint.replace("Input should be", "must be")
    remedy = f"change {path} in the YAML file or on the command line"
    if details["type"] == "literal_error":
        guess = nearest(str(value), _choices(schema, details["loc"]))
        remedy = f"did you mean {guess!r}?" if guess else remedy
    return f"{path}={show(value)} {constraint}; {remedy}"


def _own_words(message: str, path: str, value: Any) -> str:
    """The message of one of our validators, prefixed with its section."""
    section = path.split(".", maxsplit=1)[0]
    if not path or f"{section}." in message or message.startswith(section):
        return message
    return (
        f"{path}: {message}" if isinstance(value, Mapping) else f"{path}={show(value)}: {message}"
    )


def _unknown_key(
    path: str, value: Any, schema: type[BaseModel], loc: Sequence[int | str], prefix: str
) -> str:
    siblings = list(_locate(schema, loc[:-1]).section.model_fields)
    section, _, name = path.rpartition(".")
    guess = nearest(name, siblings)
    if guess is not None:
        return f"unknown key {path}={show(value)}; did you mean {_join(section, guess)}?"
    everywhere = schema_paths(schema, prefix)
    elsewhere = [each for each in everywhere if each.rpartition(".")[2] == our_name(name)]
    if elsewhere:
        return f"unknown key {path}={show(value)}; did you mean {' or '.join(elsewhere)}?"
    return (
        f"unknown key {path}={show(value)}; valid keys {f'of {section} ' if section else ''}"
        f"are {', '.join(siblings)}"
    )


def _wrong_kind(path: str, details: Mapping[str, Any], schema: type[BaseModel]) -> str:
    """A section whose kind is missing or is none of those that there are."""
    name = details["ctx"]["discriminator"].strip("'")
    kinds = [
        choice
        for section in _locate(schema, details["loc"]).sections
        for choice in _flat_args(section.model_fields[name].annotation)
    ]
    key, known = _join(path, name), f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    if details["type"] == "union_tag_not_found":
        return f"{key} is missing; set it to {known}"
    return f"{key}={show(details['ctx']['tag'])} must be {known}; change {key}"


def _choices(schema: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The literals of a setting, or of the entries of a list of literals."""
    *outer, name = [part for part in loc if isinstance(part, str)]
    field = _locate(schema, outer).section.model_fields.get(name)
    found = [] if field is None else _flat_args(field.annotation)
    return [choice for choice in found if isinstance(choice, str)]


def _flat_args(annotation: Any) -> list[Any]:
    parts = get_args(annotation)
    return [leaf for part in parts for leaf in _flat_args(part)] if parts else [annotation]


class _Located(NamedTuple):
    """The target of pydantic's `loc`: the names as they are typed, the section there, and all that
    it might be of several kinds."""

    names: list[int | str]
    section: type[BaseModel]
    sections: list[type[BaseModel]]


def _locate(schema: type[BaseModel], loc: Sequence[int | str]) -> _Located:
    """Follow `loc`: numbers are indices in lists, and of a section of several kinds (`Field` with
    `discriminator`) pydantic also names the kind, which nobody types."""
    names: list[int | str] = []
    sections: list[type[BaseModel]] = []
    for part in loc:
        if len(sections) > 1 and (kinds := [each for each in sections if _is_kind(each, part)]):
            schema, sections = kinds[0], []
            continue
        names.append(part)
        if isinstance(part, str):
            field = schema.model_fields.get(part)
            sections = [] if field is None else _sections(field.annotation)
            schema = sections[0] if sections else schema
    return _Located(names, schema, sections)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [each for each in _flat_args(annotation) if _is_section(each)]


def _is_kind(section: type[BaseModel], kind: object) -> bool:
    return any(kind in _flat_args(field.annotation) for field in section.model_fields.values())


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _path(schema: type[BaseModel], loc: Sequence[int | str], prefix: str) -> str:
    return f"{prefix}{'.'.join(map(str, _locate(schema, loc).names))}".rstrip(".")


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
