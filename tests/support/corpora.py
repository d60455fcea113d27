"""Small corpora for tests, and tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from longctx.data.prepare import BUILTIN_TOKENIZER, prepare
from longctx.data.text import Document, FilePiece, cut_files, find_files
from longctx.data.tokens import TokenFolder


class Documents(list[Document]):
    """A piece of input for `prepare`, of documents at hand."""

    @property
    def size(self) -> int:
        return sum(len(text) for document in self for text in document.pieces)

    @property
    def identity(self) -> str:
        return repr(self)

    def documents(self) -> Iterator[Document]:
        return iter(self)


def find_pieces(paths: list[Path], text_field: str = "text", skip_unreadable: bool = False) -> list[FilePiece]:
    """The files of `paths`, cut into pieces, as tools/prepare_data.py does it."""
    return cut_files(find_files(paths).files, text_field, skip_unreadable)


def make_corpus(folder: Path, documents: int = 40) -> Path:
    """Token shards of short numbered texts, every eighth held out."""
    texts = Documents(
        Document(
            f"text {i}",
            ["".join(f"def function_{i}_{j}(x):\n    return x + {j}\n\n" for j in range(1 + i % 9))],
            i % 8 == 0,
        )
        for i in range(documents)
    )
    prepare([texts], folder)
    return folder


def byte_tokenizer(path: Path, begin: bool = False, spaces: bool = False) -> Path:
    """One id a byte, with Llama 3's kind of template (`begin`), or runs of spaces as added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<s>", special=True)])
    if spaces:
        tokenizer.add_tokens([AddedToken(" " * n, normalized=False) for n in (8, 4, 2)])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(path))
    return path


def prepared(folder: Path, texts: list[str], tokenizer: Path = BUILTIN_TOKENIZER, **words) -> TokenFolder:
    """A corpus of `texts`, all of them trained on."""
    prepare([Documents(Document(str(i), [t], False) for i, t in enumerate(texts))], folder, tokenizer, **words)
    return TokenFolder(folder, 1 << 20)


def documents_of(corpus: TokenFolder) -> list[list[int]]:
    ids, ends = corpus.splits["train"].tokens[0], corpus.splits["train"].document_ends[0]
    return [part.tolist() for part in np.split(np.asarray(ids), np.asarray(ends)[:-1])]
