"""Every use of every export is equal, or refused in one line, as outcomes.py says."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest

from tests.models.engines.exports import Engine
from tests.models.engines.outcomes import EQUAL, FAMILIES, ROWS, Row


def _cases() -> Iterator[object]:
    for row in ROWS:
        marks = [pytest.mark.ecosystem] if row.needs else []
        marks += [pytest.mark.slow] if row.slow and not row.needs else []
        for family in FAMILIES:
            yield pytest.param(row, family, marks=marks, id=f"{row.function}-{family}")


@pytest.mark.filterwarnings("default")  # of other people's packages
@pytest.mark.parametrize(("row", "family"), _cases())
def test_a_use_is_equal_or_refused(row: Row, family: str, exports, tmp_path):
    module = importlib.import_module(f"tests.models.engines.{row.module}")
    use, outcome = getattr(module, row.function), row.outcome(family)
    engine = Engine(exports, family, tmp_path)
    if outcome == EQUAL:
        use(engine)
        return
    with pytest.raises(ValueError) as error:
        use(engine)
    message = str(error.value)
    assert outcome.removeprefix("refused: ") in message
    assert "\n" not in message
