"""Token files that other projects have written, read where they are: nanoGPT's and Megatron's.

Nothing is converted. Where such files lack what a run can use (a tokenizer, where documents end), `data.tokenizer` and
`data.end_of_document` tell it.
"""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

import numpy as np

from longctx.config import DataConfig, TokenDtype
from longctx.data.tokenizer import count_bytes, find_end_of_document, open_tokenizer
from longctx.data.tokens import BEFORE, MANIFEST, Corpus, TokenFolder, TokenSplit, check_document_ends, check_ids
from longctx.errors import DataError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
GPT2_END = 50256  # <|endoftext|>
SAMPLE = 1 << 20  # bytes at both ends of a file that go into its fingerprint


def open_corpus(folder: Path, vocab_size: int, data: DataConfig, rank: int = 0, ranks: int = 1) -> Corpus:
    """The token files of a folder, checked against the model's `vocab_size`, each rank reading its part.

    A folder with `manifest.json` is longctx's own, one with `*.idx` is Megatron's, one with `train.bin` nanoGPT's.
    Raises `DataError` naming the file, what is wrong with it and what to do.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; make it with tools/prepare_data.py, or name the one that has the files"
        )
    if (folder / MANIFEST).exists():
        corpus = TokenFolder(folder, vocab_size, data.check_hashes, rank, ranks)
        if corpus.manifest.format == BEFORE:  # whose file has nothing for added tokens
            corpus.token_bytes = count_bytes(open_tokenizer(folder / "tokenizer.json"))
        return corpus
    if any(folder.glob("*.idx")):
        return MegatronFolder(folder, vocab_size, data, rank, ranks)
    if (folder / "train.bin").exists():
        return NanoGPTFolder(folder, vocab_size, data, rank, ranks)
    raise DataError(
        f"{folder}: neither {MANIFEST} (longctx) nor *.idx (Megatron) nor train.bin (nanoGPT) in it; make it with "
        "tools/prepare_data.py, or name the folder that has the files"
    )


class _GivenTokenizer:
    """What `data.tokenizer` says of files that come without one; nothing if it is empty."""

    def __init__(self, data: DataConfig, vocab_size: int) -> None:
        self.end_of_document = GPT2_END if data.end_of_document is None else data.end_of_document
        self.file: Path | None = None
        self.vocab, self.token_bytes = vocab_size, None
        if not data.tokenizer:
            return
        self.file = Path(data.tokenizer).expanduser()
        if not self.file.is_file():
            raise DataError(f"data.tokenizer={data.tokenizer}: no such file; name a tokenizer.json")
        tokenizer = open_tokenizer(self.file)
        if data.end_of_document is None:
            self.end_of_document = find_end_of_document(tokenizer, self.file, option="data.end_of_document (an id)")
        lengths = count_bytes(tokenizer)
        if len(lengths) > vocab_size:
            raise DataError(
                f"data.tokenizer={data.tokenizer} has {len(lengths)} ids, model.vocab_size is {vocab_size}; set "
                f"model.vocab_size={len(lengths)} or more"
            )
        self.vocab = len(lengths)
        self.token_bytes = np.pad(lengths, (0, vocab_size - len(lengths)))  # files may have ids the tokenizer lacks


class NanoGPTFolder:
    """nanoGPT's `train.bin` and `val.bin`: ids and nothing else; `data.end_of_document` closes each document.

    Ids are uint16, or what `data.token_dtype` says: a file does not tell, and a vocabulary of more than 65,536 asks.
    """

    document_begin: list[int] | None = None
    chat_prompt: list[str] = []  # noqa: RUF012  the protocol has it of instances
    has_conversations: bool = False

    def __init__(self, folder: Path, vocab_size: int, data: DataConfig, rank: int, ranks: int) -> None:
        self.folder, given = folder, _GivenTokenizer(data, vocab_size)
        self.tokenizer_file, self.tokenizer_vocab, self.token_bytes = given.file, given.vocab, given.token_bytes
        self.end_of_document, self.ends, self.notes = given.end_of_document, [given.end_of_document], []
        dtype = _nanogpt_dtype(folder, vocab_size, data)
        self.paths = {s: folder / f for s, f in (("train", "train.bin"), ("validation", "val.bin"))}
        self.splits = {}
        for number, (split, path) in enumerate(self.paths.items()):
            if not path.exists():
                self.splits[split] = TokenSplit([], [])
                continue
            ids = _map(path, dtype)
            if dtype == "<u2":
                _refuse_wider_ids(path, ids)
            if number % ranks == rank:
                check_ids(path, ids, vocab_size)
            self.splits[split] = TokenSplit([ids], [_ends_by_id(ids, given.end_of_document)])
        files = _fingerprint([path for path in self.paths.values() if path.exists()])
        self._fingerprint = f"{files}-{given.end_of_document}" + ("" if dtype == "<u2" else f"-{dtype[1:]}")

    def fingerprint(self) -> str:
        """Of the files' sizes, both ends of their content, and the id that closes documents."""
        return self._fingerprint


def _nanogpt_dtype(folder: Path, vocab_size: int, data: DataConfig) -> str:
    if data.token_dtype == TokenDtype.auto and vocab_size > 1 << 16:
        raise DataError(
            f"{folder}: nanoGPT's files do not say how wide their ids are, and model.vocab_size={vocab_size} is more "
            f"than uint16 can tell apart; set data.token_dtype=uint32 (or uint16, if they are of a smaller vocabulary)"
        )
    return "<u4" if data.token_dtype == TokenDtype.uint32 else "<u2"


def _refuse_wider_ids(path: Path, ids: np.ndarray) -> None:
    """Of a file of uint32 read as uint16, every second id is 0."""
    begin = ids[:SAMPLE]
    if len(begin) >= 64 and not begin[1::2].any() and begin[::2].any():
        raise DataError(f"{path}: every second id is 0, so these seem to be of uint32; set data.token_dtype=uint32")


class MegatronFolder:
    """Megatron's `*.idx` and `*.bin`, by a word in their name: `val`, `valid` or `validation` is the validation split,
    `test` is left out; numbers may follow."""

    document_begin: list[int] | None = None
    chat_prompt: list[str] = []  # noqa: RUF012  the protocol has it of instances
    has_conversations: bool = False

    def __init__(self, folder: Path, vocab_size: int, data: DataConfig, rank: int, ranks: int) -> None:
        self.folder, given = folder, _GivenTokenizer(data, vocab_size)
        self.tokenizer_file, self.tokenizer_vocab, self.token_bytes = given.file, given.vocab, given.token_bytes
        self.end_of_document, self.ends = given.end_of_document, [given.end_of_document]
        kinds = {path: _split_of(path) for path in sorted(folder.glob("*.idx"))}
        self.notes = [f"{path}: left out, by its name it is to test with" for path in kinds if kinds[path] == "test"]
        self.paths = [path for path in kinds if kinds[path] != "test"]
        shards: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "validation": []}
        for number, path in enumerate(self.paths):
            ids, ends = read_megatron(path)
            if number % ranks == rank:
                check_document_ends(path, ends, len(ids))
                check_ids(path.with_suffix(".bin"), ids, vocab_size)
            shards[kinds[path]].append((ids, ends))
        if not shards["train"]:
            raise DataError(
                f"{folder}: every *.idx is one to validate or test with by its name; none to train on is left"
            )
        self.splits = {s: TokenSplit([ids for ids, _ in p], [ends for _, ends in p]) for s, p in shards.items()}
        self._fingerprint = _fingerprint([path.with_suffix(kind) for path in self.paths for kind in (".idx", ".bin")])

    def fingerprint(self) -> str:
        """Of the files' sizes and both ends of their content."""
        return self._fingerprint


def _split_of(index: Path) -> str:
    """`train`, `validation` or `test`, by the words of a file's name."""
    for word in re.split(r"[-_.]", index.stem):
        if re.fullmatch(r"val(id(ation)?)?\d*", word):
            return "validation"
        if re.fullmatch(r"test\d*", word):
            return "test"
    return "train"


def read_megatron(index: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids and document ends of a pair of Megatron's files. Raises `DataError` if they do not belong together.

    The index is: magic, version 1 (u64), a code for the type of the ids (u8), the numbers of sequences and of document
    borders (u64 each), then the sequences' lengths (i32), their offsets in bytes (i64), and the borders, as numbers of
    sequences, from 0 on (i64). (Megatron-LM, core/datasets/indexed_dataset.py)
    """
    path = index.with_suffix(".bin")
    if not path.exists():
        raise DataError(f"{path}: missing; it belongs to {index.name}")
    content = np.memmap(index, dtype="u1", mode="r") if index.stat().st_size else np.empty(0, dtype="u1")
    header = struct.Struct("<9sQBQQ")
    if len(content) < header.size or bytes(content[:9]) != INDEX_MAGIC:
        raise DataError(f"{index}: does not begin as an index of Megatron's; make it again with its preprocess_data.py")
    _, version, code, sequences, borders = header.unpack(bytes(content[: header.size]))
    if version != 1 or code not in INDEX_DTYPES:
        raise DataError(f"{index}: version {version}, type of ids {code}; version 1 with integers can be read")
    lengths_at, offsets_at = header.size, header.size + 4 * sequences
    borders_at = offsets_at + 8 * sequences
    if len(content) < borders_at + 8 * borders:  # behind them there may be a mode for each sequence
        raise DataError(
            f"{index}: {len(content)} bytes, {sequences} sequences and {borders} borders need "
            f"{borders_at + 8 * borders}: the file is cut off; copy it again"
        )
    lengths = content[lengths_at:offsets_at].view("<i4").astype(np.int64)
    offsets = content[offsets_at:borders_at].view("<i8")
    document_borders = content[borders_at : borders_at + 8 * borders].view("<i8")
    width = np.dtype(INDEX_DTYPES[code]).itemsize
    ends = np.cumsum(lengths)
    tokens = int(ends[-1]) if sequences else 0
    if path.stat().st_size != tokens * width:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, {index.name} says {tokens * width}; copy both files again"
        )
    misplaced = np.flatnonzero(offsets != (ends - lengths) * width)
    if len(misplaced):
        raise DataError(f"{index}: sequence {misplaced[0]} is not behind the one before; make the files again")
    if (
        not borders or document_borders[0] != 0 or document_borders[-1] != sequences
        or (np.diff(document_borders) < 0).any()
    ):  # fmt: skip
        raise DataError(f"{index}: its document borders do not rise from 0 to {sequences}; make the files again")
    document_ends = ends[document_borders[1:][document_borders[1:] > 0] - 1]
    # a document without sequences, or whose sequences have no tokens, is none
    return _map(path, INDEX_DTYPES[code]), np.unique(document_ends[document_ends > 0])


def _map(path: Path, dtype: str) -> np.ndarray:
    width = np.dtype(dtype).itemsize
    size = path.stat().st_size
    if size % width:
        raise DataError(f"{path}: {size} bytes are no multiple of {width}, the size of an id: the file is cut off")
    return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)


def _ends_by_id(ids: np.ndarray, end_of_document: int, chunk: int = 1 << 24) -> np.ndarray:
    """The index after each `end_of_document`, and after the last token."""
    found = [
        np.flatnonzero(ids[first : first + chunk] == end_of_document) + first + 1
        for first in range(0, len(ids), chunk)
    ]  # fmt: skip
    ends = np.concatenate([*found, [len(ids)]]).astype(np.int64)
    return np.unique(ends[ends > 0])


def _fingerprint(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(SAMPLE)
            file.seek(max(0, size - SAMPLE))
            digest.update(f"{path.name} {size} ".encode() + first + file.read(SAMPLE))
    return digest.hexdigest()[:16]
