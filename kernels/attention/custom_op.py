"""What crosses the border of a custom op of attention, and the op's registration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from longctx.kernels.attention import reference
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.mask_cache import are_remembered
from longctx.kernels.attention.options import Options, Saved
from longctx.kernels.precision import accumulation_dtype

_SCHEMA_TYPES = {"int": "SymInt", "bool": "bool", "float": "float", "Tensor": "Tensor?", "Tensor | None": "Tensor?"}


def _types(kind: type, but: str = "") -> dict[str, str]:
    """Name -> type in a custom op's schema, of the fields of a dataclass."""
    return {field.name: _SCHEMA_TYPES[str(field.type)] for field in fields(kind) if field.name != but}


_INTERVALS = _types(KeyIntervals, but="is_owned")
_BLOCKS, _OPTIONS = _types(BlockMask, but="intervals"), _types(Options)
_CALL = _INTERVALS | _BLOCKS | _OPTIONS | {"implementation": "str"}
_CALL_SCHEMA = ", ".join(f"{kind} {name}" for name, kind in _CALL.items())


# what an op keeps of a mask for the calls to come must not lie in the memory of a CUDA graph (mode="reduce-overhead")
_TAGS = (torch.Tag.cudagraph_unsafe,)


class Call(NamedTuple):
    """What an attention is called with beside its tensors with gradients.

    A custom op takes only tensors, numbers and strings, so a call crosses its border field by field, see `_CALL`.
    """

    mask: KeyIntervals | BlockMask
    options: Options
    implementation: str  # as `choice.choose_implementation` gives it

    def flat(self) -> list[Any]:
        """The values of `_CALL`; those of kept blocks are empty where the mask has none."""
        intervals, blocks = self.mask, [None, 0, 0]
        if isinstance(intervals, BlockMask):
            intervals, blocks = intervals.intervals, [getattr(self.mask, name) for name in _BLOCKS]
        of_intervals = [getattr(intervals, name) for name in _INTERVALS]
        return [*of_intervals, *blocks, *(getattr(self.options, name) for name in _OPTIONS), self.implementation]

    @staticmethod
    def of_flat(values: tuple[Any, ...]) -> Call:
        """The call whose `flat` values these are."""
        value = dict(zip(_CALL, values, strict=True))
        is_owned = are_remembered(*(value[name] for name in (*_INTERVALS, "kept") if not isinstance(value[name], int)))
        mask = KeyIntervals(**{name: value[name] for name in _INTERVALS}, is_owned=is_owned)
        if value["kept"] is not None:
            mask = BlockMask(intervals=mask, **{name: value[name] for name in _BLOCKS})
        return Call(mask, Options(**{name: value[name] for name in _OPTIONS}), value["implementation"])


Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _without_autocast(q: Tensor) -> torch.autocast:
    """Autocast has cast the op's inputs and ends there: inside, products are of the dtypes that the op chooses."""
    return torch.autocast(q.device.type, enabled=False)


def _lse_shape(q: Tensor, *_others: Any) -> tuple[int, ...]:
    return q.shape[0], q.shape[2], q.shape[1]


def attention_op(
    name: str, forward: Forward, backward: Backward, lse_shape: Callable[..., tuple[int, ...]] = _lse_shape,
    more: dict[str, str] | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """Registers `longctx::<name>(q, k, v, sink, *call.flat(), *more)` and its gradient.

    `forward(q, k, v, sink, call, *more)` gives out and lse, `backward(dout, dlse, saved, call, *more)` gives dq, dk and
    dv, and `lse_shape(q, *more)` the shape of lse; dlse is None where no gradient comes through lse. `more`: names and
    schema types of what else the op is called with. A custom op is opaque to torch.compile, breaks no graph, and is
    seen whole by activation checkpointing.
    """
    more = more or {}
    schema = ", ".join([_CALL_SCHEMA, *(f"{kind} {name}" for name, kind in more.items())])

    def split(values: tuple[Any, ...]) -> tuple[Call, tuple[Any, ...]]:
        return Call.of_flat(values[: len(_CALL)]), values[len(_CALL) :]

    def op_forward(q, k, v, sink, *values):
        call, others = split(values)
        with _without_autocast(q):
            return forward(q, k, v, sink, call, *others)

    def op_backward(dout, dlse, q, k, v, out, lse, *values):
        call, others = split(values)
        with _without_autocast(q):
            return backward(dout.contiguous(), dlse, Saved(q, k, v, out, lse), call, *others)

    op = custom_op(
        f"longctx::{name}",
        op_forward,
        mutates_args=(),
        tags=_TAGS,
        schema=f"(Tensor q, Tensor k, Tensor v, Tensor? sink, {schema}) -> (Tensor, Tensor)",
    )
    backward_op = custom_op(
        f"longctx::{name}_backward",
        op_backward,
        mutates_args=(),
        tags=_TAGS,
        schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{schema}) -> (Tensor, Tensor, Tensor)",
    )

    @op.register_fake
    def _(q, k, v, sink, *values):
        lse = q.new_empty(lse_shape(q, *split(values)[1]), dtype=accumulation_dtype(q.dtype))
        return q.new_empty(q.shape), lse

    @backward_op.register_fake
    def _(dout, dlse, q, k, v, *_others):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx, inputs, output) -> None:
        q, k, v, sink, *values = inputs
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in values]
        ctx.constants = [value for value in values if not isinstance(value, torch.Tensor)]
        tensors = (value for value in values if isinstance(value, torch.Tensor))
        ctx.save_for_backward(q, k, v, sink, *output, *tensors)

    def autograd(ctx, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, sink, out, lse, *tensors = ctx.saved_tensors
        tensors, constants = iter(tensors), iter(ctx.constants)
        values = [next(tensors if is_tensor else constants) for is_tensor in ctx.is_tensor]
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = backward_op(dout, dlse, q, k, v, out, lse, *values)
        dsink = None
        if sink is not None:
            dsink = reference.sink_gradient(reference.attention_delta(dout, dlse, out), lse, sink)
        return *gradients, dsink, *(None for _ in values)

    op.register_autograd(autograd, setup_context=setup_context)
    return op
