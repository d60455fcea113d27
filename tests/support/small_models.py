"""Small models of several kinds, and batches of packed documents for them."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch

from longctx.batch import Batch
from longctx.config import Activation, ModelConfig, Norm, Positions

LENGTH, BATCH, VOCAB = 64, 4, 97
IGNORE = -100

GQA = ModelConfig(vocab_size=VOCAB, layers=2, width=48, heads=4, kv_heads=2, head_dim=12, mlp_width=80)
WINDOW = dataclasses.replace(GQA, layers=3, window=11, full_attention_every=3)
QWEN = dataclasses.replace(GQA, qk_norm=True, tied_embeddings=False, heads=8, kv_heads=4, head_dim=8)
GPT2 = dataclasses.replace(
    GQA, kv_heads=4, norm=Norm.layer_norm, activation=Activation.gelu, positions=Positions.learned,
    max_positions=LENGTH, qkv_bias=True, projection_bias=True, logit_softcap=5.0,
)  # fmt: skip


@cache  # so that what is computed from them once is found again
def make_inputs(document_starts: tuple[tuple[int, ...], ...]) -> Batch:
    """One sequence for each tuple of the indices where its documents begin."""
    generator = torch.Generator().manual_seed(1)
    batch = len(document_starts)
    stream = torch.randint(VOCAB, (batch, LENGTH + 1), generator=generator)
    targets = stream[:, 1:].clone()
    start = torch.zeros(batch, LENGTH, dtype=torch.int64)
    for row, begins in enumerate(document_starts):
        for begin in begins:
            start[row, begin:] = begin
            if begin:
                targets[row, begin - 1] = IGNORE
    return Batch(stream[:, :-1], targets, torch.arange(LENGTH) - start, start)


# Shard borders lie at multiples of 16 (context 2) and 8 (context 4).
ONE_DOCUMENT = ((0,), (0,), (0,), (0,))
DOCUMENTS = (
    (0, 13, 32, 33, 50),  # inside a shard, at a border, one token long, over a border
    (0, 16, 48),  # all at borders of chunks
    (0, 31, 34, 63),  # one of three tokens: shorter than 4 ranks and over a border
    (0, 7, 8, 9, 10, 40),
)
