"""Added tokens, and a splitter that finds them in text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

SpecialTokens = Literal["parse", "plain"]
"""Treatment of text that spells a special token: encode it as that token, or as plain text."""

# Unicode white space: Python's \s also matches four control characters.
_SPACE = r"[^\S\x1c-\x1f]*"


class TokenSpec(NamedTuple):
    """Added token, matched in the raw text before pre-tokenization.

    The flags are those of `tokenizers.AddedToken`: `lstrip` and `rstrip` include adjacent white
    space, `single_word` excludes matches inside a word, `normalized` matches in the normalized
    text.
    """

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def is_literal(self) -> bool:
        """Return whether every literal occurrence in the raw text is a match."""
        return not (self.normalized or self.lstrip or self.rstrip or self.single_word)

    @property
    def pattern(self) -> str:
        """Regular expression for the token; with adjacent white space, the token is a group."""
        content = re.escape(self.content)
        if self.single_word:
            content = rf"(?<!\w){content}(?!\w)"
        if not (self.lstrip or self.rstrip):
            return content
        return _SPACE * self.lstrip + f"({content})" + _SPACE * self.rstrip


class Splitter:
    """Splits text at added tokens as `tokenizers` does: leftmost match, longest token first."""

    def __init__(self, ids: Mapping[TokenSpec, int]) -> None:
        tokens = sorted((t for t in ids if t.content), key=lambda t: len(t.content), reverse=True)
        self._ids = {token.content: ids[token] for token in tokens}
        self._pattern = re.compile("|".join(t.pattern for t in tokens)) if tokens else None

    def occurs_in(self, text: str) -> bool:
        """Return whether any of the tokens occurs in the text."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the ids of tokens and the non-empty text between them, in order."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            if match.start() > end:
                yield text[end : match.start()]
            yield self._ids[match[match.lastindex or 0]]
            end = match.end()
        if end < len(text):
            yield text[end:]
