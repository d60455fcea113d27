"""How ranks are compared, and which is called slow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from longctx import straggler


@pytest.mark.parametrize(
    ("machines", "tries", "told"),
    [
        ("ab", [(10, 13)] * 3, (1, 1.3, "rank 1 on b")),  # of two ranks the other is the measure
        ("abcd", [(8, 10, 10, 13)] * 3, (3, 1.3, "rank 3 on d")),
        ("aab", [(10, 10, 13)] * 3, (2, 1.3, "")),  # two share cores
        ("abc", [(10, 13, 10), (10, 13, 10), (10, 11, 10)], (1, 1.1, "")),
    ],
)  # fmt: skip
def test_who_is_slow_beside_whom(machines, tries, told, monkeypatch):
    monkeypatch.setattr(straggler, "own_ms", lambda _device: 0.0)
    answers = iter([[f"{name}/" for name in machines], *map(list, tries)])
    runtime = SimpleNamespace(device=torch.device("cpu"), gather=lambda _mine: next(answers))
    values, said = straggler.compare_ranks(runtime)
    assert values == {"run/slowest_rank": told[0], "run/slowest_over_median": pytest.approx(told[1])}
    assert (told[2] in said) if told[2] else said is None


def test_a_rank_is_slow_only_if_it_is_each_time(monkeypatch):
    """Among many ranks some other one is disturbed at each moment."""
    monkeypatch.setattr(straggler, "own_ms", lambda _device: 0.0)
    answers = iter([["a/", "b/", "c/"], [13, 10, 10], [10, 13, 10], [10, 10, 13]])
    runtime = SimpleNamespace(device=torch.device("cpu"), gather=lambda _mine: next(answers))
    assert straggler.compare_ranks(runtime)[1] is None


def clock(*seconds):
    """Of what takes so long, one after the other."""
    ends = iter([moment for s in seconds for moment in (0.0, s)])
    return SimpleNamespace(perf_counter=lambda: next(ends))


def test_speeds_are_the_best_of_several(monkeypatch):
    monkeypatch.setattr(straggler, "time", clock(0.5, 0.2, 0.3, 0.4, 0.6))
    assert straggler.own_ms(torch.device("cpu")) == 200
    monkeypatch.setattr(straggler, "time", clock(2.0, 0.5, 1.0))
    dtypes, product = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: dtypes.add(a.dtype) or product(a, b))
    assert straggler.product_tflops(torch.device("cpu"), torch.bfloat16) == pytest.approx(2 * 512**3 / 0.5 / 1e12)
    assert dtypes == {torch.bfloat16}


def test_a_device_is_waited_for_before_the_clock_is_read(monkeypatch):
    """A GPU is given 100 products in a moment."""
    done, item = [], torch.Tensor.item
    monkeypatch.setattr(straggler, "time", SimpleNamespace(perf_counter=lambda: done.append("clock") or 0.0))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: done.append("wait") or item(x))
    straggler.own_ms(torch.device("cpu"))
    assert done == ["wait", *["clock", "wait", "clock"] * 5]
