"""longctx's attention in a model of transformers, checked against its own: `python examples/transformers_attention.py`.

Needs `pip install . transformers`. Packed documents stay apart if `position_ids` restart at each, as transformers'
`DataCollatorWithFlattening` makes them; a mask of padding is not read, so pack instead of padding.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from longctx.ops import KeyIntervals, attention


def longctx_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float | None = None,
    position_ids: Tensor | None = None, sliding_window: int | None = None, dropout: float = 0.0,
    softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (batch, heads, tokens, head_dim), key and value with their heads -> (batch, tokens, heads, head_dim).

    `softcap` is Gemma 2's, `s_aux` are the sinks of gpt-oss.
    """
    tokens = query.shape[2]
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("this model looks ahead (is_causal=False): its attention is KeyIntervals.full, not this one")
    if key.shape[2] != tokens:
        raise ValueError("a cache of keys is not supported: generate with another attention")
    if position_ids is None:
        mask = KeyIntervals.causal(tokens)
    else:  # where each token's document begins
        start = torch.arange(tokens, device=position_ids.device) - position_ids.expand(len(query), tokens)
        mask = KeyIntervals.documents(start)
    if sliding_window is not None:
        mask = mask.windowed(sliding_window, query.device)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, mask, scale=scaling, dropout=dropout, softcap=softcap or 0.0, sink=s_aux)[0], None


AttentionInterface.register("longctx", longctx_attention)


def losses_and_gradients(name: str, ids: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=name,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    logits = model(ids, position_ids=positions, use_cache=False).logits
    logits.logsumexp(-1).mean().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


ids = torch.randint(256, (1, 128), generator=torch.Generator().manual_seed(1))
positions = torch.cat((torch.arange(80), torch.arange(48)))[None]  # two documents
ours, theirs = (losses_and_gradients(name, ids, positions) for name in ("longctx", "eager"))
logits = (ours[0] - theirs[0]).abs().max()
gradients = max((a - b).norm() / b.norm() for a, b in zip(ours[1], theirs[1], strict=True))
print(f"two documents: logits differ by {logits:.1e}, gradients by {gradients:.1e} of their norm")
assert logits < 1e-5, logits
assert gradients < 1e-4, gradients
