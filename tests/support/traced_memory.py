"""Bytes that a training step of the spread model holds, op by op, on fake tensors: prints a JSON line for each case.

Nothing is computed and no other rank exists. A process of its own: where a fake process group is, no other can be.
"""

from __future__ import annotations

import json
import sys
import weakref
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from longctx import plan
from longctx.batch import Batch
from longctx.config import (
    Activation,
    ComputeDtype,
    Config,
    DataConfig,
    FusedImplementation,
    ModelConfig,
    Norm,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
    Strategy,
)
from longctx.kernels import hardware
from longctx.parallel import offload
from longctx.parallel import parallelize as parallelize_module
from longctx.parallel.mesh import make_mesh


class LiveBytes(TorchDispatchMode):
    """The most bytes of all storages that exist at once, with what is `inside` ops that are not run."""

    def __init__(self, config: Config, world_size: int) -> None:
        super().__init__()
        self.config, self.world_size, self.storages, self.peak, self.where = config, world_size, {}, 0, ""
        self.of_host: set[int] = set()  # storages, see `host_tensor`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # so that it runs as ops on its local part, which come here
        results = func(*args, **(kwargs or {}))
        name = str(func)
        is_loss = "linear_cross_entropy_with_gradient" in name
        for number, x in enumerate(tree_iter(results)):
            if isinstance(x, torch.Tensor):  # the weight's gradient is the first half of its float32 sum
                self._see(x, 4 // x.element_size() if is_loss and number == 2 else 1)
        if (now := self._now() + self._inside(name, args, results)) > self.peak:
            self.peak, self.where = now, name
        return results

    def _now(self) -> float:
        storages = ((ref(), factor) for ref, factor in list(self.storages.values()))
        return sum(factor * storage.nbytes() for storage, factor in storages if storage is not None)

    def _see(self, x: torch.Tensor, factor: int) -> None:
        x = x._local_tensor if isinstance(x, DTensor) else x
        storage = x.untyped_storage()
        if x.device.type != "meta" and storage._cdata not in self.storages.keys() | self.of_host:
            key = storage._cdata
            self.storages[key] = weakref.ref(storage, lambda _: self.storages.pop(key, None)), factor

    def host_tensor(self, shape: list[int], dtype: torch.dtype, _device: torch.device) -> torch.Tensor:
        """In place of that of `host_memory`: it takes no memory of the GPU."""
        made = torch.empty(shape, dtype=dtype)
        self.storages.pop(made.untyped_storage()._cdata)
        self.of_host.add(made.untyped_storage()._cdata)
        return made

    def _inside(self, name: str, args: tuple[Any, ...], results: Any) -> float:
        if "swiglu_linear" in name:  # what goes into the product, as large as the gate or its gradient
            return (results[0] if "backward" in name else args[0]).nbytes
        if "attention_backward" in name:  # of split sequences too, without what is exchanged
            return plan.inside_attention(self.config, self.world_size)
        return plan.inside_losses(self.config, self.world_size) if "linear_cross_entropy_with_gradient" in name else 0


def nothing(*_arguments: object) -> None:
    """In place of initial values, and of reasons why a kernel cannot serve. (A Mock would keep its arguments.)"""


def traced(config: Config, world_size: int, micro_batches: int) -> LiveBytes:
    """Forward and backward passes of one step, without the optimizer's state."""
    mesh = make_mesh(config.parallel, world_size, "cpu")
    device = torch.device("cpu")
    with mock.patch.object(parallelize_module, "materialize", nothing):
        model, context_parallel = parallelize_module.parallelize(config, mesh, world_size, device)
    whole = torch.zeros(config.data.sequences_per_micro_batch, config.data.sequence_length, dtype=torch.int64)
    batch = Batch(whole, whole, torch.arange(whole.shape[1]).expand_as(whole), whole)
    mask = context_parallel.split(config.model, batch.positions).mask(batch.document_start, device)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        LiveBytes(config, world_size) as live,
        mock.patch.object(hardware, "unsupported", nothing),
        mock.patch.object(offload, "host_tensor", live.host_tensor),
    ):
        model.to_empty(device=device)
        live.peak = 0
        for _ in range(micro_batches):
            shape = config.data.sequences_per_micro_batch, config.data.sequence_length // config.parallel.context
            local = Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in Batch._fields))
            model(local.tokens, local.positions, mask, local.targets, torch.ones(())).backward()
    return live


def case(recompute: Recompute, words: dict[str, Any]) -> Config:
    """A small model; `words`: fields of `ModelConfig`, or of what is named here."""
    shape = {"vocab_size": 512, "width": 256, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp_width": 896}
    others = {"length": 4096, "compute": ComputeDtype.bfloat16, "micro_batches": 1, "less_layers": 0, "parallel": {}}
    others["unit_bytes"] = 1  # of blocks that FSDP gathers together: each by itself
    model = shape | {name: value for name, value in words.items() if name not in others}
    others |= {name: value for name, value in words.items() if name in others}
    nothing_less = Recompute.attention_saved if others["parallel"] else Recompute.none  # of tiled blocks, and of others
    return Config(
        model=ModelConfig(**model, fused_ops=FusedImplementation.triton),  # pyright: ignore[reportArgumentType]
        data=DataConfig(sequence_length=others["length"], sequences_per_step=others["micro_batches"]),
        parallel=ParallelConfig(
            recompute=recompute,
            recompute_less_layers=0 if recompute == nothing_less else others["less_layers"],
            **others["parallel"],
        ),
        precision=PrecisionConfig(compute=others["compute"]),
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "4k": {},
    "short": {"length": 64},
    "biases, QK-norm, a layer that recomputes less": {
        "less_layers": 1,
        "qk_norm": True,
        "qkv_bias": True,
        "projection_bias": True,
    },
    "large vocabulary, untied": {"vocab_size": 8192, "length": 1024, "tied_embeddings": False},
    "accumulated": {"length": 1024, "micro_batches": 2},
    "all blocks a unit": {"length": 512, "unit_bytes": 64 << 20},
}
MORE: dict[str, dict[str, Any]] = {
    "long": {"length": 16384, "layers": 6},
    "one layer": {"layers": 1},
    "GELU, layer norm": {"activation": Activation.gelu, "norm": Norm.layer_norm},
    "much attention, two layers that recompute less": {"less_layers": 2, "heads": 16, "kv_heads": 16, "mlp_width": 128},
    "much attention": {"heads": 16, "kv_heads": 16, "mlp_width": 128},
    "float32": {"compute": ComputeDtype.float32, "length": 1024},
    "large vocabulary": {"vocab_size": 8192, "length": 1024},
    "large vocabulary, untied, short": {"vocab_size": 8192, "length": 128, "tied_embeddings": False},
    "untied, wide MLP": {"vocab_size": 4096, "mlp_width": 4096, "tied_embeddings": False, "length": 1024},
}


TILED: dict[str, dict[str, Any]] = {
    "tiles": {"parallel": {"tile": 512}, "layers": 4},
    "tiles, QK-norm, a layer that recomputes less": {"parallel": {"tile": 1024}, "qk_norm": True, "less_layers": 1},
    "offload alone": {"parallel": {"offload": 2}},
    "groups of heads": {"parallel": {"tile": 512, "head_groups": 2}, "layers": 4},
    "tiles, eight groups of heads, much attention": {
        "parallel": {"tile": 512, "head_groups": 8},
        "heads": 16,
        "kv_heads": 16,
        "mlp_width": 128,
    },
    "groups of heads alone, much attention": {
        "parallel": {"head_groups": 4},
        "layers": 6,
        "heads": 16,
        "kv_heads": 16,
        "mlp_width": 128,
    },
    "tiles, GELU, offload": {"parallel": {"tile": 512, "offload": 3}, "layers": 6, "activation": Activation.gelu},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "context 4": {"parallel": {"context": 4, "strategy": Strategy.gather}},
    "context 4, units of two blocks": {
        "parallel": {"context": 4, "strategy": Strategy.gather},
        "layers": 5,
        "unit_bytes": 4 << 20,
    },
    "context 2": {"parallel": {"context": 2, "strategy": Strategy.ring}, "vocab_size": 8192},
    "replicate 2": {"parallel": {"replicate": 2}},
    "tensor 2": {"parallel": {"tensor": 2}},
}


def main(world_size: int, is_short: bool) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    variants = VARIANTS if is_short else VARIANTS | MORE | TILED
    if world_size == 4:
        few = {name: TILED[name] for name in ("groups of heads", "tiles, GELU, offload")}
        variants = LAYOUTS | few if is_short else variants | LAYOUTS
    for name, words in variants.items():
        for recompute in (Recompute.none, Recompute.full) if is_short else Recompute:
            if name in TILED and recompute == Recompute.none:
                continue
            config = case(recompute, words)
            config.data.sequences_per_step *= world_size // (config.parallel.context * config.parallel.tensor)
            with mock.patch.object(plan, "UNIT_BYTES", words.get("unit_bytes", 1)):
                live = traced(config, world_size, words.get("micro_batches", 1))
                expected = plan.memory(config, world_size)
            found = {"case": f"{name}, {recompute}", "traced": live.peak, "at": live.where, **expected._asdict()}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), "short" in sys.argv[2:])
