"""Text on disk as documents: folders of text, JSON-lines and parquet files, cut into pieces that are read apart.

A piece is what one process tokenizes and what a stopped preparation loses at most: some small files, or a range of a
large one. How an input is cut depends on its files alone, never on the number of processes.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from longctx.data.tokens import DataError

COMPRESSED = (".zst", ".gz", ".bz2", ".lz4")
MIB = 1 << 20
PIECES = 64  # an input is cut into about so many, of these sizes in bytes
SMALLEST_PIECE, LARGEST_PIECE = 4 * MIB, 256 * MIB
WHOLE_TEXT = 16 * MIB  # a text file is tokenized in parts of this size, cut behind lines


class Document(NamedTuple):
    """One text. `name` decides its split, so it must not change between runs."""

    name: str
    pieces: Iterable[str]  # the text, in pieces that may be tokenized apart from each other
    is_validation: bool | None = None  # None: the hash of the name decides


class Piece(Protocol):
    """A part of the input. It can be pickled."""

    @property
    def size(self) -> int: ...  # bytes of input, for the progress bar

    @property
    def identity(self) -> str: ...  # changes when what it holds does

    def documents(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class Range:
    """A part of a file: lines that begin in `begin` to `end` (bytes), parquet's row groups, or all of a text."""

    path: Path
    name: str  # the same from wherever the tool is called
    begin: int
    end: int
    size: int  # bytes
    changed_at: int  # ns


@dataclass(frozen=True)
class FilePiece:
    """Ranges of files, read one after the other."""

    ranges: tuple[Range, ...]
    text_field: str

    @property
    def size(self) -> int:
        return sum(r.size for r in self.ranges)

    @property
    def identity(self) -> str:
        return repr((self.text_field, [(r.name, r.begin, r.end, r.size, r.changed_at) for r in self.ranges]))

    def documents(self) -> Iterator[Document]:
        """Raises `DataError` naming file and line, row or byte of what is no text."""
        for part in self.ranges:
            kind = _kind(part.path)
            if kind == "jsonl":
                yield from _read_jsonl(part, self.text_field)
            elif kind == "parquet":
                yield from _read_parquet(part, self.text_field)
            else:
                yield Document(part.name, _read_text(part.path))


def find_pieces(paths: list[Path], text_field: str = "text") -> list[FilePiece]:
    """The files of `paths` (files, and folders searched to the bottom, sorted by path), cut into pieces.

    `.jsonl` (also `.jsonl.zst`, `.gz`, `.bz2`, `.lz4`) holds a document a line, `.parquet` one a row, both in
    `text_field`; any other file is one document of UTF-8 text. Raises `DataError` if there is nothing at a path.
    """
    files: list[tuple[Path, str]] = []
    for path in (Path(os.path.abspath(path)) for path in paths):  # names must not depend on where one stands
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files += [(file, str(file.relative_to(path.parent))) for file in found]
    total = sum(file.stat().st_size for file, _ in files)
    # a power of two, so that a small change of the input leaves most cuts where they are
    limit = min(max(1 << max(total // PIECES, 1).bit_length() - 1, SMALLEST_PIECE), LARGEST_PIECE)
    pieces, open_ranges = [], []
    for file, name in files:
        for part in _cut(file, name, limit):
            open_ranges.append(part)
            if sum(r.size for r in open_ranges) >= limit:
                pieces.append(FilePiece(tuple(open_ranges), text_field))
                open_ranges = []
    if open_ranges:
        pieces.append(FilePiece(tuple(open_ranges), text_field))
    return pieces


def _kind(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(suffixes[-1] if suffixes else "", "text")


def _cut(path: Path, name: str, limit: int) -> Iterator[Range]:
    """Ranges of a file of about `limit` bytes; a text, and what is compressed, is one."""
    stat = path.stat()
    kind = _kind(path)
    if kind == "parquet":
        groups = _parquet_groups(path)
        begin, size = 0, 0
        for group, group_size in enumerate(groups):
            size += group_size
            if size >= limit or group == len(groups) - 1:
                yield Range(path, name, begin, group + 1, size, stat.st_mtime_ns)
                begin, size = group + 1, 0
    elif kind == "jsonl" and path.suffix not in COMPRESSED:
        for begin in range(0, stat.st_size, limit):
            end = min(begin + limit, stat.st_size)
            yield Range(path, name, begin, end, end - begin, stat.st_mtime_ns)
    else:
        yield Range(path, name, 0, stat.st_size, stat.st_size, stat.st_mtime_ns)


def _parquet_groups(path: Path) -> list[int]:
    """Bytes of each row group, as compressed as they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: no parquet file ({error})") from None
    columns = range(metadata.num_columns)
    return [
        sum(metadata.row_group(g).column(c).total_compressed_size for c in columns)
        for g in range(metadata.num_row_groups)
    ]


def _open(path: Path) -> io.BufferedReader:
    """A file's bytes, as they were before compression."""
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="detect"), buffer_size=MIB)  # pyright: ignore[reportArgumentType]  it has readinto


def _read_text(path: Path) -> Iterator[str]:
    offset = 0
    try:
        with _open(path) as file:
            while part := file.read(WHOLE_TEXT):
                part += file.readline()
                yield part.decode("utf-8")
                offset += len(part)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {offset + error.start} is not UTF-8; convert or remove the file") from None
    except OSError as error:
        raise DataError(f"{path}: {error}; the file is damaged or cannot be read") from None


def _read_jsonl(part: Range, text_field: str) -> Iterator[Document]:
    is_compressed = part.path.suffix in COMPRESSED
    begin, end = (0, None) if is_compressed else (part.begin, part.end)
    try:
        with _open(part.path) as lines:
            if begin:  # the line that begins before belongs to the range before
                lines.seek(begin - 1)
                begin += len(lines.readline()) - 1
            while (end is None or begin < end) and (line := lines.readline()):
                if line.strip():
                    yield Document(f"{part.name}@{begin}", [_text_of(line, part.path, begin, text_field)])
                begin += len(line)
    except OSError as error:
        raise DataError(f"{part.path}: {error}; the file is damaged or cannot be read") from None


def _text_of(line: bytes, path: Path, offset: int, text_field: str) -> str:
    def where() -> str:
        number, left = 1, offset
        with _open(path) as file:
            while left and (part := file.read(min(MIB, left))):
                number += part.count(b"\n")
                left -= len(part)
        return f"{path}:{number}"

    try:
        return _checked(json.loads(line)[text_field], text_field, where)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where()}: not JSON ({error})") from None
    except (KeyError, TypeError):
        raise DataError(f"{where()}: no field {text_field!r}; name it with --text-field") from None


def _checked(text: Any, text_field: str, where) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where()}: field {text_field!r} holds no text but {text!r:.40}")
    # JSON may hold halves of surrogate pairs, which no encoding has: they become the replacement character
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(part: Range, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part.path) as file:
            if text_field not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise DataError(f"{part.path}: no column {text_field!r} but {columns}; name it with --text-field")
            row = sum(file.metadata.row_group(g).num_rows for g in range(part.begin))
            groups = list(range(part.begin, part.end))
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    where = f"{part.path}: row {row}"
                    yield Document(f"{part.name}@{row}", [_checked(text, text_field, lambda where=where: where)])
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{part.path}: {error}; the file is damaged or cannot be read") from None
