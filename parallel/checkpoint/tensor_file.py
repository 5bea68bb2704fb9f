"""One safetensors file, open for reading: the only opener of checkpoint files.

Opening parses a header that names every tensor and maps the file into memory; a read touches only
the pages that hold what it returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class TensorFile:
    """Tensors of one file, by name.

    Raises:
        SafetensorError, OSError: here and in every method; the caller knows what the file is for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = safe_open(path, framework="pt")
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """In safetensors' spelling, from the header alone."""
        return str(self._file.get_slice(name).get_dtype())

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """The tensor, or of its first dimensions the elements in [start, stop) of each range."""
        index = tuple(slice(start, stop) for start, stop in ranges)
        tensor: Tensor = self._file.get_slice(name)[index or ...]
        return tensor
