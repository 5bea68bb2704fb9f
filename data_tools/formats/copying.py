"""One conversion: blocks of the sources, checked, into a sink that is published at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.arrays import bytes_of
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.corpus.indexed import IndexPaths
from data_tools.errors import DataError
from data_tools.files import PARTIAL_SUFFIX
from data_tools.formats.blocks import (
    Block,
    Boundary,
    ReadOptions,
    Sink,
    Source,
    WriteOptions,
    read_ahead,
)
from data_tools.formats.checks import Documents, Fit, Tally, algorithm_of, output_dtype
from data_tools.formats.kinds import KINDS, Kind
from data_tools.formats.manifest import HASH, Manifest, manifest_path
from data_tools.formats.megatron import add_info
from data_tools.formats.resuming import Resumption
from data_tools.progress import progress_bar
from data_tools.tokenization.tokenizers import load_tokenizer


class Copy(NamedTuple):
    """A conversion to do, from the command line."""

    source_kind: str
    target_kind: str
    inputs: Sequence[str]
    output: str
    read: ReadOptions = ReadOptions()
    write: WriteOptions = WriteOptions()
    vocab_size: int | None = None
    tokenizer: str | None = None
    """What made the ids; a Megatron corpus then gets a .json."""
    drop_empty: bool = False
    in_place: bool = False
    """Write an index alone, of the ids in the file of the input."""
    command: str = ""


class Copied(NamedTuple):
    """A conversion done."""

    manifest: Manifest
    num_empty: int
    """Empty documents left out."""


def copy_corpus(copy: Copy) -> Copied:
    """Convert a corpus; documents, ids and their order are kept, or it is refused.

    Memory does not depend on the size of the corpus.

    Raises:
        DataError: an option is missing or has no effect, an input is damaged, of another kind or
            does not fit the output, or the output exists.
    """
    source_kind, target_kind = KINDS[copy.source_kind], KINDS[copy.target_kind]
    _check_options(copy, source_kind, target_kind)
    inputs = [_resolve(path, source_kind) for path in copy.inputs]
    with _one_line(copy.inputs[0], "check the path and its permissions"):
        sources = source_kind.open(inputs, copy.read)
    _check_paths(copy, target_kind, sources)
    _check_one_dtype(sources)
    boundary = _boundary(copy, sources)
    _check_boundary(copy, source_kind, target_kind, boundary)
    dtype = output_dtype(sources[0].dtype, target_kind.dtypes)
    stored_in = _stored_in(sources, dtype) if copy.in_place else None
    documents = Documents(
        boundary,
        only_there=not (target_kind.has_boundaries or copy.read.no_boundaries),
        last_may_lack_it=not source_kind.has_boundaries,
        drop_empty=copy.drop_empty,
        keep_empty=target_kind.has_empty,
    )
    recorded = sources[0].recorded if len(sources) == 1 else None
    info = None if recorded is None else recorded.info
    fit = Fit(sources[0].dtype, dtype, _vocab_size(copy, info))
    output = Tally(None if target_kind.hashes_ids else HASH)
    with _writing(copy):
        resumption = Resumption(Path(copy.output), _resume_settings(copy, sources))
        options = copy.write._replace(info=info, stored_in=stored_in, resumption=resumption)
        writer = target_kind.create(Path(copy.output), dtype, options)
    with _closing(writer, resumption) as sink:
        with _writing(copy):
            resumption.begin()
        if resumption.num_marked:
            print(
                f"{copy.output}: {resumption.num_marked:,} bytes were written before and are kept",
                file=sys.stderr,
            )
        _copy_blocks(copy, sources, boundary, documents, fit, output, sink)
        are_lost = copy.read.no_boundaries and not target_kind.has_boundaries
        manifest = Manifest(
            kind=copy.target_kind,
            dtype=dtype.name,
            num_documents=1 if are_lost else output.num_documents,
            num_tokens=output.num_tokens,
            ids_hash=output.ids_hash,
            ends_hash=None if are_lost else output.ends_hash,
            eod_id=boundary.eod if documents.all_end or not target_kind.has_boundaries else None,
            bos_id=boundary.bos,
            command=copy.command,
            info=info,
        )
        with _writing(copy):
            resumption.publish()
            sink.finish(manifest)
    if copy.tokenizer is not None:
        _add_info(copy, copy.tokenizer, manifest.eod_id, resumption)
    resumption.remove()
    return Copied(manifest, documents.num_empty)


@contextmanager
def _one_line(name: str, remedy: str) -> Iterator[None]:
    """Name the file and a remedy in errors of the system: those of a full disk name nothing."""
    try:
        yield
    except OSError as error:
        path = error.filename or name
        raise DataError(f"{path}: {error.strerror or error}; {remedy}") from error


def _writing(copy: Copy) -> AbstractContextManager[None]:
    return _one_line(copy.output, "free space there, or choose another --output")


@contextmanager
def _closing(sink: Sink, resumption: Resumption) -> Iterator[Sink]:
    """Remove what is not published, unless it is interrupted from the keyboard and marked."""
    try:
        yield sink
    except BaseException as error:
        resumption.stop(leave=isinstance(error, KeyboardInterrupt))
        sink.close()
        if not resumption.is_left:
            resumption.remove()
        raise
    sink.close()


def _resume_settings(copy: Copy, sources: Sequence[Source]) -> dict[str, Any]:
    """All that the bytes of an output depend on: inputs, options, who compresses files."""
    beside = KINDS[copy.source_kind].beside
    return {
        "version": 2,
        "pyarrow": metadata.version("pyarrow"),
        "kinds": [copy.source_kind, copy.target_kind],
        "read": copy.read._asdict(),
        "write": [copy.write.column, copy.write.shard_tokens],
        "options": [copy.vocab_size, copy.tokenizer, copy.drop_empty, copy.in_place],
        "inputs": [_stamp(p) for s in sources for path in s.paths for p in _files(path, beside)],
        "recorded": [s.recorded and s.recorded.model_dump(mode="json") for s in sources],
    }


def _files(path: Path, beside: Sequence[str]) -> list[Path]:
    """A file of a source and those beside it, or all files of its folder."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path, *(p for suffix in beside if (p := path.with_suffix(suffix)).is_file())]


def _stamp(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _add_info(copy: Copy, tokenizer: str, eod_id: int | None, resumption: Resumption) -> None:
    prefix = Path(copy.output)
    try:
        with _writing(copy):
            add_info(prefix, tokenizer, eod_id=eod_id, command=copy.command)
    except BaseException as error:  # whole, with the .json that was asked for, or not there
        paths = IndexPaths.of(prefix)
        paths.idx.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt) and not copy.in_place:
            resumption.take_back(paths.bin)
        else:
            paths.bin.unlink(missing_ok=True)
            resumption.remove()
        raise


def _check_paths(copy: Copy, target: Kind, sources: Sequence[Source]) -> None:
    """Refuse an output without a name, an input given twice, and one that would be replaced."""
    if not sources:
        raise DataError(f"{copy.inputs[0]}: it lists 0 files; pass a corpus with text")
    output = Path(copy.output)
    if output.name in ("", ".."):
        raise DataError(
            f"--output {copy.output!r} is a folder, a new name in it expected; pass "
            f"{output / 'corpus'}"
        )
    suffix = ".bin" if copy.target_kind == "megatron" else target.suffix
    # A link itself is replaced.
    folder = output.parent.resolve()
    written = [folder / (output.name + each) for each in (suffix, *target.beside)]
    written.append(manifest_path(folder / output.name))
    seen = set()
    for path in (path for source in sources for path in source.paths):
        found = path.resolve()
        if found in seen:
            raise DataError(f"{path} is given twice; remove one")
        seen.add(found)
        if any(map(found.is_relative_to, written)):
            raise DataError(
                f"{path}: it is an input, and --output {copy.output} would replace it; choose "
                "another --output"
            )


def _stored_in(sources: Sequence[Source], dtype: np.dtype[Any]) -> Path:
    """Return the one file of the input, whose bytes are those of the output.

    Raises:
        DataError: there are several, or ids of this width are none of Megatron's.
    """
    paths = [path for source in sources for path in source.paths]
    if len(paths) > 1:
        raise DataError(
            f"--in-place: {len(paths)} files found, one expected; convert each into a corpus of "
            "its own, and list them all in data.train"
        )
    found = sources[0].dtype
    if found.itemsize != dtype.itemsize:
        raise DataError(
            f"{paths[0]}: {found.name} ids found, which Megatron's format has not, so that it "
            "cannot be read in place; leave --in-place out"
        )
    return paths[0]


def _vocab_size(copy: Copy, info: CorpusInfo | None) -> int | None:
    """Return the number of ids that may occur; a tokenizer is loaded before anything is written."""
    if copy.tokenizer is None:
        return copy.vocab_size
    if copy.target_kind != "megatron" or info is not None:
        has = "writes no .json" if info is None else f"gets the .json of {info.tokenizer}"
        raise DataError(
            f"--tokenizer {copy.tokenizer} has no effect: --to {copy.target_kind} {has}; remove it"
        )
    size = load_tokenizer(copy.tokenizer).vocab_size
    return size if copy.vocab_size is None else min(size, copy.vocab_size)


def _check_one_dtype(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.dtype != sources[0].dtype:
            raise DataError(
                f"{source.name}: {source.dtype.name} ids found, {sources[0].dtype.name} expected "
                f"as in {sources[0].name}; convert files of two tokenizers apart"
            )


def _copy_blocks(
    copy: Copy,
    sources: Sequence[Source],
    boundary: Boundary,
    documents: Documents,
    fit: Fit,
    output: Tally,
    sink: Sink,
) -> None:
    """Check all blocks and give them to the sink; compare what was read with what is recorded."""
    with progress_bar("converting", sum(source.num_bytes for source in sources)) as report:
        for source in sources:
            before = Tally(None if source.recorded is None else algorithm_of(source.recorded))
            for block in _read(source, boundary):
                before.count(block)
                converted = fit.convert(documents.check(block))
                with _writing(copy):
                    _add(source, before, converted, output, sink, block)
                report(output.num_documents, output.num_tokens * source.dtype.itemsize)
            if source.recorded is not None:
                recorded = Boundary(source.recorded.eod_id, source.recorded.bos_id)
                as_recorded = boundary == recorded and not copy.read.no_boundaries
                has_boundaries = KINDS[copy.source_kind].has_boundaries
                before.compare(
                    source.name, source.recorded, with_documents=has_boundaries or as_recorded
                )
    if output.num_documents == 0:
        raise DataError(f"{sources[0].name}: it holds 0 documents; pass a corpus with text")
    given = copy.read.bos if copy.read.eod is None else copy.read.eod
    if given is not None and not KINDS[copy.source_kind].has_boundaries:
        _check_token_found(documents, sources[0].name, given)


def _read(source: Source, boundary: Boundary) -> Iterator[Block]:
    with _one_line(source.name, "check its disk and permissions, or copy it again"):
        yield from read_ahead(source.blocks(boundary))


def _check_token_found(documents: Documents, name: str, token: int) -> None:
    """A wrong token would make one document of all, which is made on demand alone."""
    if not documents.token_found:
        raise DataError(
            f"{name}: id {token} of --eod or --bos stands nowhere in it, so that it would be one "
            "document; pass the id between its documents, or --no-boundaries for one document"
        )


def _add(
    source: Source, before: Tally, block: Block, output: Tally, sink: Sink, original: Block
) -> None:
    """Write a block, and meanwhile hash what is read and what is written."""
    output.count(block)
    if output.ids is not None:
        output.ids.update(bytes_of(block.ids))
    if before.ids is not None:
        before.ids.update(bytes_of(np.ascontiguousarray(original.ids, source.dtype)))
    sink.add(block)


def _resolve(path: str, kind: Kind) -> Path:
    given = Path(path)
    if not path:
        raise DataError("INPUT '' is empty, a path expected; pass a file, a folder or a prefix")
    if given.name in ("", ".."):
        given = given.resolve()  # `.` has no name, by which files beside it are found
    if not given.name:
        raise DataError(f"INPUT {path} has no name, a corpus expected; pass a folder in it")
    for name in (given.name, given.parent.name):
        if name.endswith(PARTIAL_SUFFIX):
            raise DataError(
                f"{path}: {name} is the name of what is not completely written, a whole corpus "
                "expected; run the command that was killed again, or rename what is whole"
            )
    with_suffix = given.with_name(given.name + kind.suffix)
    return with_suffix if not given.exists() and with_suffix.exists() else given


def _boundary(copy: Copy, sources: Sequence[Source]) -> Boundary:
    """Return the tokens of the command line, else those that are recorded."""
    read = copy.read
    if read.eod is not None or read.bos is not None or read.no_boundaries:
        return Boundary(read.eod, read.bos)
    all_recorded = [source.recorded for source in sources]
    found = {Boundary() if r is None else Boundary(r.eod_id, r.bos_id) for r in all_recorded}
    if len(found) > 1:
        tokens = " and ".join(sorted(f"({each.eod}, {each.bos})" for each in found))
        raise DataError(
            f"{sources[0].name}: end and begin tokens {tokens} are recorded beside the inputs, one "
            "pair expected; convert them apart, or pass --eod"
        )
    return found.pop()


def _check_boundary(copy: Copy, source: Kind, target: Kind, boundary: Boundary) -> None:
    """Refuse documents that neither are recorded nor shown by a token, unless lost on purpose."""
    without = [
        f"--{side} {name}"
        for side, name, kind in (
            ("from", copy.source_kind, source),
            ("to", copy.target_kind, target),
        )
        if not kind.has_boundaries
    ]
    if without and boundary == Boundary() and not copy.read.no_boundaries:
        raise DataError(
            f"{without[0]} records no document boundaries; pass --eod ID or --bos ID, the id that "
            "ends or begins every document, or --no-boundaries to make one document of all"
        )
    for name, given in (("--bos", copy.read.bos), ("--no-boundaries", copy.read.no_boundaries)):
        if not without and given not in (None, False):
            raise DataError(
                f"{name} has no effect: --from {copy.source_kind} and --to {copy.target_kind} "
                "record document boundaries; remove it"
            )


def _check_options(copy: Copy, source: Kind, target: Kind) -> None:
    read, write = copy.read, copy.write
    if (read.eod is not None) + (read.bos is not None) + read.no_boundaries > 1:
        raise DataError(
            "--eod, --bos and --no-boundaries: 2 or more given, one expected; keep the one that "
            "says where documents end"
        )
    if copy.in_place and not (source.is_raw and copy.target_kind == "megatron"):
        raw = ", ".join(name for name, kind in KINDS.items() if kind.is_raw)
        raise DataError(
            f"--in-place has no effect: --from {copy.source_kind} --to {copy.target_kind}, one of "
            f"{raw} to megatron expected; remove it"
        )
    if copy.vocab_size is not None and copy.vocab_size < 1:
        raise DataError(f"--vocab-size {copy.vocab_size} must be 1 or more; raise it")
    for option, given, used, side in (
        ("dtype", read.dtype, source.reads, f"--from {copy.source_kind}"),
        ("column", read.column, source.reads | target.writes, "--from and --to"),
        ("shard_tokens", write.shard_tokens, target.writes, f"--to {copy.target_kind}"),
    ):
        if given is not None and option not in used:
            name = option.replace("_", "-")
            raise DataError(f"--{name} {given} has no effect with {side}; remove it")
