"""Token shards on disk: written once by `prepare.py`, read memory-mapped.

A folder holds, for each split (train, validation), shards of two raw little-endian files: `*.tokens`, the ids (uint16,
or uint32 where the vocabulary needs it) of whole documents, each closed by the end-of-document id, and `*.documents`,
int64, for each document the index after its last token. Shards with conversations have a third, `*.trained`: a bit for
each token, the lowest of a byte first, which says whether it is trained on. `token_bytes.bin` (uint16) says how many
bytes of text each id stands for. `manifest.json` names all files with sizes and sha256, its own too, and the tokenizer,
a copy of which lies beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longctx.errors import DataError
from longctx.files import outside, read_manifest, sha256, sync, write_manifest

FORMAT = "longctx-tokens-3"
BEFORE = "longctx-tokens-2"  # still read, with a note: see `NOTE_ON_BEFORE`
NOTE_ON_BEFORE = (
    "was prepared by an earlier version of longctx, which left out the tokenizer's own begin-of-text, took special "
    "tokens that a text spells for the tokens, and cut documents where tokenizer.json has a truncation; bytes of added "
    "tokens are counted anew here. Prepare it again, unless none of this is in your text"
)
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
NO_END = "-1"  # in place of the id of the token that an answer ends with


@dataclass
class Shard:
    """One shard of a split, as the manifest has it."""

    name: str  # files are <name>.tokens and <name>.documents
    tokens: int
    documents: int
    text_bytes: int
    tokens_sha256: str
    documents_sha256: str
    trained_sha256: str = ""  # empty: all tokens are trained on

    def sizes(self, width: int) -> dict[str, int]:
        """Its files and their bytes; `width`: bytes of an id."""
        sizes = {f"{self.name}.tokens": self.tokens * width, f"{self.name}.documents": self.documents * 8}
        return sizes | ({f"{self.name}.trained": -(-self.tokens // 8)} if self.trained_sha256 else {})

    def fields(self) -> dict[str, Any]:
        """As the manifest has it: what is empty is left out, as before there was any."""
        return {name: value for name, value in asdict(self).items() if name != "trained_sha256" or value}


@dataclass
class Manifest:
    """What a folder of token shards holds."""

    dtype: str  # numpy name of the ids' type
    vocab_size: int
    document_begin: list[int]  # ids before the text of each document, as the tokenizer's template has it
    document_end: list[int]  # ids after it; the last one is the end-of-document token
    tokenizer_sha256: str
    token_bytes_sha256: str
    splits: dict[str, list[Shard]]
    source: str = ""  # where the text came from, for people
    skipped: int = 0  # files, lines and rows that could not be read
    skipped_examples: list[str] = field(default_factory=list)  # of them, where and why
    chat_prompt: list[str] = field(default_factory=list)  # of conversations: what stands before and after a question
    answers: dict[str, int] = field(default_factory=dict)  # of conversations, by the id of the token they end with
    format: str = FORMAT

    @property
    def end_of_document(self) -> int:
        return self.document_end[-1]

    @property
    def ends(self) -> list[int]:
        """Ids at which what is generated ends: those of answers, the most frequent first, and that of documents."""
        ends_of_answers = [int(i) for i in self.answers if i != NO_END]
        return list(dict.fromkeys([*ends_of_answers, self.end_of_document]))

    def fields(self) -> dict[str, Any]:
        """As they are written: without `chat_prompt` and `answers` where there are no conversations."""
        splits = {split: [shard.fields() for shard in shards] for split, shards in self.splits.items()}
        fields = asdict(self) | {"splits": splits}
        return {name: value for name, value in fields.items() if name not in ("chat_prompt", "answers") or value}

    def write(self, folder: Path) -> None:
        write_manifest(folder / MANIFEST, self.fields())

    @staticmethod
    def read(folder: Path) -> Manifest:
        path = folder / MANIFEST
        try:
            fields = read_manifest(path, FORMAT, BEFORE)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; make the folder with tools/prepare_data.py") from None
        except NotADirectoryError:
            raise DataError(
                f"{folder}: is a file; prepare it with tools/prepare_data.py, and give the folder"
            ) from None
        except ValueError as error:
            raise DataError(f"{path}: {error}; prepare the folder again") from None
        if fields["format"] == BEFORE:
            fields |= {"document_begin": [], "document_end": [fields.pop("end_of_document")]}
        fields["splits"] = {split: [Shard(**s) for s in shards] for split, shards in fields["splits"].items()}
        return Manifest(**fields)


class TokenSplit:
    """The documents of one split as one stream of tokens."""

    def __init__(
        self, tokens: list[np.ndarray], document_ends: list[np.ndarray], trained: list[np.ndarray | None] | None = None
    ) -> None:  # fmt: skip
        """Of each shard: its ids, for each document the index after its last token, and bits that say which tokens are
        trained on (None: all). All may be memory-mapped."""
        self.tokens, self.document_ends = tokens, document_ends
        self.trained = trained or [None] * len(tokens)
        self.first = np.cumsum([0, *(len(ids) for ids in tokens)])  # of each shard in the stream, and the end

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def is_partly_trained(self) -> bool:
        """Whether there are tokens that are not trained on: those of conversations that are no answers."""
        return any(bits is not None for bits in self.trained)

    def trained_of_shard(self, shard: int) -> np.ndarray:
        """Which tokens of a shard are trained on, bool."""
        return _bits(self.trained[shard], 0, len(self.tokens[shard]))

    def read(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`count` tokens from `offset`: ids (int64), the indices in them where a new document begins, and which are
        trained on (bool).

        Raises `DataError` if a file has become shorter than it was when it was opened.
        """
        ids, starts, trained = [], [], []
        for shard, begin, end in self._parts(offset, count):
            check_still_whole(self.tokens[shard])
            check_still_whole(self.document_ends[shard])
            ids.append(np.asarray(self.tokens[shard][begin:end], dtype=np.int64))
            trained.append(_bits(self.trained[shard], begin, end))
            ends = self.document_ends[shard]
            low = np.searchsorted(ends, begin, "left")
            high = np.searchsorted(ends, end, "right")  # one may end where the shard does
            starts.append(np.asarray(ends[low:high]) + int(self.first[shard]) - offset)
        starts = np.concatenate(starts)
        return np.concatenate(ids), starts[(starts > 0) & (starts < count)], np.concatenate(trained)

    def read_pieces(self, pieces: list[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of pieces of documents, given by their first and last token: ids, and which are trained on (bool).

        As `read`, but each file is looked at once, not at every piece.
        """
        shards = [int(np.searchsorted(self.first, begin, "right")) - 1 for begin, _ in pieces]
        for shard in set(shards):
            check_still_whole(self.tokens[shard])
            check_still_whole(self.trained[shard])
        for shard, (begin, last) in zip(shards, pieces, strict=True):
            first = int(self.first[shard])
            part = begin - first, last + 1 - first
            yield self.tokens[shard][slice(*part)], _unpacked(self.trained[shard], *part)

    def _parts(self, offset: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The shards that hold `count` tokens from `offset`, and where in each they begin and end."""
        for shard in range(int(np.searchsorted(self.first, offset, "right")) - 1, len(self.tokens)):
            shard_first = int(self.first[shard])
            if shard_first >= offset + count:
                break
            begin, end = max(offset, shard_first), min(offset + count, int(self.first[shard + 1]))
            if begin < end:  # else a shard without tokens
                yield shard, begin - shard_first, end - shard_first


def _bits(packed: np.ndarray | None, begin: int, end: int) -> np.ndarray:
    """Bits `begin` to `end`; all are set where there are none. Raises `DataError` as `check_still_whole`."""
    check_still_whole(packed)
    return _unpacked(packed, begin, end)


def _unpacked(packed: np.ndarray | None, begin: int, end: int) -> np.ndarray:
    if packed is None:
        return np.ones(end - begin, dtype=bool)
    first = begin // 8
    unpacked = np.unpackbits(np.asarray(packed[first : -(-end // 8)]), bitorder="little")
    return unpacked[begin - 8 * first : end - 8 * first].astype(bool)


def check_still_whole(values: np.ndarray | None) -> None:
    """Raises `DataError` if the file that `values` are mapped from was cut short since: reading on would be SIGBUS."""
    if not isinstance(values, np.memmap) or values.filename is None:
        return
    size, expected = os.stat(values.filename).st_size, values.offset + values.nbytes
    if size < expected:
        raise DataError(
            f"{values.filename}: {size} bytes, it had {expected} when the run opened it: the file was cut short while "
            "it is being read; restore it and start the run again, which resumes"
        )


class Corpus(Protocol):
    """Token files of one folder, checked, in whatever format."""

    folder: Path
    splits: dict[str, TokenSplit]  # train, and validation if there is one
    tokenizer_file: Path | None
    tokenizer_vocab: int  # ids the tokenizer has
    token_bytes: np.ndarray | None  # bytes of text each id stands for
    document_begin: list[int] | None  # ids each document begins with, before its text; None: not known
    end_of_document: int  # id that closes a document
    ends: list[int]  # as of `Manifest`
    chat_prompt: list[str]  # as of `Manifest`
    has_conversations: bool
    notes: list[str]  # what its user should know

    def fingerprint(self) -> str: ...


class TokenFolder:
    """A prepared folder, checked: sizes against the manifest, ids against the vocabulary, no empty documents."""

    def __init__(
        self, folder: str | Path, vocab_size: int, check_hashes: bool = False, rank: int = 0, ranks: int = 1
    ) -> None:
        """Raises `DataError` naming the file and offset of what is wrong. `vocab_size`: of the model.

        What has to be read in full is shared: `rank` of `ranks` reads its part of the shards.
        """
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.vocab_size = vocab_size
        if self.manifest.vocab_size > vocab_size:
            raise DataError(
                f"{self.folder}: its tokenizer has {self.manifest.vocab_size} ids, model.vocab_size is {vocab_size}; "
                f"set model.vocab_size={self.manifest.vocab_size} or more"
            )
        for name, digest in (
            ("tokenizer.json", self.manifest.tokenizer_sha256),
            ("token_bytes.bin", self.manifest.token_bytes_sha256),
        ):
            self._check_file(name, None, digest)
        for number, shard in enumerate(s for shards in self.manifest.splits.values() for s in shards):
            self._check_shard(shard, check_hashes, is_read=number % ranks == rank)
        self.token_bytes: np.ndarray | None = np.fromfile(self.folder / "token_bytes.bin", dtype="<u2")
        self.document_begin: list[int] | None = self.manifest.document_begin
        self.end_of_document, self.notes = self.manifest.end_of_document, []
        self.chat_prompt, self.ends = self.manifest.chat_prompt, self.manifest.ends
        self.has_conversations = bool(self.manifest.answers or self.chat_prompt)
        if self.manifest.format == BEFORE:
            self.notes.append(f"{self.folder} {NOTE_ON_BEFORE}")
        self.splits = {
            split: TokenSplit(
                [self._map(f"{s.name}.tokens", self.manifest.dtype) for s in shards],
                [self._map(f"{s.name}.documents", "<i8") for s in shards],
                [self._map(f"{s.name}.trained", "u1") if s.trained_sha256 else None for s in shards],
            )
            for split, shards in self.manifest.splits.items()
        }
        self.tokenizer_vocab = self.manifest.vocab_size
        self.tokenizer_file: Path | None = self.folder / "tokenizer.json"

    def _map(self, name: str, dtype: str) -> np.ndarray:
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    def fingerprint(self) -> str:
        """Hash of the whole corpus: two folders with the same one hold the same tokens in the same order."""
        shards = [[s.fields() for s in self.manifest.splits.get(split, [])] for split in SPLITS]
        return hashlib.sha256(json.dumps([self.manifest.tokenizer_sha256, shards]).encode()).hexdigest()[:16]

    def _check_file(self, name: str, size: int | None, digest: str | None) -> None:
        path = self.folder / name
        if problem := outside(self.folder, name):
            raise DataError(problem)
        if not path.is_file():
            raise DataError(f"{path}: missing; prepare the folder again")
        if size is not None and path.stat().st_size != size:
            raise DataError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}; prepare it again")
        if digest is not None and sha256(path) != digest:
            raise DataError(f"{path}: its sha256 is not the manifest's: the file was changed; prepare it again")

    def _check_shard(self, shard: Shard, check_hashes: bool, is_read: bool) -> None:
        sizes = shard.sizes(np.dtype(self.manifest.dtype).itemsize)
        digests = shard.tokens_sha256, shard.documents_sha256, shard.trained_sha256
        for (name, size), digest in zip(sizes.items(), digests, strict=False):
            self._check_file(name, size, digest if check_hashes and is_read else None)
        if not is_read:
            return
        tokens, documents = f"{shard.name}.tokens", f"{shard.name}.documents"
        check_document_ends(self.folder / documents, self._map(documents, "<i8"), shard.tokens)
        check_ids(self.folder / tokens, self._map(tokens, self.manifest.dtype), self.vocab_size)


def check_document_ends(path: Path, ends: np.ndarray, tokens: int) -> None:
    """Raises `DataError` unless `ends` rise to `tokens`. `path` is the file they are in."""
    empty = np.flatnonzero(np.diff(ends, prepend=0) <= 0)
    if len(empty):
        raise DataError(f"{path}: document {empty[0]} is empty; prepare it again")
    if (ends[-1] if len(ends) else 0) != tokens:
        raise DataError(f"{path}: ends at {ends[-1] if len(ends) else 0}, the tokens at {tokens}; prepare it again")


def check_ids(path: Path, ids: np.ndarray, vocab_size: int, chunk: int = 1 << 24) -> None:
    """Raises `DataError` if a token of the file at `path` is outside the vocabulary."""
    for offset in range(0, len(ids), chunk):
        part = ids[offset : offset + chunk]
        if part.min() < 0 or part.max() >= vocab_size:
            where = int(np.argmax((part < 0) | (part >= vocab_size)))
            raise DataError(
                f"{path}: token {offset + where} has id {part[where]}, outside the vocabulary of {vocab_size}; set "
                "model.vocab_size or prepare the text with the model's tokenizer"
            )


class ShardWriter:
    """Writes documents, one after the other, as one shard; `finish` says what it became."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.file, self.digest = (folder / f"{name}.tokens").open("wb"), hashlib.sha256()
        self.ends: list[int] = []
        self.text_bytes = 0
        self.trained: list[np.ndarray] = []  # of all documents, from the first on that has tokens which are not

    def add(self, ids: np.ndarray, text_bytes: int, is_trained: np.ndarray | None = None) -> None:
        """Adds one document: its ids, the end-of-document id last, and which are trained on; None: all."""
        if is_trained is not None and not self.trained:
            self.trained.append(np.ones(self.ends[-1] if self.ends else 0, dtype=bool))
        if self.trained:
            self.trained.append(np.ones(len(ids), dtype=bool) if is_trained is None else is_trained)
        content = ids.astype(self.dtype).tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(ids))
        self.text_bytes += text_bytes

    def finish(self) -> list[Shard]:
        """The shard, flushed to the disk; none if no document was added."""
        self.file.close()
        tokens_path, documents_path = (self.folder / f"{self.name}.{kind}" for kind in ("tokens", "documents"))
        if not self.ends:
            tokens_path.unlink()
            return []
        np.array(self.ends, dtype="<i8").tofile(documents_path)
        sync(tokens_path)
        sync(documents_path)
        digests = [self.digest.hexdigest(), sha256(documents_path)]
        if self.trained:
            trained_path = self.folder / f"{self.name}.trained"
            np.packbits(np.concatenate(self.trained), bitorder="little").tofile(trained_path)
            sync(trained_path)
            digests.append(sha256(trained_path))
        return [Shard(self.name, self.ends[-1], len(self.ends), self.text_bytes, *digests)]
