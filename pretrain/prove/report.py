"""The result of a proof as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pretrain.prove.proof import Row, Section
from pretrain.prove.small_run import SmallRun


def is_proven(sections: Sequence[Section]) -> bool:
    return all(row.passed for section in sections for row in section.rows)


def first_failure(sections: Sequence[Section]) -> str | None:
    """The first check that failed, in words; None if all hold."""
    for section in sections:
        for row in section.rows:
            if not row.passed:
                where = ", ".join(part for part in (row.where, row.rank) if part)
                return (
                    f"{row.check} ({section.title}): off by {row.error:.2e}, "
                    f"bound {row.bound.value:.1e}" + f", at {where}" * bool(where)
                )
    return None


def table(sections: Sequence[Section]) -> str:
    """One table per leg: the check, its largest relative error, where it is, and the bound."""
    lines = []
    for section in sections:
        lines += ["", section.title]
        cells: list[tuple[str, ...]] = [
            ("", "check", "largest error", "bound", "where", "bound from")
        ]
        cells += [_cells(row) for row in section.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        for line in cells:
            padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
            lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    where = ", ".join(part for part in (row.where, row.rank) if part)
    mark = "ok" if row.passed else "FAIL"
    return mark, row.check, f"{row.error:.2e}", f"{row.bound.value:.1e}", where, row.bound.reason


def as_json(small: SmallRun, sections: Sequence[Section]) -> str:
    """The whole result, for programs."""
    content: dict[str, Any] = {
        "proven": is_proven(sections),
        "shrunk": [change._asdict() for change in small.changes],
        "unproven": small.unproven,
        "legs": [
            {
                "title": section.title,
                "checks": [
                    {
                        "check": row.check,
                        "passed": row.passed,
                        "error": row.error,
                        "where": row.where,
                        "rank": row.rank,
                        "bound": row.bound.value,
                        "reason": row.bound.reason,
                    }
                    for row in section.rows
                ],
            }
            for section in sections
        ],
    }
    return json.dumps(content, indent=2)
