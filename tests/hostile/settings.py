"""Run files, overrides and DeepSpeed JSON, and ways to spoil each of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import to_yaml
from pretrain.config.deepspeed_keys import ACCEPTED
from tests.hostile.attempt import Attempt
from tests.hostile.commands import Outcome, train
from tests.hostile.mutations import (
    change_of,
    leaves,
    replaced,
    with_unknown_key,
)
from tests.pretrain.tiny_run import tiny_run


class RunFile:
    """A run file in YAML, and DeepSpeed's JSON beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = tiny_run(folder, logging__tensorboard=True, training__betas=[0.9, 0.95])
        self.values = yaml.safe_load(to_yaml(config))

    def attempt(self, draw: random.Random) -> Attempt:
        kind = draw.choice(("change", "change", "change", "override", "unknown", "text"))
        if kind == "text":
            return self._text(draw)
        if kind == "unknown":
            values, key = with_unknown_key(self.values, draw)
            # The names of lr_multipliers and the like are free; none is in the example.
            return self._file(f"unknown {key}", yaml.safe_dump(values), True, (key,))
        path, value = draw.choice(list(leaves(self.values)))
        change = change_of(value, path, draw)
        names = (change.key, str(path[-1]), str(path[0]))
        heard = _shows(change.path, change.value)
        what = f"{change.key}={change.value!r}"
        if kind == "override":
            argument = f"{change.key}={_override(change.value)}"
            self._write(yaml.safe_dump(self.values))
            return Attempt(argument, lambda: self._print(argument), change.refuse, names, heard)
        text = yaml.safe_dump(replaced(self.values, change.path, change.value))
        return self._file(what, text, change.refuse, names, heard)

    def _text(self, draw: random.Random) -> Attempt:
        text = yaml.safe_dump(self.values)
        lines = text.splitlines()
        line = draw.randrange(len(lines))
        kind, spoilt = draw.choice(
            (
                ("a line twice", "\n".join([*lines[: line + 1], lines[line], *lines[line + 1 :]])),
                ("a tab", "\n".join([*lines[:line], "\t" + lines[line], *lines[line + 1 :]])),
                ("a NUL", text[:line] + "\0" + text[line:]),
                ("a tag", text + "x: !!python/object/apply:os.system ['true']\n"),
                ("a list", f"- {json.dumps(text)}\n"),
                ("nested", text + "x: " + "[" * 20_000 + "]" * 20_000 + "\n"),
                ("references", text + REFERENCES),
                ("braces", text + "{" * (1 + draw.randrange(9))),
                ("a reference", text + "run_name: ${nothing.there}\n"),
                ("missing", text.replace("run_dir:", "x:")),
            )
        )
        return self._file(kind, spoilt, True, ("fuzzed.yaml", "run_dir", "training.betas"))

    def _write(self, text: str) -> None:
        (self.folder / "fuzzed.yaml").write_text(text, encoding="utf-8")

    def _file(
        self,
        what: str,
        text: str,
        refuse: bool,
        names: tuple[str, ...],
        heard: Callable[[Outcome], str | None] = lambda outcome: None,
    ) -> Attempt:
        self._write(text)
        return Attempt(what, self._print, refuse, names, heard)

    def _print(self, *overrides: str) -> Outcome:
        arguments = ("--config-name", "fuzzed", "--config-dir", str(self.folder))
        return train(*arguments, "--print-config", *overrides)


def _override(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | str) else _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_plain(each)}" for key, each in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _shows(path: tuple[Any, ...], value: Any) -> Callable[[Outcome], str | None]:
    """Accepted is what the resolved configuration says."""

    def unheard(outcome: Outcome) -> str | None:
        shown = yaml.safe_load(outcome.out)
        for part in path:
            shown = shown[part]
        same = shown == value or (isinstance(value, float) and math.isclose(shown, value))
        return None if same else f"accepted, and the configuration says {shown!r}"

    return unheard


# Ten to the power of eight values, if each reference is written out.
REFERENCES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)


class DeepSpeedFile:
    """A DeepSpeed JSON: every value of a wrong type, every key that is not one, and bad JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "plain.yaml").write_text(to_yaml(tiny_run(folder)))
        self.file = folder / "ds.json"
        self.keys = dict(leaves(ACCEPTED))
        self.valid = json.loads(Path("configs/ds/zero1.json").read_text())

    def attempt(self, draw: random.Random) -> Attempt:
        kind = draw.choice(("type", "type", "unknown", "text"))
        if kind == "text":
            text = self._text(draw)
            return self._attempt(f"text {text[:80]!r}", text, ("ds.json",))
        if kind == "unknown":
            values, key = with_unknown_key(self.valid, draw)
            return self._attempt(f"unknown {key}", json.dumps(values), (key,))
        path, wanted = draw.choice(list(self.keys.items()))
        value = draw.choice(_WRONG.get(wanted, ["nonsense", 77, -1, None, [], {"x": 1}]))
        text = json.dumps(_nested(self.valid, path, value))
        return self._attempt(f"{'.'.join(path)}={value!r}", text, (*map(str, path), "not a number"))

    def _text(self, draw: random.Random) -> str:
        text = json.dumps(self.valid)
        cut = draw.randrange(1, len(text) - 1)
        return draw.choice(
            (
                text[:cut],
                "\ufeff" + text,
                "[" * 100_000,
                '{"a":' * 50_000,
                text[:-1] + ', "gradient_clipping": 1.0}',
                text[:-1] + ', "steps_per_print": 1e999}',
                text[:-1] + ', "steps_per_print": NaN}',
                text[:-1] + f', "steps_per_print": {"9" * 10_000}}}',
                text[:-1] + ', "steps_per_print": -1}',
                f"[{text}]",
                "null",
                "",
                text + text,
                text.replace('"', "'"),
                text[:cut] + "\0" + text[cut:],
                text[:-1] + ', "\\ud800": 1}',
            )
        )

    def _attempt(self, what: str, text: str, names: tuple[str, ...]) -> Attempt:
        self.file.write_text(text, encoding="utf-8")
        arguments = ("--config-name", "plain", "--config-dir", str(self.folder))

        def run() -> Outcome:
            return train(*arguments, "--ds_config", str(self.file), "--print-run-dir")

        return Attempt(what, run, True, names)


_WRONG: dict[Any, list[Any]] = {
    int: ["many", True, 0.5, -1, None, [1], {"x": 1}, float("inf"), "1", -(10**30)],
    float: ["many", True, -1.0, None, [1], {"x": 1}, float("nan"), float("inf"), "1"],
    bool: ["maybe", 0, 1, 0.5, None, [True], {"x": 1}],
    str: [5, True, None, ["x"], {"x": 1}],
    list: [5, True, None, "x", {"x": 1}],
}


def _nested(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    result = json.loads(json.dumps(values))
    place = result
    for part in path[:-1]:
        place = place.setdefault(part, {})
    place[path[-1]] = value
    return result
