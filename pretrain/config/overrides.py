"""The grammar of the command line: `section.key=VALUE`, `group=OPTION`, `~key`.

    VALUE = [VALUE, ...]  |  {KEY: VALUE, ...}  |  'text' or "text"  |  bare text

Bare text is null, true, false or a number if it reads as one, otherwise a string stripped of outer
blanks. It must not contain any of `,=[]{}()'"` unless escaped with a backslash. `${...}` refers to
another setting. Hydra's prefixes `+` and `++` are accepted and ignored: a setting need not be in
the run file to be set.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pretrain.config.errors import show
from pretrain.config.input_checks import MAX_DEPTH, MAX_TEXT
from pretrain.errors import ConfigError

_PREFIX = re.compile(r"~|\+{1,2}")
_KEY = re.compile(r"\w[\w-]*([./]\w[\w-]*)*")

_QUOTED = re.compile(r"""'(?P<single>(?:[^'\\]|\\.)*)'|"(?P<double>(?:[^"\\]|\\.)*)\"""", re.DOTALL)
_ESCAPED = re.compile(r"""\\([\\,:=[\]{}()'" \t])""")
_BARE_VALUE = re.compile(rf"""(?:{_ESCAPED.pattern}|\$\{{[^}}]+\}}|[^,=[\]{{}}()'"])+""")
_BARE_KEY = re.compile(rf"""(?:{_ESCAPED.pattern}|[^,:=[\]{{}}()'"])+""")
_OUTER_BLANKS = re.compile(r"^[ \t]+|(?<!\\)[ \t]+$")

_WORDS = {"null": None, "true": True, "false": False}
_WHOLE = r"(?:0|[1-9](?:_?[0-9])*)"
_DIGITS = r"[0-9](?:_?[0-9])*"
_INTEGER = re.compile(rf"[+-]?{_WHOLE}")
_FLOAT = re.compile(
    rf"[+-]?(?:inf|nan|(?:{_WHOLE}\.?|{_WHOLE}?\.{_DIGITS})(?:e[+-]?{_DIGITS})?)", re.IGNORECASE
)


class Override(NamedTuple):
    """One argument of the command line. `text`: its value as it was typed, without quotes.
    `removes`: it is `~key`, which has no value."""

    key: str
    value: Any = None
    text: str = ""
    removes: bool = False


def parse_override(argument: str) -> Override:
    """Read one argument.

    Raises:
        ConfigError: the argument is not of the grammar; one line.
    """
    shown = show(argument)
    if len(argument) > MAX_TEXT:
        raise ConfigError(f"override {shown} is longer than {MAX_TEXT}; use a run file")
    prefixed, equals, text = argument.partition("=")
    key = _PREFIX.sub("", prefixed, count=1) if _PREFIX.match(prefixed) else prefixed
    if not _KEY.fullmatch(key):
        raise ConfigError(f"override {shown} is not of the form section.key=VALUE; correct it")
    if re.split("[./]", key)[0] == "hydra":
        raise ConfigError(f"override {shown} has no effect: Hydra is not used here; remove it")
    if "/" in key:
        group, _, folder = key.partition("/")
        raise ConfigError(
            f"override {shown} has a path in place of a group; write {group}={folder}/{text}"
        )
    if prefixed.startswith("~"):
        if equals:
            raise ConfigError(f"override {shown} removes a setting; write ~{key} without a value")
        return Override(key, removes=True)
    if not equals:
        raise ConfigError(f"override {shown} has no value; write {prefixed}=VALUE")
    value = _ValueReader(key, text).read()
    return Override(key, value, value if isinstance(value, str) else text.strip())


class _ValueReader:
    """Recursive-descent parser of one value."""

    def __init__(self, key: str, text: str) -> None:
        self._key = key
        self._text = text
        self._position = 0
        self._depth = 0

    def read(self) -> Any:
        """Parse the whole text; no text is the empty string."""
        if not self._text.strip():
            return ""
        value = self._value()
        if self._accept(","):
            start = self._text[:80]
            raise ConfigError(
                f"override {self._key}={start} has several values and a setting has one; "
                f"write {self._key}=[{start}] for a list"
            )
        if self._position < len(self._text):
            raise self._error()
        return value

    def _value(self) -> Any:
        if self._accept("["):
            return self._items("]", self._value)
        if self._accept("{"):
            return dict(self._items("}", self._pair))
        return self._scalar(_BARE_VALUE)

    def _items(self, end: str, read: Callable[[], Any]) -> list[Any]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error()
        items: list[Any] = []
        while not self._accept(end):
            if items and not self._accept(","):
                raise self._error()
            items.append(read())
        self._depth -= 1
        return items

    def _pair(self) -> tuple[Any, Any]:
        key = self._scalar(_BARE_KEY)
        if not self._accept(":"):
            raise self._error()
        return key, self._value()

    def _scalar(self, bare: re.Pattern[str]) -> Any:
        self._skip_blanks()
        quoted = _QUOTED.match(self._text, self._position)
        found = quoted or bare.match(self._text, self._position)
        if found is None:
            raise self._error()
        self._position = found.end()
        if quoted:
            return re.sub(r"""\\([\\'"])""", r"\1", quoted["single"] or quoted["double"] or "")
        try:
            return _typed(_OUTER_BLANKS.sub("", found[0]))
        except ValueError:  # more digits than Python converts
            raise self._error() from None

    def _accept(self, mark: str) -> bool:
        """Consume `mark` if it comes next."""
        self._skip_blanks()
        is_next = self._text.startswith(mark, self._position)
        self._position += len(mark) * is_next
        return is_next

    def _skip_blanks(self) -> None:
        while self._text.startswith((" ", "\t"), self._position):
            self._position += 1

    def _error(self) -> ConfigError:
        start = f"{self._key}={self._text[:80]}"
        return ConfigError(
            f"the value of override {start} cannot be parsed at character {self._position + 1}; "
            f"quote it for the shell and for the parser: '{self._key}=\"{self._text[:80]}\"'"
        )


def _typed(text: str) -> Any:
    """Convert bare text to its value."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _ESCAPED.sub(r"\1", text)
