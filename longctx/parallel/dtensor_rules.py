"""What the fused ops do with DTensors: which shards stay where they are, and which results are partial sums.

Importing this module registers it all. Activations sharded by batch or sequence (unevenly too) stay sharded and
gradients of weights come back as partial sums; norms a head, rotary and softmax take sharded heads; logits or output
weights sharded by classes give losses by two small reductions, without gathering either. (Shoeybi et al. 2019)

The rules of `register_sharding` say, for one axis of the mesh at a time, which placements of outputs go with which of
inputs: None where there is no tensor. Losses need sums between ranks; they have dispatch rules, which get the DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.library import custom_op, register_torch_dispatch

from longctx.kernels import dense, precision, rotary, softmax, swiglu  # noqa: F401  register ops
from longctx.kernels.loss import reference as loss_reference
from longctx.kernels.loss.cross_entropy import cross_entropy_gradient, cross_entropy_gradient_, cross_entropy_statistics
from longctx.kernels.loss.linear_cross_entropy import Vocabulary, fake_gradients, finished, in_chunks
from longctx.kernels.loss.options import LOSS_SCHEMA, LossOptions
from longctx.kernels.norm import layer_norm, rms_norm  # noqa: F401  register ops
from longctx.local_part import local_of

Rules = list[tuple[list[Placement | None], list[Placement | None]]]
ops = torch.ops.longctx


def _if(x: object, placement: Placement) -> Placement | None:
    """The placement of an optional tensor."""
    return None if x is None else placement


# norms ---------------------------------------------------------------------------------------------------------------


def _shards(x: Any, n_fixed_dims: int) -> list[Placement]:
    """In which ways x may be sharded, in all but its last dims: evenly or not, or as flattened dims are (strided)."""
    dims = len(x.shape) - n_fixed_dims
    strided = [p for p in x.placements if _splits(p) and not p.is_shard() and p.dim < dims]
    return [*(Shard(dim) for dim in range(dims)), *strided]


def _splits(p: Any) -> bool:
    return not p.is_replicate() and not p.is_partial()


def _of_weight(weight: Any, x: Any, p: Any) -> Placement:
    """A weight a head goes with the heads; a weight for all rows is everywhere."""
    is_split = weight is not None and len(weight.shape) == 2 and p == Shard(len(x.shape) - 2)
    return Shard(0) if is_split else Replicate()


@register_sharding(ops.norm.default)
def _norm(
    x, weight, bias, residual, total_dtype, eps, weight_offset, subtract_mean, dropout, seed, row_ids
) -> Rules:  # fmt: skip
    if dropout and row_ids is None and any(_splits(p) for p in x.placements):
        raise ValueError("dropout of a sharded x: give row_ids, sharded as x is, so that rows know their numbers")

    def rule(p: Placement, of_weight: Placement) -> tuple[list[Placement | None], list[Placement | None]]:
        total = Replicate() if total_dtype is None else p
        inputs = [p, _if(weight, of_weight), _if(bias, of_weight), _if(residual, p)]
        return [p, total, p], [*inputs, *[None] * 5, _if(seed, Replicate()), _if(row_ids, p)]

    return [rule(Replicate(), Replicate()), *(rule(p, _of_weight(weight, x, p)) for p in _shards(x, 1))]


@register_sharding(ops.norm_backward.default)
def _norm_backward(
    dy, dtotal, total, weight, statistics, x_dtype, residual_dtype, has_bias, weight_offset, dropout, seed, row_ids
) -> Rules:  # fmt: skip
    def rule(p: Placement, of_weight: Placement, dweight: Placement) -> tuple[list, list]:
        outputs = [
            p, Replicate() if residual_dtype is None else p, Replicate() if weight is None else dweight,
            dweight if has_bias else Replicate(),
        ]  # fmt: skip
        inputs = [p, _if(dtotal, p), p, _if(weight, of_weight), p]
        return outputs, [*inputs, *[None] * 5, _if(seed, Replicate()), _if(row_ids, p)]

    rules = [rule(Replicate(), Replicate(), Replicate())]
    for p in _shards(total, 1):
        of_weight = _of_weight(weight, total, p)
        rules.append(rule(p, of_weight, of_weight if of_weight.is_shard() else Partial()))
    return rules


# rotary, softmax, pointwise ------------------------------------------------------------------------------------------


@register_sharding(ops.rotary.default)
def _rotary(q, k, cos, sin, positions, interleaved, inverse) -> Rules:
    def rule(p: Placement, of_angle: Placement, of_positions: Placement) -> tuple[list, list]:
        inputs = [p, _if(k, p), of_angle, of_angle, _if(positions, of_positions), None, None]
        return [p, Replicate() if k is None else p], inputs

    everywhere, batch = Replicate(), q.shape[0]
    angle_of_batch = Shard(0) if len(cos.shape) == 3 and cos.shape[0] == batch else everywhere
    positions_of_batch = Shard(0) if positions is not None and positions.shape[0] == batch else everywhere
    return [
        rule(everywhere, everywhere, everywhere),
        rule(Shard(0), angle_of_batch, positions_of_batch),
        rule(Shard(1), everywhere if positions is not None else Shard(1), Shard(1)),
        rule(Shard(2), everywhere, everywhere),
    ]


@register_sharding(ops.softmax.default)
def _softmax(x, mask, causal, mask_keeps, scale) -> Rules:
    rules: Rules = [([Replicate()], [Replicate(), _if(mask, Replicate()), None, None, None])]
    for dim in range(len(x.shape) - (2 if causal else 1)):  # which rows a causal one holds, it cannot know
        of_mask: Placement = Replicate()
        if mask is not None:
            mask_dim = dim - (len(x.shape) - len(mask.shape))
            if mask_dim >= 0 and mask.shape[mask_dim] == x.shape[dim]:
                of_mask = Shard(mask_dim)
        rules.append(([Shard(dim)], [Shard(dim), _if(mask, of_mask), None, None, None]))
    return rules


def _alike(n_outputs: int, n_inputs: int, n_others: int, n_fixed_dims: int) -> Callable[..., Rules]:
    """All tensors are sharded alike, in any but their last `n_fixed_dims` dims."""

    def rules(x: Any, *_others: object) -> Rules:
        placements = Replicate(), *_shards(x, n_fixed_dims)
        return [([p] * n_outputs, [*[p] * n_inputs, *[None] * n_others]) for p in placements]

    return rules


register_sharding(ops.softmax_backward.default)(_alike(1, 2, 1, 1))
register_sharding(ops.swiglu.default)(_alike(1, 2, 0, 0))
register_sharding(ops.swiglu_backward.default)(_alike(2, 3, 0, 0))
register_sharding(ops.swiglu_packed.default)(_alike(1, 1, 0, 1))
register_sharding(ops.swiglu_packed_backward.default)(_alike(1, 2, 0, 1))


@register_sharding(ops.gelu_backward.default)
def _gelu_backward(dout, x) -> Rules:
    last = len(x.shape) - 1
    rules: Rules = [([Replicate()] * 3, [Replicate()] * 2), ([Shard(last), Shard(last), Shard(0)], [Shard(last)] * 2)]
    return rules + [([p, p, Partial()], [p] * 2) for p in _shards(x, 1)]


# losses --------------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How tokens and classes are spread over the axes of a mesh."""

    mesh: DeviceMesh
    tokens: list[Placement]  # of targets, losses and all else that is one a token
    vocabulary: int | None  # the mesh axis over which the classes are split
    first_class: int
    n_classes: int
    largest_share: int  # of the classes

    @staticmethod
    def of(mesh: DeviceMesh, tokens: Sequence[Placement], is_vocabulary: Sequence[bool], n_classes: int) -> _Layout:
        axes = [axis for axis, splits in enumerate(is_vocabulary) if splits]
        if len(axes) > 1:
            raise ValueError(f"classes are split over axes {axes} of the mesh: one at most can be served")
        pairs = zip(tokens, is_vocabulary, strict=True)
        placements = [p if _splits(p) and not is_class_axis else Replicate() for p, is_class_axis in pairs]
        if not axes:
            return _Layout(mesh, placements, None, 0, n_classes, n_classes)
        share = -(-n_classes // mesh.size(axes[0]))  # as DTensor cuts: the last ranks may hold fewer, or none
        first = min(mesh.get_local_rank(axes[0]) * share, n_classes)
        return _Layout(mesh, placements, axes[0], first, n_classes, share)

    def local(self, x: Tensor | None, placements: Sequence[Placement] | None = None) -> Any:
        """This rank's part; a plain tensor is the whole on every rank."""
        if x is None:
            return None
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        # detached: under no_grad torch 2.11 detaches the result in place, for which DTensor has no rule
        return x.detach().redistribute(self.mesh, self.tokens if placements is None else placements).to_local()

    def everywhere(self, x: Tensor) -> Tensor:
        return self.local(x, [Replicate()] * self.mesh.ndim)

    def whole(self, local: Tensor, shape: torch.Size, placements: Sequence[Placement] | None = None) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        placements = self.tokens if placements is None else placements
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def sum(self, local: Tensor) -> DTensor:
        """A number added up over the ranks that have different tokens."""
        parts = [Partial() if _splits(p) else Replicate() for p in self.tokens]
        return self.whole(local, torch.Size(()), parts).redistribute(self.mesh, [Replicate()] * self.mesh.ndim)


def _layout_of_logits(logits: Tensor) -> _Layout:
    if not isinstance(logits, DTensor):
        raise ValueError("logits: must be a DTensor, as the targets are")
    last = logits.ndim - 1
    splits = [p.is_shard(last) for p in logits.placements]
    return _Layout.of(logits.device_mesh, logits.placements, splits, logits.shape[-1])


def _local_logits(logits: DTensor, layout: _Layout) -> tuple[Tensor, list[Placement]]:
    placements = list(layout.tokens)
    if layout.vocabulary is not None:
        placements[layout.vocabulary] = Shard(logits.ndim - 1)
    return layout.local(logits, placements), placements


def _logits_in_place(logits: DTensor) -> Tensor:
    if any(p.is_partial() for p in logits.placements):
        raise ValueError(f"inplace: logits {logits.placements} are partial sums; redistribute them, or not in place")
    return logits.to_local()


def merged(statistics: Tensor, group: Any) -> Tensor:
    """Statistics (4, ...) of some classes, to those of the classes of all ranks: a maximum and a sum."""
    peak = collectives.all_reduce(statistics[0], "max", group)
    total = statistics[1] * (statistics[0] - peak).exp()
    sums = collectives.all_reduce(torch.cat((total.unsqueeze(0), statistics[2:])), "sum", group)
    return torch.cat((peak.unsqueeze(0), sums))


def _losses(logits: Tensor, targets: Tensor, layout: _Layout, call: Sequence) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps of this rank's tokens, from the logits of its classes."""
    held = cross_entropy_statistics(logits, targets, layout.first_class, *call)
    found = merged(held, (layout.mesh, layout.vocabulary))
    return loss_reference.losses_of_statistics(found, targets, LossOptions(*call[:-1]), layout.n_classes)


def _dispatch(name: str) -> Callable:
    """Registers a function of an op and its arguments, some of them DTensors."""

    def register(rule: Callable) -> Callable:
        def dispatched(_mode, function, _types, arguments=(), _keywords=None):
            with torch.no_grad():
                return rule(function, *arguments)

        register_torch_dispatch(f"longctx::{name}", DTensor, dispatched)
        return rule

    return register


@_dispatch("cross_entropy")
def _cross_entropy(op, logits, targets, *call):
    layout = _layout_of_logits(logits)
    local, of_tokens = _local_logits(logits, layout)[0], layout.local(targets)
    losses, lse = op(local, of_tokens, *call) if layout.vocabulary is None else _losses(local, of_tokens, layout, call)
    return layout.whole(losses, logits.shape[:-1]), layout.whole(lse, logits.shape[:-1])


@_dispatch("cross_entropy_gradient")
def _cross_entropy_gradient(op, weights, logits, targets, lse, _first_class, n_classes, *call):
    layout = _layout_of_logits(logits)
    local, placements = _local_logits(logits, layout)
    of_tokens = (layout.local(x) for x in (targets, lse))
    gradient = op(layout.local(weights), local, *of_tokens, layout.first_class, n_classes, *call)
    return layout.whole(gradient, logits.shape, placements)


@_dispatch("cross_entropy_gradient_")
def _cross_entropy_gradient_in_place(op, weights, logits, targets, lse, _first_class, n_classes, *call):
    layout = _layout_of_logits(logits)
    of_tokens = (layout.local(x) for x in (targets, lse))
    op(layout.local(weights), _logits_in_place(logits), *of_tokens, layout.first_class, n_classes, *call)


@_dispatch("cross_entropy_with_gradient")
def _cross_entropy_with_gradient(op, logits, targets, weight, *call):
    layout = _layout_of_logits(logits)
    local, placements = _local_logits(logits, layout)
    of_tokens, weight = layout.local(targets), layout.everywhere(weight)
    if layout.vocabulary is None:
        loss, gradient = op(local, of_tokens, weight, *call)
    else:
        losses, lse = _losses(local, of_tokens, layout, call)
        gradient = cross_entropy_gradient(weight, local, of_tokens, lse, layout.first_class, layout.n_classes, *call)
        loss = losses.sum() * weight
    return layout.sum(loss), layout.whole(gradient, logits.shape, placements)


@_dispatch("cross_entropy_with_gradient_")
def _cross_entropy_with_gradient_in_place(op, logits, targets, weight, *call):
    layout = _layout_of_logits(logits)
    of_tokens, weight, local = layout.local(targets), layout.everywhere(weight), _logits_in_place(logits)
    if layout.vocabulary is None:
        return layout.sum(op(local, of_tokens, weight, *call))
    losses, lse = _losses(local, of_tokens, layout, call)
    cross_entropy_gradient_(weight, local, of_tokens, lse, layout.first_class, layout.n_classes, *call)
    return layout.sum(losses.sum() * weight)


@_dispatch("scale_")
def _scale(op, x, factor):
    if isinstance(factor, DTensor):
        factor = factor.redistribute(factor.device_mesh, [Replicate()] * factor.device_mesh.ndim).to_local()
    op(local_of(x), factor)


# linear cross entropy ------------------------------------------------------------------------------------------------


def _vocabulary_parallel(
    hidden, weight, bias, targets, token_weights, first_class, n_classes, largest_share, group_name, *call
):  # fmt: skip
    group = _resolve_process_group(GroupName(group_name))

    vocabulary = Vocabulary(first_class, n_classes, largest_share, partial(merged, group=group))
    losses, gradients = in_chunks(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1), LossOptions(*call[:-1]), call[-1],
        None if token_weights is None else token_weights.reshape(-1), vocabulary,
    )  # fmt: skip
    if gradients is None:
        return losses.view(targets.shape), *(hidden.new_empty(0) for _ in range(3))
    return losses.view(targets.shape), *finished(gradients, hidden)


_vocabulary_parallel_op = custom_op(
    "longctx::vocabulary_parallel_linear_cross_entropy",
    _vocabulary_parallel,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? token_weights, int first_class, "
    f"int n_classes, int largest_share, str group_name, {LOSS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_vocabulary_parallel_op.register_fake
def _(hidden, weight, bias, targets, token_weights, *_others):
    losses = hidden.new_empty(targets.shape, dtype=precision.accumulation_dtype(hidden.dtype))
    if token_weights is None:
        return losses, *(hidden.new_empty(0) for _ in range(3))
    return losses, *fake_gradients(hidden, weight, bias)


class _Projection(NamedTuple):
    """The parts of hidden states, weight, bias and targets that a rank computes with."""

    layout: _Layout
    hidden: DTensor  # the whole one, as its placements came
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor]
    weight_shape: torch.Size

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> _Projection:
        if not isinstance(hidden, DTensor) or not isinstance(weight, DTensor):
            raise ValueError("hidden and weight: must both be DTensors of one mesh, or neither")
        splits = [p.is_shard(0) for p in weight.placements]
        tokens = [Replicate() if p.is_shard(hidden.ndim - 1) else p for p in hidden.placements]
        layout = _Layout.of(weight.device_mesh, tokens, splits, weight.shape[0])
        of_weight = [Shard(0) if split else Replicate() for split in splits]
        tensors = layout.local(hidden), layout.local(weight, of_weight), layout.local(bias, of_weight)
        return _Projection(layout, hidden, (*tensors, layout.local(targets)), weight.shape)

    def split_over_classes(self, token_weights: Tensor | None, call: Sequence) -> tuple[Tensor, ...]:
        layout = self.layout
        assert layout.vocabulary is not None
        group = layout.mesh.get_group(layout.vocabulary).group_name
        shares = layout.first_class, layout.n_classes, layout.largest_share
        return _vocabulary_parallel_op(*self.tensors, token_weights, *shares, group, *call)

    def gradients(self, dhidden: Tensor, dweight: Tensor, dbias: Tensor) -> tuple[DTensor, DTensor, DTensor]:
        """Of hidden states as these came; of weight and bias as partial sums over the ranks with other tokens."""
        layout = self.layout
        of_hidden, of_weight = list(layout.tokens), [Partial() if _splits(p) else Replicate() for p in layout.tokens]
        if layout.vocabulary is not None:
            of_hidden[layout.vocabulary], of_weight[layout.vocabulary] = Partial(), Shard(0)
        back = [p if _splits(p) else Replicate() for p in self.hidden.placements]
        return (
            layout.whole(dhidden, self.hidden.shape, of_hidden).redistribute(layout.mesh, back),
            layout.whole(dweight, self.weight_shape, of_weight),
            layout.whole(dbias, self.weight_shape[:1] if dbias.numel() else dbias.shape,
                         of_weight if dbias.numel() else [Replicate()] * layout.mesh.ndim),
        )  # fmt: skip


@_dispatch("linear_cross_entropy")
def _linear_cross_entropy(op, hidden, weight, bias, targets, *call):
    part = _Projection.of(hidden, weight, bias, targets)
    is_split = part.layout.vocabulary is not None
    losses = part.split_over_classes(None, call)[0] if is_split else op(*part.tensors, *call)
    return part.layout.whole(losses, hidden.shape[:-1])


@_dispatch("linear_cross_entropy_backward")
def _linear_cross_entropy_backward(op, dlosses, hidden, weight, bias, targets, *call):
    part = _Projection.of(hidden, weight, bias, targets)
    dlosses = part.layout.local(dlosses)
    if part.layout.vocabulary is None:
        return part.gradients(*op(dlosses, *part.tensors, *call))
    return part.gradients(*part.split_over_classes(dlosses, call)[1:])


@_dispatch("linear_cross_entropy_with_gradient")
def _linear_cross_entropy_with_gradient(op, hidden, weight, bias, targets, token_weight, *call):
    part = _Projection.of(hidden, weight, bias, targets)
    token_weight = part.layout.everywhere(token_weight)
    if part.layout.vocabulary is None:
        loss, *gradients = op(*part.tensors, token_weight, *call)
    else:
        losses, *gradients = part.split_over_classes(token_weight, call)
        loss = losses.sum() * token_weight
    return part.layout.sum(loss), *part.gradients(*gradients)
