"""A block of the model by tiles of tokens and groups of heads: only attention sees the whole sequence.

Norms, projections and MLP take every token by itself, so their working set need not be that of all tokens: here it is a
tile's. Attention takes every head by itself, so queries, keys and values need not be those of all heads: here they are
a group's, and so is what is exchanged with other ranks. One autograd function a block keeps the block's input, with
`attention_saved` attention's results too, on the device or in host memory; its backward pass computes the rest again,
tile by tile, and adds up the gradients of weights in float32.

(Luo et al. 2024, Mini-Sequence Transformer; Bekman et al. 2025, Arctic Long Sequence Training; for groups of heads
Ghadia et al. 2026, Untied Ulysses)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.config import Recompute
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.precision import accumulation_dtype
from longctx.model.transformer import Block
from longctx.parallel.activation_checkpointing import attention_ops
from longctx.parallel.offload import ActivationOffload

Rotation = tuple[Tensor, Tensor]


class TiledBlock:
    """What a block's `run` becomes: the same results in tiles of so many tokens; 0: all of a micro-batch at once.

    Attention is over one of `head_groups` equal groups of heads after the other.

    All parameters must have gradients, and the gradient that the block is given is written over: nobody else reads it
    where blocks follow each other.
    """

    def __init__(
        self, block: Block, layer: int, tile: int, recompute: Recompute, offload: ActivationOffload | None = None,
        head_groups: int = 1,
    ) -> None:  # fmt: skip
        """`offload`: that of the run, where the first layers put what they keep; None: all is kept on the device."""
        assert recompute != Recompute.none, "a tiled block keeps nothing but its input and attention's results"
        self.block, self.layer, self.tile, self.offload = block, layer, tile, offload
        self.head_groups = head_groups
        self.saves_attention = recompute == Recompute.attention_saved

    def __call__(self, x: Tensor, rotation: Rotation, mask: KeyIntervals) -> Tensor:
        """As `Block.forward`."""
        if not torch.is_grad_enabled():
            return self.forward(x, rotation, mask)[0]
        return _Function.apply(x, rotation, mask, self, *self.block.parameters())

    # the two passes ---------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, rotation: Rotation, mask: KeyIntervals
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The block's result, and attention's output and each group's log-sum-exp, if they are saved."""
        attention = self._attention(x, rotation, mask)
        y, rows, rows_of_out = torch.empty_like(x), _rows(x), _rows(attention[0])
        for part in self._parts(x):
            hidden, residual = self.block.after_attention(rows_of_out[:, part], rows[:, part])
            _rows(y)[:, part] = residual + self.block.mlp.down(hidden)
        return y, attention if self.saves_attention else ()

    def backward(
        self, dy: Tensor, x: Tensor, rotation: Rotation, mask: KeyIntervals, attention: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The gradients of x, in the memory of dy, and of the block's parameters."""
        sums = _GradientSums()
        attention = attention or self._attention(x, rotation, mask)
        dx = dy.contiguous()
        dout = self._backward_after_attention(dx, attention[0], x, sums)
        gradients = self._backward_of_attention(dout, x, rotation, mask, attention)
        del attention, dout
        self._backward_before_attention(dx, gradients, x, rotation, sums)
        return dx, [sums.of(parameter) for parameter in self.block.parameters()]

    def _backward_after_attention(self, dx: Tensor, out: Tensor, x: Tensor, sums: _GradientSums) -> Tensor:
        """The gradient of `out`; in dx, that of the residual stream there in place of that of the block's result."""
        down, rows_of_dx = self.block.mlp.down, _rows(dx)
        of_down: list[Tensor] = list(down.parameters())
        parameters = [p for p in self._parameters_after_attention() if all(p is not other for other in of_down)]
        dout = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        for part in self._parts(x):
            tiles = [_rows(t)[:, part].detach().requires_grad_() for t in (out, x)]
            with torch.enable_grad():
                hidden, residual = self.block.after_attention(*tiles)
            dy = rows_of_dx[:, part]
            sums.add(of_down, _gradients_of_linear(down, hidden.detach(), dy))  # its product is not needed again
            results = [get_gradient_edge(hidden), get_gradient_edge(residual)]  # without what they hold
            del hidden, residual
            _rows(dout)[:, part], rows_of_dx[:, part], *gradients = torch.autograd.grad(
                results, [*tiles, *parameters], [dy @ down.weight, dy]
            )
            del results, tiles
            sums.add(parameters, gradients)
            del gradients
        sums.finish([*parameters, *of_down])
        return dout

    def _backward_of_attention(
        self, dout: Tensor, x: Tensor, rotation: Rotation, mask: KeyIntervals, attention: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """The gradients of queries, with groups of heads in the memory of dout, and of keys and values.

        `attention` is not run again: a backward pass needs what it returned, and queries, keys and values again.
        """
        out, *lses = attention
        groups = self.head_groups
        if groups == 1:
            return self._backward_of_group(0, dout, x, rotation, mask, (out, *lses))
        whole = [dout]
        for group, (dout_of_group, out_of_group, lse) in enumerate(
            zip(dout.chunk(groups, 2), out.chunk(groups, 2), lses, strict=True)
        ):
            results = out_of_group.contiguous(), lse
            gradients = self._backward_of_group(group, dout_of_group.contiguous(), x, rotation, mask, results)
            if group == 0:
                whole += [t.new_empty((*t.shape[:2], groups * t.shape[2], t.shape[3])) for t in gradients[1:]]
            _put(gradients, whole, group, groups)
            del gradients
        return whole

    def _backward_of_group(
        self, group: int, dout: Tensor, x: Tensor, rotation: Rotation, mask: KeyIntervals, results: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """The gradients of a group's queries, keys and values."""
        inputs = [t.requires_grad_() for t in self._before_attention(x, rotation, group)]
        with torch.enable_grad(), _ReplayAttention(results):
            out = self.block.attention.attend(*inputs, mask)
        return [gradient.contiguous() for gradient in torch.autograd.grad(out, inputs, dout)]

    def _backward_before_attention(
        self, dx: Tensor, gradients: list[Tensor], x: Tensor, rotation: Rotation, sums: _GradientSums
    ) -> None:  # fmt: skip
        """Adds to dx what comes through queries, keys and values, whose gradients are given."""
        after = set(self._parameters_after_attention())
        parameters: list[Tensor] = [parameter for parameter in self.block.parameters() if parameter not in after]
        for part in self._parts(x):
            tile = _rows(x)[:, part].detach().requires_grad_()
            with torch.enable_grad():
                projected = self.block.before_attention(tile, _of(rotation, part))
            of_tile, *others = torch.autograd.grad(
                projected, [tile, *parameters], [_rows(gradient)[:, part] for gradient in gradients]
            )
            del projected, tile
            _rows(dx)[:, part] += of_tile
            sums.add(parameters, others)
            del others
        sums.finish(parameters)

    # parts of them ----------------------------------------------------------------------------------------------------

    def _parameters_after_attention(self) -> list[Tensor]:
        modules = self.block.attention.output, self.block.mlp_norm, self.block.mlp
        return [parameter for module in modules for parameter in module.parameters()]

    def _parts(self, x: Tensor) -> list[slice]:
        """Of the tokens of all sequences, one after the other."""
        tokens = x.shape[0] * x.shape[1]
        tile = self.tile or tokens
        return [slice(first, first + tile) for first in range(0, tokens, tile)]

    def _attention(self, x: Tensor, rotation: Rotation, mask: KeyIntervals) -> tuple[Tensor, ...]:
        """Its output over all heads, and the log-sum-exp of each group of heads."""
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for group in range(self.head_groups):
            with _KeepAttention() as kept:
                outs.append(self.block.attention.attend(*self._before_attention(x, rotation, group), mask))
            lses.append(kept.results[1])
        return _joined(outs), *lses

    def _before_attention(self, x: Tensor, rotation: Rotation, group: int) -> list[Tensor]:
        """Queries, keys and values of all tokens, of a group of heads."""
        whole: list[Tensor] = []
        for part in self._parts(x):
            of_part = self.block.before_attention(_rows(x)[:, part], _of(rotation, part), group, self.head_groups)
            whole = whole or [t.new_empty((*x.shape[:2], *t.shape[2:])) for t in of_part]
            for all_tokens, tile in zip(whole, of_part, strict=True):
                _rows(all_tokens)[:, part] = tile
        return whole


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation, mask: KeyIntervals, tiled: TiledBlock, *_parameters: Tensor):
        y, attention = tiled.forward(x, rotation, mask)
        ctx.tiled, ctx.rotation, ctx.mask, ctx.kept = tiled, rotation, mask, None
        if tiled.offload is not None and tiled.layer < tiled.offload.layers:
            ctx.kept = tiled.offload.put(tiled.layer, [x.detach(), *attention])
            return y
        ctx.save_for_backward(x, *attention)
        if tiled.offload is not None:
            tiled.offload.settle()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        tiled: TiledBlock = ctx.tiled
        offload = tiled.offload
        saved = ctx.saved_tensors if offload is None or ctx.kept is None else offload.get(ctx.kept)
        if offload is not None and tiled.layer == offload.layers:  # the layer before is the first to come back
            offload.prefetch()
        x, *attention = (t.detach() for t in saved)
        del saved
        dx, gradients = tiled.backward(dy, x, ctx.rotation, ctx.mask, tuple(attention))
        return dx, None, None, None, *gradients


def _rows(x: Tensor) -> Tensor:
    """(batch, sequence, ...) as one sequence of all tokens."""
    return x.view(1, -1, *x.shape[2:])


def _put(parts: list[Tensor], whole: list[Tensor], group: int, groups: int) -> None:
    """Copies a group's heads to where they are among all heads."""
    for part, all_heads in zip(parts, whole, strict=True):
        all_heads.chunk(groups, 2)[group].copy_(part)


def _joined(groups: list[Tensor]) -> Tensor:
    """(batch, sequence, heads, head_dim) of all groups of heads."""
    return groups[0].contiguous() if len(groups) == 1 else torch.cat(groups, 2)


def _of(rotation: Rotation, part: slice) -> Rotation:
    cos, sin = (_rows(table)[:, part] for table in rotation)
    return cos, sin


def _gradients_of_linear(linear: nn.Linear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Of its weight and, if it has one, its bias."""
    x, dy = x.flatten(0, -2), dy.flatten(0, -2)
    of_bias = [] if linear.bias is None else [dy.sum(0, dtype=accumulation_dtype(dy.dtype)).to(dy.dtype)]
    return [dy.T @ x, *of_bias]


class _GradientSums:
    """Gradients of parameters: the sum of several tiles' in float32, and at the end in the parameter's dtype."""

    def __init__(self) -> None:
        self.sums: dict[Tensor, Tensor] = {}

    def add(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter not in self.sums:
                self.sums[parameter] = gradient
                continue
            total = self.sums[parameter].to(accumulation_dtype(gradient.dtype))
            self.sums[parameter] = total.add_(gradient)

    def finish(self, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            self.sums[parameter] = self.sums[parameter].to(parameter.dtype)

    def of(self, parameter: Tensor) -> Tensor:
        return self.sums[parameter]


class _KeepAttention(TorchDispatchMode):
    """Remembers what attention's op returns."""

    results: tuple[Tensor, ...] = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func in attention_ops():
            self.results = results
        return results


class _ReplayAttention(TorchDispatchMode):
    """Gives known results in place of running attention's op, so that its backward pass can be run."""

    def __init__(self, results: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in attention_ops():
            return tuple(t.detach() for t in self.results)
        return func(*args, **(kwargs or {}))
