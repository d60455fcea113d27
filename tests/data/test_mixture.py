"""Several corpora in one run: exact shares, an order that any layout and any resume keeps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from corpora import Documents, make_corpus
from longctx.config import DataConfig
from longctx.data.loader import Loader, RecallStream
from longctx.data.mixture import BLOCK, MixedTokens, Mixture, shares
from longctx.data.packing import IGNORE_INDEX, cut_attention, pack
from longctx.data.prepare import BUILTIN_TOKENIZER, prepare
from longctx.data.text import Document
from longctx.data.tokens import TokenFolder
from longctx.errors import DataError, UserError
from longctx.sources import probes
from runs import losses_of, small_config, trainer_of
from thorough import examples


class Named:
    """A source whose sequences say where they come from."""

    def __init__(self, name: int) -> None:
        self.name = name

    def sequence(self, number, span=None):
        return pack(np.array([self.name, number, 0]), np.empty(0, dtype=np.int64))


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.integers(8, 5000))
def test_shares(weights, total):
    counts = shares(weights, total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        exact = total * weight / sum(weights)
        assert count >= 1
        assert exact - len(weights) <= count <= max(exact, 1) + 1


def test_every_sequence_of_a_source_once_and_in_order():
    source = MixedTokens([Named(0), Named(1), Named(2)], shares([0.5, 0.3, 0.2], BLOCK), seed=1)
    places = [source.place(n) for n in range(2 * BLOCK)]
    for k, count in enumerate(source.counts):
        assert [inner for where, inner in places if where == k] == list(range(2 * count))
    for first in range(0, 2 * BLOCK, BLOCK // 8):  # the shares hold in parts of a block too, within 5 deviations
        found = Counter(where for where, _ in places[first : first + BLOCK // 8])
        for k, share in enumerate((0.5, 0.3, 0.2)):
            assert abs(found[k] - share * BLOCK / 8) < 5 * (share * (1 - share) * BLOCK / 8) ** 0.5
    assert places != [MixedTokens(source.sources, source.counts, seed=2).place(n) for n in range(2 * BLOCK)]


@settings(deadline=None, max_examples=examples(30))
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2]), st.sampled_from([12, 24, 60])),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_layouts_and_batch_sizes_read_the_same(steps):
    """A run that is resumed at another number of data ranks, micro-batch and batch size: the order goes on."""
    source = MixedTokens([Named(0), Named(1)], [3000, 1096], seed=3)
    consumed, read = 0, []
    for ranks, micro_batch, batch in steps:
        data = DataConfig(sequences_per_step=batch, sequences_per_micro_batch=micro_batch)
        parts = [b for rank in range(ranks) for b in Loader(source, data, rank, ranks).step(consumed)]
        found = sorted(tuple(row) for part in parts for row in part.tokens.tolist())
        assert found == sorted(source.place(n) for n in range(consumed, consumed + batch))
        read += found
        consumed += batch
    assert len(set(read)) == consumed


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return make_corpus(folder / "a"), make_corpus(folder / "b", documents=90)


def test_a_run_on_a_mixture(tmp_path, corpora):
    config = small_config(tmp_path, corpora[0], validation__sample_tokens=2)
    config.data.folder, config.data.mixture = "", {str(corpora[0]): 1.0, str(corpora[1]): 3.0}
    with trainer_of(config) as trainer:
        counts = Counter(trainer.loader.source.place(n)[0] for n in range(BLOCK))
        assert counts == {0: BLOCK // 4, 1: 3 * BLOCK // 4}
        assert trainer.validation.source.size == 4
        assert [source.size for source in trainer.validation.source.sources] == [1, 3]
        assert str(trainer.tokens) == f"25 % {corpora[0]}, 75 % {corpora[1]}"
    whole = losses_of(config, 6)
    config.name = "parts"
    with trainer_of(config) as trainer:
        first = [trainer.train_step()[0]["loss/train"] for _ in range(3)]
        trainer.save()
    assert first + losses_of(config, 3) == whole


def test_validation_keeps_the_weights_of_a_source_with_little_text(corpora):
    """It has one sequence for its share of 6, which comes six times; alone it would come once."""
    few, many = (TokenFolder(folder, 8192) for folder in corpora)
    data = DataConfig(sequence_length=len(few.splits["validation"]) - 1)
    source, notes = Mixture([few, many], [0.6, 0.4]).validation(data, 10)
    assert notes[0] == (
        f"{corpora[0]}, validation split: 6 sequences are to be read and there are 1, which come more than once"
    )
    sequences = [source.sequence(n).tokens.tobytes() for n in range(source.size)]
    assert (len(sequences), len(set(sequences[:6])), len(set(sequences)) > 1) == (10, 1, True)
    source, notes = Mixture([few], [1.0]).validation(data, 10)
    assert (source.size, notes) == (
        1,
        [f"{corpora[0]}, validation split: 10 sequences are to be read and there are 1, so fewer are read"],
    )


def test_tokenizers_must_agree(tmp_path, corpora):

    tokenizer = Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prepare([Documents([Document("a", ["b"], False)])], tmp_path / "c", tmp_path / "tokenizer.json")
    others = [TokenFolder(folder, 9000) for folder in (corpora[0], tmp_path / "c")]
    with pytest.raises(DataError, match="c and .*a were made with different tokenizers; prepare both with one"):
        Mixture(others, [1, 1])


def test_fingerprints(corpora):
    a, b = (TokenFolder(folder, 8192) for folder in corpora)
    assert Mixture([a], [1.0]).fingerprint() == a.fingerprint()
    found = {Mixture([a, b], weights).fingerprint() for weights in ([1.0, 1.0], [1.0, 2.0])}
    assert len(found | {Mixture([b, a], [1.0, 1.0]).fingerprint(), a.fingerprint()}) == 4


def test_copies_are_a_share_of_the_training_sequences(tmp_path, corpus):
    config = small_config(tmp_path, corpus, data__copies=0.25)
    with trainer_of(config) as trainer:
        source = trainer.loader.source
        copies = [source.sequence(n) for n in range(BLOCK) if source.place(n)[0] == 1]
    assert len(copies) == BLOCK // 4
    assert all((sequence.targets[:8] == IGNORE_INDEX).all() for sequence in copies)
    asked = probes(config, trainer.tokens).probe(0).sequence.tokens
    assert (source.sources[1].sequence(0).tokens == asked).mean() < 0.1  # the model is not asked for what it has read


# curriculum ----------------------------------------------------------------------------------------------------------


def test_cut_attention():
    sequence = pack(np.arange(11), np.array([3]))
    cut = cut_attention(sequence, 4)
    assert cut.document_start.tolist() == [0, 0, 0, 3, 4, 4, 4, 4, 8, 8]
    assert cut.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1]
    assert cut.targets.tolist() == sequence.targets.tolist()
    assert cut.tokens.tolist() == sequence.tokens.tolist()


def test_a_growing_length_reads_the_same_tokens(tmp_path, corpus):
    plain = small_config(tmp_path, corpus, name="plain")
    grows = small_config(tmp_path, corpus, name="grows", data__curriculum={0: 16, 3: 32, 5: 64})
    with trainer_of(plain) as one, trainer_of(grows) as other:
        for step in range(6):
            a, b = one.train_step()[0], other.train_step()[0]
            assert a["data/tokens"] == b["data/tokens"]
            ratio = b["data/documents_per_sequence"] - a["data/documents_per_sequence"]
            assert (1 < ratio <= 3) if step < 3 else (0 < ratio <= 1) if step < 5 else ratio == 0
    whole = losses_of(small_config(tmp_path, corpus, name="whole", data__curriculum={0: 16, 3: 32}), 5)
    parts = small_config(tmp_path, corpus, name="parts", data__curriculum={0: 16, 3: 32})
    with trainer_of(parts) as trainer:
        first = [trainer.train_step()[0]["loss/train"] for _ in range(2)]
        trainer.save()
    assert first + losses_of(parts, 3) == whole


def test_the_stream_is_cut_too():
    loader = Loader(RecallStream(DataConfig(sequence_length=64), seed=0), DataConfig(sequences_per_step=1), 0, 1)
    assert loader.step(0, 16)[0].positions.max() == 15
    assert loader.step(0)[0].positions.max() == 63


def test_a_corpus_without_validation_text_is_left_out(tmp_path, corpora, capsys):
    prepare([Documents([Document("a", ["def f(x):\n" * 99], False)])], tmp_path / "c")
    config = small_config(tmp_path, corpora[0])
    config.data.folder, config.data.mixture = "", {str(corpora[0]): 3.0, str(tmp_path / "c"): 1.0}
    with trainer_of(config) as trainer:
        assert [source.size for source in trainer.validation.source.sources] == [3]
    assert f"no validation: {tmp_path}/c, validation split: 0 tokens" in capsys.readouterr().out


def test_every_folder_is_checked(tmp_path, corpora):
    config = small_config(tmp_path, corpora[0])
    config.data.folder, config.data.mixture = "", {str(corpora[0]): 1.0, str(tmp_path / "no"): 1.0}
    with pytest.raises(UserError, match="no: no such folder"), trainer_of(config):
        pass


def test_corpora_that_frame_documents_otherwise_are_not_mixed(tmp_path):
    documents = [Documents([Document("a", ["b"], False)])]
    prepare(documents, tmp_path / "a")
    prepare(documents, tmp_path / "b", end_of_document="b")
    with pytest.raises(DataError, match="prepare both alike"):
        Mixture([TokenFolder(tmp_path / name, 8192) for name in "ab"], [1, 1])


def test_each_corpus_has_a_validation_sequence_at_least(tmp_path):
    folders = make_corpus(tmp_path / "a"), make_corpus(tmp_path / "b", documents=90)
    mixture = Mixture([TokenFolder(folder, 8192) for folder in folders], [0.9, 0.1])
    source, _ = mixture.validation(DataConfig(sequence_length=16), 1)
    assert source is not None
    assert [one.size for one in source.sources] == [1, 1]
