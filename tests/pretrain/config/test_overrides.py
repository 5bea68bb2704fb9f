"""The grammar of the command line, and one-line errors of arguments outside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from models.registry import family_names, get_config_class
from pretrain.config import RunConfig
from pretrain.config.input_checks import check_override
from pretrain.config.overrides import Override, parse_override
from pretrain.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""), ("''", ""), ("a", "a"), ("a b", "a b"), (" a  b ", "a  b"), ("/d/x.y", "/d/x.y"),
        ("null", None), ("Null", None), ("true", True), ("FALSE", False), ("no", "no"), ("~", "~"),
        ("0", 0), ("-12", -12), ("1_000", 1000), ("007", "007"), ("0x10", "0x10"),
        ("1e-3", 1e-3), ("5.0E+4", 5e4), (".5", 0.5), ("1.", 1.0), ("1.5.2", "1.5.2"),
        ("2024-01-01", "2024-01-01"), ("12:30", "12:30"), ("a: b", "a: b"), ("a#b", "a#b"),
        ("'1'", "1"), ('"null"', "null"), ("'a,b=[c]'", "a,b=[c]"), ("\"it's\"", "it's"),
        (r"'it\'s'", "it's"), (r"'a\\'", "a\\"), (r"'a\n'", r"a\n"),
        (r"a\,b\=c", "a,b=c"), (r"\[a\]", "[a]"), (r"a\ ", "a "), (r"C:\x", r"C:\x"),
        ("[]", []), ("[a, 'b,c' ,1]", ["a", "b,c", 1]), ("[[1,2],[null]]", [[1, 2], [None]]),
        ("{}", {}), ("{a:1}", {"a": 1}), ("{a: b:c, 'd': [1]}", {"a": "b:c", "d": [1]}),
        ("{a b: {1: x}}", {"a b": {1: "x"}}), ('["a","b-c"]', ["a", "b-c"]),
        ("${a.b}/x", "${a.b}/x"), ("${oc.env:HOME,'a b'}", "${oc.env:HOME,'a b'}"),
        ("[${a.b},c]", ["${a.b}", "c"]),
    ],
)  # fmt: skip
def test_a_value_has_the_type_that_it_reads_as(text: str, value: Any) -> None:
    found = parse_override(f"data.train={text}").value
    assert found == value
    assert type(found) is type(value)


def test_what_no_number_is_still_reads_as_one() -> None:
    assert math.isnan(parse_override("a=nan").value)
    assert parse_override("a=-inf").value == -math.inf


def test_prefixes_and_removals() -> None:
    assert parse_override("a.b=1") == parse_override("+a.b=1") == parse_override("++a.b=1")
    assert parse_override("a.b=1") == Override("a.b", 1, "1")
    assert parse_override("~a.b") == Override("a.b", removes=True)


@pytest.mark.parametrize(
    "text",
    ["[1", "1]", "[1,]", "[,1]", "{a}", "{a:}", "{a:1,}", "{:1}", "a=b", "a(b)", "int(3)", "'a",
     "a'b", "'a' b", "{a:1", "[a b", "${a", "[" * 60 + "]" * 60, "1" * 5000],
)  # fmt: skip
def test_a_value_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_override(f"run_dir={text}")
    message = str(raised.value)
    for part in ("run_dir=" + text[:20], "cannot be parsed at character", "quote it"):
        assert part in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("training.lr=1,2", ["training.lr=1,2 has several values", "training.lr=[1,2]"]),
        ("training.lr", ["'training.lr' has no value", "write training.lr=VALUE"]),
        ("~training.lr=1", ["'~training.lr=1' removes a setting", "write ~training.lr without"]),
        ("model/small=1b", ["'model/small=1b'", "write model=small/1b"]),
        ("hydra.run.dir=x", ["hydra.run.dir=x", "no effect", "remove it"]),
        *((text, [repr(text), "section.key=VALUE"]) for text in ("=1", "", "~", "+++a=1", "a b=1")),
        *((text, [repr(text), "section.key=VALUE"]) for text in ("a..b=1", "a[0]=1", "a@b=1")),
    ],
)
def test_an_argument_that_is_no_override_is_refused(argument: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_override(argument)
    for part in parts:
        assert part in str(raised.value)


def settings_of(schema: type[BaseModel]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield name
        kinds = (field.annotation, *get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from (f"{name}.{inner}" for inner in settings_of(kind))


@pytest.mark.parametrize("family", ["", *family_names()])
def test_no_setting_of_ours_has_a_name_of_credentials(family):
    schema = get_config_class(family) if family else RunConfig
    names = [f"model.{name}" if family else name for name in settings_of(schema)]
    assert len(names) > 10
    for name in names:
        check_override(f"{name}=1")
