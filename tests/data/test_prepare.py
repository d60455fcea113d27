"""Text of every kind into token shards: in parallel, resumable, with the same result each time."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from corpora import Documents, find_pieces
from longctx.data import text
from longctx.data.lengths import draw_lengths, length_histogram, length_table, share_of_long
from longctx.data.prepare import prepare
from longctx.data.text import Document, FilePiece
from longctx.data.tokens import TokenFolder, TokenSplit
from longctx.errors import DataError
from runs import ROOT

TEXTS = [f"text {i} — é\n" * (1 + i % 7) for i in range(300)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text, "SMALLEST_PIECE", 1 << 9)


def texts_of(pieces: list[FilePiece]) -> list[str]:
    return ["".join(document.pieces) for piece in pieces for document in piece.documents()]


def write_jsonl(path: Path, texts: list[str]) -> bytes:
    content = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()
    path.write_bytes(content)
    return content


def test_jsonl_is_cut_between_lines(tmp_path, small_pieces):
    content = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    pieces = find_pieces([tmp_path / "a.jsonl"])
    assert len(pieces) == -(-len(content) // 512) > 40
    assert texts_of(pieces) == TEXTS
    names = [d.name for piece in pieces for d in piece.documents()]
    assert names == [d.name for piece in [FilePiece((whole(pieces),), "text")] for d in piece.documents()]


def whole(pieces):
    """The ranges of one file's pieces as one."""
    ranges = [r for piece in pieces for r in piece.ranges]
    return text.Range(ranges[0].path, "jsonl", ranges[0].name, 0, ranges[-1].end, ranges[-1].end, 0)


@pytest.mark.parametrize("begin", range(40))
def test_a_range_begins_anywhere(tmp_path, begin):
    """Each line is read by the range it begins in, wherever the cut is."""
    content = write_jsonl(tmp_path / "a.jsonl", ["a", "b" * 9, "c"])
    parts = [(0, begin), (begin, len(content))]
    path = tmp_path / "a.jsonl"
    pieces = [FilePiece((text.Range(path, "jsonl", "a", b, e, e - b, 0),), "text") for b, e in parts]
    assert texts_of(pieces) == ["a", "b" * 9, "c"]


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_compressed_jsonl(tmp_path, suffix):
    content = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:  # two frames, as parallel compressors write them
        path.write_bytes(
            b"".join(bytes(pa.compress(part, "zstd", asbytes=True)) for part in (content[:999], content[999:]))
        )
    (tmp_path / "a.jsonl").unlink()
    assert texts_of(find_pieces([tmp_path])) == TEXTS
    bad = content.replace(b"}\n", b"\n", 3)
    path.write_bytes(gzip.compress(bad) if suffix == ".gz" else bytes(pa.compress(bad, "zstd", asbytes=True)))
    with pytest.raises(DataError, match=rf"{path}:1: not JSON"):
        texts_of(find_pieces([path]))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{path}"):
        texts_of(find_pieces([path]))


def test_parquet(tmp_path, small_pieces):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": TEXTS, "id": range(300)}), path, row_group_size=40)
    pieces = find_pieces([path], "body")
    assert len(pieces) > 3
    assert texts_of(pieces) == TEXTS
    assert [d.name for piece in pieces for d in piece.documents()] == [f"a.parquet@{i}" for i in range(300)]
    with pytest.raises(DataError, match=r"a.parquet: no column 'text' but body, id; name it with --text-field"):
        texts_of(find_pieces([path]))
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a.parquet: row 1: field 'text' holds no text but None"):
        texts_of(find_pieces([path]))
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a.parquet: no parquet file"):
        find_pieces([path])


def test_a_large_text_is_cut_behind_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "WHOLE_TEXT", 100)
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    [document] = find_pieces([tmp_path / "a.txt"])[0].documents()
    parts = list(document.pieces)
    assert len(parts) > 50
    assert all(part.endswith("\n") for part in parts)
    assert "".join(parts) == "".join(TEXTS)
    (tmp_path / "a.txt").write_bytes(b"line\n" * 100 + b"\xff")
    with pytest.raises(DataError, match="a.txt: byte 500 is not UTF-8"):
        texts_of(find_pieces([tmp_path / "a.txt"]))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_is_no_text(tmp_path, mode):
    """Its headers are valid UTF-8, so all of its files would be one text with them."""
    (tmp_path / "a.txt").write_text("one text\n")
    name = "books.tar" + (".gz" if mode == "w:gz" else "")
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / name, mode) as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    with pytest.raises(DataError, match=rf"{name}: byte \d+ is 0, so this is no text: unpack an archive \(tar\)"):
        texts_of(find_pieces([tmp_path / "in"]))
    (tmp_path / "wide.txt").write_bytes("one text".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"wide.txt: byte 1 is 0, so this is no text: .*convert UTF-16"):
        texts_of(find_pieces([tmp_path / "wide.txt"]))


def test_what_json_can_hold_and_text_cannot(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00 é"}\n')
    assert texts_of(find_pieces([tmp_path / "a.jsonl"])) == ["a\ufffd b \U0001f600 é"]
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"a.jsonl:1: not JSON"):
        texts_of(find_pieces([tmp_path / "a.jsonl"]))


def test_errors_name_the_line_behind_a_cut(tmp_path, small_pieces):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    content = (tmp_path / "a.jsonl").read_text().splitlines()
    content[222] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(content))
    with pytest.raises(DataError, match=r"a.jsonl:223: not JSON"):
        texts_of(find_pieces([tmp_path / "a.jsonl"]))


# preparing -----------------------------------------------------------------------------------------------------------


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_processes_make_the_same(tmp_path, small_pieces):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    pieces = find_pieces([tmp_path / "a.jsonl"])
    for workers in (1, 2):
        prepare(pieces, tmp_path / f"{workers}", workers=workers)
    assert content_of(tmp_path / "1") == content_of(tmp_path / "2")
    tokens = TokenFolder(tmp_path / "1", 8192, check_hashes=True)
    assert sum(s.documents for shards in tokens.manifest.splits.values() for s in shards) == 300
    assert sum(s.text_bytes for shards in tokens.manifest.splits.values() for s in shards) == sum(
        len(t.encode()) for t in TEXTS
    )


class Failing(Documents):
    """Reads its documents and then fails."""

    def documents(self):
        yield from super().documents()
        raise DataError("a bad line")


def test_what_is_done_is_kept(tmp_path, monkeypatch):
    good = [Documents([Document(f"{i}", [t], False)]) for i, t in enumerate(TEXTS[:6])]
    bad = Failing(good[3])
    with pytest.raises(DataError, match="a bad line"):
        prepare([*good[:3], bad, *good[4:]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    read = []
    monkeypatch.setattr(Documents, "documents", lambda piece: read.append(piece[0].name) or iter(piece))
    prepare(good, tmp_path / "out")
    assert read == ["3", "4", "5"]
    assert not list(tmp_path.glob("*.preparing"))


def test_a_shard_that_was_cut_off_is_made_again(tmp_path):
    """As by a machine that lost power after the record of its piece was written."""
    good = [Documents([Document(f"{i}", [t], False)]) for i, t in enumerate(TEXTS[:6])]
    with pytest.raises(DataError, match="a bad line"):
        prepare([*good[:3], Failing(good[3]), *good[4:]], tmp_path / "out")
    cut = next((tmp_path / "out.preparing").glob("train_00001*.tokens"))
    cut.write_bytes(cut.read_bytes()[:-2])
    prepare(good, tmp_path / "out")
    prepare(good, tmp_path / "fresh")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "fresh")


def test_other_options_begin_anew(tmp_path):
    good = [Documents([Document(f"{i}", [t], False)]) for i, t in enumerate(TEXTS[:3])]
    with pytest.raises(DataError, match="a bad line"):
        prepare([good[0], Failing(good[1])], tmp_path / "out")
    prepare(good, tmp_path / "out", max_document_tokens=4)
    prepare(good, tmp_path / "fresh", max_document_tokens=4)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "fresh")


def test_two_at_once_are_refused(tmp_path):
    class Slow(Documents):
        def documents(self):
            with pytest.raises(DataError, match=r"out.preparing: another process is at work there"):
                prepare([Documents(self)], tmp_path / "out")
            return super().documents()

    prepare([Slow([Document("a", ["text"], False)])], tmp_path / "out")


def test_a_killed_preparation_goes_on(tmp_path):
    """Killed again and again, with its processes: the end is what it would have been. LONGCTX_KILLS=20: so often."""
    kills = min(20, int(os.environ.get("LONGCTX_KILLS", "1")))
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 2000 for i in range(72 * kills)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(find_pieces([tmp_path / "a.jsonl"]), tmp_path / "expected")
    command = [sys.executable, "tools/prepare_data.py", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")]
    finished = 0
    for number in range(kills + 1):
        job = subprocess.Popen(
            [*command, "--workers", "2"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        work = tmp_path / "out.preparing"
        while number < kills and job.poll() is None and len(list(work.glob("piece_*.json"))) <= finished:
            time.sleep(0.005)
        if number < kills and job.poll() is None:  # the first process alone; the others must end with it
            workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(job.pid, signal.SIGKILL)
            while any(Path(f"/proc/{worker}").exists() for worker in workers):
                time.sleep(0.005)
        job.communicate()
        if job.returncode == 0:
            break
        finished = len(list(work.glob("piece_*.json")))
        assert not (tmp_path / "out").exists()
    assert job.returncode == 0
    assert finished >= kills - 1
    made = content_of(tmp_path / "out")
    made.pop("lengths.svg")
    expected = content_of(tmp_path / "expected")
    assert made.keys() == expected.keys()
    assert {name for name in made if made[name] != expected[name]} == {"manifest.json"}  # it says where from


def test_lengths(tmp_path):
    split = TokenSplit([np.zeros(70_000), np.zeros(7)], [np.array([3, 60_000, 70_000]), np.array([1, 7])])
    rows = {low: (documents, tokens) for low, documents, tokens in length_histogram(split)}
    assert {low: row for low, row in rows.items() if row != (0, 0)} == {
        1: (1, 1), 2: (1, 3), 4: (1, 6), 8192: (1, 10_000), 32768: (1, 59_997),
    }  # fmt: skip
    assert share_of_long(split) == pytest.approx(59_997 / 70_007)
    assert "in documents of 32,768 tokens or more: 85.7 % of the tokens" in length_table(split)
    assert "85.7 % of the tokens" in draw_lengths(split, tmp_path / "a.svg").read_text()


def test_ids_above_65535_are_kept(tmp_path):
    """As those of Llama 3's vocabulary, which two bytes do not hold."""
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{n}": n for n in range(1, 70000)}, "w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    documents = [Documents([Document("a", ["w69999 w5"], False)])]
    prepare(documents, tmp_path / "corpus", file, end_of_document="<end>")
    assert TokenFolder(tmp_path / "corpus", 70000).splits["train"].read(0, 3)[0].tolist() == [69999, 5, 0]


def test_parts_of_a_document_are_as_long_as_asked_for_with_their_frame(tmp_path):
    """And have their share of its bytes."""
    text = "def f(x): return x + 1\n" * 9
    prepare([Documents([Document("a", [text], False)])], tmp_path / "corpus", max_document_tokens=16)
    corpus = TokenFolder(tmp_path / "corpus", 8192)
    (ends,) = corpus.splits["train"].document_ends
    assert np.diff(ends, prepend=0).max() == 16
    assert sum(shard.text_bytes for shard in corpus.manifest.splits["train"]) == pytest.approx(len(text), abs=len(ends))


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    """Even where it has the size it had."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "abc"}\n')
    (before,) = find_pieces([file])
    os.utime(file, ns=(0, 1))
    (after,) = find_pieces([file])
    assert before.identity != after.identity
