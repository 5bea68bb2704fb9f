"""Joining the shards of a `preprocess` run into its output."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_tools.corpus.corpus_info import CorpusInfo, SourceInfo, left_out_list, read_info
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter, append_corpora
from data_tools.errors import DataError
from data_tools.files import replace_atomically
from data_tools.preprocessing.encoding import EncodingSettings
from data_tools.preprocessing.inputs import Source
from data_tools.preprocessing.resume_folder import ResumeFolder
from data_tools.preprocessing.shards import (
    LeftOut,
    Shard,
    ShardReport,
    SourceCounts,
    left_out_path,
    read_report,
)
from data_tools.progress import progress_bar

MAX_LISTED = 10


class PreprocessJob(NamedTuple):
    """Inputs, output and settings of a `preprocess` run."""

    inputs: Sequence[str]
    output: str
    settings: EncodingSettings
    overwrite: bool = False
    license: str | None = None
    command: str = ""
    shard_bytes: int | None = None
    """Input bytes per shard; None: chosen by input size. The output does not depend on it."""


class PreprocessReport(NamedTuple):
    """Sidecar of the written corpus, and the first documents left out of it."""

    info: CorpusInfo
    first_left_out: list[LeftOut]


def join_shards(
    job: PreprocessJob, sources: Sequence[Source], shards: Sequence[Shard], folder: ResumeFolder
) -> PreprocessReport:
    """Join finished shards into the output, and remove the work folder.

    Raises:
        DataError: no shard holds a document, a shard is missing, or the disk is full.
    """
    output = Path(job.output)
    if not folder.is_published():
        try:
            _write_output(job, sources, shards, folder)
        except OSError as error:
            raise DataError(
                f"{output}: cannot be written ({error.strerror}); free as much space as "
                f"{folder.path} takes, then run the same command again"
            ) from error
        folder.mark_published()
    folder.remove()
    info = read_info(output)
    assert info is not None, "_write_output wrote it"
    return PreprocessReport(info, _first_left_out(output))


def _write_output(
    job: PreprocessJob, sources: Sequence[Source], shards: Sequence[Shard], folder: ResumeFolder
) -> None:
    reports = [_require_report(folder, shard) for shard in shards]
    counts = [SourceCounts() for _ in sources]
    for report in reports:
        for number, part in report.sources.items():
            counts[number].merge(part)
    tokenizer = job.settings.load_tokenizer()
    if not any(part.documents for part in counts):
        folder.remove()
        raise DataError(
            f"{job.output}: the input holds no documents with text, so nothing was written; "
            "pass an input with text"
        )
    folder.mark_publishing()
    corpora = (
        IndexedDataset(folder.path / shard.name)
        for shard, report in zip(shards, reports, strict=True)
        if report.documents
    )
    with IndexedDatasetWriter(
        job.output, vocab_size=tokenizer.vocab_size, overwrite=True
    ) as writer:
        num_bytes = sum(part.tokens for part in counts) * writer.dtype.itemsize
        with progress_bar("joining", num_bytes) as progress:
            append_corpora(writer, corpora, progress)
        left_out_sha256 = _join_left_out(Path(job.output), shards, reports, folder)
        writer.finish(
            tokenizer=job.settings.tokenizer,
            tokenizer_fingerprint=tokenizer.fingerprint,
            **job.settings.text_rules()._asdict(),
            num_bytes=sum(part.num_bytes for part in counts),
            command=job.command,
            license=job.license,
            sources=[_source_info(*pair) for pair in zip(sources, counts, strict=True)],
            left_out_sha256=left_out_sha256,
        )


def _require_report(folder: ResumeFolder, shard: Shard) -> ShardReport:
    report = read_report(folder.path, shard)
    if report is None:
        raise DataError(
            f"{folder.path}: shard {shard.name} of {shard.pieces[0].path} is missing, though all "
            "ranks have finished; choose an --output on a file system shared by all ranks"
        )
    return report


def _source_info(source: Source, counts: SourceCounts) -> SourceInfo:
    return SourceInfo(
        name=source.name,
        num_files=len(source.files),
        num_documents=counts.documents,
        num_tokens=counts.tokens,
        num_bytes=counts.num_bytes,
        num_with_null_bytes=counts.with_null_bytes,
        left_out=counts.left_out,
    )


def _join_left_out(
    output: Path, shards: Sequence[Shard], reports: Sequence[ShardReport], folder: ResumeFolder
) -> str | None:
    """Write OUTPUT.left_out.jsonl with line numbers within each file, and return its SHA-256.

    Without documents left out there is no file, and the result is None.
    """
    path = left_out_list(output)
    path.unlink(missing_ok=True)
    if not any(counts.left_out for report in reports for counts in report.sources.values()):
        return None
    lines_before: dict[str, int] = {}
    digest = hashlib.sha256()
    with replace_atomically(path) as file:
        for shard, report in zip(shards, reports, strict=True):
            uncounted = {p.path for p in shard.pieces if p.first_line is None}
            with open(left_out_path(folder.path, shard), "rb") as spool:
                for line in spool:
                    entry = LeftOut.model_validate_json(line)
                    if entry.line is not None and entry.file in uncounted:
                        entry.line += lines_before[entry.file]
                    data = entry.model_dump_json().encode() + b"\n"
                    digest.update(data)
                    file.write(data)
            for piece, lines in zip(shard.pieces, report.lines, strict=True):
                lines_before[piece.path] = lines_before.get(piece.path, 0) + lines
    return digest.hexdigest()


def _first_left_out(output: Path) -> list[LeftOut]:
    try:
        with open(left_out_list(output), "rb") as file:
            return [LeftOut.model_validate_json(line) for line in islice(file, MAX_LISTED)]
    except FileNotFoundError:
        return []


def summary(output: str, info: CorpusInfo) -> str:
    """Describe a written corpus in one line."""
    return (
        f"{output}.bin/.idx: {info.num_documents:,} documents, {info.num_tokens:,} tokens "
        f"({info.dtype}), {info.num_bytes / info.num_tokens:.2f} bytes per token"
    )
