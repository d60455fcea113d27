"""The mask of key intervals: what it may be made of, how it is cut, and what is kept of it."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode

from longctx.kernels import hardware
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.mask_cache import cached_per_mask


def test_subset_of_keys_keeps_the_mask():
    mask = KeyIntervals.documents(torch.tensor([[0] * 11 + [11] * 20 + [31] * 9])).window(9, "cpu")
    rows, keys = torch.tensor([0, 3, 10, 11, 12, 30, 39]), torch.tensor([1, 2, 9, 10, 11, 25, 30, 31, 38])
    whole = mask.dense("cpu")
    part = mask.rows(rows).keys(keys).dense("cpu")
    assert torch.equal(part[0, 0], whole[0, 0][rows][:, keys])


@pytest.mark.parametrize("size", [2, 2**31 + 5, 2**32, 2**32 + 1, sys.maxsize])
def test_a_window_shows_nothing_that_comes_later(size):
    """Of any mask and size: one larger than the sequence is none."""
    for mask in (KeyIntervals.full(6, 6), KeyIntervals.causal(6)):
        seen = mask.window(size, "cpu").dense("cpu")[0, 0]
        assert seen.equal(torch.ones(6, 6, dtype=torch.bool).tril().triu(1 - min(size, 6)))


def test_limits_beyond_any_position():
    mask = KeyIntervals.full(6, 6)
    for far in (2**31 - 1, 2**31, 2**32, sys.maxsize):
        assert mask.band(4, far, "cpu").dense("cpu").equal(mask.band(4, None, "cpu").dense("cpu"))
        assert mask.band(far, 1, "cpu").dense("cpu").equal(mask.band(None, 1, "cpu").dense("cpu"))
        assert not mask.band(-far, None, "cpu").dense("cpu").any()
        assert not mask.band(None, -far, "cpu").dense("cpu").any()


def test_the_window_of_a_mask_is_made_once():
    mask = KeyIntervals.documents(torch.tensor([[0, 0, 0, 3, 3, 3]]))
    first = mask.windowed(2, torch.device("cpu"))
    assert mask.windowed(2, torch.device("cpu")) is first
    assert first.dense("cpu").equal(mask.window(2, "cpu").dense("cpu"))
    assert mask.windowed(3, torch.device("cpu")) is not first
    last = weakref.ref(mask.start)
    del mask, first
    assert last() is None


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ([0, 1, 0], [3, 3, 3], "start of the key intervals: 1 at 1 is followed by less, must never decrease"),
        ([0, 0, 0], [3, 2, 3], "end of the key intervals: 3 at 0 is followed by less"),
        ([0, 0, 0], [3, 3, 4], r"end of the key intervals: values from 3 to 4, must lie in 0\.\.3"),
        ([-1, 0, 0], [3, 3, 3], "start of the key intervals: values from -1 to 0"),
        ([0, 0], [3, 3, 3], "key intervals have one start and one end a row"),
    ],
)
def test_bad_intervals(start, end, message):
    with pytest.raises(ValueError, match=message):
        KeyIntervals.intervals(torch.tensor(start), torch.tensor(end), 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeyIntervals.documents(torch.tensor([[0, 0, 1, 1]])), "1 at token 2 is not where a document starts"),
        (lambda: KeyIntervals.documents(torch.tensor([[0, 0, 3, 3]])), "3 at token 2 is not where a document starts"),
        (lambda: KeyIntervals.documents(torch.tensor([[0, 1, 0]])), "0 at token 2 is not where a document starts that"),
        (lambda: KeyIntervals.documents(torch.tensor([[-1, -1]])), "-1 at token 0 is not where a document starts"),
        (lambda: KeyIntervals.documents(torch.tensor([0, 0])), r"document_start \(2,\): must be \(batch, sequence\)"),
        (lambda: KeyIntervals.documents(torch.zeros(1, 4)), "document_start: torch.float32, must be integers"),
        (lambda: KeyIntervals.intervals(torch.tensor([1 << 32]), torch.tensor([1]), 3), "values from 4294967296"),
        (lambda: KeyIntervals.causal(4).window(3.5, "cpu"), "window of 3.5 keys: must be an integer"),
        (lambda: KeyIntervals.causal(4).keys(torch.ones(4, dtype=torch.bool)), "must be ascending int32 or int64"),
        (lambda: KeyIntervals.causal(4).rows(torch.ones(4, dtype=torch.bool)), "must be ascending int32 or int64"),
    ],
)
def test_what_is_no_mask_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bounds_of_any_integers():
    start, end = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3])
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.uint32):
        mask = KeyIntervals.intervals(start.to(dtype), end.to(dtype), 3)
        assert mask.start.tolist() == [[0, 0, 1]]
        assert mask.end.tolist() == [[1, 2, 3]]
        assert KeyIntervals.documents(torch.tensor([[0, 0, 2]]).to(dtype)).start.tolist() == [[0, 0, 2]]


def test_nothing_is_kept_while_a_cuda_graph_is_captured(monkeypatch):
    """It is replayed for other values, and its tensors are filled when it is; nor is there anything to be looked at."""
    monkeypatch.setattr(hardware, "is_recording", lambda: True)
    first, second = (KeyIntervals.causal(13, 17).with_bounds("cpu") for _ in range(2))
    assert first.start is not second.start
    KeyIntervals.intervals(torch.tensor([3, 1]), torch.tensor([4, 4]), 5)  # which decreases


def test_masks_of_a_size_share_their_bounds():
    first, second = (KeyIntervals.causal(9, 11).with_bounds("cpu") for _ in range(2))
    assert first.start is second.start
    assert first.dense("cpu").equal(KeyIntervals.causal(9, 11).dense("cpu"))
    assert KeyIntervals.causal(9, 12).with_bounds("cpu").start is not first.start


def test_starts_of_documents_are_copied():
    """A loader may write the next batch into the same tensor."""
    start = torch.zeros(1, 8, dtype=torch.int32)
    mask = KeyIntervals.documents(start)
    start[0, 4:] = 4
    assert mask.start is not None
    assert mask.start.eq(0).all()


def test_what_is_kept_for_tensors_is_for_all_of_them_as_they_are():
    """None is taken for another that has its address later, nor for what it was before it was written to."""
    total = cached_per_mask(lambda tensors: float(tensors[1].sum()))
    anchor = torch.zeros(1)
    assert [total((anchor, torch.full((1,), float(n)))) for n in range(20)] == list(range(20))
    x = torch.zeros(1)
    assert total((anchor, x)) == 0
    x.add_(1)
    assert total((anchor, x)) == 1


def test_a_fake_tensor_is_not_kept():
    with FakeTensorMode():
        KeyIntervals.causal(1733).with_bounds("cpu")
    start = KeyIntervals.causal(1733).with_bounds("cpu").start
    assert type(start) is torch.Tensor
