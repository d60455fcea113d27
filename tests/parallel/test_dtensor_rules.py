"""The fused ops on DTensors: on 2 and 4 ranks, forward and backward as in one process, with no needless talk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from longctx.kernels.compat.norms import dropout_add_layer_norm
from longctx.kernels.dense import fused_dense
from longctx.kernels.loss import linear_cross_entropy as linear_ce
from longctx.kernels.loss.cross_entropy import cross_entropy
from longctx.kernels.loss.linear_cross_entropy import linear_cross_entropy
from longctx.kernels.norm.layer_norm import add_layer_norm, layer_norm
from longctx.kernels.norm.rms_norm import add_rms_norm, rms_norm
from longctx.kernels.rotary import apply_rotary_to_both
from longctx.kernels.softmax import softmax
from longctx.kernels.swiglu import swiglu
from longctx.parallel import dtensor_rules  # noqa: F401  registers the rules
from ranks import run_on_ranks

R, BATCH, SEQUENCE, HEADS, LAST = Replicate(), Shard(0), Shard(1), Shard(2), Shard(2)


class Case(NamedTuple):
    """A call, its inputs with their placements, and what it must come to."""

    call: Callable[..., Any]
    inputs: list[tuple[tuple[int, ...] | torch.Tensor, Any]]  # a shape: random numbers that get a gradient
    outputs: list[Any]  # placements
    gradients: list[Any]
    talk: dict[str, int] = {}  # collectives of forward and backward together; none  # noqa: RUF012


def keyword(**keywords) -> Callable[[Callable], Callable]:
    return lambda function: lambda *t, **more: function(*t, implementation="triton", **keywords, **more)


triton = keyword()
X = (4, 7, 24)  # 7 tokens are uneven over 2 and over 4 ranks
HEADED = (4, 7, 8, 12)
TARGETS = torch.tensor([[3, 0, -100, 36, 18, 19, 1], [20, -100, 5, 36, 17, 2, 2]] * 2)
FEW_TARGETS = torch.where(TARGETS < 0, -100, TARGETS % 5)
EVEN_TARGETS = torch.cat((TARGETS, TARGETS[:, :1]), 1)
ROW_IDS = torch.arange(28).view(4, 7)
SEED = torch.tensor([99])
ANGLES = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(0)).cos()
KEEP = torch.rand(4, 1, 7, 12, generator=torch.Generator().manual_seed(0)) > 0.2
P = "partial"
LOSS_AND_COUNT = {"all_reduce": 2}  # the loss, and of how many targets it is the mean

CASES = {
    "rms_norm, sequence": Case(triton(rms_norm), [(X, SEQUENCE), ((24,), R)], [SEQUENCE], [SEQUENCE, P]),
    "rms_norm, batch": Case(triton(rms_norm), [(X, BATCH), ((24,), R)], [BATCH], [BATCH, P]),
    "rms_norm, replicated": Case(triton(rms_norm), [(X, R), ((24,), R)], [R], [R, R]),
    "add_rms_norm, sequence": Case(
        triton(add_rms_norm), [(X, SEQUENCE), (X, SEQUENCE), ((24,), R)], [SEQUENCE] * 2, [SEQUENCE, SEQUENCE, P]
    ),
    "rms_norm of heads": Case(triton(rms_norm), [(HEADED, HEADS), ((12,), R)], [HEADS], [HEADS, P]),
    "rms_norm, a weight a head": Case(triton(rms_norm), [(HEADED, HEADS), ((8, 12), BATCH)], [HEADS], [HEADS, BATCH]),
    "rms_norm, a weight a head, sequence": Case(
        triton(rms_norm), [(HEADED, SEQUENCE), ((8, 12), R)], [SEQUENCE], [SEQUENCE, P]
    ),
    "rms_norm, flattened": Case(
        lambda x, w: triton(rms_norm)(x.flatten(0, 1), w).unflatten(0, (4, 8)),
        [((4, 8, 24), SEQUENCE), ((24,), R)],
        [SEQUENCE],
        [SEQUENCE, P],
    ),
    "layer_norm without bias": Case(triton(layer_norm), [(X, SEQUENCE), ((24,), R)], [SEQUENCE], [SEQUENCE, P]),
    "layer_norm, sequence": Case(
        triton(layer_norm), [(X, SEQUENCE), ((24,), R), ((24,), R)], [SEQUENCE], [SEQUENCE, P, P]
    ),
    "add_layer_norm, batch": Case(
        triton(add_layer_norm), [(X, BATCH), (X, BATCH), ((24,), R), ((24,), R)], [BATCH] * 2, [BATCH, BATCH, P, P]
    ),
    "dropout_add_layer_norm, sequence": Case(
        lambda x, r, w, b, seed, ids: dropout_add_layer_norm(
            x, r, w, b, 0.4, 1e-5, prenorm=True, seed=seed, row_ids=ids, implementation="triton"
        ),
        [(X, SEQUENCE), (X, SEQUENCE), ((24,), R), ((24,), R), (SEED, R), (ROW_IDS, SEQUENCE)],
        [SEQUENCE] * 2,
        [SEQUENCE, SEQUENCE, P, P],
    ),
    "rotary, sequence": Case(
        triton(apply_rotary_to_both),
        [(HEADED, SEQUENCE), ((4, 7, 4, 12), SEQUENCE), (ANGLES, SEQUENCE), (ANGLES, SEQUENCE)],
        [SEQUENCE] * 2,
        [SEQUENCE] * 2,
    ),
    "rotary, heads": Case(
        triton(apply_rotary_to_both),
        [(HEADED, HEADS), ((4, 7, 4, 12), HEADS), (ANGLES, R), (ANGLES, R)],
        [HEADS] * 2,
        [HEADS] * 2,
    ),
    "rotary, table": Case(
        lambda q, k, c, s, p: apply_rotary_to_both(q, k, c, s, positions=p, implementation="triton"),
        [(HEADED, SEQUENCE), ((4, 7, 4, 12), SEQUENCE), (ANGLES[0], R), (ANGLES[0], R), (ROW_IDS % 7, SEQUENCE)],
        [SEQUENCE] * 2,
        [SEQUENCE] * 2,
    ),
    "softmax, heads": Case(triton(softmax), [((4, 8, 7, 12), Shard(1)), (KEEP, R)], [Shard(1)], [Shard(1)]),
    "softmax, batch": Case(triton(softmax), [((4, 8, 7, 12), BATCH), (KEEP, BATCH)], [BATCH], [BATCH]),
    "softmax, rows": Case(triton(softmax), [((4, 8, 7, 12), Shard(2)), (KEEP, Shard(2))], [Shard(2)], [Shard(2)]),
    "softmax, rows without a mask": Case(triton(softmax), [((4, 8, 7, 12), Shard(2))], [Shard(2)], [Shard(2)]),
    "softmax, causal rows": Case(  # which rows a rank has, a kernel does not know
        keyword(causal=True)(softmax), [((4, 8, 7, 12), Shard(2))], [R], [R], {"all_gather_into_tensor": 1}
    ),
    "softmax, causal": Case(keyword(causal=True)(softmax), [((4, 8, 7, 12), Shard(1))], [Shard(1)], [Shard(1)]),
    "swiglu, sequence": Case(triton(swiglu), [(X, SEQUENCE), (X, SEQUENCE)], [SEQUENCE], [SEQUENCE] * 2),
    "swiglu, width": Case(triton(swiglu), [(X, LAST), (X, LAST)], [LAST], [LAST] * 2),
    "swiglu, packed": Case(triton(swiglu), [(X, SEQUENCE)], [SEQUENCE], [SEQUENCE]),
    "dense, batch": Case(fused_dense, [((4, 24), BATCH), ((40, 24), R), ((40,), R)], [BATCH], [BATCH, P, P]),
    "cross_entropy, sequence": Case(
        triton(cross_entropy), [((4, 7, 37), SEQUENCE), (TARGETS, SEQUENCE)], [R], [SEQUENCE], LOSS_AND_COUNT
    ),
    "cross_entropy, classes": Case(
        triton(cross_entropy), [((4, 7, 37), LAST), (TARGETS, R)], [R], [LAST], {"all_reduce": 2}
    ),
    "cross_entropy, flattened": Case(
        lambda x, t: triton(cross_entropy)(x.flatten(0, 1), t.flatten(0, 1)),
        [((4, 8, 37), SEQUENCE), (EVEN_TARGETS, SEQUENCE)],
        [R],
        [SEQUENCE],
        LOSS_AND_COUNT,
    ),
    "cross_entropy, few classes": Case(  # the last of 4 ranks has none
        triton(cross_entropy), [((4, 7, 5), LAST), (FEW_TARGETS, R)], [R], [LAST], {"all_reduce": 2}
    ),
    "linear_cross_entropy, few classes": Case(
        triton(linear_cross_entropy), [(X, R), ((5, 24), BATCH), (FEW_TARGETS, R)], [R], [R, BATCH], {"all_reduce": 1}
    ),
    "cross_entropy, classes, all options": Case(
        keyword(label_smoothing=0.1, z_loss=1e-3, softcap=5.0, reduction="none")(cross_entropy),
        [((4, 7, 37), LAST), (TARGETS, R)],
        [R],
        [LAST],
        {"all_reduce": 2},
    ),
    "cross_entropy, classes, over the logits": Case(
        lambda x, t: cross_entropy(x * 1, t, inplace=True, implementation="triton"),
        [((4, 7, 37), LAST), (TARGETS, R)],
        [R],
        [LAST],
        {"all_reduce": 2},
    ),
    "cross_entropy, classes, losses over the logits": Case(
        lambda x, t: cross_entropy(x * 1, t, reduction="none", inplace=True, implementation="triton"),
        [((4, 7, 37), LAST), (TARGETS, R)],
        [R],
        [LAST],
        {"all_reduce": 2},
    ),
    "linear_cross_entropy, sequence": Case(
        triton(linear_cross_entropy), [(X, SEQUENCE), ((37, 24), R), (TARGETS, SEQUENCE)], [R], [SEQUENCE, P],
        LOSS_AND_COUNT,
    ),
    "linear_cross_entropy, classes": Case(  # the gradient of hidden states is added up; the op's own sums do not show
        triton(linear_cross_entropy), [(X, R), ((37, 24), BATCH), (TARGETS, R)], [R], [R, BATCH], {"all_reduce": 1}
    ),
    "linear_cross_entropy, classes and sequence": Case(
        keyword(reduction="sum")(linear_cross_entropy),
        [(X, SEQUENCE), ((37, 24), BATCH), (TARGETS, R)],
        [R],
        [SEQUENCE, BATCH],
        {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1},
    ),
    "linear_cross_entropy, classes, losses": Case(
        lambda h, w, b, t: triton(linear_cross_entropy)(h, w, t, bias=b, reduction="none", softcap=3.0),
        [(X, R), ((37, 24), BATCH), ((37,), BATCH), (TARGETS, R)],
        [R],
        [R, BATCH, BATCH],
        {"all_reduce": 1},
    ),
}  # fmt: skip
if torch.__version__ < (2, 13):  # which refuses to flatten a sharded dim behind another
    CASES = {name: case for name, case in CASES.items() if not name.endswith(", flattened")}


def tensors_of(case: Case) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        x if isinstance(x, torch.Tensor) else torch.randn(x, generator=generator).requires_grad_()
        for x, _ in case.inputs
    ]


def run(case: Case, inputs: list, call: Callable | None = None) -> tuple[list, list]:
    """Outputs and gradients of a call, for fixed gradients of the outputs."""
    outputs = (call or case.call)(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(2)
    of_outputs = []
    for y in outputs:
        dy = torch.randn(y.shape, generator=generator).to(y.device)
        if isinstance(y, DTensor):
            dy = distribute_tensor(dy, y.device_mesh, y.placements, src_data_rank=None)
        of_outputs.append(dy)
    gradients = torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], of_outputs)
    return [y.detach() for y in outputs], list(gradients)


def on_mesh(case: Case, mesh: DeviceMesh, placements: list) -> list[torch.Tensor]:
    return [
        distribute_tensor(x.detach().to(mesh.device_type), mesh, p, src_data_rank=None).requires_grad_(x.requires_grad)
        for x, p in zip(tensors_of(case), placements, strict=True)
    ]


def compared(case: Case, mesh: DeviceMesh, placements: list, compiled: bool = False) -> dict:
    """Results against one process, their placements, and the collectives."""
    alone = run(case, [x.detach().to(mesh.device_type).requires_grad_(x.requires_grad) for x in tensors_of(case)])
    talk = CommDebugMode()
    if compiled:  # which cannot be while a mode counts
        call = torch.compile(case.call, fullgraph=True, backend="aot_eager")
        outputs, gradients = run(case, on_mesh(case, mesh, placements), call)
    else:
        with talk:
            outputs, gradients = run(case, on_mesh(case, mesh, placements))
    pairs = list(zip(outputs + gradients, alone[0] + alone[1], strict=True))
    return {
        # the maximum of torch, which NaN passes through
        "error": float(torch.stack([(a.full_tensor() - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]).max()),
        "placements": [[P if p.is_partial() else str(p) for p in x.placements] for x, _ in pairs],
        "talk": {str(kind).split(".")[-1]: count for kind, count in talk.get_comm_counts().items()},
    }


def on_one_axis(rank: int, device_type: str) -> list[dict]:
    linear_ce.tokens_of_a_chunk = lambda _hidden, classes: max(1, 200 // classes)  # several chunks, alike on all ranks
    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    return [compared(case, mesh, [[p] for _, p in case.inputs]) for case in CASES.values()]


def check_cases(found: list[list[dict]]) -> None:
    for (name, case), *of_ranks in zip(CASES.items(), *found, strict=True):
        for result in of_ranks:
            assert result["error"] < 3e-6, (name, result)
            assert result["talk"] == case.talk, (name, result)
            assert result["placements"] == [[str(p)] for p in case.outputs + case.gradients], (name, result)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_on_ranks(ranks):
    check_cases(run_on_ranks(ranks, on_one_axis, "cpu"))


@pytest.mark.gpu(2)
def test_on_gpus():
    check_cases(run_on_ranks(2, on_one_axis, "cuda", device="cuda"))


# a mesh of two axes --------------------------------------------------------------------------------------------------

ON_TWO_AXES = {  # tokens over the first, heads or classes over the second
    "add_rms_norm, sequence": [[SEQUENCE, R], [SEQUENCE, R], [R, R]],
    "rms_norm, a weight a head": [[SEQUENCE, HEADS], [R, BATCH]],
    "rotary, sequence": [[SEQUENCE, HEADS], [SEQUENCE, HEADS], [SEQUENCE, R], [SEQUENCE, R]],
    "cross_entropy, classes": [[SEQUENCE, LAST], [SEQUENCE, R]],
    "cross_entropy, classes, all options": [[BATCH, LAST], [BATCH, R]],
    "linear_cross_entropy, classes": [[SEQUENCE, R], [R, BATCH], [SEQUENCE, R]],
    "linear_cross_entropy, classes, losses": [[BATCH, SEQUENCE], [R, BATCH], [R, BATCH], [BATCH, R]],
}


def on_two_axes(_rank: int) -> dict[str, dict]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tokens", "classes"))
    return {name: compared(CASES[name], mesh, placements) for name, placements in ON_TWO_AXES.items()}


def test_two_axes():
    for of_rank in run_on_ranks(4, on_two_axes):
        for name, result in of_rank.items():
            assert result["error"] < 3e-6, (name, result)
            assert not result["talk"].get("all_gather_into_tensor") or "losses" in name, (name, result)


# torch.compile, refusals ---------------------------------------------------------------------------------------------

COMPILED = (
    "add_rms_norm, sequence", "rotary, sequence", "swiglu, width", "linear_cross_entropy, classes and sequence",
)  # fmt: skip
COMPILED_TOO = (
    "layer_norm, sequence", "softmax, heads", "cross_entropy, classes", "cross_entropy, classes, all options",
)  # fmt: skip


def compiled_on_ranks(_rank: int, names: tuple[str, ...]) -> dict[str, dict]:
    mesh = init_device_mesh("cpu", (2,))
    cases = {name: CASES[name] for name in names}
    return {name: compared(case, mesh, [[p] for _, p in case.inputs], True) for name, case in cases.items()}


@pytest.mark.parametrize("names", [COMPILED, pytest.param(COMPILED_TOO, marks=pytest.mark.slow)], ids=len)
def test_one_graph(names):
    for of_rank in run_on_ranks(2, compiled_on_ranks, names):
        for name, result in of_rank.items():
            assert result["error"] < 3e-6, (name, result)


def refusals(_rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 1))
    x = distribute_tensor(torch.ones(2, 6, 8), mesh, [SEQUENCE, R])
    weight = distribute_tensor(torch.ones(10, 8), mesh, [BATCH, BATCH])
    seed, targets = distribute_tensor(SEED, mesh, [R, R]), torch.zeros(2, 6, dtype=torch.int64)
    partial = DTensor.from_local(x.to_local(), mesh, [Partial(), R]).requires_grad_()
    said = []
    for call in (
        lambda: dropout_add_layer_norm(x, None, None, None, 0.5, 1e-5, seed=seed, implementation="triton"),
        lambda: linear_cross_entropy(x, weight, targets),
        lambda: linear_cross_entropy(x, torch.ones(10, 8), targets),
        lambda: cross_entropy(torch.ones(2, 6, 8), distribute_tensor(targets, mesh, [SEQUENCE, R])),
        lambda: cross_entropy(partial * 1, targets[:, :3], inplace=True),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        said.append(str(caught.value))
    return said


def test_refusals():
    for said in run_on_ranks(2, refusals):
        assert "dropout of a sharded x: give row_ids" in said[0]
        assert "classes are split over axes [0, 1] of the mesh: one at most" in said[1]
        assert "hidden and weight: must both be DTensors of one mesh, or neither" in said[2]
        assert "logits: must be a DTensor, as the targets are" in said[3]
        assert "are partial sums; redistribute them, or not in place" in said[4]
