"""Text on disk as documents: folders of text, JSON-lines and parquet files, cut into pieces that are read apart.

A piece is what one process tokenizes and what a stopped preparation loses at most: some small files, or a range of a
large one. How an input is cut depends on its files alone, never on the number of processes.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from longctx.data.chat import Chat, Completion
from longctx.errors import DataError

CONVERSATIONS = ("messages", "tools", "prompt", "completion")  # fields that conversations are in
COMPRESSED = (".zst", ".gz", ".bz2", ".lz4")
BOM = b"\xef\xbb\xbf"
MIB = 1 << 20
LONGEST_FIRST_LINE = 64 * MIB  # by the first line it is told whether a file holds JSON lines
PIECES = 64  # an input is cut into about so many, of these sizes in bytes
SMALLEST_PIECE, LARGEST_PIECE = 4 * MIB, 256 * MIB
WHOLE_TEXT = 4 * MIB  # a text file is tokenized in parts of this size, cut behind lines


class Document(NamedTuple):
    """One text. `name` decides its split, so it must not change between runs."""

    name: str
    pieces: Iterable[str]  # the text, in pieces that may be tokenized apart from each other
    is_validation: bool | None = None  # None: the hash of the name decides
    answers: Chat | Completion | None = None  # in place of a text: what is trained on in parts only
    find_place: Callable[[], str] | None = None  # for messages, which takes reading; None: its name says it

    @property
    def place(self) -> str:
        return self.find_place() if self.find_place else self.name


class Skipped(NamedTuple):
    """A file, line or row that cannot be read and is left out, as was asked for."""

    why: str
    find_place: Callable[[], str]  # which may take reading

    @property
    def place(self) -> str:
        return self.find_place()


class Piece(Protocol):
    """A part of the input. It can be pickled."""

    @property
    def size(self) -> int: ...  # bytes of input, for the progress bar

    @property
    def identity(self) -> str: ...  # changes when what it holds does

    def documents(self) -> Iterator[Document | Skipped]: ...


@dataclass(frozen=True)
class Range:
    """A part of a file: lines that begin in `begin` to `end` (bytes), parquet's row groups, or all of a text."""

    path: Path
    kind: str  # jsonl, parquet or text
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
    skip_unreadable: bool = False

    @property
    def size(self) -> int:
        return sum(r.size for r in self.ranges)

    @property
    def identity(self) -> str:
        ranges = [(r.kind, r.name, r.begin, r.end, r.size, r.changed_at) for r in self.ranges]
        return repr((self.text_field, self.skip_unreadable, ranges))

    def documents(self) -> Iterator[Document | Skipped]:
        """Raises `DataError` naming file and line, row or byte of what is no text, unless it is to be skipped."""
        readers = {"jsonl": self._read_jsonl, "parquet": self._read_parquet, "text": self._read_text}
        for part in self.ranges:
            try:
                yield from readers[part.kind](part)
            except UnreadableError as error:  # of the file: the rest of it is left out
                if not self.skip_unreadable:
                    raise
                yield Skipped(error.args[0].removeprefix(f"{part.path}: "), lambda path=part.path: str(path))

    def _read_text(self, part: Range) -> Iterator[Document | Skipped]:
        if self.skip_unreadable:  # read twice, so that no half of a document is kept
            for _ in _text_parts(part.path):
                pass
        yield Document(part.name, _text_parts(part.path))

    def _read_jsonl(self, part: Range) -> Iterator[Document | Skipped]:
        is_compressed = part.path.suffix in COMPRESSED
        begin, end = (0, None) if is_compressed else (part.begin, part.end)
        try:
            with _open(part.path) as lines:
                if begin:  # the line that begins before belongs to the range before
                    lines.seek(begin - 1)
                    begin += len(lines.readline()) - 1
                while (end is None or begin < end) and (line := lines.readline()):
                    if line.strip():
                        where = partial(_line_at, part.path, begin)
                        yield self._document(f"{part.name}@{begin}", _content_of_line, line, where)
                    begin += len(line)
        except _damage() as error:
            raise UnreadableError(f"{part.path}: {error}; the file is damaged or cannot be read") from None

    def _read_parquet(self, part: Range) -> Iterator[Document | Skipped]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(part.path) as file:
                there = file.schema_arrow.names
                columns = [self.text_field] if self.text_field in there else [c for c in CONVERSATIONS if c in there]
                if self.text_field in columns and (other := _conversation_beside(self.text_field, set(there))):
                    raise UnreadableError(
                        f"{part.path}: columns {self.text_field!r} and {other}: drop what is not to be trained on"
                    )
                if not columns:
                    raise UnreadableError(
                        f"{part.path}: no column {self.text_field!r} but {', '.join(there)}; name it with --text-field"
                    )
                row = sum(file.metadata.row_group(g).num_rows for g in range(part.begin))
                groups = list(range(part.begin, part.end))
                for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=columns):
                    for record in _rows(batch):
                        where = f"{part.path}: row {row}"
                        found = record if self.text_field in columns else _without_nulls(record)
                        yield self._document(f"{part.name}@{row}", _content_of_row, found, lambda where=where: where)
                        row += 1
        except (pa.ArrowException, OSError) as error:
            raise UnreadableError(f"{part.path}: {error}; the file is damaged or cannot be read") from None

    def _document(
        self, name: str, content_of: Callable[..., str | Chat | Completion], found: Any, where: Callable[[], str]
    ) -> Document | Skipped:  # fmt: skip
        try:
            content = content_of(found, self.text_field)
            pieces, answers = ([content], None) if isinstance(content, str) else ([], content)
            return Document(name, pieces, answers=answers, find_place=where)
        except UnreadableError as error:
            if not self.skip_unreadable:
                raise UnreadableError(f"{where()}: {error.args[0]}") from None
            return Skipped(error.args[0], where)


class UnreadableError(DataError):
    """A file, line or row that is no text, which `skip_unreadable` leaves out."""

    def __str__(self) -> str:
        return f"{super().__str__()}; or leave out what cannot be read with --skip-unreadable"


class Input(NamedTuple):
    """The files of an input, and what of it is left out."""

    files: list[tuple[Path, str]]  # with their names, which are the same from wherever the tool is called
    left_out: list[tuple[str, str]]  # name, and why


def find_files(paths: list[Path]) -> Input:
    """The files of `paths`: files, and folders searched to the bottom, sorted by path.

    Names that begin with a dot are left out of folders: they are other programs' notes (`.git`, `.cache` of a download,
    `.DS_Store`). Raises `DataError` if there is nothing at a path.
    """
    files: list[tuple[Path, str]] = []
    left_out: list[tuple[str, str]] = []
    for path in (Path(os.path.abspath(path)) for path in paths):  # names must not depend on where one stands
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_file():
            files.append((path, path.name))
            continue
        if not path.is_dir():
            raise DataError(f"{path}: is a pipe or a device, which cannot be read twice; write it to a file first")
        found, others = _search(path)
        files += [(file, str(file.relative_to(path.parent))) for file in sorted(found)]
        left_out += [(str(other.relative_to(path.parent)), why) for other, why in sorted(others)]
    return _each_once(files, left_out)


def _each_once(files: list[tuple[Path, str]], left_out: list[tuple[str, str]]) -> Input:
    """Without the other names of a file: a text that is read twice would be held out and trained on."""
    chosen: dict[tuple[int, int], int] = {}  # of each file the place of one of its names
    places = {}
    for place in sorted(range(len(files)), key=lambda i: files[i][0].is_symlink()):  # a file itself before links to it
        stat = files[place][0].stat()
        places[place] = chosen.setdefault((stat.st_dev, stat.st_ino), place)
    for place, first in sorted(places.items()):
        if place != first:
            left_out.append((files[place][1], f"the same file as {files[first][1]}"))
    return Input([files[place] for place in sorted(chosen.values())], left_out)


def _search(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    found: list[Path] = []
    left_out: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        left_out.append((Path(error.filename), f"{error.strerror}"))

    for root, folders, names in os.walk(folder, onerror=unreadable):
        for name in [*folders, *names]:
            path = Path(root, name)
            if name.startswith("."):
                left_out.append((path, "its name begins with a dot"))
            elif name in folders:
                if path.is_symlink():
                    left_out.append((path, "a link to a folder; name that folder as an input of its own"))
            elif path.is_file():
                found.append(path)
            else:
                left_out.append((path, "no file, or a link to nothing"))
        folders[:] = [name for name in folders if not name.startswith(".")]
    return found, left_out


def cut_files(files: list[tuple[Path, str]], text_field: str, skip_unreadable: bool = False) -> list[FilePiece]:
    """Files as pieces. JSON lines hold a document a line, parquet one a row, both in `text_field`; others are one each.

    What a file holds is told by its content: JSON lines may have any name, and be compressed (`.zst`, `.gz`, `.bz2`,
    `.lz4`). Raises `DataError`, if a file cannot be read: unless `skip_unreadable`, which leaves it out.
    """
    total = sum(file.stat().st_size for file, _ in files)
    # a power of two, so that a small change of the input leaves most cuts where they are
    limit = min(max(1 << max(total // PIECES, 1).bit_length() - 1, SMALLEST_PIECE), LARGEST_PIECE)
    pieces, open_ranges = [], []
    for file, name in files:
        for part in _cut(file, name, limit, text_field, skip_unreadable):
            open_ranges.append(part)
            if sum(r.size for r in open_ranges) >= limit:
                pieces.append(FilePiece(tuple(open_ranges), text_field, skip_unreadable))
                open_ranges = []
    if open_ranges:
        pieces.append(FilePiece(tuple(open_ranges), text_field, skip_unreadable))
    return pieces


def files_by_kind(pieces: Iterable[FilePiece]) -> dict[str, tuple[int, int]]:
    """Kind of file -> how many, and their bytes: `JSON lines, compressed`, `parquet`, `text`."""
    names = {"jsonl": "JSON lines", "parquet": "parquet", "text": "text"}
    sizes: dict[tuple[str, Path], int] = {}
    for part in (part for piece in pieces for part in piece.ranges):
        kind = names[part.kind] + (", compressed" if part.path.suffix in COMPRESSED else "")
        sizes[kind, part.path] = sizes.get((kind, part.path), 0) + part.size
    return {
        kind: (sum(k == kind for k, _ in sizes), sum(size for (k, _), size in sizes.items() if k == kind))
        for kind in dict.fromkeys(kind for kind, _ in sizes)
    }


def _kind(path: Path, text_field: str) -> str:
    """What a file holds: by its content, where its name does not say it."""
    suffixes = [s.lower() for s in path.suffixes if s not in COMPRESSED]
    by_name = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    if kind := by_name.get(suffixes[-1] if suffixes else ""):
        return kind
    try:
        with _open(path) as file:
            first = file.readline(LONGEST_FIRST_LINE).removeprefix(BOM)
            while first and not first.strip():
                first = file.readline(LONGEST_FIRST_LINE)
            second = file.readline(LONGEST_FIRST_LINE) if first.lstrip().startswith(b"{") else b""
    except _damage():  # reading it will say so
        return "text"
    if first.startswith(b"PAR1"):
        return "parquet"
    record, fields = _record_of(first), {text_field, *CONVERSATIONS}
    if record is not None and (record.keys() & fields or _record_of(second) is not None):
        return "jsonl"
    if len(first) == LONGEST_FIRST_LINE and first.lstrip().startswith(b"{") and _fields_of_begun(first[:MIB]) & fields:
        return "jsonl"
    if first.lstrip().startswith(b"[") and _is_array_of_records(path, text_field):
        raise DataError(f"{path}: holds a JSON array of records; make JSON lines of it, a record a line (jq -c '.[]')")
    return "text"


def _is_array_of_records(path: Path, text_field: str) -> bool:
    """Whether a file begins as a JSON array of records with text or conversations, on one line or many."""
    with _open(path) as file:
        begin = file.read(MIB).removeprefix(BOM).decode("utf-8", "replace").lstrip()
    element = begin.removeprefix("[").lstrip()
    try:
        record, _ = json.JSONDecoder().raw_decode(element)
        fields = set(record) if isinstance(record, dict) else set()
    except (ValueError, RecursionError):
        is_cut = len(element) > MIB // 2  # a record longer than that: by what looks like its fields
        fields = _fields_of_begun(element.encode()) if is_cut and element.startswith("{") else set()
    return bool(fields & {text_field, *CONVERSATIONS})


def _fields_of_begun(record: bytes) -> set[str]:
    """What looks like the fields of a JSON object of which there is the beginning alone."""
    return {name.decode("utf-8", "replace") for name in re.findall(rb'[{,]\s*"([^"]*)"\s*:', record)}


def _record_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, if it is one."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _cut(path: Path, name: str, limit: int, text_field: str, skip_unreadable: bool) -> Iterator[Range]:
    """Ranges of a file of about `limit` bytes; a text, and what is compressed, is one."""
    stat = path.stat()
    kind = _kind(path, text_field)
    if kind == "parquet":
        try:
            groups = _parquet_groups(path)
        except UnreadableError:
            if not skip_unreadable:
                raise
            groups = [stat.st_size]  # which reading it will leave out
        begin, size = 0, 0
        for group, group_size in enumerate(groups):
            size += group_size
            if size >= limit or group == len(groups) - 1:
                yield Range(path, kind, name, begin, group + 1, size, stat.st_mtime_ns)
                begin, size = group + 1, 0
    elif kind == "jsonl" and path.suffix not in COMPRESSED:
        for begin in range(0, stat.st_size, limit):
            end = min(begin + limit, stat.st_size)
            yield Range(path, kind, name, begin, end, end - begin, stat.st_mtime_ns)
    else:
        yield Range(path, kind, name, 0, stat.st_size, stat.st_size, stat.st_mtime_ns)


def _parquet_groups(path: Path) -> list[int]:
    """Bytes of each row group, as compressed as they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableError(f"{path}: no parquet file ({error})") from None
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


def _text_parts(path: Path) -> Iterator[str]:
    """A text file in parts that end behind lines, without a byte-order mark."""
    offset = 0
    try:
        with _open(path) as file:
            while part := file.read(WHOLE_TEXT):
                part += file.readline()
                if (nul := part.find(b"\0")) >= 0:
                    raise UnreadableError(
                        f"{path}: byte {offset + nul} is 0, so this is no text: unpack an archive (tar), convert UTF-16"
                    )
                yield (part if offset else part.removeprefix(BOM)).decode("utf-8")
                offset += len(part)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path}: byte {offset + error.start} is not UTF-8; convert or remove the file") from None
    except _damage() as error:
        raise UnreadableError(f"{path}: {error}; the file is damaged or cannot be read") from None


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    import pyarrow as pa

    return OSError, pa.ArrowException


def _line_at(path: Path, offset: int) -> str:
    """The place of the line that begins at a byte."""
    number, left = 1, offset
    with _open(path) as file:
        while left and (part := file.read(min(MIB, left))):
            number += part.count(b"\n")
            left -= len(part)
    return f"{path}:{number}"


def _rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch of Arrow's; in place of one whose text is not UTF-8 the error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _content_of_row(row: Any, text_field: str) -> str | Chat | Completion:
    if isinstance(row, UnicodeDecodeError):
        raise UnreadableError(f"byte {row.start} of a text is not UTF-8")
    return _content(row, text_field)


def _content_of_line(line: bytes, text_field: str) -> str | Chat | Completion:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"not JSON ({error})") from None
    return _content(record, text_field)


def _content(record: Any, text_field: str) -> str | Chat | Completion:
    """What a record holds: a text, a conversation (`messages`), or `prompt` and `completion`, texts or messages."""
    record = record if isinstance(record, dict) else {}
    there = {key for key, value in record.items() if value is not None}
    if text_field in there and (other := _conversation_beside(text_field, there)):
        raise UnreadableError(f"fields {text_field!r} and {other}: drop what is not to be trained on")
    if text_field in record and (text_field in there or not _conversation_beside(text_field, set(record))):
        return _checked(record[text_field], text_field)
    tools = record.get("tools")
    if isinstance(tools, str):  # as datasets keep what has no fixed columns
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UnreadableError(f"field 'tools' is not JSON ({error})") from None
    tools = _encodable(tools)
    if "messages" in record:
        return Chat(_messages(record["messages"], "messages"), tools or None)
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Completion(_checked(prompt, "prompt"), _checked(completion, "completion"))
        given = _messages(prompt, "prompt")
        return Chat([*given, *_messages(completion, "completion")], tools or None, len(given))
    raise UnreadableError(
        f"no field {text_field!r}; name it with --text-field (also read: messages; prompt and completion)"
    )


def _conversation_beside(text_field: str, there: set[str]) -> str:
    """Which of the fields that are there hold what is trained on in parts, beside a text; empty: none."""
    if "messages" in there - {text_field}:
        return "'messages'"
    return "'prompt' with 'completion'" if {"prompt", "completion"} <= there - {text_field} else ""


def _messages(found: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) and "role" in m for m in found):
        raise UnreadableError(f"field {field!r} holds no list of messages, each with a role: {found!r:.60}")
    return [_message(message) for message in found]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it: content as one text, arguments of calls as objects, nothing that is null."""
    message = {key: _encodable(value) for key, value in message.items() if value is not None}
    role = message["role"]
    if role == "assistant" and message.get("weight", 1) != 1:
        raise UnreadableError(f"a message has weight {message['weight']}; a turn cannot be left out of training")
    content = message.get("content", "")
    if isinstance(content, list) and (role != "tool" or _is_text_in_parts(content)):
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        message["content"] = content = "".join(texts) if len(texts) == len(content) else content
    if not isinstance(content, str) and role in ("system", "user", "assistant"):  # what a tool gives may be an object
        raise UnreadableError(f"content of a message holds no text but {message['content']!r:.60}")
    calls = message.get("tool_calls") or []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UnreadableError(f"tool_calls hold no list of calls, each with a function: {calls!r:.60}")
        if isinstance(arguments := function.get("arguments"), str):  # as OpenAI has them
            try:
                function["arguments"] = _encodable(json.loads(arguments or "{}"))
            except (ValueError, RecursionError) as error:
                raise UnreadableError(f"arguments of a call are not JSON ({error})") from None
    return message


def _is_text_in_parts(content: list[Any]) -> bool:
    """Whether a tool's result is OpenAI's parts of a text, and no list of the tool's own."""
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    return 0 < len(parts) == len(content)


def _encodable(value: Any) -> Any:
    """JSON may hold halves of surrogate pairs, which no encoding has: they become the replacement character."""
    if isinstance(value, dict):
        return {key: _encodable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_encodable(inner) for inner in value]
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _without_nulls(value: Any) -> Any:
    """Without what Arrow fills in where one row's object lacks a key that another row's has."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _checked(text: Any, text_field: str) -> str:
    if not isinstance(text, str):
        raise UnreadableError(f"field {text_field!r} holds no text but {text!r:.40}")
    return _encodable(text)
