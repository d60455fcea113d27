"""The one mask of longctx: every query row sees one contiguous range of keys.

Full, causal, sliding-window and packed-document masks, and each of them cut into the shards of a sequence that is
split over processes, are all of this form. Query row `i` sees the keys `start[i] <= j < end[i]`; a row with
`start >= end` sees none. Both bounds never decrease with `i`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """Key ranges of `n_queries` query rows over `n_keys` keys.

    `start` and `end` are int32, (batch or 1, n_queries); None stands for the compile-time cases: a full mask, or a
    causal one (bottom-right aligned: the last query sees the last key) where `is_causal` is set.
    """

    n_queries: int
    n_keys: int
    is_causal: bool = False
    start: Tensor | None = None
    end: Tensor | None = None

    @staticmethod
    def full(n_queries: int, n_keys: int) -> KeyIntervals:
        """Every query sees every key."""
        return KeyIntervals(n_queries, n_keys)

    @staticmethod
    def causal(n_queries: int, n_keys: int | None = None) -> KeyIntervals:
        """Query `i` sees the keys up to `i + n_keys - n_queries`."""
        return KeyIntervals(n_queries, n_queries if n_keys is None else n_keys, is_causal=True)

    @staticmethod
    def documents(document_start: Tensor) -> KeyIntervals:
        """Causal inside each of the documents packed into a sequence.

        `document_start`: (batch, sequence) integers, for each token the index of its document's first token.
        """
        batch, length = document_start.shape
        start = document_start.to(torch.int32)
        end = torch.arange(1, length + 1, dtype=torch.int32, device=start.device).expand(batch, length)
        return KeyIntervals(length, length, start=start, end=end)

    def bounds(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """`(start, end)`, written out for the compile-time cases too: int32, (batch or 1, n_queries)."""
        if self.start is not None and self.end is not None:
            return self.start, self.end
        start = torch.zeros(1, self.n_queries, dtype=torch.int32, device=device)
        if not self.is_causal:
            return start, torch.full_like(start, self.n_keys)
        end = torch.arange(1, self.n_queries + 1, dtype=torch.int32, device=device) + (self.n_keys - self.n_queries)
        return start, end.clamp_(min=0).unsqueeze(0)

    def window(self, size: int, device: torch.device | str) -> KeyIntervals:
        """The same mask where each row sees only the last `size` keys of its range (itself included)."""
        if size < 1:
            raise ValueError(f"window of {size} keys: a window holds at least the row's own key, so give 1 or more")
        start, end = self.bounds(device)
        return KeyIntervals(self.n_queries, self.n_keys, start=torch.maximum(start, end - size), end=end)

    def rows(self, index: Tensor) -> KeyIntervals:
        """The mask of the query rows `index` (ascending) over the same keys: one rank's share."""
        start, end = self.bounds(index.device)
        return KeyIntervals(index.numel(), self.n_keys, start=start[:, index], end=end[:, index])

    def keys(self, index: Tensor) -> KeyIntervals:
        """The mask over the subset `index` (ascending) of the keys.

        A contiguous range of all keys stays a contiguous range of any ascending subset, however scattered: its new
        bound is the number of kept keys before the old one.
        """
        start, end = self.bounds(index.device)
        index = index.to(torch.int32)

        def kept_before(bound: Tensor) -> Tensor:
            return torch.searchsorted(index, bound.contiguous(), out_int32=True)

        return KeyIntervals(self.n_queries, index.numel(), start=kept_before(start), end=kept_before(end))


def once_a_mask(compute: Callable[..., T]) -> Callable[..., T]:
    """Keeps the results of `compute(mask, *arguments)` as long as the mask's bounds live: all layers share one."""
    results: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def cached(mask: KeyIntervals, *arguments: Hashable) -> T:
        if mask.start is None:
            return compute(mask, *arguments)
        if mask.start not in results:
            results[mask.start] = {}
        of_mask: dict = results[mask.start]
        key = (id(mask.end), mask.n_keys, *arguments)
        if key not in of_mask:
            of_mask[key] = mask.end, compute(mask, *arguments)  # with `end`, so that its id stays its own
        return of_mask[key][1]

    return cached
