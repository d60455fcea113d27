"""Validation and samples are the same numbers and words in every layout."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from longctx import evaluate
from longctx.config import DataConfig, ParallelConfig, ValidationConfig
from longctx.data.loader import Copies
from longctx.data.packing import IGNORE_INDEX, Sequence
from longctx.evaluate import StoppedError, generate, recall
from longctx.parallel.mesh import make_mesh
from ranks import run_on_ranks
from runs import small_config, trainer_of


def look(_rank, config):
    with trainer_of(config) as trainer:
        for _ in range(3):
            trainer.train_step()
        words = generate(trainer.model, [[5, 6, 7], [9]], 6, trainer.mesh, torch.device("cpu"), 8192)
        return trainer.validate(), words


def test_samples_end_with_their_turn_and_with_the_models_positions(tmp_path, corpus, monkeypatch):
    """Of conversations an answer is cut behind the token that ends it; positions that are learned have an end."""
    asked = []

    def draw(_model, prompts, new_tokens, *_):
        asked.append((new_tokens, max(map(len, prompts))))
        return [[*prompt, 7, tokens.end_of_document, 8] for prompt in prompts]

    monkeypatch.setattr(evaluate, "generate", draw)
    with trainer_of(small_config(tmp_path, corpus)) as trainer:
        tokens, settings = trainer.tokens, ValidationConfig(sample_tokens=50, sample_prompts=["def f", "a"])
        call = partial(evaluate.sample_texts, trainer.model, tokens, settings, trainer.mesh, torch.device("cpu"))
        texts = call()
        assert asked[-1][0] == 50
        call(31)
        assert asked[-1][0] == 30 - asked[-1][1]  # in whole pairs of chunks
        longest = asked[-1][1]
        told = f"(none: the longest prompt has {longest} tokens, and texts may have {longest // 2 * 2})"
        assert call(longest) == [told, told]
        tokens.document_begin = [3, 4]  # as the documents of training, which the model has never seen without
        call()
        assert asked[-1][1] == longest + 2
        tokens.document_begin = None
        tokens.chat_prompt = ["", ""]
        cut = call()
        assert all(
            whole.startswith(answer) and len(answer) < len(whole) for answer, whole in zip(cut, texts, strict=True)
        )


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [(ParallelConfig(context=2, tensor=2), 4), pytest.param(ParallelConfig(), 2, marks=pytest.mark.slow)],
)
def test_layouts_agree(tmp_path, corpus, parallel, ranks):
    config = small_config(tmp_path / "1", corpus, validation__sequences=3)
    single, words = run_on_ranks(1, look, config)[0]
    config.folder, config.parallel = str(tmp_path / "2"), parallel
    for results, other_words in run_on_ranks(ranks, look, config):
        assert results == pytest.approx(single, rel=1e-5)
        assert results["recall/32"] == single["recall/32"]
        assert other_words == words


def test_validation_by_hand(tmp_path, corpus):
    config = small_config(tmp_path, corpus, validation__sequences=3)
    with trainer_of(config) as trainer:
        results = trainer.validate()
        nats, tokens, text_bytes, first = 0.0, 0, 0, []
        for number in range(3):
            sequence = trainer.validation.source.sequence(number)
            start = torch.from_numpy(sequence.document_start).unsqueeze(0)
            from longctx.kernels.attention.key_intervals import KeyIntervals

            inputs = [torch.from_numpy(x).unsqueeze(0) for x in sequence[:3]]
            with torch.no_grad():
                losses = trainer.model(inputs[0], inputs[2], KeyIntervals.documents(start), inputs[1])
            valid = inputs[1] != IGNORE_INDEX
            nats += float(losses[valid].sum())
            tokens += int(valid.sum())
            text_bytes += int(trainer.tokens.token_bytes[inputs[1][valid].numpy()].sum())
            first += losses[valid & (inputs[2] <= 1)].tolist()
    assert results["loss/val"] == pytest.approx(nats / tokens, rel=1e-6)
    assert results["loss/val_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert results["loss/pos/1"] == pytest.approx(sum(first) / len(first), rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "expected"), [([4.0] * 10 + [3.0, 2.5, 2.25], -0.75), ([4.0] * 10 + [3.0], None), ([4.0], None)]
)
def test_the_last_octave_beside_1k(losses, expected):
    """Of losses at 1, 2, 4, ... tokens; nothing of a context that ends with the octave of 1024."""
    found = evaluate._last_octave_minus_1k({f"loss/pos/{2**k}": loss for k, loss in enumerate(losses)})
    assert found == ({} if expected is None else {"loss/last_octave_minus_1k": expected})


class OneDocument:
    """Sequences of 64 tokens, of which each document is longer."""

    def sequence(self, number):
        tokens = np.arange(64)
        return Sequence(tokens, tokens + 1, tokens, np.zeros(64, np.int64))


class LossIsPosition(torch.nn.Module):
    def forward(self, _tokens, positions, _mask, _targets):
        return positions.double()


def test_a_sequence_ends_with_a_whole_octave(tmp_path, corpus):
    """Losses by position are means over many targets, the last of them too."""
    with trainer_of(small_config(tmp_path, corpus)) as trainer:
        found = evaluate.validate(LossIsPosition(), OneDocument(), 2, trainer.mesh, torch.device("cpu"), None)
    means = {f"loss/pos/{2**k}": (2**k + 2 ** (k + 1) - 1) / 2 for k in range(1, 6)}
    assert found == {"loss/val": 31.5, "loss/pos/1": 0.5, **means}


class RecallsUpTo(torch.nn.Module):
    """Knows a token that was seen at most `far` tokens before it, and no other."""

    def __init__(self, far):
        super().__init__()
        self.far = far

    def forward(self, tokens, _positions, _mask, targets):
        index = torch.arange(tokens.shape[1])
        distance = index.unsqueeze(1) + 1 - index  # of a target to a token
        is_there = (targets[0].unsqueeze(1) == tokens) & (distance > 0) & (distance <= self.far)
        return torch.where(is_there.any(1), 0.69, 0.70).unsqueeze(0)  # log 2 = 0.693


def test_recall_by_distance(tmp_path, corpus):
    probes = Copies(DataConfig(sequence_length=1024), 1 << 30, seed=1)
    with trainer_of(small_config(tmp_path, corpus)) as trainer:
        found = recall(RecallsUpTo(200), probes, 3, trainer.mesh, torch.device("cpu"))
        assert found == {"recall/32": 1.0, "recall/64": 1.0, "recall/128": 1.0, "recall/256": 0.0, "recall/512": 0.0}
        assert recall(RecallsUpTo(200), probes, 0, trainer.mesh, torch.device("cpu")) == {}


def test_samples_are_drawn_at_their_temperature(tmp_path, corpus):
    """Logits 0.7 ln 3 apart, at a temperature of 0.7, are drawn 3 to 1."""

    def two_ids(tokens, _positions, _mask):
        return torch.tensor([0.7 * math.log(3), 0.0]).expand(*tokens.shape, 2)

    with trainer_of(small_config(tmp_path, corpus)) as trainer:
        words = generate(two_ids, [[1]] * 500, 8, trainer.mesh, torch.device("cpu"), vocab_size=2)
    drawn = torch.tensor(words)[:, 1:]
    assert float((drawn == 0).float().mean()) == pytest.approx(0.75, abs=0.02)  # three standard deviations


def test_samples_stay_inside_the_tokenizer(tmp_path, corpus):
    with trainer_of(small_config(tmp_path, corpus)) as trainer:
        words = generate(trainer.model, [[1, 2]], 20, trainer.mesh, torch.device("cpu"), vocab_size=50, temperature=5.0)
    assert words[0][:2] == [1, 2]
    assert len(words[0]) == 22
    assert max(words[0]) < 50


CPU = torch.device("cpu")


class Squares:
    """Sequences whose tokens are the square of their number."""

    def sequence(self, number):
        tokens, zeros = np.full(64, number**2), np.zeros(64, np.int64)
        return Sequence(tokens, tokens, np.arange(64), zeros)


class LossIsToken(torch.nn.Module):
    def forward(self, tokens, *_others):
        return tokens.double()


def of_two_readers(rank):
    """The loss of 3 sequences, and what happens where rank 1 alone is asked to stop."""
    mesh = make_mesh(ParallelConfig(), 2, "cpu")
    call = LossIsToken(), Squares(), 3, mesh, CPU, None
    with pytest.raises(StoppedError):
        evaluate.validate(*call, must_stop=lambda: rank == 1)
    return evaluate.validate(*call)["loss/val"]


def test_each_sequence_is_validated_once_by_two_readers():
    assert run_on_ranks(2, of_two_readers) == [pytest.approx(5 / 3)] * 2


def counts(_rank):
    def next_id(tokens, _positions, _mask):
        return 100.0 * torch.nn.functional.one_hot(tokens + 1, 32).float()

    return generate(next_id, [[3, 4], [9]], 5, make_mesh(ParallelConfig(), 1, "cpu"), CPU, 32)


def test_a_sample_goes_on_from_its_last_token():
    assert run_on_ranks(1, counts) == [[[3, 4, 5, 6, 7, 8, 9], [9, 10, 11, 12, 13, 14]]]


def test_an_answer_has_the_token_that_ends_it():
    assert evaluate._until([5, 7, 2, 8], [3, 2]) == [5, 7, 2]
    assert evaluate._until([5, 7], [3, 2]) == [5, 7]
