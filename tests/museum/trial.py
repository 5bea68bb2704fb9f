"""Trials: the tests and the checks of a proof that detect an exhibit."""

from __future__ import annotations

import json
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tests.faults.mutated_copy import KILLED, SURVIVED, Copy, applied, mutated_copy, run, run_tests
from tests.museum.exhibit import Exhibit
from tests.museum.exhibits import EXHIBITS

CONTRACT = "tests/models/test_contract.py"
LIMIT = 1200.0  # seconds, of the tests or of the proof of one exhibit; a hang, not a slow machine
_PROVEN, _DIFFERENT = 0, 1  # exit codes of pretrain.prove
_SHOWN = 3  # checks that are named


class Verdict(NamedTuple):
    """The tests that detect an exhibit; "": none; None: not tried.

    `proof`: the checks of `pretrain.prove` that fail in the first part of the run in which any
    does. `contract`: the first contract test that fails. `test`: the first of the area's own tests.
    """

    proof: str | None
    contract: str | None
    test: str | None

    @property
    def is_caught(self) -> bool:
        return bool(self.proof or self.contract)


class ExhibitError(Exception):
    """The museum itself is wrong: what should pass without a mutant does not, or ends badly."""


def try_exhibits(
    names: Sequence[str], *, proofs_only: bool = False, quick: bool = False
) -> Iterator[tuple[str, Verdict]]:
    """Try the exhibits of these names, or all, one after the other.

    `proofs_only`: with `pretrain.prove` alone, `quick`: with its quick form alone.

    Raises:
        ExhibitError: there is no such exhibit; a test or a proof fails without one, or ends
            otherwise than in a verdict.
    """
    if unknown := set(names) - EXHIBITS.keys():
        raise ExhibitError(f"no exhibit is called {sorted(unknown)}; README.md lists all")
    passed: set[tuple[str, ...]] = set()
    trials = _trials(proofs_only=proofs_only or quick, options=("--quick",) * quick)
    with mutated_copy() as copy:
        for name in names or EXHIBITS:
            exhibit = EXHIBITS[name]
            _check_without_mutant(copy, exhibit, trials, passed)
            with applied(exhibit.mutant, copy):
                found = (
                    fails(copy, of(exhibit)) if of and of(exhibit) else None for fails, of in trials
                )
                verdict = Verdict(*found)
            yield name, verdict


class _Trial(NamedTuple):
    """`fails(copy, arguments)`: the first failure, or "". `of`: the arguments of an exhibit."""

    fails: Callable[[Copy, Sequence[str]], str]
    of: Callable[[Exhibit], tuple[str, ...]] | None


def _trials(*, proofs_only: bool, options: tuple[str, ...]) -> tuple[_Trial, _Trial, _Trial]:
    """Of the fields of a Verdict, in their order."""
    cases = _contract_cases()
    return (
        _Trial(_failed_checks, lambda exhibit: (*exhibit.proof, *options)),
        _Trial(_failed_test, None if proofs_only else lambda e: _contract(e.case, cases)),
        _Trial(_failed_test, None if proofs_only else lambda exhibit: exhibit.mutant.tests),
    )


def _check_without_mutant(
    copy: Copy, exhibit: Exhibit, trials: Sequence[_Trial], passed: set[tuple[str, ...]]
) -> None:
    """Check that what the exhibit is to make fail passes without it; `passed`: what is known to."""
    for fails, of in trials:
        if of is None or of(exhibit) in passed or not of(exhibit):
            continue
        if failed := fails(copy, of(exhibit)):
            raise ExhibitError(
                f"without a mutant, {' '.join(of(exhibit))} fails: {failed}\n"
                f"{copy.log.read_text()[-3000:]}"
            )
        passed.add(of(exhibit))


def _contract_cases() -> list[str]:
    # Before the copy is made, which unloads our own packages.
    from tests.models.families import CASES

    return list(CASES)


def _contract(case: str, cases: Sequence[str]) -> tuple[str, ...]:
    """Arguments of pytest for the contract tests of one case."""
    longer = (f" and not {other}" for other in cases if case in other and case != other)
    return ("-k", case + "".join(longer), CONTRACT)


def _failed_test(copy: Copy, arguments: Sequence[str]) -> str:
    """The name of the first test that fails, or ""."""
    outcome = run_tests(copy, arguments, limit=LIMIT)
    log = copy.log.read_text()
    if outcome == SURVIVED:
        return ""
    if outcome == -signal.SIGALRM:
        return f"ran for more than {LIMIT:.0f} s"
    failed = re.search(r"^(?:FAILED|ERROR) \S*::(.+?)(?: - .*)?$", log, re.MULTILINE)
    if outcome != KILLED or failed is None:
        raise ExhibitError(f"pytest ended with {outcome}\n{log[-3000:]}")
    return failed[1]


def _failed_checks(copy: Copy, arguments: Sequence[str]) -> str:
    """The checks that fail in the first part of a proof in which any fails, or ""."""

    def prove() -> int:
        from pretrain.prove.command import main

        tempfile.tempdir = str(copy.log.parent)
        return main([*arguments, "--json"])

    outcome = run(copy, prove, limit=LIMIT)
    log = copy.log.read_text()
    if outcome == _PROVEN:
        return ""
    if outcome == -signal.SIGALRM:
        return f"ran for more than {LIMIT:.0f} s"
    if outcome != _DIFFERENT:
        raise ExhibitError(
            f"the proof of {' '.join(arguments)} ended with {outcome}\n{log[-3000:]}"
        )
    if stopped := re.search(r"^not proven: (?:.*error: )?(.*?)(;|$)", log, re.MULTILINE):
        return f"the run stops: {stopped[1]}"
    begin = re.search(r"^\{", log, re.MULTILINE)
    if begin is None:
        raise ExhibitError(f"the proof of {' '.join(arguments)} printed no result\n{log[-3000:]}")
    return _first_failures(json.loads(log[begin.start() :]))


def _first_failures(result: dict[str, list[dict[str, Any]]]) -> str:
    resumed: Counter[str] = Counter()
    for number, leg in enumerate(result["legs"]):
        precision = leg["title"].partition(",")[0]
        resumed[precision] += "resumed" in leg["title"]
        names = [_check(check["check"]) for check in leg["checks"] if not check["passed"]]
        if names:
            part = _part(leg["title"], resumed[precision]) + ": " if number else ""
            first = list(dict.fromkeys(names))
            return part + ", ".join(first[:_SHOWN]) + ", ..." * (len(first) > _SHOWN)
    raise ExhibitError(f"a proof that fails in no check: {result}")


def _part(title: str, num_resumes: int) -> str:
    """Such as `after a resume`: the title without precision and layout."""
    if "resumed" in title:
        return "after a resume" if num_resumes == 1 else "after the second resume"
    return "at the end" if "after step" in title else re.sub(r"^(fp32|bf16), ", "", title)


def _check(name: str) -> str:
    """`loss` of `step 2: loss`."""
    return re.sub(r"^step \d+: | after step \d+$", "", name)
