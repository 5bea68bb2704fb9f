"""Bytes of text files as training batches, and the published curriculum over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.agiformer.standalone.settings import (
    CURRICULUM,
    CurriculumStage,
    check_counts,
    check_stages,
    check_text,
    stage_ends,
)
from parallel.cross_entropy import IGNORED_LABEL


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a file, one after the other: inputs and labels int64 [seq_len].

    Every byte but the first of the file is the label of one position. The last window is filled up
    with positions that are not scored.

    Raises:
        ValueError: there is no such file, it has fewer than two bytes, or windows would be empty.
    """

    def __init__(self, path: Path, seq_len: int) -> None:
        check_counts(seq_len=seq_len)
        check_text(path)
        self.bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self.seq_len = seq_len

    def __len__(self) -> int:
        return -(-(len(self.bytes) - 1) // self.seq_len)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        first = number * self.seq_len
        window = torch.from_numpy(self.bytes[first : first + self.seq_len + 1].astype(np.int64))
        inputs, labels = (
            torch.zeros(self.seq_len).long(),
            torch.full((self.seq_len,), IGNORED_LABEL),
        )
        inputs[: len(window) - 1], labels[: len(window) - 1] = window[:-1], window[1:]
        return inputs, labels


def byte_loader(
    path: Path, batch_size: int, seq_len: int, *, shuffle: bool, seed: int = 0
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of the windows of a file, in its order or in one that the seed decides.

    Raises:
        ValueError: as of `ByteWindows`, or a batch would be empty.
    """
    check_counts(batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    windows = ByteWindows(path, seq_len)
    return DataLoader(windows, batch_size=batch_size, shuffle=shuffle, generator=generator)


class CurriculumDataLoader:
    """The three stages of a run of `max_steps` batches: iterate over it for all of them, in order.

    `seed` decides the order of the windows in a stage.

    Raises:
        ValueError: a file of a stage, or `val.txt`, is missing, a number is below 1, or a stage has
            no step.
    """

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int,
        seq_len: int,
        max_steps: int,
        *,
        seed: int = 0,
    ) -> None:
        check_counts(batch_size=batch_size)
        check_stages(max_steps)
        self.seed = seed
        self.data_dir, self.max_steps = Path(data_dir), max_steps
        self.batch_size, self.seq_len = batch_size, seq_len
        self.stage = CURRICULUM[0]
        for source in (*(stage.source for stage in CURRICULUM), "val"):
            ByteWindows(self.data_dir / f"{source}.txt", seq_len)

    def stage_of(self, step: int) -> CurriculumStage:
        """The stage of the step after the first `step`."""
        ends = zip(CURRICULUM, stage_ends(self.max_steps), strict=True)
        return next((stage for stage, end in ends if step < end), CURRICULUM[-1])

    def check_stage_change(self, step: int) -> bool:
        """Go to the stage of a step; whether it is another one."""
        before, self.stage = self.stage, self.stage_of(step)
        return self.stage != before

    def get_plasticity_alpha(self) -> float:
        """The plasticity of the stage."""
        return self.stage.plasticity

    def get_loader(self, split: str = "train") -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of the stage's text, shuffled, or with split="val" of the held-out file, in
        order."""
        source = self.stage.source if split == "train" else split
        path = self.data_dir / f"{source}.txt"
        is_train = split == "train"
        return byte_loader(path, self.batch_size, self.seq_len, shuffle=is_train, seed=self.seed)

    def __iter__(self) -> Iterator[list[Tensor]]:
        batches = None
        for step in range(self.max_steps):
            if self.check_stage_change(step) or batches is None:
                loader = self.get_loader()
                batches = iter(loader)
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            yield batch
