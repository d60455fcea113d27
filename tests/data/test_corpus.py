"""Token files of nanoGPT and Megatron are read where they are, checked, and refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from longctx.config import DataConfig
from longctx.data.corpus import NanoGPTFolder, open_corpus, read_megatron
from longctx.data.prepare import BUILTIN_TOKENIZER
from longctx.data.tokens import TokenFolder
from longctx.errors import DataError
from runs import losses_of, small_config

VOCAB = 8192
DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 2]]


def write_megatron(path: Path, documents: list[list[int]], code: int = 8, dtype: str = "<u2") -> None:
    """Byte for byte what Megatron's preprocess_data.py writes: a sequence a document."""
    lengths = np.array([len(d) for d in documents], dtype="<i4")
    offsets = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    borders = np.arange(len(documents) + 1, dtype="<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(borders))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + borders.tobytes())
    np.array([i for d in documents for i in d], dtype=dtype).tofile(path.with_suffix(".bin"))


def documents_of(split) -> list[list[int]]:
    ids, starts, _ = split.read(0, len(split))
    return [part.tolist() for part in np.split(ids, starts)]


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4")])
def test_megatron(tmp_path, code, dtype):
    write_megatron(tmp_path / "a_text_document", DOCUMENTS, code, dtype)
    write_megatron(tmp_path / "b_valid_text_document", DOCUMENTS[:2], code, dtype)
    corpus = open_corpus(tmp_path, VOCAB, DataConfig())
    assert documents_of(corpus.splits["train"]) == DOCUMENTS
    assert documents_of(corpus.splits["validation"]) == DOCUMENTS[:2]
    assert corpus.tokenizer_file is None
    assert corpus.token_bytes is None
    write_megatron(tmp_path / "c_test_text_document", DOCUMENTS[:1], code, dtype)
    without = corpus.fingerprint()
    corpus = open_corpus(tmp_path, VOCAB, DataConfig())
    assert corpus.fingerprint() == without
    write_megatron(tmp_path / "values_text_document", DOCUMENTS[1:], code, dtype)
    write_megatron(tmp_path / "x_val1_text_document", DOCUMENTS[:1], code, dtype)
    corpus = open_corpus(tmp_path, VOCAB, DataConfig())
    assert documents_of(corpus.splits["train"]) == DOCUMENTS + DOCUMENTS[1:]
    assert documents_of(corpus.splits["validation"]) == DOCUMENTS[:2] + DOCUMENTS[:1]
    assert corpus.notes == [f"{tmp_path}/c_test_text_document.idx: left out, by its name it is to test with"]
    before = corpus.fingerprint()
    write_megatron(tmp_path / "a_text_document", [[5, 6, 6, 2], *DOCUMENTS[1:]], code, dtype)
    assert open_corpus(tmp_path, VOCAB, DataConfig()).fingerprint() != before


def change(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


IDX, BIN = "a.idx", "a.bin"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / BIN).unlink(), "a.bin: missing; it belongs to a.idx"),
        (lambda f: change(f / IDX, 0, b"X"), "a.idx: does not begin as an index of Megatron's"),
        (lambda f: (f / IDX).write_bytes(b""), "a.idx: does not begin as an index"),
        (lambda f: change(f / IDX, 9, b"\x02"), "a.idx: version 2, type of ids 8"),
        (lambda f: change(f / IDX, 17, b"\x07"), "a.idx: version 1, type of ids 7"),
        (lambda f: (f / IDX).write_bytes((f / IDX).read_bytes()[:-8]), "a.idx: .* the file is cut off"),
        (lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:-2]), "a.bin: 22 bytes, a.idx says 24"),
        (lambda f: change(f / IDX, 34 + 12 + 8, b"\x07"), "a.idx: sequence 1 is not behind the one before"),
        (lambda f: change(f / IDX, 34 + 12 + 24 + 8, b"\x09"), "a.idx: its document borders do not rise from 0 to 3"),
        (lambda f: change(f / BIN, 6, b"\xff\xff"), "a.bin: token 3 has id 65535, outside the vocabulary of 8192"),
    ],
)
def test_megatron_damage(tmp_path, damage, message):
    write_megatron(tmp_path / "a", DOCUMENTS)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_corpus(tmp_path, VOCAB, DataConfig())


def test_megatron_sequences_of_a_document_are_joined(tmp_path):
    write_megatron(tmp_path / "a", DOCUMENTS)
    borders_at = 34 + 12 + 24
    change(tmp_path / "a.idx", borders_at + 8, struct.pack("<q", 2))  # the first document has two sequences
    _, ends = read_megatron(tmp_path / "a.idx")
    assert ends.tolist() == [6, 12]


def test_megatron_without_tokens(tmp_path):
    """Documents without sequences are none, and files without tokens are passed over."""
    write_megatron(tmp_path / "a", DOCUMENTS)
    borders = np.array([0, 0, 1, 1, 3], dtype="<i8")
    index = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(index[:26] + struct.pack("<Q", 5) + index[34:70] + borders.tobytes())
    assert read_megatron(tmp_path / "a.idx")[1].tolist() == [4, 12]
    write_megatron(tmp_path / "a", DOCUMENTS)
    write_megatron(tmp_path / "b", [])
    write_megatron(tmp_path / "c", DOCUMENTS)
    split = open_corpus(tmp_path, VOCAB, DataConfig()).splits["train"]
    assert len(split.read(6, 12)[0]) == 12
    assert documents_of(split) == DOCUMENTS * 2


def test_nanogpt(tmp_path):
    for name, documents in (("train.bin", [*DOCUMENTS, [3, 4]]), ("val.bin", DOCUMENTS[:1])):
        np.array([i for d in documents for i in d], dtype="<u2").tofile(tmp_path / name)
    corpus = open_corpus(tmp_path, VOCAB, DataConfig(end_of_document=2))
    assert documents_of(corpus.splits["train"]) == [*DOCUMENTS, [3, 4]]
    assert documents_of(corpus.splits["validation"]) == DOCUMENTS[:1]
    assert isinstance(corpus, NanoGPTFolder)
    assert corpus.fingerprint() != open_corpus(tmp_path, VOCAB, DataConfig(end_of_document=3)).fingerprint()
    with pytest.raises(DataError, match=r"train.bin: token 2 has id 7, outside the vocabulary of 7"):
        open_corpus(tmp_path, 7, DataConfig())
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"train.bin: 3 bytes are no multiple of 2"):
        open_corpus(tmp_path, VOCAB, DataConfig())


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(DataError, match=r"neither manifest.json \(longctx\) nor \*.idx \(Megatron\) nor train.bin"):
        open_corpus(tmp_path, VOCAB, DataConfig())
    with pytest.raises(DataError, match=r"no: no such folder"):
        open_corpus(tmp_path / "no", VOCAB, DataConfig())


def test_a_run_on_each_format_has_the_same_losses(tmp_path, corpus):
    """The same tokens as longctx's, Megatron's and nanoGPT's files, with the tokenizer named."""
    own = TokenFolder(corpus, VOCAB)
    tokenizer = str(BUILTIN_TOKENIZER)
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "megatron").mkdir()
    for split, name in (("train", "train"), ("validation", "val")):
        ids, starts, _ = own.splits[split].read(0, len(own.splits[split]))
        ids.astype("<u2").tofile(tmp_path / "nanogpt" / f"{name}.bin")
        write_megatron(tmp_path / "megatron" / f"{name}_text_document", [d.tolist() for d in np.split(ids, starts)])
    losses = {
        name: losses_of(small_config(tmp_path, folder, name=name, data__tokenizer=tokenizer), 2)
        for name, folder in (("o", corpus), ("n", tmp_path / "nanogpt"), ("m", tmp_path / "megatron"))
    }
    assert losses["n"] == losses["m"] == losses["o"]
    opened = open_corpus(tmp_path / "nanogpt", VOCAB + 8, DataConfig(tokenizer=tokenizer))
    assert own.token_bytes is not None
    assert opened.token_bytes is not None
    assert opened.token_bytes[:VOCAB].tolist() == own.token_bytes.tolist()
