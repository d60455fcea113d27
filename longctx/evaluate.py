"""Looking at a model: validation loss, loss by position in the document, recall by distance, and samples of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.config import ValidationConfig
from longctx.data.loader import HeldOut, Probes, collate
from longctx.data.mixture import Mixture
from longctx.data.packing import IGNORE_INDEX, Sequence
from longctx.data.tokenizer import open_tokenizer
from longctx.errors import UserError
from longctx.metric_names import octaves
from longctx.parallel.load_balance import Split, zigzag
from longctx.parallel.local_batch import LocalBatch
from longctx.parallel.mesh import Mesh
from longctx.runtime import raise_together

BUCKETS = 32  # of integers: 1, 2-3, 4-7, ...


class StoppedError(Exception):
    """Some rank was asked to stop while the model was looked at; raised on all ranks alike."""


class SequenceLosses(NamedTuple):
    """Of the targets that this rank holds of one sequence: number `number`, and what else is known of them."""

    number: int
    held: LocalBatch
    split: Split
    is_target: Tensor  # (1, held tokens)
    nats: Tensor  # (targets,) float64


def losses_by_sequence(
    model: nn.Module, sequence: Callable[[int], Sequence], sequences: int, mesh: Mesh, device: torch.device,
    must_stop: Callable[[], bool],
) -> Iterator[SequenceLosses]:  # fmt: skip
    """Yields the losses of each target of sequences 0 to `sequences` - 1, each on one data-parallel rank.

    Every rank runs the same number of forward passes, or collectives would hang.
    """
    for first in range(0, sequences, mesh.readers):
        number, problem, read = first + mesh.reader, None, None
        try:
            read = sequence(number)
        except UserError as error:
            problem = error
        asked = torch.tensor([must_stop(), problem is not None], dtype=torch.int64, device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        is_asked, is_unread = asked.tolist()
        if is_unread or read is None:
            raise_together(problem)
        if is_asked:
            raise StoppedError
        batch = collate([read])
        split = zigzag(batch.tokens.shape[1], mesh.size("context"))
        held = LocalBatch.of(batch, split, mesh, device)
        is_target = (held.targets != IGNORE_INDEX) & (number < sequences)
        yield SequenceLosses(number, held, split, is_target, model(*held)[is_target].double())


class ByOctave:
    """Means of values by an integer of at least 1: 1, 2-3, 4-7, ..."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=device)  # values, then how many

    def add(self, values: Tensor, at: Tensor) -> None:
        """values (n,) float64, at (n,) integers."""
        bucket = at.double().log2().floor().long()
        self.sums[0].index_add_(0, bucket, values)
        self.sums[1].index_add_(0, bucket, torch.ones_like(values))

    def means(self, prefix: str) -> dict[str, float]:
        """`prefix` + 2^k -> mean over 2^k to 2^(k+1) - 1, over all ranks."""
        dist.all_reduce(self.sums)
        pairs = zip(*self.sums.tolist(), strict=True)
        return {f"{prefix}{2**k}": total / count for k, (total, count) in enumerate(pairs) if count}


@torch.no_grad()
def validate(
    model: nn.Module, source: HeldOut, sequences: int, mesh: Mesh, device: torch.device,
    token_bytes: np.ndarray | None, must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:  # fmt: skip
    """Loss over the first `sequences` of `source`: nats a token, bits a byte, nats a token by position.

    `loss/pos/<2^k>` is the mean over targets with 2^k + 1 to 2^(k+1) tokens of their document before them, 1 and 2 for
    the first, so that a sequence of 2^k tokens ends with a whole octave. `loss/last_octave_minus_1k` is that of the
    largest 2^k minus that of 1024. Every rank gets the same numbers, whatever the layout. Without `token_bytes` (bytes
    of text an id stands for) no bits a byte.
    Raises `StoppedError` between two sequences if `must_stop` says so on some rank.
    """
    bytes_of = None if token_bytes is None else torch.from_numpy(token_bytes.astype(np.float64)).to(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    by_position = ByOctave(device)
    for found in losses_by_sequence(model, source.sequence, sequences, mesh, device, must_stop):
        sums[0] += found.nats.sum()
        sums[1] += len(found.nats)
        sums[2] += 0 if bytes_of is None else bytes_of[found.held.targets[found.is_target]].sum()
        by_position.add(found.nats, found.held.positions[found.is_target].clamp(min=1))
    dist.all_reduce(sums)
    nats, tokens, text_bytes = sums.tolist()
    positions = by_position.means("loss/pos/")
    if tokens == 0:
        return {}
    results = {"loss/val": nats / tokens}
    if text_bytes:
        results["loss/val_bits_per_byte"] = nats / math.log(2) / text_bytes
    return results | positions | _last_octave_minus_1k(positions)


def _last_octave_minus_1k(positions: dict[str, float]) -> dict[str, float]:
    """Whether a long context helps, in one number, of the losses by position; none of a context that is not long."""
    losses = octaves(positions, "loss/pos/")
    last = max(losses)
    if last <= 1024 or 1024 not in losses:
        return {}
    return {"loss/last_octave_minus_1k": losses[last] - losses[1024]}


@torch.no_grad()
def recall(
    model: nn.Module, probes: Probes, sequences: int, mesh: Mesh, device: torch.device,
    must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:  # fmt: skip
    """`recall/<2^k>`: share of the tokens recalled that can be read off 2^k to 2^(k+1) - 1 tokens before them.

    Recalled is a token to which the model gives more probability than to all others together. Every rank gets the same
    numbers, whatever the layout. `must_stop` as in `validate`.
    """
    by_distance = ByOctave(device)
    for found in losses_by_sequence(
        model, lambda number: probes.probe(number).sequence, sequences, mesh, device, must_stop
    ):
        distances = torch.from_numpy(probes.probe(found.number).distance).unsqueeze(0)
        distance = found.split.shard(distances, mesh.rank("context")).to(device)[found.is_target]
        is_asked = distance > 0
        by_distance.add((found.nats < math.log(2)).double()[is_asked], distance[is_asked])
    return by_distance.means("recall/")


def sample_texts(
    model: nn.Module, tokens: Mixture, settings: ValidationConfig, mesh: Mesh, device: torch.device,
    longest: int | None = None,
) -> list[str]:  # fmt: skip
    """What the model makes of `validation.sample_prompts`, as text; of a corpus of conversations, its answer to them.

    Nothing without a tokenizer. `longest`: tokens that the model has positions for, which end a text too, or leave no
    room for one, which is then said. All ranks call it.
    """
    if not tokens.tokenizer_file or not settings.sample_tokens or not settings.sample_prompts:
        return []
    tokenizer, begin = open_tokenizer(tokens.tokenizer_file), tokens.document_begin or []
    asked = settings.sample_prompts
    if tokens.chat_prompt:  # special tokens and all, as conversations are trained on
        begin, (before, after) = [], tokens.chat_prompt
        tokenizer.encode_special_tokens = False
        asked = [f"{before}{prompt}{after}" for prompt in asked]
    prompts = [[*begin, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in asked]
    prompts = [ids or [tokens.end_of_document] for ids in prompts]
    new_tokens = settings.sample_tokens
    if longest is not None:
        room, asked_for = longest // _pieces(mesh) * _pieces(mesh), max(map(len, prompts))
        if room <= asked_for:
            return [f"(none: the longest prompt has {asked_for} tokens, and texts may have {room})"] * len(prompts)
        new_tokens = min(new_tokens, room - asked_for)
    texts = generate(model, prompts, new_tokens, mesh, device, tokens.tokenizer_vocab)
    if tokens.chat_prompt:  # an answer ends with its turn
        texts = [
            [*prompt, *_until(ids[len(prompt) :], tokens.ends)] for prompt, ids in zip(prompts, texts, strict=True)
        ]
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in texts]


def _pieces(mesh: Mesh) -> int:
    """What the length of a text that is split over a mesh is a multiple of."""
    return 2 * mesh.size("context") * mesh.size("tensor")


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to the first that is one of `ends`."""
    return ids[: next((n for n, i in enumerate(ids, 1) if i in ends), len(ids))]


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
    pieces = _pieces(mesh)
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
