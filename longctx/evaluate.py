"""Looking at a model: validation loss, loss by position in the document, and samples of text."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.data.loader import Batch, Source, collate
from longctx.data.packing import IGNORE_INDEX
from longctx.kernels.attention.mask import KeyIntervals, to_device
from longctx.parallel.mesh import Mesh
from longctx.parallel.sequence import Split, zigzag

BUCKETS = 32  # of tokens before a target: 1, 2-3, 4-7, ...


class Held(NamedTuple):
    """What this rank holds of a batch, on its device: (batch, sequence / context) each, and the mask of the whole."""

    tokens: Tensor
    positions: Tensor
    mask: KeyIntervals
    targets: Tensor

    @staticmethod
    def of(batch: Batch, split: Split, mesh: Mesh, device: torch.device) -> Held:
        tokens, positions, targets = (
            to_device(split.shard(x, mesh.rank("context")), device)
            for x in (batch.tokens, batch.positions, batch.targets)
        )
        return Held(tokens, positions, split.mask(batch.document_start, device), targets)


@torch.no_grad()
def validate(
    model: nn.Module, source: Source, sequences: int, mesh: Mesh, device: torch.device, token_bytes: np.ndarray | None
) -> dict[str, float]:  # fmt: skip
    """Loss over the first `sequences` of `source`: nats a token, bits a byte, nats a token by position.

    `loss/pos/<2^k>` is the mean over targets with 2^k to 2^(k+1) - 1 tokens of their document before them. Every rank
    gets the same numbers, whatever the layout. Without `token_bytes` (bytes of text an id stands for) no bits a byte.
    """
    bytes_of = None if token_bytes is None else torch.from_numpy(token_bytes.astype(np.float64)).to(device)
    sums = torch.zeros(3 + 2 * BUCKETS, dtype=torch.float64, device=device)  # nats, tokens, bytes, then by position
    for first in range(0, sequences, mesh.readers):  # all ranks run alike, so that collectives meet
        batch = collate([source.sequence(first + mesh.reader)])
        split = zigzag(batch.tokens.shape[1], mesh.size("context"))
        held = Held.of(batch, split, mesh, device)
        valid = (held.targets != IGNORE_INDEX) & (first + mesh.reader < sequences)
        losses, positions, targets = model(*held)[valid].double(), held.positions[valid], held.targets[valid]
        bucket = (positions + 1).double().log2().floor().long()
        sums[0] += losses.sum()
        sums[1] += len(losses)
        sums[2] += 0 if bytes_of is None else bytes_of[targets].sum()
        sums[3 : 3 + BUCKETS].index_add_(0, bucket, losses)
        sums[3 + BUCKETS :].index_add_(0, bucket, torch.ones_like(losses))
    dist.all_reduce(sums)
    nats, tokens, text_bytes, *by_position = sums.tolist()
    if tokens == 0:
        return {}
    results = {"loss/val": nats / tokens}
    if text_bytes:
        results["loss/val_bits_per_byte"] = nats / math.log(2) / text_bytes
    for index, (total, count) in enumerate(zip(by_position[:BUCKETS], by_position[BUCKETS:], strict=True)):
        if count:
            results[f"loss/pos/{2**index}"] = total / count
    return results


@torch.no_grad()
def generate(
    model: nn.Module, prompts: list[list[int]], new_tokens: int, mesh: Mesh, device: torch.device,
    vocab_size: int, temperature: float = 0.7, seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """Continues each prompt (token ids, at least one) by `new_tokens` samples. All ranks return the same ids.

    The whole text is run again for each token: right in every layout, and meant for a look at a model, not for serving.
    Ids from `vocab_size` on (rows of the model that no token uses) are never drawn.
    """
    rank, size = mesh.rank("context"), mesh.size("context")
    lengths = torch.tensor([len(p) for p in prompts])
    pieces = 2 * size * mesh.size("tensor")
    total = -(-(int(lengths.max()) + new_tokens) // pieces) * pieces
    ids = torch.zeros(len(prompts), total, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    positions = torch.arange(total).expand_as(ids)
    split = zigzag(total, size)
    held, mask = split.held(rank), split.mask(torch.zeros_like(ids), device)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(new_tokens):
        inputs = (split.shard(x, rank).to(device) for x in (ids, positions))
        logits = model(*inputs, mask)
        is_last = (held.unsqueeze(0) == lengths.unsqueeze(1) - 1).to(device)  # (batch, held tokens)
        last = torch.einsum("bn,bnv->bv", is_last.to(logits.dtype), logits).float()
        dist.all_reduce(last, group=mesh.group("context"))
        probabilities = (last[:, :vocab_size].cpu() / temperature).softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        box = [drawn.tolist()]
        dist.broadcast_object_list(box, src=0)  # rounding may differ between ranks; the text must not
        ids[torch.arange(len(prompts)), lengths] = torch.tensor(box[0])
        lengths += 1
    return [ids[row, : int(lengths[row])].tolist() for row in range(len(prompts))]
