"""Ring attention around a model of one's own: `torchrun --nproc-per-node 2 examples/ring_attention.py`.

Two processes (or 4, 8, ...) share each sequence; the loss and all gradients are those of one process that holds it
whole. Runs on CPUs and on GPUs, and needs `pip install .` and no more.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.ops import KeyIntervals, attention, cross_entropy
from longctx.parallel import ContextParallel, balanced

VOCABULARY, WIDTH, HEADS, TOKENS = 256, 64, 4, 512


class Model(nn.Module):
    """One layer, for the example; positions are embedded, so each token needs to know its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, positions: Tensor, attend) -> Tensor:
        x = self.tokens(ids) + self.positions(positions)
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        return self.head(x + attend(q, k, v).flatten(2))


def sum_of_losses(model: Model, ids: Tensor, targets: Tensor, positions: Tensor, attend) -> Tensor:
    return cross_entropy(model(ids, positions, attend).flatten(0, 1), targets.flatten(), reduction="sum")


use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
if use_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same model and text on each rank
model = Model().to(device)
text = torch.randint(VOCABULARY, (1, TOKENS + 1)).to(device)
ids, targets = text[:, :-1], text[:, 1:]  # shifted before the sequence is cut: no target is lost at a border
document_start = torch.zeros(1, TOKENS, dtype=torch.long)
document_start[:, 200:] = 200  # two documents, which do not see each other
positions = (torch.arange(TOKENS) - document_start).to(device)

# what differs from one device: who holds which tokens, and the attention
context = ContextParallel.of_group(dist.group.WORLD, "ring")
split = balanced(positions[0].cpu() + 1, size)  # each token sees its position + 1 keys
attend, mask = context.attend(), split.mask(document_start, device)
mine = [split.shard(x, rank) for x in (ids, targets, positions)]
loss = sum_of_losses(model, *mine, lambda q, k, v: attend(q, k, v, mask)) / TOKENS
loss.backward()
dist.all_reduce(total := loss.detach().clone())
for parameter in model.parameters():  # or FSDP, DDP: with sums, not means
    dist.all_reduce(parameter.grad)
context.close()

if rank == 0:
    split_gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    whole_mask = KeyIntervals.documents(document_start).to(device)
    whole = sum_of_losses(model, ids, targets, positions, lambda q, k, v: attention(q, k, v, whole_mask)[0]) / TOKENS
    whole.backward()
    pairs = zip(split_gradients, model.parameters(), strict=True)
    error = max((a - b.grad).norm() / b.grad.norm() for a, b in pairs)
    print(f"loss of {size} processes {total:.6f}, of one {whole:.6f}; gradients differ by {error:.1e} of their norm")
    assert abs(total - whole) < 1e-5, (total, whole)
    assert error < 1e-5, error
dist.destroy_process_group()
