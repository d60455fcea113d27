"""Where a stream of tokens is cut into sequences: each target is that of one sequence, and none is lost.

A cut (begin, end) has the targets begin + 1 to end: each is predicted from the token before it. Its sequence has more
tokens than that where the targets do not fill it: those after `end`, or, at the end of the stream, before `begin`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np


class Cuts(Protocol):
    """Cuts of a stream by number, 0, 1, 2, ..."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[int, int]: ...


class EqualCuts:
    """Of text: as few as can be, with equally many targets, to one: a short one at the end would count as much."""

    def __init__(self, tokens: int, length: int) -> None:
        self.targets = tokens - 1
        self.number = (self.targets + length - 1) // length

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, number: int) -> tuple[int, int]:
        return number * self.targets // self.number, (number + 1) * self.targets // self.number


class WholeDocuments:
    """Of conversations: as many whole documents in each as fit, so that no answer is without its question.

    A document longer than a sequence fills several; what follows it begins in the last of them. The first token of a
    document is no target: documents are kept apart.
    """

    def __init__(self, document_ends: np.ndarray, length: int, is_trained: Callable[[int, int], bool]) -> None:
        """document_ends (documents,), ascending: the index after the last token of each.

        `is_trained(begin, end)`: whether any of the targets begin + 1 to end is trained on; cuts without are left out.
        """
        cuts, begin, last = [], 0, int(document_ends[-1]) - 1
        while begin < last:
            reach = begin + length
            fitting = int(np.searchsorted(document_ends, reach + 1, "right"))
            border = int(document_ends[fitting - 1]) if fitting else 0
            end, following = (border - 1, border) if border > begin else (reach, reach)
            if is_trained(begin, end):
                cuts.append((begin, end))
            begin = following
        self.cuts = np.array(cuts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, number: int) -> tuple[int, int]:
        begin, end = self.cuts[number].tolist()
        return begin, end
