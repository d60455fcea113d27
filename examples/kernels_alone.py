"""The kernels alone, on a GPU or a CPU: `python examples/kernels_alone.py`. Needs `pip install .` and no more."""

import torch

from longctx.ops import KeyIntervals, attention, linear_cross_entropy, rms_norm

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
x = torch.randn(1, 1024, 4 * 64, device=device, dtype=dtype, requires_grad=True)  # (batch, tokens, heads * head_dim)
q = rms_norm(x, torch.ones(256, device=device, dtype=dtype)).unflatten(-1, (4, 64))
k = v = q[:, :, :2]  # two query heads share a head of keys and values
out, _lse = attention(q, k, v, KeyIntervals.causal(1024))
head = torch.randn(50257, 256, device=device, dtype=dtype)
loss = linear_cross_entropy(out.flatten(2), head, torch.randint(50257, (1, 1024), device=device))  # holds no logits
loss.backward()
print(f"loss {loss.item():.3f}, gradient norm {x.grad.float().norm().item():.3f}")
