"""The corpora of a run and the share of its sequences that each gives.

Which corpus gives sequence number n is a pure function of the seed and n, as the order inside each corpus is: in every
block of `BLOCK` numbers each corpus has its share, rounded, at places drawn from a generator.
"""

from __future__ import annotations

import bisect
import hashlib
from functools import lru_cache
from itertools import accumulate

import numpy as np

from longctx.config import DataConfig
from longctx.data.loader import ShuffledTokens, Source, SpacedTokens, is_packed
from longctx.data.packing import Sequence
from longctx.data.tokens import Corpus
from longctx.errors import DataError

BLOCK = 4096


class Mixture:
    """Checked corpora with their weights; one corpus alone is a mixture too."""

    def __init__(self, corpora: list[Corpus], weights: list[float]) -> None:
        """Raises `DataError` if their tokenizers differ, or how they write conversations."""
        self.corpora, self.weights = corpora, weights
        first = corpora[0]
        for other in corpora[1:]:
            if _tokens_of(other) != _tokens_of(first):
                raise DataError(
                    f"{other.folder} and {first.folder} were made with different tokenizers; prepare both with one"
                )
            if (other.document_begin, other.end_of_document) != (first.document_begin, first.end_of_document):
                raise DataError(
                    f"{other.folder}: documents begin with {other.document_begin} and end with "
                    f"{other.end_of_document}, those of {first.folder} with {first.document_begin} and "
                    f"{first.end_of_document}; prepare both alike"
                )
        of_chats = [corpus for corpus in corpora if corpus.has_conversations]
        for other in of_chats[1:]:
            if other.chat_prompt != of_chats[0].chat_prompt:
                raise DataError(
                    f"{other.folder}: its conversations write a question as {other.chat_prompt}, those of "
                    f"{of_chats[0].folder} as {of_chats[0].chat_prompt}; prepare both with one --chat-template"
                )
        self.tokenizer_file, self.tokenizer_vocab = first.tokenizer_file, first.tokenizer_vocab
        self.token_bytes: np.ndarray | None = first.token_bytes
        self.document_begin, self.end_of_document = first.document_begin, first.end_of_document
        first_of_chats = next(iter(of_chats), first)
        self.chat_prompt, self.chat_folder = first_of_chats.chat_prompt, first_of_chats.folder
        ends = [end for corpus in corpora for end in corpus.ends if end != self.end_of_document]
        self.ends = list(dict.fromkeys([*ends, self.end_of_document]))
        self.notes = [note for corpus in corpora for note in corpus.notes]

    def __str__(self) -> str:
        if len(self.corpora) == 1:
            return str(self.corpora[0].folder)
        total = sum(self.weights)
        parts = zip(self.corpora, self.weights, strict=True)
        return ", ".join(f"{100 * weight / total:.4g} % {corpus.folder}" for corpus, weight in parts)

    def fingerprint(self) -> str:
        """Two mixtures with the same one give the same sequences in the same order."""
        if len(self.corpora) == 1:
            return self.corpora[0].fingerprint()
        facts = [(corpus.fingerprint(), weight) for corpus, weight in zip(self.corpora, self.weights, strict=True)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def is_packed(self, data: DataConfig) -> bool:
        """Whether there are conversations to train on, and kept apart; see `windows.py`."""
        return any(is_packed(corpus.splits["train"], data) for corpus in self.corpora)

    def training(self, data: DataConfig, seed: int) -> Source:
        """Raises `DataError` if a corpus is too short for one sequence."""
        sources: list[Source] = [
            ShuffledTokens(corpus.splits["train"], data, seed, f"{corpus.folder}, training split")
            for corpus in self.corpora
        ]
        if len(sources) == 1:
            return sources[0]
        return MixedTokens(sources, shares(self.weights, BLOCK), seed)

    def validation(self, data: DataConfig, sequences: int) -> tuple[ChainedTokens | None, list[str]]:
        """`sequences` held-out ones by weight, at least one of each corpus; and what there is to say of it.

        A corpus of a mixture that has fewer gives them more than once, so that the weights stay; one alone gives fewer.
        """
        counts = shares(self.weights, max(sequences, len(self.corpora)))
        sources, notes, is_mixed = [], [], len(self.corpora) > 1
        for corpus, count in zip(self.corpora, counts, strict=True):
            where = f"{corpus.folder}, validation split"
            try:
                source = SpacedTokens(corpus.splits["validation"], data, count, where, repeats=is_mixed)
            except DataError as error:
                notes.append(f"no validation: {error}")
                continue
            if (there := len(source.windows)) < count:
                use = "which come more than once" if is_mixed else "so fewer are read"
                notes.append(f"{where}: {count} sequences are to be read and there are {there}, {use}")
            sources.append(source)
        return ChainedTokens(sources) if sources else None, notes


class MixedTokens:
    """Sequences of several sources, `counts[i]` of source i in every block."""

    def __init__(self, sources: list[Source], counts: list[int], seed: int) -> None:
        self.sources, self.counts, self.seed = sources, counts, seed
        self.block_order = lru_cache(maxsize=4)(self._block_order)

    def sequence(self, number: int, span: int | None = None) -> Sequence:
        source, inner = self.place(number)
        return self.sources[source].sequence(inner, span)

    def place(self, number: int) -> tuple[int, int]:
        """Which source gives sequence `number`, and the number it has there: each counts 0, 1, 2 ..."""
        block, place = divmod(number, sum(self.counts))
        order = self.block_order(block)
        source = int(order[place])
        return source, block * self.counts[source] + int((order[:place] == source).sum())

    def _block_order(self, block: int) -> np.ndarray:
        """The sources of a block's places."""
        draws = np.random.Philox(key=[self.seed, block]).random_raw(sum(self.counts))
        return np.repeat(np.arange(len(self.counts)), self.counts)[np.argsort(draws, kind="stable")]


class ChainedTokens:
    """The sequences of several sources, one source after the other."""

    def __init__(self, sources: list[SpacedTokens]) -> None:
        self.sources, self.ends = sources, list(accumulate(source.size for source in sources))
        self.size = self.ends[-1]

    def sequence(self, number: int) -> Sequence:
        number %= self.size
        source = bisect.bisect_right(self.ends, number)
        return self.sources[source].sequence(number - (self.ends[source] - self.sources[source].size))


def shares(weights: list[float], total: int) -> list[int]:
    """`total` split by weight into whole numbers of at least 1, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) > total:  # the ones that were rounded up to 1 take from the largest
        counts[int(np.argmax(counts))] -= 1
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _tokens_of(corpus: Corpus) -> bytes | None:
    """Equal if ids mean the same, as far as the files tell."""
    return corpus.tokenizer_file.read_bytes() if corpus.tokenizer_file else None
