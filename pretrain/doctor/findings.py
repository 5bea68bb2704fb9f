"""Findings of an examination, and how they are printed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

from parallel.checkpoint.errors import CheckpointError

Severity = Literal["ok", "warning", "error"]

EXIT_OK = 0  # warnings included: a reader weighs them, not a job script
EXIT_ERRORS = 2


class Finding(NamedTuple):
    """One result of a check. `remedy` is empty if there is nothing to do."""

    section: str
    severity: Severity
    what: str
    remedy: str = ""


def of_message(section: str, severity: Severity, message: str) -> Finding:
    """A finding from one of the project's messages, "what is wrong; what to do"."""
    message = " ".join(message.split())
    for separator in ("; ", ": "):
        what, found, remedy = message.rpartition(separator)
        if found:
            return Finding(section, severity, what, remedy)
    return Finding(section, severity, message)


def attempt(section: str, check: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """Run a check; an error of a user's setting, file or system becomes a finding, and so does
    every warning that is logged."""
    with _logged_warnings() as warnings:
        try:
            found = list(check())
        except (ValueError, OSError, ImportError, CheckpointError) as error:
            found = [of_message(section, "error", str(error) or type(error).__name__)]
    return [of_message(section, "warning", each) for each in dict.fromkeys(warnings)] + found


def exit_code(findings: Sequence[Finding]) -> int:
    """2 if a finding is an error, else 0."""
    return EXIT_ERRORS if any(each.severity == "error" for each in findings) else EXIT_OK


def as_json(findings: Sequence[Finding]) -> str:
    """One JSON object: the findings, and how many are errors and warnings."""
    content = {
        "findings": [each._asdict() for each in findings],
        "errors": sum(each.severity == "error" for each in findings),
        "warnings": sum(each.severity == "warning" for each in findings),
    }
    return json.dumps(content, indent=2)


def as_text(findings: Sequence[Finding]) -> Iterator[str]:
    """Lines: a heading for each section, then its findings, each remedy on a line of its own."""
    section = None
    for each in findings:
        if each.section != section:
            section = each.section
            yield section
        yield f"  {each.severity:<8} {each.what}"
        if each.remedy:
            yield f"           -> {each.remedy}"


@contextmanager
def _logged_warnings() -> Iterator[list[str]]:
    """Collect warnings of our packages instead of printing them."""
    texts: list[str] = []

    class _Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = _Collect(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("data_tools", "models", "parallel", "pretrain")]
    before = [each.propagate for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.propagate = False
    try:
        yield texts
    finally:
        for each, propagated in zip(loggers, before, strict=True):
            each.removeHandler(handler)
            each.propagate = propagated
