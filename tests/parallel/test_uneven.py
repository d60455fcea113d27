"""Vocabularies that no product of axes divides: every layout trains the same, and reads what others have saved."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from longctx.config import ParallelConfig
from longctx.local_part import part
from ranks import run_on_ranks
from runs import TINY, small_config, trainer_of

VOCABULARY = 8197  # rows: 4099 and 4098 over two, 1367, 1367, 1365 and 1366, 1366, 1366 of those over three


@pytest.mark.parametrize(("outer", "inner"), itertools.product((1, 2, 3, 4, 6, 8), repeat=2))
def test_parts_of_parts_are_those_of_torch_chunk(outer, inner):
    for rows in (1, 5, 13, 96, 97, 50257):
        whole, at = torch.arange(rows), 0
        for i, first in enumerate([*whole.chunk(outer), *[whole[rows:]] * outer][:outer]):
            for j, piece in enumerate([*first.chunk(inner), *[whole[rows:]] * inner][:inner]):
                (size,), (offset,) = part((rows,), [(0, outer, i), (0, inner, j)])
                assert size == len(piece)
                assert size == 0 or offset == int(piece[0]) == at
                at += size
        assert at == rows


def train_and_go_on(_rank, config, save):
    """The losses of two steps, the second of which is the first of a run that has resumed."""
    with trainer_of(config) as trainer:
        loss = trainer.train_step()[0]["loss/train"]
        if save:
            trainer.save()
    return loss


@pytest.mark.parametrize(
    ("axes", "tied"),
    [
        ({"context": 3}, False),
        pytest.param({"tensor": 2, "context": 3}, False, marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "replicate": 2, "shard": 2}, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_layout_trains_and_resumes_alike(tmp_path, corpus, axes, tied):
    """A step of the layout, saved; then one more of it and of one process, both from there."""

    def config(name: str, **changes):
        model = dataclasses.replace(TINY, vocab_size=VOCABULARY, tied_embeddings=tied)
        found = small_config(
            tmp_path, corpus, model=model, parallel=ParallelConfig(verify=False, **changes), name=name
        )  # fmt: skip
        found.data.sequence_length, found.data.sequences_per_step = 48, 12
        return found

    ranks = 1
    for size in axes.values():
        ranks *= size
    layout = {"shard": 1} | axes
    [alone] = run_on_ranks(1, train_and_go_on, config("alone"), True)
    split = run_on_ranks(ranks, train_and_go_on, config("split", **layout), True)
    assert split == pytest.approx([alone] * ranks, abs=1e-6)
    [from_alone] = run_on_ranks(1, train_and_go_on, config("alone"), False)
    [from_split] = run_on_ranks(1, train_and_go_on, config("split"), False)
    again = run_on_ranks(ranks, train_and_go_on, config("alone", **layout), False)
    assert from_split == pytest.approx(from_alone, abs=1e-6)
    assert again == pytest.approx([from_alone] * ranks, abs=1e-6)
    assert abs(from_alone - alone) > 0.01
