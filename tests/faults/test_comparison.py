"""Figures of SECURITY.md for DeepSpeed alone and for a run of ours, measured again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.comparison import FAULTS, measure

SAME = "the same losses, bit for bit"
EXPECTED = {
    "clean_resume": (SAME, SAME),
    "killed_in_a_save": (
        r"8 kills: 3 x an error, 5 x step 1",
        r"\d+ kills: \d+ x step 1, \d+ x step 2",
    ),
    "full_disk": (
        r"an error on the rank; `latest` names global_step2; restart: an error .*, with the old "
        r"tag: step 1",
        r"an error on 2 ranks, with the path; `latest` names step_2; restart: step 2",
    ),
    "latest_missing": (r"a silent start from the beginning", r"step 2"),
    "latest_empty": (r"an error", r"step 2"),
    "damaged": (
        r"bit flips: \d refused, \d+ without effect, \d+ wrong; truncations: 20 of 20 refused",
        r"bit flips: 80 of 80 refused; truncations: 20 of 20 refused",
    ),
    "pickled_code": (r"executed, restart: step 1", r"not executed, restart: an error"),
    "stopped_rank": (r"not found in 45 s", r"ended after 1\d s"),
    "not_a_number": (
        r"1 step skipped on all ranks, weights finite; rank 0 shows finite losses",
        r"1 step skipped on all ranks, weights finite; the log says: rank 1 with",
    ),
    "modes": (
        r"folders 0755, files 0644, programs 0744",
        r"folders 0750, files 0640$",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_both_sides_do_what_is_written(fault: str, tmp_path: Path) -> None:
    row = measure(fault, tmp_path)
    print("\n| " + " | ".join(row) + " |")
    for found, expected in zip(row[1:], EXPECTED[FAULTS[fault]], strict=True):
        assert re.match(expected, found), found
