"""How long the documents of a corpus are: what a long context can be trained on at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longctx.data.tokens import TokenSplit

LONG = 32768  # tokens


def document_lengths(split: TokenSplit) -> np.ndarray:
    """Tokens of each document, int64."""
    return np.concatenate([np.empty(0, np.int64), *(np.diff(ends, prepend=0) for ends in split.document_ends)])


def length_histogram(split: TokenSplit) -> list[tuple[int, int, int]]:
    """(2^k, documents of 2^k to 2^(k+1) - 1 tokens, their tokens), from the first length there is to the last."""
    lengths = document_lengths(split)
    if not len(lengths):
        return []
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1  # exact, where a logarithm is not
    documents = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths).astype(np.int64)
    return [(1 << k, int(documents[k]), int(tokens[k])) for k in range(int(exponents.min()), len(documents))]


def share_of_long(split: TokenSplit, length: int = LONG) -> float:
    """Share of the tokens that are in documents of at least `length` tokens."""
    lengths = document_lengths(split)
    return float(lengths[lengths >= length].sum() / max(1, lengths.sum()))


def length_table(split: TokenSplit) -> str:
    """The histogram as text, a line each power of two, and the share of tokens in long documents."""
    total = max(1, len(split))
    lines = ["document length     documents          tokens   share of tokens"]
    lines += [
        f"{low:>9,} - {2 * low - 1:<9,} {documents:>9,} {tokens:>15,} {100 * tokens / total:>8.1f} %"
        for low, documents, tokens in length_histogram(split)
    ]
    return "\n".join(
        [*lines, f"in documents of {LONG:,} tokens or more: {100 * share_of_long(split):.1f} % of the tokens"]
    )


def draw_lengths(split: TokenSplit, path: Path) -> Path:
    """Draws tokens by document length, with the share of long documents in the title; returns `path`."""
    from matplotlib.figure import Figure

    rows = length_histogram(split)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar([str(low) if low < 1024 else f"{low // 1024}k" for low, _, _ in rows], [tokens for _, _, tokens in rows])
    axes.set_xlabel("document length, tokens, from")
    axes.set_ylabel("tokens")
    axes.set_title(f"{100 * share_of_long(split):.1f} % of the tokens in documents of {LONG:,} or more")
    figure.savefig(path)
    return path
