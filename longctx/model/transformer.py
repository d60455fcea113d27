"""One decoder-only transformer for the shapes of GPT-2 and of Llama and its kin; `ModelConfig` says which."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import Activation, ModelConfig, Positions, layer_windows, layers_with_rotary
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.loss import reference
from longctx.kernels.loss.linear_cross_entropy import linear_cross_entropy
from longctx.kernels.swiglu import swiglu, swiglu_linear
from longctx.model.attention import Attention
from longctx.model.norm import make_norm
from longctx.model.rotary import cos_sin
from longctx.plan import matmul_parameters


class MLP(nn.Module):
    """SwiGLU or GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.projection_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.projection_bias)
        self.gate, self.fused_ops = None, str(config.fused_ops)
        self.fuses_down = False  # SwiGLU is made again in the backward pass: for blocks without checkpointing
        if config.activation == Activation.swiglu:
            self.gate = nn.Linear(config.width, config.mlp_width, bias=config.projection_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None or not self.fuses_down:
            return self.down(self.hidden(x))
        down = self.down
        return swiglu_linear(self.gate(x), self.up(x), down.weight, down.bias, implementation=self.fused_ops)

    def hidden(self, x: Tensor) -> Tensor:
        """What comes between the products, (..., mlp_width)."""
        if self.gate is None:
            return F.gelu(self.up(x), approximate="tanh")
        return swiglu(self.gate(x), self.up(x), implementation=self.fused_ops)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, rotates: bool) -> None:
        """rotates: whether queries and keys are turned by their positions."""
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, rotates)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.run: Callable[[Tensor, tuple[Tensor, Tensor], KeyIntervals], Tensor] | None = None

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: KeyIntervals) -> Tensor:
        """x (batch, sequence, width) -> the same; by `run`, if there is one: see `longctx.parallel.tiled_block`."""
        if self.run is not None:
            return self.run(x, rotation, mask)
        normed, x = self.mlp_norm(self.attention(self.attention_norm(x), rotation, mask), residual=x)
        return x + self.mlp(normed)

    def before_attention(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], group: int = 0, groups: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of any tokens: their queries, keys and values, as attention is given them; of one of so many equal groups of
        heads."""
        return self.attention.project(self.attention_norm(x), rotation, group, groups)

    def after_attention(self, out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of any tokens, from attention's `out` (batch, tokens, heads, head_dim) and the block's x: what the MLP's last
        product is given, and what that is added to."""
        normed, x = self.mlp_norm(self.attention.output(torch.flatten(out, 2)), residual=x)
        return self.mlp.hidden(normed), x


class Head(nn.Module):
    """From hidden states to losses, or to logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.softcap, self.fused_ops = config.logit_softcap, str(config.fused_ops)
        self.weight = None
        if not config.tied_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))

    def forward(
        self, hidden: Tensor, tied_weight: Tensor | None, targets: Tensor | None, token_weight: Tensor | None
    ) -> Tensor:  # fmt: skip
        """See `Transformer.forward`; hidden (batch, sequence, width); `tied_weight` (vocabulary, width): the
        embedding's, where the head has none of its own."""
        weight = tied_weight if self.weight is None else self.weight
        assert weight is not None
        if targets is None:
            return reference.project_to_vocabulary(hidden, weight, softcap=self.softcap)
        return linear_cross_entropy(
            hidden, weight.to(hidden.dtype), targets, softcap=self.softcap, token_weight=token_weight,
            reduction="none" if token_weight is None else "sum", implementation=self.fused_ops,
        )  # fmt: skip


class Transformer(nn.Module):
    """The whole model. It knows nothing of processes: `longctx.parallel.parallelize` spreads it from outside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = None
        if config.positions == Positions.learned:
            self.position_embedding = nn.Embedding(config.max_positions, config.width)
        self.blocks = nn.ModuleList(Block(config, rotates) for rotates in layers_with_rotary(config))
        self.final_norm = make_norm(config)
        self.head = Head(config)

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: KeyIntervals, targets: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens, positions, targets (batch, sequence) integers -> loss of each token (batch, sequence), nats.

        With `token_weight`, one number: the sum of the losses times it, whose gradients are made in the forward pass.
        Without targets: logits (batch, sequence, vocabulary). A token whose target is -100 has loss 0. `mask` is that
        of the whole sequence, `tokens` and the rest may be one rank's share of it.
        """
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        rotation_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rotation = cos_sin(positions, self.config.rotary, self.config.head_dim, rotation_dtype)
        windows = layer_windows(self.config)
        masks = {window: mask.windowed(window, tokens.device) if window else mask for window in set(windows)}
        for block, window in zip(self.blocks, windows, strict=True):
            x = block(x, rotation, masks[window])
        tied_weight = self.embedding.weight if self.config.tied_embeddings else None
        return self.head(self.final_norm(x), tied_weight, targets, token_weight)


# initial values ------------------------------------------------------------------------------------------------------


def initial_value(name: str, like: Tensor, config: ModelConfig, seed: int, device: torch.device) -> Tensor:
    """The whole parameter `name` before training, drawn from a generator seeded by (seed, name).

    So every layout starts from the same values, and a parameter's do not depend on which others exist. Matrices:
    normal, `init_std`; those that write to the residual stream: divided by sqrt(2 * layers) (Radford et al. 2019).
    """
    if name.endswith("bias"):
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=like.dtype, device=device)
    std = config.init_std
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.layers)
    drawn_as = name.replace("head.weight", "output_weight")  # its name before: a seed gives the model it always gave
    digest = hashlib.sha256(f"{seed}/{drawn_as}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device=device).mul_(std).to(like.dtype)


def build(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """A whole, initialised model on one device: for tests and tools. Training goes through `parallelize`."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter, config, seed, torch.device(device)))
    return model


# size and work -------------------------------------------------------------------------------------------------------


def training_flops(config: ModelConfig, positions: Tensor) -> float:
    """FLOPs of forward and backward over sequences whose tokens are at `positions` in their documents.

    6 a parameter and token, and 12 * heads * head_dim a layer and pair of a query and a key it sees: causal, aware of
    documents and windows. For whole documents of length L the second is 6 * layers * heads * head_dim * sum of L^2.
    """
    pairs = attention_pairs(config, positions)
    return 6.0 * matmul_parameters(config) * positions.numel() + 12.0 * config.heads * config.head_dim * pairs


def attention_pairs(config: ModelConfig, positions: Tensor) -> float:
    """Pairs of a query and a key it sees, over all layers, of tokens at `positions` in their documents."""
    return float(keys_seen(config, positions).sum())


def keys_seen(config: ModelConfig, positions: Tensor) -> Tensor:
    """How many keys the tokens at `positions` in their documents see, over all layers: like `positions`."""
    seen, windows = positions + 1, layer_windows(config)
    return sum((windows.count(w) * (seen.clamp(max=w) if w else seen) for w in set(windows)), torch.zeros_like(seen))


def palm_flops(config: ModelConfig, tokens: int, sequence_length: int) -> float:
    """FLOPs as others count them: attention as if nothing were masked. (Chowdhery et al. 2022, appendix B)"""
    attention = 12.0 * config.layers * config.heads * config.head_dim * sequence_length
    return tokens * (6.0 * matmul_parameters(config) + attention)
