"""Token shards on disk: written once by `prepare.py`, read memory-mapped.

A folder holds, for each split (train, validation), shards of two raw little-endian files: `*.tokens`, the ids (uint16,
or uint32 where the vocabulary needs it) of whole documents, each closed by the end-of-document id, and `*.documents`,
int64, for each document the index after its last token. `token_bytes.bin` (uint16) says how many bytes of text each id
stands for. `manifest.json` names all files with sizes and sha256, and the tokenizer, a copy of which lies beside it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from longctx.config import UserError
from longctx.files import sha256

FORMAT = "longctx-tokens-1"
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")


class DataError(UserError):
    """Data that cannot be trained on: the message names the file, what is wrong and what to do."""


@dataclass
class Shard:
    """One shard of a split, as the manifest has it."""

    name: str  # files are <name>.tokens and <name>.documents
    tokens: int
    documents: int
    text_bytes: int
    tokens_sha256: str
    documents_sha256: str


@dataclass
class Manifest:
    """What a folder of token shards holds."""

    dtype: str  # numpy name of the ids' type
    vocab_size: int
    end_of_document: int
    tokenizer_sha256: str
    splits: dict[str, list[Shard]]
    source: str = ""  # where the text came from, for people
    format: str = FORMAT

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest:
        path = folder / MANIFEST
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; make the folder with tools/prepare_data.py") from None
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); prepare the folder again") from None
        if fields.get("format") != FORMAT:
            raise DataError(f"{path}: format {fields.get('format')!r}, this version reads {FORMAT!r}; prepare it again")
        fields["splits"] = {split: [Shard(**s) for s in shards] for split, shards in fields["splits"].items()}
        return Manifest(**fields)


class TokenSplit:
    """The documents of one split as one stream of tokens, memory-mapped."""

    def __init__(self, folder: Path, dtype: str, shards: list[Shard]) -> None:
        self.tokens = [np.memmap(folder / f"{s.name}.tokens", dtype=dtype, mode="r") for s in shards]
        self.document_ends = [np.memmap(folder / f"{s.name}.documents", dtype="<i8", mode="r") for s in shards]
        self.first = np.cumsum([0, *(s.tokens for s in shards)])  # of each shard in the stream, and the end

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens from `offset`: ids (int64), and the indices in them where a new document begins."""
        ids, starts = [], []
        for shard in range(int(np.searchsorted(self.first, offset, "right")) - 1, len(self.tokens)):
            shard_first = int(self.first[shard])
            begin, end = max(offset, shard_first), min(offset + count, int(self.first[shard + 1]))
            if begin >= end:
                break
            ids.append(np.asarray(self.tokens[shard][begin - shard_first : end - shard_first], dtype=np.int64))
            ends = self.document_ends[shard]
            low = np.searchsorted(ends, begin - shard_first, "left")
            high = np.searchsorted(ends, end - shard_first, "right")  # one may end where the shard does
            starts.append(np.asarray(ends[low:high]) + shard_first - offset)
        starts = np.concatenate(starts)
        return np.concatenate(ids), starts[(starts > 0) & (starts < count)]


class TokenFolder:
    """A prepared folder, checked: sizes against the manifest, ids against the vocabulary, no empty documents."""

    def __init__(self, folder: str | Path, vocab_size: int, check_hashes: bool = False) -> None:
        """Raises `DataError` naming the file and offset of what is wrong. `vocab_size`: of the model."""
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.vocab_size = vocab_size
        if self.manifest.vocab_size > vocab_size:
            raise DataError(
                f"{self.folder}: its tokenizer has {self.manifest.vocab_size} ids, model.vocab_size is {vocab_size}; "
                f"set model.vocab_size={self.manifest.vocab_size} or more"
            )
        for shards in self.manifest.splits.values():
            for shard in shards:
                self._check_shard(shard, check_hashes)
        self.token_bytes = np.fromfile(self.folder / "token_bytes.bin", dtype="<u2")
        self.splits = {
            split: TokenSplit(self.folder, self.manifest.dtype, shards)
            for split, shards in self.manifest.splits.items()
        }

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    def fingerprint(self) -> str:
        """Hash of the whole corpus: two folders with the same one hold the same tokens in the same order."""
        shards = [[asdict(s) for s in self.manifest.splits.get(split, [])] for split in SPLITS]
        return hashlib.sha256(json.dumps([self.manifest.tokenizer_sha256, shards]).encode()).hexdigest()[:16]

    def _check_shard(self, shard: Shard, check_hashes: bool) -> None:
        width = np.dtype(self.manifest.dtype).itemsize
        files = (
            (f"{shard.name}.tokens", shard.tokens * width, shard.tokens_sha256),
            (f"{shard.name}.documents", shard.documents * 8, shard.documents_sha256),
        )
        for name, size, digest in files:
            path = self.folder / name
            if not path.exists():
                raise DataError(f"{path}: missing; prepare the folder again")
            if path.stat().st_size != size:
                raise DataError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}; prepare it again")
            if check_hashes and sha256(path) != digest:
                raise DataError(f"{path}: its sha256 is not the manifest's: the file was changed; prepare it again")
        ends = np.memmap(self.folder / f"{shard.name}.documents", dtype="<i8", mode="r")
        empty = np.flatnonzero(np.diff(ends, prepend=0) <= 0)
        if len(empty):
            raise DataError(f"{self.folder / shard.name}.documents: document {empty[0]} is empty; prepare it again")
        if len(ends) and ends[-1] != shard.tokens:
            raise DataError(f"{self.folder / shard.name}.documents: ends at {ends[-1]}, the shard at {shard.tokens}")
        self._check_ids(self.folder / f"{shard.name}.tokens")

    def _check_ids(self, path: Path, chunk: int = 1 << 24) -> None:
        ids = np.memmap(path, dtype=self.manifest.dtype, mode="r")
        for offset in range(0, len(ids), chunk):
            part = ids[offset : offset + chunk]
            if part.max() >= self.vocab_size:
                where = int(np.argmax(part >= self.vocab_size))
                raise DataError(
                    f"{path}: token {offset + where} has id {part[where]}, outside the vocabulary of "
                    f"{self.vocab_size}; set model.vocab_size or prepare the text with the model's tokenizer"
                )


class ShardWriter:
    """Writes the documents of one split into shards of at most `shard_tokens` tokens (a document is never cut)."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int = 1 << 28) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.shards: list[Shard] = []
        self._open()

    def _open(self) -> None:
        self.name = f"{self.split}_{len(self.shards):05d}"
        self.file = (self.folder / f"{self.name}.tokens").open("wb")
        self.ends: list[int] = []
        self.text_bytes = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Adds one document: its ids, the end-of-document id last."""
        tokens = self.ends[-1] if self.ends else 0
        if tokens and tokens + len(ids) > self.shard_tokens:
            self._close()
            self._open()
            tokens = 0
        self.file.write(ids.astype(self.dtype).tobytes())
        self.ends.append(tokens + len(ids))
        self.text_bytes += text_bytes

    def _close(self) -> None:
        self.file.close()
        tokens_path, documents_path = (self.folder / f"{self.name}.{kind}" for kind in ("tokens", "documents"))
        if not self.ends:
            tokens_path.unlink()
            return
        np.array(self.ends, dtype="<i8").tofile(documents_path)
        shard = Shard(
            self.name, self.ends[-1], len(self.ends), self.text_bytes, sha256(tokens_path), sha256(documents_path)
        )
        self.shards.append(shard)

    def finish(self) -> list[Shard]:
        self._close()
        return self.shards
