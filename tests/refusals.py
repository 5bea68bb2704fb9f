"""The four parts of every refusal, whatever its wording: setting, value, constraint, remedy.

Tests assert our messages here alone, so that prose can improve. A `match=` of pytest may pin names
of settings and files, values, and messages of libraries (pydantic's "Input should be ...");
test_wording.py finds any with three words of ours in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pydantic import ValidationError


@contextmanager
def assert_refused(
    setting: str,
    value: object,
    constraint: str | tuple[str, ...],
    remedy: str | tuple[str, ...],
    *,
    error: type[Exception] = ValueError,
) -> Iterator[None]:
    """The block raises `error`, whose message is one line with four parts in this order.

    `setting` (or the file or source that is wrong) and `value` are words of the message as they
    are; of the constraint and of the remedy, which is all that follows the last ";" or ": ", every
    given piece has to be there, in any order: numbers, other settings, what is to be done.
    """
    with pytest.raises(error) as caught:
        yield
    message = _message(caught.value)
    assert message.strip(), "an empty message"
    assert "\n" not in message, message
    problem, remedies = _parts(message)
    assert setting in problem, f"the setting {setting!r} is not in: {message}"
    after = problem[problem.index(setting) + len(setting) :]
    assert _holds_word(after, str(value)), f"the value {value!r} does not follow in: {message}"
    for piece in _pieces(constraint):
        assert piece in problem, f"the constraint {piece!r} is not in: {message}"
    for piece in _pieces(remedy):
        assert piece in remedies, f"{piece!r} is not in the remedy of: {message}"


def _message(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    # A section that is validated alone; a run's own configuration makes one line of it.
    (first,) = error.errors()
    return ".".join([*map(str, first["loc"]), first["msg"]])


def _parts(message: str) -> tuple[str, str]:
    """The problem and the remedy; an empty remedy where nothing separates one."""
    separators = list(re.finditer(r"; |: (?=[a-z])", message))
    if not separators:
        return message, ""
    last = separators[-1]
    return message[: last.start()], message[last.end() :]


def _holds_word(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}(?![\w])", text) is not None


def _pieces(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that a command has written to standard error."""
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text
