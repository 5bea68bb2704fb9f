"""Errors of lm_eval's tasks in one line, and task files that it leaves out."""

from __future__ import annotations

from pathlib import Path


def described(error: BaseException) -> str:
    """Type and message of an error that a task's code, or the package that loads its data, has
    raised: of its cause, if it has one, and with its place if the message says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    if lines and lines[0] != "None":
        return f"{type(error).__name__}: {lines[0]}"
    trace, name = error.__traceback__, type(error).__name__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return name
    code = trace.tb_frame.f_code
    return f"{name} in {code.co_name} of {code.co_filename}, line {trace.tb_lineno}"


def broken_file(folder: Path) -> str | None:
    """The first task file in a folder that lm_eval leaves out without a word, and why; None if it
    reads them all."""
    from lm_eval.tasks._index import TaskIndex

    for path in sorted(folder.rglob("*.y*ml")):
        if path.suffix == ".yml":
            return f"{path}: lm_eval reads only files named .yaml"
        try:
            TaskIndex.entry_from_path(path)
        except Exception as error:  # of YAML, of a file that it includes, or of its shape
            return f"{path}: {' '.join(str(error).split()) or type(error).__name__}"
    return None
