"""The batches of a loader, again and again, with a position that can be found again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class BatchStream:
    """An endless iterator over a loader whose state says where it is.

    A loader that shuffles draws its order from a random generator when an epoch begins: its own
    `generator`, or torch's. The state keeps how that stood, so that the epoch can be drawn again
    and the batches that were seen be passed over. A sampler with `set_epoch` is told the epoch.

    Raises:
        ValueError: the loader has no batches.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.epoch, self.seen = 0, 0  # epochs begun before this one, and batches of this one
        self._order: torch.Tensor | None = None
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._begin()
        assert self._batches is not None
        try:
            batch = next(self._batches)
        except StopIteration:
            if self.seen == 0:
                raise ValueError(
                    "train_dataloader has no batches; check the data and the batch size"
                ) from None
            self.epoch, self.seen, self._batches = self.epoch + 1, 0, None
            return next(self)
        self.seen += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "seen": self.seen, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where the state was taken; draws from torch's generator on the way.

        Raises:
            ValueError: the loader ends before that.
        """
        self.epoch, self.seen = int(state["epoch"]), int(state["seen"])
        if self.seen == 0:
            return
        self._generator.set_state(state["order"])
        self._begin()
        assert self._batches is not None
        for number in range(self.seen):
            if next(self._batches, None) is None:
                raise ValueError(
                    f"train_dataloader has {number} batches, and the checkpoint was taken after "
                    f"{self.seen}; give the data that it was trained on"
                )

    def _begin(self) -> None:
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        self._order = self._generator.get_state()
        self._batches = iter(self.loader)

    @property
    def _generator(self) -> torch.Generator:
        own = getattr(self.loader, "generator", None)
        return torch.default_generator if own is None else own
