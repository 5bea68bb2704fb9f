"""The table of the museum: what last detected each exhibit, in results.json and the README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from tests.museum.exhibits import EXHIBITS
from tests.museum.trial import Verdict

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results.json")
_BEGIN, _END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
_HEAD = (
    "| exhibit | as it was | `prove` | contract test | a test of its area | tried |\n"
    "|---|---|---|---|---|---|\n"
)


def record(verdicts: Mapping[str, Verdict]) -> None:
    """Keep what was found, beside what is known of other exhibits, and write the table anew."""
    results = known()
    for name, verdict in verdicts.items():
        tried = {trial: found for trial, found in verdict._asdict().items() if found is not None}
        today = {"tried": f"{datetime.now(UTC):%Y-%m-%d}"}
        results[name] = results.get(name, {}) | tried | today
    in_order = {name: results[name] for name in EXHIBITS if name in results}
    RESULTS.write_text(json.dumps(in_order, indent=1) + "\n")
    before, rest = README.read_text().split(_BEGIN)
    after = rest.split(_END)[1]
    README.write_text(before + _BEGIN + table(in_order) + _END + after)


def known() -> dict[str, dict[str, str]]:
    """Exhibit -> trial -> what saw it, "" for nothing; and the day."""
    results: dict[str, dict[str, str]] = json.loads(RESULTS.read_text())
    return results


def written_table() -> str:
    """The table in the README."""
    return README.read_text().split(_BEGIN)[1].split(_END)[0]


def table(results: Mapping[str, Mapping[str, str]]) -> str:
    """The results as Markdown."""
    proven = sum(bool(found.get("proof")) for found in results.values())
    caught = sum(bool(found.get("proof") or found.get("contract")) for found in results.values())
    summary = (
        f"`python -m tests.museum --record`: {caught} of {len(results)} exhibits are caught by "
        f"`prove` or the contract test, {proven} of them by `prove`.\n\n"
    )
    return summary + _HEAD + "".join(_row(name, found) for name, found in results.items())


def _row(name: str, found: Mapping[str, str]) -> str:
    exhibit = EXHIBITS[name]
    trials = [found.get(key, "not tried") or "-" for key in (*Verdict._fields, "tried")]
    if not exhibit.mutant.tests:
        trials[Verdict._fields.index("test")] = "none"
    cells = (name, f"{exhibit.source.what} ({exhibit.source.link})", *trials)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
