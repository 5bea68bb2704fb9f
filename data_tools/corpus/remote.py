"""Local copies of corpora in object stores."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.files import lock_folder, partial_path

_SUFFIXES = (".json", ".idx", ".bin")  # .bin last: it completes a copy


def is_remote(path: str) -> bool:
    """Return whether a path is a URL for fsspec, such as s3://bucket/corpus/train."""
    return "://" in path


def local_prefix(path: str, *, cache_dir: str | None) -> Path:
    """Return the local prefix of a corpus; a remote one is first copied by one process per machine.

    A copy belongs to one version of the remote files (as distinguished by fsspec's `ukey`: ETag,
    time, size), so that a changed corpus is copied again beside the old copy.

    Raises:
        DataError: the URL cannot be opened, a file is missing, or the copy cannot be written.
    """
    if not is_remote(path):
        return Path(path)
    if "::" in path:  # fsspec would chain file systems, some of which run templates
        raise DataError(f"{path}: a URL of one file system expected, such as s3://bucket/train")
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    try:
        return _copy(path, folder)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no {path}.bin and {path}.idx there; check the URL") from error
    except (ImportError, ValueError) as error:  # missing package for a protocol, or unknown one
        raise DataError(f"{path}: {error}; install that package or check the URL") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be copied to {folder}: {error.strerror or error}; check the access "
            "rights and free space, or set data.cache_dir"
        ) from error


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/manyformer, by default ~/.cache/manyformer."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "manyformer")


def _copy(url: str, folder: Path) -> Path:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    suffixes = [s for s in _SUFFIXES if s != ".json" or system.exists(path + s)]
    versions = [system.ukey(path + suffix) for suffix in suffixes]
    key = hashlib.sha256("\0".join([url, *versions]).encode()).hexdigest()[:32]
    prefix = folder / key / path.rstrip("/").rpartition("/")[2]
    with lock_folder(folder / key):
        for suffix in suffixes:
            _fetch(system, path + suffix, prefix.with_name(prefix.name + suffix))
    return prefix


def _fetch(system: Any, source: str, target: Path) -> None:
    if target.exists():
        return
    partial = partial_path(target)
    system.get_file(source, str(partial))
    size, expected = partial.stat().st_size, system.info(source)["size"]
    if size != expected:
        raise DataError(
            f"{source}: {size} bytes of {expected} arrived at {partial}; start again to copy it"
        )
    os.replace(partial, target)
