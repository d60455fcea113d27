"""From text to sequences: nothing lost, nothing repeated, damage refused by file and offset."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from corpora import Documents, find_pieces
from longctx.config import DataConfig
from longctx.data import builtin, windows
from longctx.data.loader import Copies, Loader, RecallStream, ShuffledTokens, SpacedTokens, shuffled
from longctx.data.packing import IGNORE_INDEX, pack
from longctx.data.prepare import BUILTIN_TOKENIZER, prepare
from longctx.data.recall import copies_sequence
from longctx.data.text import Document
from longctx.data.tokens import TokenFolder, TokenSplit
from longctx.errors import DataError
from thorough import examples

VOCAB = 8192
TEXTS = ["def f(x):\n    return x\n", "import os\n" * 7, "ü €\n", "class A:\n    pass\n"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    prepare([Documents(Document(f"{i}", [t], i == 3) for i, t in enumerate(TEXTS))], folder)
    return folder


def test_round_trip(corpus):
    tokens = TokenFolder(corpus, VOCAB, check_hashes=True)
    tokenizer = Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    ids, starts, _ = tokens.splits["train"].read(0, len(tokens.splits["train"]))
    documents = np.split(ids, starts)
    assert [tokenizer.decode(d[:-1].tolist()) for d in documents] == TEXTS[:3]
    assert all(d[-1] == tokens.manifest.end_of_document for d in documents)
    assert tokens.token_bytes[ids].sum() == sum(len(t.encode()) for t in TEXTS[:3])
    assert tokens.manifest.splits["train"][0].text_bytes == sum(len(t.encode()) for t in TEXTS[:3])


def test_windows_cross_shards(tmp_path):
    prepare([Documents([Document(f"{i}", [f"x = {i}\n" * 4], False)]) for i in range(12)], tmp_path / "many")
    tokens = TokenFolder(tmp_path / "many", VOCAB)
    assert [s.name for s in tokens.manifest.splits["train"]] == [f"train_{i:05d}" for i in range(12)]
    split = tokens.splits["train"]
    whole, starts, _ = split.read(0, len(split))
    assert len(starts) == 11
    for offset in range(0, len(split) - 30, 7):  # windows that cross shards
        ids, inside, _ = split.read(offset, 30)
        assert np.array_equal(ids, whole[offset : offset + 30])
        assert np.array_equal(inside, starts[(starts > offset) & (starts < offset + 30)] - offset)


def test_folders_and_jsonl(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "b" / "one.txt").write_text("one")
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    read = ["".join(d.pieces) for piece in find_pieces([tmp_path / "in"]) for d in piece.documents()]
    assert read == ["two", "three", "one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a.jsonl:2: not JSON"),
        ('{"text": null}', r"a.jsonl:2: field 'text' holds no text but None"),
        ('{"body": "x"}', r"a.jsonl:2: no field 'text'"),
    ],
)
def test_bad_jsonl_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(find_pieces([tmp_path / "a.jsonl"])[0].documents())


def test_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no text to train on; every document is empty"):
        prepare([Documents([Document("a", [""])])], tmp_path / "empty")
    with pytest.raises(DataError, match="no text to train on; all 1 documents were held out; lower the validation"):
        prepare([Documents([Document("a", ["x"])])], tmp_path / "empty", validation_fraction=1.0)
    assert list(tmp_path.iterdir()) == []


def damage_size(folder):
    with (folder / "train_00000.tokens").open("ab") as file:
        file.write(b"x")


def damage_byte(folder):
    path = folder / "train_00000.tokens"
    content = bytearray(path.read_bytes())
    content[6] ^= 1
    path.write_bytes(content)


def damage_documents(folder):
    ends = np.fromfile(folder / "train_00000.documents", dtype="<i8")
    ends[1] = ends[0]
    ends.tofile(folder / "train_00000.documents")


def damage_id(folder):
    ids = np.fromfile(folder / "train_00000.tokens", dtype="<u2")
    ids[5] = 60000
    ids.tofile(folder / "train_00000.tokens")


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def damage_manifest_byte(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"documents": 3', '"documents": 2'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_size, r"train_00000.tokens: \d+ bytes, the manifest says"),
        (damage_byte, r"train_00000.tokens: its sha256"),
        (damage_documents, r"train_00000.documents: "),
        (damage_id, r"train_00000.tokens: "),
        (lambda f: (f / "train_00000.tokens").unlink(), "train_00000.tokens: missing"),
        (lambda f: (f / "manifest.json").unlink(), "no such file"),
        (damage_manifest, "manifest.json: format None"),
        (damage_manifest_byte, "manifest.json: its sha256 is not its own"),
    ],
)
def test_damage_is_refused_by_name(corpus, damage, message):
    damage(corpus)
    with pytest.raises(DataError, match=message):
        TokenFolder(corpus, VOCAB, check_hashes=True)


def test_every_flip_in_every_file_is_named(corpus):
    names = {path.name for path in corpus.iterdir()}
    assert len(names) == 7
    for file in sorted(corpus.iterdir()):
        content = file.read_bytes()
        for place in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
            changed = bytearray(content)
            changed[place] ^= 4
            file.write_bytes(changed)
            with pytest.raises(DataError, match=file.name):
                TokenFolder(corpus, VOCAB, check_hashes=True)
        file.write_bytes(content[:-1])
        with pytest.raises(DataError, match=file.name):
            TokenFolder(corpus, VOCAB, check_hashes=True)
        file.write_bytes(content)
    one, other = corpus / "train_00000.tokens", corpus / "train_00000.documents"
    one.rename(corpus / "x")
    other.rename(one)
    (corpus / "x").rename(other)
    with pytest.raises(DataError, match="train_00000.tokens"):
        TokenFolder(corpus, VOCAB)


def test_what_must_be_read_is_shared_by_the_ranks(corpus):
    """Each shard is read by one of them: that one raises, and the run ends for all."""
    damage_id(corpus)
    refused = []
    for rank in range(2):
        try:
            TokenFolder(corpus, VOCAB, rank=rank, ranks=2)
        except DataError:
            refused.append(rank)
    assert refused == [0]


def test_ids_outside_the_vocabulary(corpus):
    damage_id(corpus)
    with pytest.raises(DataError, match="token 5 has id 60000, outside the vocabulary of 8192"):
        TokenFolder(corpus, VOCAB)
    with pytest.raises(DataError, match="8192 ids, model.vocab_size is 100; set model.vocab_size=8192"):
        TokenFolder(corpus, 100)


def test_pack():
    ids = np.arange(10, 21)
    sequence = pack(ids, np.array([4, 5, 10]))
    assert sequence.tokens.tolist() == list(range(10, 20))
    assert sequence.targets.tolist() == [11, 12, 13, IGNORE_INDEX, IGNORE_INDEX, 16, 17, 18, 19, IGNORE_INDEX]
    assert sequence.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
    assert sequence.document_start.tolist() == [0, 0, 0, 0, 4, 5, 5, 5, 5, 5]
    joined = pack(ids, np.array([4, 5, 10]), separate_documents=False)
    assert joined.targets.tolist() == list(range(11, 21))
    assert joined.positions.tolist() == list(range(10))


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 5), st.integers(0, 3))
def test_shuffle_is_a_permutation(size, seed, epoch):
    assert sorted(shuffled(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_shuffle_differs_between_epochs():
    orders = [[shuffled(i, 100, 0, epoch) for i in range(100)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != list(range(100))


class Counting:
    """A source whose sequences are their numbers."""

    def sequence(self, number, span=None):
        return pack(np.full(3, number), np.empty(0, dtype=np.int64))


@settings(deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2]), st.integers(0, 5), st.integers(0, 5))
def test_layouts_read_the_same_sequences(ranks, micro_batch, steps_before, steps_after):
    """Any number of data ranks and any micro-batch, changed in the middle: each sequence once, in the same step."""

    def read(ranks, micro_batch, consumed):
        data = DataConfig(sequences_per_step=24, sequences_per_micro_batch=micro_batch)
        batches = [b for rank in range(ranks) for b in Loader(Counting(), data, rank, ranks).step(consumed)]
        return sorted(int(n) for batch in batches for n in batch.tokens[:, 0])

    consumed = 0
    for layout in [(1, 1)] * steps_before + [(ranks, micro_batch)] * steps_after:
        assert read(*layout, consumed) == list(range(consumed, consumed + 24))
        consumed += 24


def split_of(lengths, per_shard, is_trained=None):
    """Documents of such lengths, whose ids count up, in shards of `per_shard` documents."""
    tokens, ends, bits, first = [], [], [], 0
    for at in range(0, len(lengths), per_shard):
        of_shard = np.cumsum(lengths[at : at + per_shard])
        tokens.append(np.arange(first, first + of_shard[-1]))
        ends.append(of_shard)
        last = first + int(of_shard[-1])
        bits.append(None if is_trained is None else np.packbits(is_trained[first:last], bitorder="little"))
        first = last
    return TokenSplit(tokens, ends, bits)


documents = st.lists(st.integers(1, 30), min_size=1, max_size=20).filter(lambda lengths: sum(lengths) > 12)


@settings(deadline=None)
@given(documents, st.integers(1, 12), st.integers(1, 4))
def test_an_epoch_has_each_target_once(lengths, length, per_shard):
    """Those of the end of the text too, which is shorter than a sequence; ids are places, so a target says where."""
    source = ShuffledTokens(split_of(lengths, per_shard), DataConfig(sequence_length=length), seed=3, where="here")
    sequences = [source.sequence(n) for n in range(source.size)]
    for sequence in sequences:
        assert len(sequence.tokens) == length
    targets = [int((sequence.targets != IGNORE_INDEX).sum()) for sequence in sequences]
    first_tokens = len(lengths) - 1  # which are no targets
    assert len(sequences) == -(-(sum(lengths) - 1) // length)
    assert max(targets) - min(targets) <= 1 + first_tokens
    for sequence in sequences:
        is_target = sequence.targets != IGNORE_INDEX
        assert np.array_equal(sequence.targets[is_target], sequence.tokens[is_target] + 1)
    seen = sorted(t for sequence in sequences for t in sequence.targets[sequence.targets != IGNORE_INDEX])
    assert seen == sorted(set(range(sum(lengths))) - {0, *np.cumsum(lengths)})


@settings(deadline=None)
@given(documents, st.integers(8, 12), st.integers(1, 4), st.randoms(use_true_random=False))
def test_conversations_stay_whole(lengths, length, per_shard, draw):
    """Each target that is trained on comes once an epoch, with its document from the first token on, if that fits."""
    is_trained = np.array([draw.random() < 0.5 for _ in range(sum(lengths))])
    split = split_of(lengths, per_shard, is_trained)
    source = ShuffledTokens(split, DataConfig(sequence_length=length), seed=3, where="here")
    starts = np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
    sizes = np.repeat(lengths, lengths)
    seen = []
    for sequence in (source.sequence(n) for n in range(source.size)):
        for index in np.flatnonzero(sequence.targets != IGNORE_INDEX):
            target = int(sequence.targets[index])
            seen.append(target)
            if sizes[target] <= length + 1:
                assert sequence.tokens[sequence.document_start[index]] == starts[target]
    assert sorted(seen) == [t for t in np.flatnonzero(is_trained) if t != starts[t]]


def test_conversations_fill_sequences():
    """The longest first, each into the fullest sequence that it fits; the rest is a document without targets."""
    lengths = [60, 60, 60, 40, 41, 30, 11, 1, 250, 39]
    is_trained = np.ones(sum(lengths), dtype=bool)
    is_trained[:20] = False
    is_trained[sum(lengths[:5]) : sum(lengths[:6])] = False  # the sixth teaches nothing
    source = ShuffledTokens(split_of(lengths, 4, is_trained), DataConfig(sequence_length=100), 0, "here")
    first = np.cumsum([0, *lengths]).tolist()
    found = []
    for number in range(source.size):
        ids, starts, trained = source.windows.read(number)
        begins = [0, *starts.tolist()]
        found.append([(int(ids[a]), b - a) for a, b in zip(begins, [*begins[1:], 101], strict=True)])
        assert trained.sum() > 0
    assert sorted(found) == [
        [(first[0], 60), (first[4], 41)],
        [(first[1], 60), (first[3], 40), (first[3] + 39, 1)],  # and the rest
        [(first[2], 60), (first[9], 39), (first[9] + 38, 2)],
        [(first[6], 11), (first[8] + 200, 50), (first[8] + 249, 40)],
        [(first[8], 101)],
        [(first[8] + 100, 101)],
    ]


def test_packing_wastes_little():
    """One after the other, conversations of half a sequence's length would need 30 % more sequences."""
    lengths = np.random.default_rng(0).lognormal(np.log(1000), 0.7, 20000).astype(int).clip(50, 8000)
    source = ShuffledTokens(
        split_of(lengths.tolist(), 5000, np.ones(lengths.sum(), dtype=bool)),
        DataConfig(sequence_length=2048),
        0,
        "here",
    )
    needed = (lengths - 1).sum() / 2048
    assert needed < source.size < 1.005 * needed


def test_a_file_is_no_folder_of_tokens(tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"chats.jsonl: is a file; prepare it with tools/prepare_data.py"):
        TokenFolder(tmp_path / "chats.jsonl", VOCAB)


def test_too_little_text(corpus):
    split = TokenFolder(corpus, VOCAB).splits["train"]
    with pytest.raises(
        DataError, match=rf"{len(split)} tokens, a sequence needs 100001; .*sequence_length={len(split) - 1}"
    ):
        ShuffledTokens(split, DataConfig(sequence_length=100000), 0, "here")
    with pytest.raises(DataError, match=r"0 tokens, a sequence needs 65; add text$"):  # no length would do
        ShuffledTokens(TokenSplit([], []), DataConfig(sequence_length=64), 0, "here")


def test_validation_is_spread_over_the_split(corpus):
    split = TokenFolder(corpus, VOCAB).splits["train"]
    source = SpacedTokens(split, DataConfig(sequence_length=4), 3, "here", repeats=True)
    assert source.size == 3
    there = len(source.windows)
    for number, window in ((0, 0), (1, there // 3), (2, 2 * there // 3), (3, 0)):
        assert np.array_equal(source.sequence(number).tokens, source.windows.read(window)[0][:-1])


def test_recall_stream():
    data = DataConfig(sequence_length=512)
    stream = RecallStream(data, seed=1)
    sequence = stream.sequence(5)
    assert all(np.array_equal(a, b) for a, b in zip(sequence, stream.sequence(5), strict=True))
    assert not np.array_equal(sequence.tokens, stream.sequence(6).tokens)
    keys, values = sequence.tokens[::2], sequence.targets[::2]
    assert len({(k, v) for k, v in zip(keys, values, strict=True)}) == len(set(keys)) <= data.recall.keys
    assert (sequence.targets[1::2] == IGNORE_INDEX).all()
    assert keys.max() < data.recall.keys <= values.min()


def test_distances_of_recall():
    stream = RecallStream(DataConfig(sequence_length=200), seed=3)
    sequence, distance = stream.probe(5)
    last: dict[int, int] = {}
    for place, (key, target) in enumerate(zip(sequence.tokens, sequence.targets, strict=True)):
        expected = 0
        if target != IGNORE_INDEX:
            expected = place - last.get(key, place)
            last[key] = place
        assert distance[place] == expected


@given(length=st.integers(1, 3000), vocab_size=st.integers(2, 50000), number=st.integers(0, 100))
@settings(max_examples=examples(100), deadline=None)
def test_copies_can_be_read_off(length, vocab_size, number):
    data = DataConfig(sequence_length=length)
    sequence, distance = Copies(data, vocab_size, seed=1).probe(number)
    asked = np.flatnonzero(distance)
    assert np.array_equal(asked, np.flatnonzero(sequence.targets != IGNORE_INDEX))
    assert np.array_equal(sequence.tokens[asked + 1 - distance[asked]], sequence.targets[asked])
    assert sequence.tokens.max() < vocab_size
    far, counts = np.unique(distance[asked], return_counts=True)
    assert set(counts) <= {24}
    assert set(far) <= {2**k for k in range(5, 12)}
    assert bool(len(far)) == (length >= 63)
    assert length < 1000 or {32, 64, 128} <= set(far)
    assert np.array_equal(Copies(data, vocab_size, seed=1).probe(number).sequence.tokens, sequence.tokens)


@given(
    length=st.integers(1, 3000),
    vocab_size=st.integers(2, 50000),
    number=st.integers(0, 100),
    span=st.none() | st.integers(256, 2048),
)
@settings(max_examples=examples(100), deadline=None)
def test_copies_to_train_on_ask_for_what_stood_before(length, vocab_size, number, span):
    tokens, targets, positions, start = copies_sequence(number, length, vocab_size, 1, span)
    whole = np.append(tokens, -1)
    assert np.array_equal(positions, np.arange(length) % (span or length))
    assert np.array_equal(start, np.arange(length) - positions)
    asked = np.flatnonzero(targets != IGNORE_INDEX)
    assert np.array_equal(whole[asked + 1][:-1], targets[asked][:-1])
    assert tokens.max() < vocab_size
    if length >= 1000:
        assert 0.05 < len(asked) / length < 0.7
    if (
        vocab_size > 5000
    ):  # eight tokens up to a target stand somewhere before it, where attention reaches, and it after
        text = tokens.tolist()
        for at in asked[:: max(1, len(asked) // 20)]:
            before = text[at - 7 : at + 1]
            assert any(text[i : i + 8] == before and text[i + 8] == targets[at] for i in range(start[at], at - 8)), at


@pytest.mark.parametrize(("span", "share"), [(None, 0.38), (256, 0.26), (1024, 0.36)])
def test_how_many_tokens_copies_ask_for(span, share):
    """Half of them are copies, but for what begins each and the first of a span."""
    targets = [copies_sequence(number, 3000, 9000, 1, span)[1] for number in range(50)]
    assert np.mean([(t != IGNORE_INDEX).mean() for t in targets]) == pytest.approx(share, abs=0.02)


def test_builtin_packages():
    packages = builtin.packages()
    assert packages.keys() >= builtin.HELD_OUT
    assert {"python/json", "torch/nn"} <= packages.keys() - builtin.HELD_OUT
    text = "".join(builtin.read_package("python/json", packages["python/json"]))
    assert "# python: json/decoder.py\n" in text
    installed = builtin.packages(site_packages=True)
    assert packages.items() <= installed.items()
    assert {"numpy/linalg", "sympy/core"} <= installed.keys() - packages.keys()
    assert builtin.fingerprint() != builtin.fingerprint(site_packages=True)


def test_shipped_tokenizer():
    tokenizer = Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    assert tokenizer.get_vocab_size() == VOCAB
    text = "def naïve(x: int) -> str:\n\treturn '€' * x\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_manifest_is_plain_json(corpus):
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["splits"]["train"][0]["documents"] == 3
    assert TokenFolder(corpus, VOCAB).manifest.fields() | {"sha256": manifest["sha256"]} == manifest


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = {}
    for seed in (0, 1):
        source = ShuffledTokens(split_of([1281], 1), DataConfig(sequence_length=64), seed, "here")
        assert source.size == 20
        for epoch in range(2):
            orders[seed, epoch] = tuple(int(source.sequence(epoch * 20 + n).tokens[0]) for n in range(20))
    assert len(set(orders.values())) == 4
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1


def test_a_text_of_a_sequence_needs_one_token_more():
    with pytest.raises(DataError, match="64 tokens, a sequence needs 65"):
        ShuffledTokens(split_of([64], 1), DataConfig(sequence_length=64), 0, "here")
    assert ShuffledTokens(split_of([65], 1), DataConfig(sequence_length=64), 0, "here").size == 1


def test_conversations_that_are_packed_in_lots_stay_apart(monkeypatch):
    """The first sequence of a lot is none of the lot before."""
    monkeypatch.setattr(windows, "PACKED_TOGETHER", 3)
    split = split_of([9] * 8, 8, np.ones(72, dtype=bool))
    source = ShuffledTokens(split, DataConfig(sequence_length=20), 0, "here")
    assert source.size == 5
    seen = sorted(t for n in range(source.size) for t in source.sequence(n).targets.tolist() if t >= 0)
    assert seen == [t for t in range(72) if t % 9]
