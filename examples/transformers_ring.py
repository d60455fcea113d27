"""Ring attention in a model of transformers: `torchrun --nproc-per-node 2 examples/transformers_ring.py`.

Two processes (or 4, 8, ...) share each sequence, and no logits are held: the loss takes hidden states and the matrix of
the head. Loss and all gradients are those of transformers' own attention and loss in one process. Runs on CPUs and on
GPUs, and needs `pip install . transformers`.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from longctx.ops import linear_cross_entropy
from longctx.parallel import ContextParallel, SplitMask, balanced

VOCABULARY, TOKENS = 256, 512


def ring(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, context: ContextParallel,
    mask: SplitMask, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    dropout: float = 0.0, s_aux: Tensor | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """This rank's query (batch, heads, tokens, head_dim), key and value -> (batch, tokens, heads, head_dim).

    `context` and `mask` are what the model was called with: transformers hands them on.
    """
    if dropout or s_aux is not None or not getattr(module, "is_causal", True):
        raise ValueError("over several ranks attention has no dropout and no sinks, and here it is causal")
    if sliding_window is not None:
        mask = mask.windowed(sliding_window, query.device)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return context.attend(scale=scaling, softcap=softcap or 0.0)(q, k, v, mask), None


AttentionInterface.register("ring", ring)

use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
if use_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same model and text on each rank
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_implementation="ring",
)  # fmt: skip
model = LlamaForCausalLM(config).to(device)  # or .from_pretrained(folder, attn_implementation="ring")
text = torch.randint(VOCABULARY, (1, TOKENS + 1)).to(device)
ids, targets = text[:, :-1], text[:, 1:]  # shifted before the sequence is cut: no target is lost at a border
document_start = torch.zeros(1, TOKENS, dtype=torch.long)
document_start[:, 200:] = 200  # two documents, which do not see each other
positions = (torch.arange(TOKENS) - document_start).to(device)

# what differs from one device: who holds which tokens, and the attention
context = ContextParallel.of_group(dist.group.WORLD, "ring")
split = balanced(positions[0].cpu() + 1, size)  # each token sees its position + 1 keys
my_ids, my_targets, my_positions = (split.shard(x, rank) for x in (ids, targets, positions))
hidden = model.model(
    my_ids, position_ids=my_positions, use_cache=False, context=context,
    mask=split.mask(document_start, device),
).last_hidden_state  # fmt: skip
loss = linear_cross_entropy(hidden, model.lm_head.weight, my_targets, reduction="sum") / TOKENS
loss.backward()
dist.all_reduce(total := loss.detach().clone())
for parameter in model.parameters():  # or FSDP2: with sums, not means
    dist.all_reduce(parameter.grad)
context.close()

if rank == 0:
    split_gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_attn_implementation("eager")
    logits = model(ids, position_ids=positions, use_cache=False).logits
    whole = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    whole.backward()
    pairs = zip(split_gradients, model.parameters(), strict=True)
    error = max((a - b.grad).norm() / b.grad.norm() for a, b in pairs)
    print(f"loss of {size} processes {total:.6f}, of one {whole:.6f}; gradients differ by {error:.1e} of their norm")
    assert abs(total - whole) < 1e-5, (total, whole)
    assert error < 1e-5, error
dist.destroy_process_group()
