"""Text, tokenizers and token files of other people: what they hold is trained on, and nothing is lost in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, models, processors

from corpora import byte_tokenizer, documents_of, find_pieces, make_corpus, prepared
from in_process import run_script
from longctx.config import DataConfig, TokenDtype
from longctx.data import tokenizer as tokenizer_module
from longctx.data import tokens
from longctx.data.chat import Completion
from longctx.data.corpus import open_corpus, read_megatron
from longctx.data.prepare import BUILTIN_TOKENIZER, prepare
from longctx.data.text import Skipped, files_by_kind, find_files
from longctx.data.tokenizer import as_trained, count_bytes, document_frame, open_tokenizer
from longctx.data.tokens import TokenFolder
from longctx.errors import DataError, UserError
from longctx.files import sha256, write_manifest
from ranks import run_on_ranks
from runs import ROOT, small_config, trainer_of

END = 0  # of a document, in the shipped tokenizer


# tokenizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_nothing_is_cut_or_padded(tmp_path, setting):
    """transformers writes both into tokenizer.json when they were used once."""
    tokenizer = Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    tokenizer.enable_truncation(16) if setting == "truncation" else tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = prepared(tmp_path / "corpus", ["a " * 600, "b b"], tmp_path / "tokenizer.json")
    assert np.asarray(corpus.splits["train"].document_ends[0]).tolist() == [602, 605]


def test_special_tokens_that_a_text_spells_are_text(tmp_path):
    texts = ["In GPT-2 the string <|endoftext|> closes a document.", "<s>one <|im_start|>more"]
    corpus = prepared(tmp_path / "corpus", texts)
    documents = documents_of(corpus)
    assert [d.count(END) for d in documents] == [1, 1]
    tokenizer = open_tokenizer(BUILTIN_TOKENIZER)
    assert [tokenizer.decode(d[:-1], skip_special_tokens=False) for d in documents] == texts
    assert [int(count_bytes(tokenizer)[d].sum()) for d in documents] == [52, len(texts[1])]
    assert corpus.manifest.splits["train"][0].text_bytes == 52 + len(texts[1])


def test_special_tokens_that_the_model_knows_as_words_are_text_too(tmp_path):
    """Unigram tokenizers (T5, XLM-R) have </s> in their model."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *[(c, -2.0) for c in "ab</s>▁"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(tmp_path / "t.json"))
    assert 1 in open_tokenizer(tmp_path / "t.json").encode("a</s>b", add_special_tokens=False).ids
    [document] = documents_of(prepared(tmp_path / "corpus", ["a</s>b"], tmp_path / "t.json"))
    assert document == [2, 4, 5, 6, 7, 3, 1]


def test_a_template_that_cannot_be_told_ends_no_run(tmp_path, monkeypatch):
    """It is refused where it would be used, and left out of the tokenizer that goes along where it was not."""

    def cannot(*_arguments):
        raise DataError("its template changes the text itself")

    path = byte_tokenizer(tmp_path / "t.json", begin=True)
    monkeypatch.setattr(tokenizer_module, "_template", cannot)
    with pytest.raises(DataError, match="its template changes the text itself"):
        prepared(tmp_path / "a", ["a"], path)
    corpus = prepared(tmp_path / "b", ["a"], path, add_special_tokens=False)
    assert Tokenizer.from_str(as_trained(path, corpus.document_begin)).encode("a").ids == documents_of(corpus)[0][:-1]


def test_added_tokens_that_are_no_special_ones_count_their_bytes(tmp_path):
    tokenizer = open_tokenizer(byte_tokenizer(tmp_path / "t.json", spaces=True))
    code = "def f():\n        return    1\n"
    ids = tokenizer.encode(code).ids
    assert len(ids) < len(code)
    assert int(count_bytes(tokenizer)[ids].sum()) == len(code)
    assert count_bytes(tokenizer)[[256, 257, 258]].tolist() == [0, 0, 8]


def test_a_corpus_of_an_earlier_version_is_counted_anew_and_named(tmp_path):
    """Its file of bytes a token has nothing for added tokens."""
    tokenizer = byte_tokenizer(tmp_path / "t.json", spaces=True)
    folder = tmp_path / "corpus"
    counted = prepared(folder, ["a" * 300], tokenizer).token_bytes
    fields = json.loads((folder / "manifest.json").read_text())
    for key in ("sha256", "document_begin", "document_end", "skipped", "skipped_examples"):
        fields.pop(key)
    assert counted is not None
    before = counted.copy()
    before[258:] = 0
    before.tofile(folder / "token_bytes.bin")
    fields |= {
        "format": tokens.BEFORE,
        "end_of_document": 256,
        "token_bytes_sha256": sha256(folder / "token_bytes.bin"),
    }
    write_manifest(folder / "manifest.json", fields)
    corpus = open_corpus(folder, 1 << 20, DataConfig())
    assert corpus.end_of_document == 256
    assert np.array_equal(corpus.token_bytes, counted)
    assert len(corpus.notes) == 1
    assert "was prepared by an earlier version of longctx" in corpus.notes[0]


@pytest.mark.parametrize(
    ("is_added", "expected"), [(True, [[257, 3, 256], [257, 4, 256]]), (False, [[3, 256], [4, 256]])]
)
def test_documents_begin_as_the_tokenizer_has_it(tmp_path, is_added, expected):
    tokenizer = byte_tokenizer(tmp_path / "t.json", begin=True)
    ids = open_tokenizer(tokenizer).encode("ab", add_special_tokens=False).ids
    corpus = prepared(tmp_path / "corpus", ["a", "b"], tokenizer, add_special_tokens=is_added)
    assert documents_of(corpus) == [[*d[:-2], i, 256] for d, i in zip(expected, ids, strict=True)]
    assert corpus.document_begin == corpus.manifest.document_begin == ([257] if is_added else [])
    # and so does the tokenizer that goes along with exported weights
    along = Tokenizer.from_str(as_trained(tokenizer, corpus.document_begin))
    assert along.encode("a").ids == documents_of(corpus)[0][:-1]


def test_the_end_of_a_document_can_be_named(tmp_path):
    tokenizer = open_tokenizer(byte_tokenizer(tmp_path / "t.json"))
    assert document_frame(tokenizer, tmp_path, "<s>").end == (257,)
    assert document_frame(tokenizer, tmp_path).end == (256,)
    with pytest.raises(DataError, match="has no token '</s>'; name one of its own"):
        document_frame(tokenizer, tmp_path, "</s>")


def test_a_template_that_ends_documents_does_so_once(tmp_path):
    path = byte_tokenizer(tmp_path / "t.json")
    tokenizer = Tokenizer.from_file(str(path))
    ends = [("<|endoftext|>", 256), ("<s>", 257)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=ends)
    tokenizer.save(str(path))
    assert document_frame(open_tokenizer(path), path).end == (256,)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: no tokenizer.json that the tokenizers library reads"):
        open_tokenizer(tmp_path / "tokenizer.json")


# files of text -------------------------------------------------------------------------------------------------------


def texts_of(paths: list[Path], **words) -> list[str]:
    documents = [d for piece in find_pieces(paths, **words) for d in piece.documents()]
    return ["".join(d.pieces) for d in documents if not isinstance(d, Skipped)]


LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize("name", ["c4.json.gz", "loose.json", "x.ndjson", "no_suffix", "a.txt"])
def test_json_lines_are_known_by_their_content(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith(".gz") else b"\xef\xbb\xbf" + LINES)
    assert texts_of([tmp_path / name]) == ["one", "two"]


def test_json_that_is_no_lines_of_records_is_text(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "a"}\n')
    (tmp_path / "pretty.json").write_text('{\n  "text": "a"\n}\n')
    assert texts_of([tmp_path / "package.json", tmp_path / "pretty.json"]) == [
        '{"name": "a"}\n',
        '{\n  "text": "a"\n}\n',
    ]


def test_records_without_the_text_field_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"content": "a"}\n{"content": "b"}\n')
    with pytest.raises(DataError, match=r"a.json:1: no field 'text'; name it with --text-field"):
        texts_of([tmp_path])
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"}]')
    with pytest.raises(DataError, match="holds a JSON array of records; make JSON lines of it"):
        texts_of([tmp_path])


def test_hidden_files_are_left_out_and_named(tmp_path):
    """A folder made by `hf download --local-dir` has .cache/huggingface and .gitattributes."""
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "a.metadata").write_text("b1e2")
    (tmp_path / ".DS_Store").write_bytes(b"\x00\xff")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    assert texts_of([tmp_path]) == ["text"]  # without the byte-order mark
    name = tmp_path.name
    assert find_files([tmp_path]).left_out == [
        (f"{name}/.DS_Store", "its name begins with a dot"),
        (f"{name}/.cache", "its name begins with a dot"),
        (f"{name}/elsewhere", "a link to a folder; name that folder as an input of its own"),
        (f"{name}/gone", "no file, or a link to nothing"),
    ]


def test_a_file_of_two_names_is_read_once(tmp_path):
    """Else a text could be held out and trained on: links, as in a cache of downloads, and inputs that overlap."""
    blobs, snapshot = tmp_path / "data" / "blobs", tmp_path / "data" / "snapshots"
    blobs.mkdir(parents=True)
    snapshot.mkdir()
    (blobs / "f00").write_text("one")
    (snapshot / "a.txt").symlink_to(blobs / "f00")
    (snapshot / "b.txt").write_text("two")
    assert texts_of([tmp_path / "data"]) == ["one", "two"]
    assert find_files([tmp_path / "data"]).left_out == [("data/snapshots/a.txt", "the same file as data/blobs/f00")]
    assert texts_of([snapshot]) == ["one", "two"]
    (tmp_path / "other" / "snapshots").mkdir(parents=True)
    (tmp_path / "other" / "snapshots" / "b.txt").write_text("another")
    assert texts_of([snapshot, tmp_path / "other" / "snapshots"]) == ["one", "two", "another"]  # of the same name
    for paths in ([tmp_path / "data", snapshot], [snapshot] * 2, [snapshot, snapshot / "b.txt"]):
        assert texts_of(paths) == ["one", "two"]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: is a pipe or a device, which cannot be read twice; write it to a file"):
        find_files([tmp_path / "pipe"])


def test_bzip2_with_an_empty_stream_is_named(tmp_path):
    """Which pyarrow does not read, and says so by an exception of its own."""
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(b"one\n") + bz2.compress(b"") + bz2.compress(b"two\n"))
    with pytest.raises(DataError, match=r"a.txt.bz2: .*the file is damaged or cannot be read; or leave out"):
        texts_of([tmp_path])


def test_the_output_is_not_inside_the_input(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some text\n" * 50)
    (tmp_path / "link").symlink_to(texts)
    tool, options = ROOT / "tools" / "prepare_data.py", ["--validation-fraction", "0", "--workers", "1"]
    for output in ("corpus", "../link/corpus"):
        refused = run_script(tool, ".", "--output", output, *options, folder=texts)
        assert f"--output {output} is inside the input .; give a folder beside it" in refused.stderr
    assert run_script(tool, ".", "--output", "../corpus", *options, folder=texts).returncode == 0
    (tmp_path / "none").mkdir()
    nothing = run_script(tool, "none", "--output", "other", *options, folder=tmp_path)
    assert nothing.stderr == "prepare_data.py: none: no files to read\n"
    (tmp_path / "c.jsonl").write_text('{"content": "x"}\n' * 3)
    words = "c.jsonl", "--output", "other", "--skip-unreadable", *options
    said = run_script(tool, *words, folder=tmp_path).stderr
    assert "no text to train on; 3 documents were left out, such as" in said
    assert "c.jsonl:1: no field 'text'" in said


def test_a_folder_of_ones_own_is_not_emptied(tmp_path):
    (tmp_path / "c.preparing").mkdir()
    (tmp_path / "c.preparing" / "notes.txt").write_text("mine")
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(DataError, match=r"c.preparing: holds what no preparation has written; rename it"):
        prepare(find_pieces([tmp_path / "a.txt"]), tmp_path / "c", validation_fraction=0.0)
    assert (tmp_path / "c.preparing" / "notes.txt").read_text() == "mine"


@pytest.fixture
def mixed(tmp_path):
    """A folder with text, JSON lines and what cannot be read."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text("good text\n" * 50)
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "b.jsonl").write_bytes(LINES + b"{broken\n" + b'{"text": 5}\n' + b'{"text": "three"}\n')
    (folder / "c.parquet").write_bytes(b"no parquet")
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"half " * 1000)[:30])
    return folder


def test_what_cannot_be_read_ends_the_preparation_or_is_counted(mixed, tmp_path):
    with pytest.raises(
        DataError, match=r"c.parquet: no parquet file .* leave out what cannot be read with --skip-unrea"
    ):
        find_pieces([mixed])
    pieces = find_pieces([mixed], skip_unreadable=True)
    assert sorted(texts_of([mixed], skip_unreadable=True)) == ["good text\n" * 50, "one", "three", "two"]
    manifest = prepare(pieces, tmp_path / "corpus", validation_fraction=0.0)
    assert manifest.skipped == 5
    places = [
        "b.jsonl:3: not JSON",
        "b.jsonl:4: field 'text' holds no text",
        "c.parquet",
        "d.txt.gz",
        "latin.txt: byte 3",
    ]
    for place, example in zip(places, sorted(manifest.skipped_examples), strict=True):
        assert f"{mixed}/{place}" in example
    assert files_by_kind(pieces) == {
        "text": (2, 504), "JSON lines": (1, 70), "parquet": (1, 10), "text, compressed": (1, 30),
    }  # fmt: skip


def test_the_tool_shows_what_was_read_and_left_out(mixed, tmp_path):
    (mixed / ".hidden").write_text("x")
    os.rename(mixed / "a.txt", os.fsencode(mixed) + b"/caf\xe9.txt")  # a name that is not UTF-8
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), str(mixed), "--output", str(tmp_path / "out")]
    refused = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    done = subprocess.run(
        [*command, "--skip-unreadable", "--workers", "2", "--validation-fraction", "0"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out, its name begins with a dot: 1 (mixed/.hidden)" in done.stdout
    assert "left out, unreadable: 5 files, lines or rows, such as" in done.stdout
    assert "train: 4 documents" in done.stdout


# files of tokens -----------------------------------------------------------------------------------------------------


def test_nanogpt_files_of_wide_ids(tmp_path):
    ids = np.arange(1, 401) % 70000
    ids.astype("<u4").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"model.vocab_size=128256 is more than uint16 .* set data.token_dtype=uint32"):
        open_corpus(tmp_path, 128256, DataConfig())
    with pytest.raises(DataError, match="every second id is 0, so these seem to be of uint32"):
        open_corpus(tmp_path, 50304, DataConfig())
    corpus = open_corpus(tmp_path, 128256, DataConfig(token_dtype=TokenDtype.uint32))
    assert corpus.splits["train"].read(0, 400)[0].tolist() == ids.tolist()


def test_a_document_of_megatron_that_is_one_empty_sequence_is_none(tmp_path):
    lengths, borders = np.array([3, 0, 2], "<i4"), np.array([0, 1, 2, 3], "<i8")
    offsets = np.array([0, 6, 6], "<i8")
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08"
    counts = len(lengths).to_bytes(8, "little") + len(borders).to_bytes(8, "little")
    (tmp_path / "a.idx").write_bytes(header + counts + lengths.tobytes() + offsets.tobytes() + borders.tobytes())
    np.arange(5, dtype="<u2").tofile(tmp_path / "a.bin")
    assert read_megatron(tmp_path / "a.idx")[1].tolist() == [3, 5]
    assert len(open_corpus(tmp_path, 100, DataConfig()).splits["train"]) == 5


@pytest.mark.parametrize("name", ["../../train_00000", "/abs/train_00000"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, name):
    folder = make_corpus(tmp_path / "corpus")
    fields = json.loads((folder / "manifest.json").read_text())
    fields.pop("sha256")
    fields["splits"]["train"][0]["name"] = name
    write_manifest(folder / "manifest.json", fields)
    with pytest.raises(DataError, match=f"its manifest names '{name}.tokens', which is no file of this folder"):
        TokenFolder(folder, 8192)


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    (folder / "train_00000.tokens").rename(tmp_path / "elsewhere")
    (folder / "train_00000.tokens").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="train_00000.tokens: is a link out of its folder, and is not read"):
        TokenFolder(folder, 8192)


def test_a_file_cut_short_while_it_is_read_is_named(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    with trainer_of(small_config(tmp_path, folder)) as trainer:
        assert math.isfinite(trainer.train_step()[0]["loss/train"])
        os.truncate(folder / "train_00000.tokens", 100)
        with pytest.raises(UserError, match=r"train_00000.tokens: 100 bytes, it had \d+ when the run opened it"):
            trainer.train_step()


def step_on_two(rank, config):
    """Of a step, and of a validation: what each rank says when rank 1 alone cannot read."""
    said = []
    with trainer_of(config) as trainer:
        trainer.train_step()
        for act in (trainer.train_step, trainer.validate):
            if rank == 1:
                source = trainer.loader.source if act == trainer.train_step else trainer.validation.source.sources[0]
                source.window = unreadable
            try:
                act()
            except UserError as error:
                said.append(str(error))
    return said


def unreadable(_number):
    raise DataError("shard: cut short")


def test_a_file_cut_short_on_one_rank_ends_all_with_its_message(tmp_path, corpus):
    results = run_on_ranks(2, step_on_two, small_config(tmp_path, corpus))
    assert results == [["rank 1: shard: cut short"] * 2] * 2


def test_a_full_disk_is_told_with_what_is_free_and_needed(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_arguments) -> None:
            raise OSError(28, "No space left on device", str(tmp_path / "train_00000.tokens"))

    monkeypatch.setattr("longctx.data.prepare.ShardWriter", Full)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"train_00000.tokens: No space left on device: .* free, about 0.0 MB needed"):
        prepare(find_pieces([tmp_path / "a.txt"]), tmp_path / "corpus")


def test_lines_that_are_left_out_are_not_looked_up(tmp_path, monkeypatch):
    """But for the examples: each look-up reads the file up to there."""
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 50 + '{"text": "good"}\n')
    looked_up = []
    monkeypatch.setattr("longctx.data.text._line_at", lambda path, offset: looked_up.append(offset) or f"{path}:?")
    made = prepare(
        find_pieces([tmp_path / "a.jsonl"], skip_unreadable=True), tmp_path / "out", validation_fraction=0.0,
        skip_unreadable=True,
    )  # fmt: skip
    assert (made.skipped, len(looked_up)) == (50, 20)
    assert made.skipped_examples[0] == f"{tmp_path / 'a.jsonl'}:?: field 'text' holds no text but None"


def test_rows_of_parquet_that_are_not_utf8_are_named_or_left_out(tmp_path):
    texts = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: row 1: byte 0 of a text is not UTF-8; or leave out"):
        texts_of([tmp_path / "a.parquet"])
    assert texts_of([tmp_path / "a.parquet"], skip_unreadable=True) == ["one", "three"]


def test_a_parquet_file_without_the_column_is_left_out_too(tmp_path):
    pq.write_table(pa.table({"Text": ["one"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("two")
    with pytest.raises(DataError, match=r"a.parquet: no column 'text' but Text; name it with --text-field"):
        texts_of([tmp_path / "a.parquet", tmp_path / "b.txt"])
    assert texts_of([tmp_path / "a.parquet", tmp_path / "b.txt"], skip_unreadable=True) == ["two"]


def test_a_first_line_that_is_too_long_to_read_is_told_by_its_fields(tmp_path, monkeypatch):
    monkeypatch.setattr("longctx.data.text.LONGEST_FIRST_LINE", 1000)
    (tmp_path / "dump.json").write_text(json.dumps({"id": 1, "text": "long " * 500}) + '\n{"text": "two"}\n')
    assert texts_of([tmp_path / "dump.json"]) == ["long " * 500, "two"]


def test_a_preparation_that_cannot_be_moved_into_place_is_kept(tmp_path):
    """And one into what a link to nothing is called is refused at once."""
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    pieces = find_pieces([tmp_path / "a.txt"])
    with pytest.raises(DataError, match="link: exists already"):
        prepare(pieces, tmp_path / "link", validation_fraction=0.0)
    with mock.patch.object(Path, "rename", side_effect=OSError(20, "Not a directory", "out")), pytest.raises(DataError):
        prepare(pieces, tmp_path / "out", validation_fraction=0.0)
    assert (tmp_path / "out.preparing" / "piece_00000.json").is_file()
    assert prepare(pieces, tmp_path / "out", validation_fraction=0.0).splits["train"]
    assert not list((tmp_path / "out").glob("piece_*"))


def test_a_text_that_is_null_beside_a_completion_is_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null, "prompt": "Q", "completion": "A"}\n')
    (document,) = [d for piece in find_pieces([tmp_path / "a.jsonl"]) for d in piece.documents()]
    assert document.answers == Completion("Q", "A")
