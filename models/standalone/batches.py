"""Endless, resumable iteration over a loader's batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class ResumableBatches:
    """An endless iterator over a loader, epoch after epoch.

    A loader that shuffles draws its order from a random generator when an epoch begins: its own
    `generator`, or torch's. The state holds that generator's state, so that the epoch can be drawn
    again and the batches already seen skipped. A sampler with `set_epoch` is told the epoch.

    Raises:
        ValueError: the loader has no batches.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.epoch, self.seen = 0, 0  # finished epochs, and batches of the current one
        self._order: torch.Tensor | None = None
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> ResumableBatches:
        return self

    def __next__(self) -> Any:
        batches = self._begin() if self._batches is None else self._batches
        try:
            batch = next(batches)
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
        """Go to the saved position; draws from torch's generator on the way.

        Raises:
            ValueError: the loader has fewer batches.
        """
        self.epoch, self.seen = int(state["epoch"]), int(state["seen"])
        if self.seen == 0:
            return
        self._generator.set_state(state["order"])
        batches = self._begin()
        for number in range(self.seen):
            if next(batches, None) is None:
                raise ValueError(
                    f"train_dataloader has {number} batches, and the checkpoint was taken after "
                    f"{self.seen}; give the data that it was trained on"
                )

    def _begin(self) -> Iterator[Any]:
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        self._order = self._generator.get_state()
        self._batches = iter(self.loader)
        return self._batches

    @property
    def _generator(self) -> torch.Generator:
        own = getattr(self.loader, "generator", None)
        return torch.default_generator if own is None else own
