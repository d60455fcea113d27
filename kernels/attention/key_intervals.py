"""The one mask of longctx: every query row sees one contiguous range of keys.

Full, causal, sliding-window and packed-document masks, and each of them cut into the shards of a sequence that is
split over processes, are all of this form. Query row `i` sees the keys `start[i] <= j < end[i]`; a row with
`start >= end` sees none. Both bounds never decrease with `i`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.kernels import hardware
from longctx.kernels.attention.mask_cache import cached_per_mask, remember

_FAR = 1 << 32  # tokens, farther than any position: limits are clamped to it, so that sums fit int64


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """Key ranges of `n_queries` query rows over `n_keys` keys. Made by the static methods, which check what they get.

    `start` and `end` are int32, (batch or 1, n_queries); None stands for the compile-time cases: a full mask, or a
    causal one (bottom-right aligned: the last query sees the last key) where `is_causal` is set.
    `query_position` (batch or 1, n_queries) and `key_position` (n_keys,), int32, are what distances and dropout are
    counted in; None stands for `i + n_keys - n_queries` and `j`.
    """

    n_queries: int
    n_keys: int
    is_causal: bool = False
    start: Tensor | None = None
    end: Tensor | None = None
    query_position: Tensor | None = None
    key_position: Tensor | None = None
    is_owned: bool = True  # False: the tensors are of compiled code, see `mask_cache`

    def __post_init__(self) -> None:
        if self.is_owned:
            remember(self.start, self.end, self.query_position, self.key_position)

    @staticmethod
    def full(n_queries: int, n_keys: int) -> KeyIntervals:
        """Every query sees every key. Raises ValueError for what are no numbers of rows, as `causal` does."""
        _check_sizes(n_queries, n_keys)
        return KeyIntervals(n_queries, n_keys)

    @staticmethod
    def causal(n_queries: int, n_keys: int | None = None) -> KeyIntervals:
        """Query `i` sees the keys up to `i + n_keys - n_queries`."""
        n_keys = n_queries if n_keys is None else n_keys
        _check_sizes(n_queries, n_keys)
        return KeyIntervals(n_queries, n_keys, is_causal=True)

    @staticmethod
    def intervals(start: Tensor, end: Tensor, n_keys: int) -> KeyIntervals:
        """Any bounds: integers, (n_queries,) or (batch or 1, n_queries), never decreasing along a sequence. Copied.

        Raises ValueError if they decrease or leave the keys. The check waits for the device, so make a mask once a step
        and share it over the layers.
        """
        start, end = (_comparable(torch.atleast_2d(bound)) for bound in (start, end))
        if start.shape != end.shape or start.ndim != 2 or start.device != end.device:
            raise ValueError(
                f"start {tuple(start.shape)} on {start.device} and end {tuple(end.shape)} on {end.device}: "
                "key intervals have one start and one end a row, (batch or 1, n_queries), on one device"
            )
        for name, bound in (("start", start), ("end", end)):
            _check_ascending(f"{name} of the key intervals", bound, n_keys)
        start, end = (
            bound.to(torch.int32, memory_format=torch.contiguous_format, copy=True) for bound in (start, end)
        )  # fmt: skip
        return KeyIntervals(start.shape[1], n_keys, start=start, end=end)

    @staticmethod
    def documents(document_start: Tensor) -> KeyIntervals:
        """Causal inside each of the documents packed into a sequence.

        `document_start`: (batch, sequence) integers, for each token the index of its document's first token. Raises
        ValueError for others, such as the numbers of documents, for which it waits for the device (not while
        torch.compile traces).
        """
        if document_start.ndim != 2:
            raise ValueError(f"document_start {tuple(document_start.shape)}: must be (batch, sequence)")
        batch, length = document_start.shape
        document_start = _comparable(document_start)
        _check_document_starts(document_start)
        start = document_start.to(torch.int32, memory_format=torch.contiguous_format, copy=True)
        end = torch.arange(1, length + 1, dtype=torch.int32, device=start.device).repeat(batch, 1)
        return KeyIntervals(length, length, start=start, end=end)

    @staticmethod
    def sequences(
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, n_queries: int, n_keys: int, is_causal: bool = False
    ) -> KeyIntervals:
        """Sequences of any lengths side by side: rows cu_seqlens_q[s]:cu_seqlens_q[s + 1] see the keys of sequence s.

        Both (sequences + 1,), int32, starting at 0 and never decreasing; rows past the last entry see nothing. Causal:
        bottom-right aligned in each sequence. Positions are such that a sequence's last query is at its last key.
        Raises ValueError for other offsets, for which it waits for the device (not while torch.compile traces).
        """
        _check_offsets(cu_seqlens_q, cu_seqlens_k, n_queries, n_keys)
        row, sequence = sequence_of_rows(cu_seqlens_q, n_queries)
        is_row = sequence < cu_seqlens_q.numel() - 1
        last = sequence.clamp(max=cu_seqlens_q.numel() - 2)
        start = torch.where(is_row, cu_seqlens_k[last], cu_seqlens_k[-1])
        end = torch.where(is_row, cu_seqlens_k[last + 1], cu_seqlens_k[-1])
        position = end - (cu_seqlens_q[last + 1] - row)
        if is_causal:
            end = torch.minimum(end, torch.maximum(start, position + 1))
        start, end, position = (x.to(torch.int32).unsqueeze(0) for x in (start, end, position))
        return KeyIntervals(n_queries, n_keys, start=start, end=end, query_position=position)

    def to(self, device: torch.device | str) -> KeyIntervals:
        """The same mask on another device."""
        tensors = {
            name: to_device(tensor, device)
            for name in ("start", "end", "query_position", "key_position")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **tensors)

    def bounds(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """`(start, end)`, written out for the compile-time cases too: int32, (batch or 1, n_queries)."""
        if self.start is not None and self.end is not None:
            return self.start, self.end
        start = torch.zeros(1, self.n_queries, dtype=torch.int32, device=device)
        if not self.is_causal:
            return start, torch.full_like(start, self.n_keys)
        return start, (self.positions(device)[0] + 1).clamp_(min=0)

    def with_bounds(self, device: torch.device | str) -> KeyIntervals:
        """The same mask with bounds: for all full or causal masks of a size the same tensors, which caches know."""
        if self.start is not None:
            return self
        made = _with_bounds(KeyIntervals(self.n_queries, self.n_keys, self.is_causal), torch.device(device))
        return replace(
            made, query_position=self.query_position, key_position=self.key_position, is_owned=self.is_owned
        )  # fmt: skip

    def identity(self) -> tuple[tuple[Tensor | None, ...], tuple[int, int, bool]]:
        """The tensors and sizes that the mask consists of, see `mask_cache`."""
        tensors = self.start, self.end, self.query_position, self.key_position
        return tensors, (self.n_queries, self.n_keys, self.is_causal)

    def positions(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Of the queries, (batch or 1, n_queries), and of the keys, (n_keys,): int32, written out."""
        query, key = self.query_position, self.key_position
        if query is None:
            first = self.n_keys - self.n_queries
            query = torch.arange(first, self.n_keys, dtype=torch.int32, device=device).unsqueeze(0)
        return query, torch.arange(self.n_keys, dtype=torch.int32, device=device) if key is None else key

    def dense(self, device: torch.device | str) -> Tensor:
        """(batch or 1, 1, n_queries, n_keys) bool: True where a row sees a key."""
        start, end = (bound.unsqueeze(-1) for bound in self.bounds(device))
        key = torch.arange(self.n_keys, device=start.device)
        return ((key >= start) & (key < end)).unsqueeze(1)

    def window(self, size: int, device: torch.device | str) -> KeyIntervals:
        """The same mask where each row sees only the last `size` keys up to its own position (that included)."""
        return self.band(_left_of_window(size), 0, device)

    def band(self, left: int | None, right: int | None, device: torch.device | str) -> KeyIntervals:
        """The same mask where a row at position p sees only the keys p - left to p + right; None: no limit there.

        For masks over all keys, so before `keys` takes a subset of them.
        """
        start, end = self.bounds(device)
        position = self.positions(device)[0].long()  # any limit may be given: none wraps around

        def limit(offset: int) -> Tensor:
            return (position + max(-_FAR, min(_FAR, offset))).clamp(0, torch.iinfo(start.dtype).max).to(start.dtype)

        first = start if left is None else torch.maximum(start, limit(-left))
        if right is not None:
            end = torch.maximum(start, torch.minimum(end, limit(right + 1)))
        first, end = (bound.contiguous() for bound in torch.broadcast_tensors(first, end))
        return replace(self, is_causal=False, start=first, end=end)

    def windowed(self, size: int, device: torch.device | str) -> KeyIntervals:
        """As `window`: for the same mask and size the same tensors each time, which caches know."""
        return banded(self, _left_of_window(size), 0, torch.device(device))

    def rows(self, index: Tensor) -> KeyIntervals:
        """The mask of the query rows `index` over the same keys: ascending ones, such as one rank's, for a kernel."""
        _check_index(index)
        start, end = self.bounds(index.device)
        position = self.positions(index.device)[0]
        return replace(
            self, n_queries=index.numel(), is_causal=False,
            start=start[:, index], end=end[:, index], query_position=position[:, index],
        )  # fmt: skip

    def keys(self, index: Tensor) -> KeyIntervals:
        """The mask over the subset `index` (ascending) of the keys.

        A contiguous range of all keys stays a contiguous range of any ascending subset, however scattered: its new
        bound is the number of kept keys before the old one.
        """
        _check_index(index)
        start, end = self.bounds(index.device)
        query_position, key_position = self.positions(index.device)
        index = index.to(torch.int32)

        def kept_before(bound: Tensor) -> Tensor:
            return torch.searchsorted(index, bound.contiguous(), out_int32=True)

        return KeyIntervals(
            self.n_queries, index.numel(), start=kept_before(start), end=kept_before(end),
            query_position=query_position, key_position=key_position[index],
        )  # fmt: skip


@cached_per_mask
def _with_bounds(mask: KeyIntervals, device: torch.device) -> KeyIntervals:
    start, end = mask.bounds(device)
    return KeyIntervals(mask.n_queries, mask.n_keys, start=start, end=end)


@cached_per_mask
def banded(mask: KeyIntervals, left: int | None, right: int | None, device: torch.device) -> KeyIntervals:
    """`mask.band(left, right, device)`: for the same mask the same tensors, which caches know."""
    return mask.band(left, right, device)


def _check_index(index: Tensor) -> None:
    """Raises ValueError unless these are integers (n,). That they ascend is not asked: it would wait for the device."""
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index {tuple(index.shape)} {index.dtype}: must be ascending int32 or int64, (n,)")


def _check_sizes(*sizes: int) -> None:
    for size in sizes:
        is_number = isinstance(size, int | torch.SymInt) and not isinstance(size, bool)  # compiled code has the latter
        if not is_number or (isinstance(size, int) and size < 0):
            raise ValueError(f"a mask over {size!r} rows or keys: give their number, 0 or more")


def _left_of_window(size: int) -> int:
    """How many keys before its own a row of a window sees."""
    if isinstance(size, float | bool):
        raise ValueError(f"window of {size!r} keys: must be an integer")
    if size < 1:
        raise ValueError(f"window of {size} keys: a window holds at least the row's own key, so give 1 or more")
    return size - 1


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device; on the way from the CPU to a GPU nobody waits for what the GPU still has to do."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def sequence_of_rows(cu_seqlens: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """The rows 0..n_rows - 1 (int32), and the sequence that each is in; past the last offset, as many as there are."""
    row = torch.arange(n_rows, dtype=torch.int32, device=cu_seqlens.device)
    return row, torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def _comparable(x: Tensor) -> Tensor:
    """As int64 where torch does not compare numbers of its type: those without a sign and of more than 8 bits."""
    return x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x


def _check_ascending(what: str, bound: Tensor, limit: int) -> None:
    """Raises ValueError unless `bound` (rows, n) has integers of 0..limit that never decrease along a row."""
    _check_integers(what, bound)
    if hardware.is_recording() or bound.numel() == 0:
        return
    decreases = (bound[:, 1:] < bound[:, :-1]).any()
    least, most, decreasing = torch.stack((bound.min(), bound.max(), decreases.to(bound.dtype))).tolist()
    if least < 0 or most > limit:
        raise ValueError(f"{what}: values from {least} to {most}, must lie in 0..{limit}")
    if decreasing:
        row, at = torch.nonzero(bound[:, 1:] < bound[:, :-1])[0].tolist()
        raise ValueError(f"{what}: {int(bound[row, at])} at {at} is followed by less, must never decrease")


def _check_integers(what: str, x: Tensor) -> None:
    if x.is_floating_point() or x.dtype == torch.bool:
        raise ValueError(f"{what}: {x.dtype}, must be integers")


def _check_document_starts(start: Tensor) -> None:
    """Raises ValueError unless each token's document starts at or before it, at a token that says the same, and no
    earlier than the document of the token before."""
    _check_integers("document_start", start)
    if hardware.is_recording() or start.numel() == 0:
        return
    token = torch.arange(start.shape[1], device=start.device)
    of_start = start.gather(1, start.long().clamp(0, start.shape[1] - 1))
    wrong = (start < 0) | (start > token) | (of_start != start)
    wrong[:, 1:] |= start[:, 1:] < start[:, :-1]
    if wrong.any():
        row, at = torch.nonzero(wrong)[0].tolist()
        raise ValueError(
            f"document_start: {int(start[row, at])} at token {at} is not where a document starts that goes on "
            "here; it holds the index of each token's first token, such as 0, 0, 0, 3, 3, not a document's number"
        )


def _check_offsets(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, n_queries: int, n_keys: int) -> None:
    for name, offsets, tokens in (("cu_seqlens_q", cu_seqlens_q, n_queries), ("cu_seqlens_k", cu_seqlens_k, n_keys)):
        if offsets.ndim != 1 or offsets.numel() < 2 or offsets.dtype != torch.int32:
            raise ValueError(
                f"{name} {tuple(offsets.shape)} {offsets.dtype}: must be (sequences + 1,) torch.int32 with 1 or more"
            )
        _check_ascending(name, offsets.unsqueeze(0), tokens)
        if not hardware.is_recording() and (first := int(offsets[0])):
            raise ValueError(f"{name} starts at {first}, must start at 0")
    if cu_seqlens_q.numel() != cu_seqlens_k.numel() or cu_seqlens_q.device != cu_seqlens_k.device:
        raise ValueError(
            f"cu_seqlens_q of {cu_seqlens_q.numel() - 1} sequences on {cu_seqlens_q.device} and cu_seqlens_k of "
            f"{cu_seqlens_k.numel() - 1} on {cu_seqlens_k.device}: must be the same sequences on one device"
        )
