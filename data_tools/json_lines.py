"""Text of lines of JSON."""

from __future__ import annotations

import orjson


def quick_text(line: bytes, key: str) -> str | None:
    """Return the text under a key of a JSON object; None where `json` has to decide.

    Where both read a line, the text is the same. orjson refuses NaN and lone surrogates, on which
    `json` then decides, and reads lists nested 1,024 deep, where `json` stops at Python's recursion
    limit.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    text = record.get(key) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None
