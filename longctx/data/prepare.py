"""Text to token shards: what `tools/prepare_data.py` runs, and `data=builtin` at its first start."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from longctx.data.tokens import DataError, Manifest, ShardWriter
from longctx.files import sha256

BUILTIN_TOKENIZER = Path(__file__).parent / "builtin_tokenizer.json"
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")


class Document(NamedTuple):
    """One text. `name` decides its split, so it must not change between runs."""

    name: str
    pieces: Iterable[str]  # the text, in pieces that may be tokenized apart from each other
    is_validation: bool | None = None  # None: the hash of the name decides


def read_documents(paths: list[Path], text_field: str = "text") -> Iterator[Document]:
    """The documents of text files (one each), of `.jsonl` files (one a line) and of folders of both, sorted by path.

    Raises `DataError` naming file and line where a line is not JSON or lacks `text_field`.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            name = str(file.relative_to(path.parent))  # the same from wherever it is called
            if file.suffix == ".jsonl":
                yield from _read_jsonl(file, name, text_field)
            else:
                try:
                    yield Document(name, [file.read_text(encoding="utf-8")])
                except UnicodeDecodeError as error:
                    raise DataError(f"{file}: byte {error.start} is not UTF-8; convert or remove the file") from None


def _read_jsonl(file: Path, name: str, text_field: str) -> Iterator[Document]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
                if not isinstance(text, str):
                    raise DataError(f"{file}:{number}: field {text_field!r} holds no text but {text!r:.40}")
            except ValueError as error:
                raise DataError(f"{file}:{number}: not JSON ({error})") from None
            except (KeyError, TypeError):
                raise DataError(f"{file}:{number}: no field {text_field!r}; name it with --text-field") from None
            yield Document(f"{name}:{number}", [text])


def prepare(
    documents: Iterable[Document],
    folder: Path,
    tokenizer_file: Path = BUILTIN_TOKENIZER,
    validation_fraction: float = 0.01,
    max_document_tokens: int | None = None,
    source: str = "",
) -> Manifest:
    """Tokenizes `documents` into `folder`, which appears only when it is whole.

    A document goes to the validation split if the hash of its name falls into `validation_fraction`. One longer than
    `max_document_tokens` is cut into several. Raises `DataError` if nothing is left to train on, or if `folder`
    exists.
    """
    if folder.exists():
        raise DataError(f"{folder}: exists already; remove it or give another folder")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    end_of_document = find_end_of_document(tokenizer, tokenizer_file)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        writers = {split: ShardWriter(work, split, dtype) for split in ("train", "validation")}
        for document in tqdm(documents, desc=f"tokenizing into {folder}", unit=" documents", disable=None):
            ids, text_bytes = _encode(tokenizer, document.pieces)
            if not len(ids):
                continue
            is_validation = document.is_validation
            if is_validation is None:
                is_validation = _fraction_of_name(document.name) < validation_fraction
            limit = (max_document_tokens or len(ids) + 1) - 1
            for first in range(0, len(ids), limit):
                part = ids[first : first + limit]
                share = round(text_bytes * len(part) / len(ids))
                writers["validation" if is_validation else "train"].add(np.append(part, end_of_document), share)
        shutil.copyfile(tokenizer_file, work / "tokenizer.json")
        _token_bytes(tokenizer, vocab_size, end_of_document).tofile(work / "token_bytes.bin")
        shards = {split: writer.finish() for split, writer in writers.items()}
        if not shards["train"]:
            held_out = sum(shard.documents for shard in shards["validation"])
            why = f"all {held_out} documents were held out; lower the validation fraction or split them into more"
            raise DataError(
                f"{source or 'the input'}: no text to train on; {why if held_out else 'every document is empty'}"
            )
        manifest = Manifest(dtype, vocab_size, end_of_document, sha256(tokenizer_file), shards, source)
        manifest.write(work)
        os.chmod(work, 0o755)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def find_end_of_document(tokenizer: Tokenizer, where: Path) -> int:
    """The id that closes a document. Raises `DataError` if the tokenizer has none of the usual names for it."""
    for token in END_OF_DOCUMENT:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token_id
    raise DataError(f"{where}: has no end-of-document token; one of {', '.join(END_OF_DOCUMENT)} is needed")


def _encode(tokenizer: Tokenizer, pieces: Iterable[str]) -> tuple[np.ndarray, int]:
    """Ids of the pieces in order, and the bytes of their text."""
    ids: list[np.ndarray] = []
    text_bytes = 0
    for batch in _batched(pieces):
        text_bytes += sum(len(piece.encode()) for piece in batch)
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ids += [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
    return (np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)), text_bytes


def _batched(pieces: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    """Pieces in lists of at most `size`."""
    iterator = iter(pieces)
    while batch := [piece for _, piece in zip(range(size), iterator, strict=False)]:
        yield batch


def _fraction_of_name(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _token_bytes(tokenizer: Tokenizer, vocab_size: int, end_of_document: int) -> np.ndarray:
    """Bytes of text each id stands for. In byte-level tokenizers each character of a token stands for one byte."""
    is_byte_level = "ByteLevel" in tokenizer.to_str()
    lengths = np.zeros(vocab_size, dtype="<u2")
    for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        if is_byte_level:
            lengths[token_id] = len(token)
        else:  # SentencePiece: a mark for the space, <0x0A> for a single byte
            lengths[token_id] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
    lengths[end_of_document] = 0
    return lengths
