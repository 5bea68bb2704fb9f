"""Added tokens: what they are, and where a text spells one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

SpecialTokens = Literal["parse", "plain"]
"""What becomes of text that spells a special token: that token, or ordinary tokens."""

# What Unicode calls white space: Python's \s has four control characters more.
_SPACE = r"[^\S\x1c-\x1f]*"


class TokenSpec(NamedTuple):
    """A token that is looked for in the text before anything else is done to it.

    The flags are those of `tokenizers.AddedToken`: `lstrip` and `rstrip` take the white space
    beside it, `single_word` passes it over inside a word, `normalized` looks for it after the
    text's normalization.
    """

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def is_literal(self) -> bool:
        """Whether it is found wherever the raw text spells it."""
        return not (self.normalized or self.lstrip or self.rstrip or self.single_word)

    @property
    def pattern(self) -> str:
        """A regular expression for the token, a group where it may take white space as well."""
        content = re.escape(self.content)
        if self.single_word:
            content = rf"(?<!\w){content}(?!\w)"
        if not (self.lstrip or self.rstrip):
            return content
        return _SPACE * self.lstrip + f"({content})" + _SPACE * self.rstrip


class Splitter:
    """Cuts text at tokens as `tokenizers` does: at the leftmost one, and the longest of those."""

    def __init__(self, ids: Mapping[TokenSpec, int]) -> None:
        tokens = sorted((t for t in ids if t.content), key=lambda t: len(t.content), reverse=True)
        self._ids = {token.content: ids[token] for token in tokens}
        self._pattern = re.compile("|".join(t.pattern for t in tokens)) if tokens else None

    def occurs_in(self, text: str) -> bool:
        """Whether the text spells any of the tokens."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: ids of tokens, and what lies between them, which is never empty."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            if match.start() > end:
                yield text[end : match.start()]
            yield self._ids[match[match.lastindex or 0]]
            end = match.end()
        if end < len(text):
            yield text[end:]
