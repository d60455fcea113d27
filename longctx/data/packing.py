"""A window of the token stream as a training sequence: targets, positions and document borders.

Targets are shifted here, before a sequence is cut over ranks: a shift after cutting would lose the target at the end
of every shard.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORE_INDEX = -100  # target of a token after which nothing is to be predicted


class Sequence(NamedTuple):
    """One training row; each field int64, (sequence_length,)."""

    tokens: np.ndarray
    targets: np.ndarray  # the next token of the same document, or IGNORE_INDEX: also where it is not trained on
    positions: np.ndarray  # inside the document, 0 at its first token in this sequence
    document_start: np.ndarray  # index in the sequence of the first token of this token's document


def pack(
    ids: np.ndarray, new_documents: np.ndarray, is_trained: np.ndarray | None = None, separate_documents: bool = True
) -> Sequence:  # fmt: skip
    """Cuts a sequence of n tokens out of n + 1 tokens of the stream.

    ids (n + 1,); new_documents: ascending indices in 1..n at which another document begins; is_trained (n + 1,): which
    tokens are targets, None: all. With `separate_documents` positions restart at a new document, attention is kept
    apart by `document_start`, and the token before has no target; without, the sequence is one text.
    """
    length = len(ids) - 1
    index = np.arange(length)
    targets = ids[1:].copy()
    if is_trained is not None:
        targets[~is_trained[1:]] = IGNORE_INDEX
    if not separate_documents:
        return Sequence(ids[:-1], targets, index, np.zeros_like(index))
    targets[new_documents - 1] = IGNORE_INDEX
    starts = np.concatenate(([0], new_documents[new_documents < length]))
    document_start = np.repeat(starts, np.diff(np.append(starts, length)))
    return Sequence(ids[:-1], targets, index - document_start, document_start)


def cut_attention(sequence: Sequence, span: int | None) -> Sequence:
    """The same tokens and targets, with attention and positions begun anew at every multiple of `span`; None: as is."""
    if span is None:
        return sequence
    index = np.arange(len(sequence.tokens))
    start = np.maximum(sequence.document_start, index // span * span)
    return sequence._replace(positions=index - start, document_start=start)
