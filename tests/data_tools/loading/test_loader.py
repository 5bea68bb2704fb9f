from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.config import DataConfig
from data_tools.errors import DataError
from data_tools.loading.builders import build_train_loader
from data_tools.loading.loader import TrainLoader
from tests.data_tools.corpora import write_counting_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_SEQUENCE_LENGTH = 8
_FIRST_OF_B = 10_000  # tokens of source b start here, so a token tells its source


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_counting_corpus(folder / "a", 1000)
    write_counting_corpus(folder / "b", 300, first=_FIRST_OF_B)
    write_counting_corpus(folder / "c", 500, first=2 * _FIRST_OF_B)
    return folder


def _loader(
    folder: Path,
    *,
    train: list[dict[str, Any]] | None = None,
    num_workers: int = 1,
    reset_at_documents: bool = False,
    sequence_length: int = _SEQUENCE_LENGTH,
    **changes: Any,
) -> TrainLoader:
    mix = train or [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.3}]
    config = DataConfig.model_validate(
        {
            "train": [{**source, "path": str(folder / source["path"])} for source in mix],
            "sequence_length": sequence_length,
            "num_workers": num_workers,
            "reset_at_documents": reset_at_documents,
        }
    )
    layout = {
        "micro_batch_size": 2,
        "micro_batches_per_step": 1,
        "data_rank": 0,
        "data_size": 1,
        "seed": 5,
        "vocab_size": 1 << 20,
    }
    return build_train_loader(config, sequence_length=sequence_length, **(layout | changes))


def _samples(loaders: list[TrainLoader], num_steps: int, micro_batches: int) -> torch.Tensor:
    """Tokens of all ranks in run-wide order, [samples, s]."""
    rows = [next(loader).tokens for _ in range(num_steps * micro_batches) for loader in loaders]
    return torch.cat(rows)


@pytest.fixture
def reference(corpora: Path) -> Iterator[torch.Tensor]:
    with _loader(corpora, micro_batch_size=16, num_workers=0) as loader:
        yield _samples([loader], num_steps=12, micro_batches=1)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("data_size", "micro_batch_size", "micro_batches"), [(1, 2, 8), (2, 4, 2), (4, 4, 1), (4, 1, 4)]
)
def test_order_of_samples_is_the_same_at_every_layout(
    corpora: Path,
    reference: torch.Tensor,
    data_size: int,
    micro_batch_size: int,
    micro_batches: int,
    num_workers: int,
) -> None:
    loaders = [
        _loader(
            corpora,
            data_rank=rank,
            data_size=data_size,
            micro_batch_size=micro_batch_size,
            micro_batches_per_step=micro_batches,
            num_workers=num_workers,
        )
        for rank in range(data_size)
    ]
    assert torch.equal(_samples(loaders, 12, micro_batches), reference)
    states = [loader.state_dict() for loader in loaders]
    assert states[0]["consumed_samples"] == 192
    assert all(state == states[0] for state in states)
    for loader in loaders:
        loader.close()


def test_a_changed_seed_changes_the_order(corpora: Path, reference: torch.Tensor) -> None:
    with _loader(corpora, micro_batch_size=16, seed=6) as loader:
        assert not torch.equal(_samples([loader], 12, 1), reference)


@pytest.mark.parametrize("data_size", [1, 2])
def test_resumed_run_goes_on_with_the_same_samples(
    corpora: Path, reference: torch.Tensor, data_size: int
) -> None:
    with _loader(corpora, micro_batch_size=4, micro_batches_per_step=4) as before:
        first = _samples([before], num_steps=5, micro_batches=4)
        state = json.loads(json.dumps(before.state_dict()))
    # As if killed; the new run has another layout of the same global batch.
    resumed = [
        _loader(
            corpora,
            micro_batch_size=8 // data_size,
            micro_batches_per_step=2,
            data_rank=rank,
            data_size=data_size,
            state=state,
        )
        for rank in range(data_size)
    ]
    rest = _samples(resumed, num_steps=7, micro_batches=2)
    assert torch.equal(torch.cat([first, rest]), reference)
    for loader in resumed:
        loader.close()


def test_resume_after_every_step_gives_the_same_samples(
    corpora: Path, reference: torch.Tensor
) -> None:
    state, rows = None, []
    for _ in range(12):
        with _loader(corpora, micro_batch_size=16, state=state) as loader:
            rows.append(next(loader).tokens)
            state = loader.state_dict()
    assert torch.equal(torch.cat(rows), reference)


def test_consumed_samples_alone_skip_to_the_same_position(
    corpora: Path, reference: torch.Tensor
) -> None:
    with _loader(corpora, micro_batch_size=16, consumed_samples=64) as loader:
        assert torch.equal(next(loader).tokens, reference[64:80])
        assert loader.consumed_samples == 80


def test_micro_batches_of_an_unfinished_step_are_drawn_again(corpora: Path) -> None:
    with _loader(corpora, micro_batches_per_step=3) as loader:
        drawn = [next(loader).tokens for _ in range(5)]
        state = loader.state_dict()
    assert state["consumed_samples"] == 6
    with _loader(corpora, micro_batches_per_step=3, state=state) as resumed:
        assert torch.equal(next(resumed).tokens, drawn[3])


def test_ledger_counts_the_tokens_actually_read(corpora: Path) -> None:
    with _loader(corpora, micro_batch_size=16) as loader:
        tokens = _samples([loader], num_steps=9, micro_batches=1)
        from_b = int((tokens[:, 0] >= _FIRST_OF_B).sum())
        sources = loader.state_dict()["sources"]
        assert {name: source["tokens"] for name, source in sources.items()} == {
            "a": (144 - from_b) * _SEQUENCE_LENGTH,
            "b": from_b * _SEQUENCE_LENGTH,
        }
        assert sources["b"]["position"] == from_b * _SEQUENCE_LENGTH


def test_changed_mix_repeats_no_sample_of_any_source(corpora: Path) -> None:
    mixes = [
        [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}],
        [{"path": "c", "weight": 1}, {"path": "a", "weight": 1}],
        [{"path": "b", "weight": 1}, {"path": "a", "weight": 1}],
    ]
    state, rows = None, []
    for mix in mixes:
        with _loader(corpora, train=mix, micro_batch_size=4, state=state) as loader:
            rows.append(_samples([loader], num_steps=9, micro_batches=1))
            state = loader.state_dict()
    firsts = torch.cat(rows)[:, 0].tolist()
    assert len(set(firsts)) == len(firsts)  # less than an epoch of every source
    assert state is not None
    assert set(state["sources"]) == {"a", "b", "c"}
    given = sum(source["tokens"] for source in state["sources"].values())
    assert given == len(firsts) * _SEQUENCE_LENGTH
    # The source that came back is where an unbroken run of it would be.
    with _loader(corpora, train=[{"path": "b"}], micro_batch_size=64) as alone:
        order = next(alone).tokens[:, 0].tolist()
    of_b = [first for first in firsts if _FIRST_OF_B <= first < 2 * _FIRST_OF_B]
    assert of_b == order[: len(of_b)]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"seed": 6}, ("training.seed", 6, "5", ("restore", "new run"))),
        ({"sequence_length": 4}, ("data.sequence_length", 4, "8", ("restore", "new run"))),
        ({"consumed_samples": 4}, ("consumed_samples", 4, "2", "one")),
    ],
)
def test_resume_that_would_repeat_samples_is_refused(
    corpora: Path, changes: dict[str, Any], parts: tuple
) -> None:
    with _loader(corpora) as loader:
        next(loader)
        state = loader.state_dict()
    with assert_refused(*parts, error=DataError):
        _loader(corpora, state=state, **changes)


def test_resume_with_another_corpus_of_the_same_name_is_refused(
    corpora: Path, tmp_path: Path
) -> None:
    with _loader(corpora) as loader:
        state = loader.state_dict()
    write_counting_corpus(tmp_path / "a", 1000, first=1)
    write_counting_corpus(tmp_path / "b", 300, first=_FIRST_OF_B)
    with _refused(
        "data source", value="a", constraint=("checkpoint", "saved"), remedy=("restore", "name")
    ):
        _loader(tmp_path, state=state)


@pytest.mark.parametrize("state", [{}, {"consumed_samples": "many"}, {"surplus": 1}])
def test_state_of_something_else_is_refused(corpora: Path, state: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data position .*; resume"):
        _loader(corpora, state=state)


def test_position_before_the_current_mix_is_refused(corpora: Path) -> None:
    with _loader(corpora) as loader:
        _samples([loader], num_steps=5, micro_batches=1)
        state = loader.state_dict()
    loader = _loader(corpora, train=[{"path": "b"}], state=state)
    with _refused("sample", value=3, constraint="10", remedy="earlier"):
        loader.skip_to(3)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_batch_holds_tokens_and_the_tokens_that_follow(
    corpora: Path, micro_batch_size: int
) -> None:
    with _loader(corpora, micro_batch_size=micro_batch_size) as loader:
        batch = next(loader)
    assert batch.tokens.shape == batch.labels.shape == (micro_batch_size, _SEQUENCE_LENGTH)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.segment_ids is None
    assert torch.equal(batch.labels, batch.tokens + 1)  # a counting corpus
    batch.labels.fill_(-1)
    assert (batch.tokens >= 0).all()  # no shared memory


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_first_token_of_a_document_is_not_scored_when_documents_are_kept_apart(
    corpora: Path, micro_batch_size: int
) -> None:
    changes = {"micro_batch_size": micro_batch_size, "reset_at_documents": True}
    with (
        _loader(corpora, **changes) as loader,
        _loader(corpora, micro_batch_size=micro_batch_size) as plain,
    ):
        num_masked = 0
        for _ in range(20):
            batch, whole = next(loader), next(plain)
            assert batch.segment_ids is not None
            assert torch.equal(batch.tokens, whole.tokens)
            new_document = batch.segment_ids.diff(dim=1) != 0
            assert (batch.segment_ids[:, 0] == 0).all()
            assert (batch.labels[:, :-1][new_document] == -100).all()
            scored = batch.labels != -100
            assert torch.equal(batch.labels[scored], whole.labels[scored])
            assert scored[:, :-1][~new_document].all()
            num_masked += int((~scored).sum())
        assert num_masked > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_error_while_preparing_surfaces_in_next_and_the_position_stays(
    corpora: Path, num_workers: int
) -> None:
    # Foreign corpora are probed when opened; this id is past what is probed of each block.
    prefix = write_counting_corpus(corpora / f"wrong{num_workers}", 40_000)
    prefix.with_suffix(".json").unlink()
    tokens = np.memmap(prefix.with_suffix(".bin"), dtype=np.int32, mode="r+")
    with _loader(
        corpora, train=[{"path": prefix.name}], num_workers=num_workers, vocab_size=50_000
    ) as loader:
        good = next(loader).tokens
        assert good.shape == (2, _SEQUENCE_LENGTH)
        tokens[:] = 60_000
        with _refused(
            "token id", value=60000, constraint=("50000", "vocabulary"), remedy="--vocab-size 50000"
        ):
            [next(loader) for _ in range(5)]
        position = loader.consumed_samples
        tokens[:] = 1
        assert (next(loader).tokens == 1).all()
        assert loader.consumed_samples == position + 2


def test_closing_ends_the_threads_and_next_starts_them_again(corpora: Path) -> None:
    def threads() -> int:
        return sum(thread.name.startswith("data-loader") for thread in threading.enumerate())

    before = threads()
    with _loader(corpora, num_workers=2) as loader:
        rows = [next(loader).tokens, next(loader).tokens]
        assert threads() > before
        loader.close()
        assert threads() == before
        rows.append(next(loader).tokens)
    assert threads() == before
    with _loader(corpora, num_workers=0) as plain:
        assert all(torch.equal(next(plain).tokens, row) for row in rows)


def test_unreferenced_loader_stops_its_threads(corpora: Path) -> None:
    loader = _loader(corpora, num_workers=2)
    next(loader)
    threads = [t for t in threading.enumerate() if t.name.startswith("data-loader")]
    assert threads
    del loader
    gc.collect()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_running_loader_can_seek(corpora: Path, reference: torch.Tensor, num_workers: int) -> None:
    with _loader(corpora, micro_batch_size=16, num_workers=num_workers) as loader:
        first = next(loader).tokens
        state = loader.state_dict()
        next(loader)
        loader.load_state_dict(state)
        assert torch.equal(next(loader).tokens, reference[16:32])
        loader.skip_to(0)
        assert torch.equal(next(loader).tokens, first)


def test_rank_outside_the_data_ranks_is_refused(corpora: Path) -> None:
    with assert_refused("data_rank", value=2, constraint="data_size=2", remedy="rank"):
        _loader(corpora, data_rank=2, data_size=2)
