from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_tools.tokenization.special_tokens import Splitter, TokenSpec

_WORDS = ["<a>", "<a>b", "<|x|>", "x", "b", " ", "\n", "\t ", "\u3000", ".", "<", "ab"]
_TOKENS = [
    TokenSpec("<a>"),
    TokenSpec("<a>b"),  # the longest of those that begin at one place
    TokenSpec("<|x|>", lstrip=True, rstrip=True),
    TokenSpec("x", single_word=True),
    TokenSpec("b", rstrip=True),
]


@pytest.fixture(scope="module")
def theirs() -> Tokenizer:
    """Every character that is no token is an id of its own, from 1000 on."""
    letters = sorted({letter for word in _WORDS for letter in word})
    tokenizer = Tokenizer(models.WordLevel({letter: 1000 + i for i, letter in enumerate(letters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_tokens([AddedToken(**token._asdict()) for token in _TOKENS])
    return tokenizer


@given(text=st.lists(st.sampled_from(_WORDS), max_size=12).map("".join))
@settings(max_examples=400, deadline=None)
def test_text_is_cut_where_the_tokenizers_library_cuts_it(theirs: Tokenizer, text: str) -> None:
    ids = {token: theirs.token_to_id(token.content) for token in _TOKENS}
    ours: list[int] = []
    for part in Splitter(ids).split(text):
        of_letters = (
            [theirs.token_to_id(letter) for letter in part] if isinstance(part, str) else []
        )
        ours += [part] if isinstance(part, int) else of_letters
    # A letter that is a token as well is found as one, or not at all inside a word.
    inner = {theirs.token_to_id(token.content) for token in _TOKENS if len(token.content) == 1}
    expected = theirs.encode(text).ids
    assert [i for i in ours if i not in inner] == [i for i in expected if i not in inner]
    assert len(ours) == len(expected)


def test_splitter_without_tokens_keeps_text_and_yields_nothing_empty() -> None:
    assert list(Splitter({}).split("a <a>")) == ["a <a>"]
    assert list(Splitter({TokenSpec("<a>"): 7}).split("<a><a>b")) == [7, 7, "b"]
    assert not Splitter({TokenSpec("<a>"): 7}).occurs_in("<b>")
