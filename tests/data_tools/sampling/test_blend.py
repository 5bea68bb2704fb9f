from __future__ import annotations

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.sampling.blend import PERIOD, Blend
from tests.refusals import assert_refused

_MIXES = [
    {"a": 1.0},
    {"a": 1.0, "b": 1.0},
    {"web": 7.0, "code": 2.0, "books": 1.0},
    {"a": 0.3333, "b": 0.1, "c": 0.05, "d": 0.0007, "e": 0.516},
    {f"s{i}": 1.0 + i for i in range(40)},
]


@pytest.mark.parametrize("weights", _MIXES)
def test_realised_proportions_are_within_a_tenth_of_a_percent(weights: dict[str, float]) -> None:
    num_samples = 100_000
    blend = Blend(weights)
    counts = np.bincount(blend.look_up(np.arange(num_samples)).sources)
    shares = np.array([weights[name] for name in blend.names]) / sum(weights.values())
    assert np.abs(counts / num_samples - shares).max() < 0.001


@pytest.mark.parametrize("weights", _MIXES)
def test_no_source_ever_strays_from_its_share(weights: dict[str, float]) -> None:
    blend = Blend(weights)
    sources = blend.look_up(np.arange(PERIOD)).sources
    for source in range(len(weights)):
        drawn = np.cumsum(sources == source)
        expected = np.arange(1, PERIOD + 1) * (drawn[-1] / PERIOD)
        assert np.abs(drawn - expected).max() <= 1 + len(weights) / 4


@pytest.mark.parametrize("weights", _MIXES)
def test_each_source_gives_its_samples_in_order_without_a_gap(weights: dict[str, float]) -> None:
    draws = Blend(weights).look_up(np.arange(2 * PERIOD + 1000))
    for source in range(len(weights)):
        samples = draws.samples[draws.sources == source]
        assert np.array_equal(samples, np.arange(len(samples)))


@pytest.mark.parametrize("consumed", [0, 1, 999, PERIOD, 3 * PERIOD + 17])
def test_ledger_equals_a_count_of_the_draws(consumed: int) -> None:
    blend = Blend({"a": 0.7, "b": 0.2, "c": 0.1})
    counts = np.bincount(blend.look_up(np.arange(consumed)).sources, minlength=3)
    assert list(blend.ledger(consumed).values()) == counts.tolist()


def test_changed_mix_goes_on_where_each_source_was() -> None:
    first = Blend({"a": 0.5, "b": 0.5})
    second = Blend({"a": 0.1, "c": 0.9}, start_sample=1000, base=first.ledger(1000))
    ledger = first.ledger(1000) | second.ledger(2500)
    third = Blend({"b": 1.0, "a": 1.0}, start_sample=2500, base=ledger)
    given: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for blend, begin, end in ((first, 0, 1000), (second, 1000, 2500), (third, 2500, 4000)):
        draws = blend.look_up(np.arange(begin, end))
        for source, sample in zip(draws.sources, draws.samples, strict=True):
            given[blend.names[source]].append(int(sample))
    assert all(samples == list(range(len(samples))) for samples in given.values())
    assert ledger | third.ledger(4000) == {name: len(samples) for name, samples in given.items()}


def test_order_in_which_sources_are_listed_has_no_effect() -> None:
    weights = {"b": 1.0, "a": 1.0, "c": 3.0}
    listed = Blend(weights)
    reversed_ = Blend(dict(reversed(weights.items())))
    for field in range(2):
        draws = [blend.look_up(np.arange(1000))[field] for blend in (listed, reversed_)]
        assert np.array_equal(*draws)
    assert listed.names == reversed_.names


def test_weight_too_small_to_be_drawn_is_refused() -> None:
    with assert_refused(
        "rare", value="1e-06", constraint="65536", remedy=("raise", "leave"), error=DataError
    ):
        Blend({"common": 1.0, "rare": 1e-6})
