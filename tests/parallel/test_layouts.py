"""The result does not depend on the layout: loss and every gradient against one process and against float64."""

from __future__ import annotations

import dataclasses
from functools import cache, partialmethod
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from longctx import plan
from longctx.batch import Batch
from longctx.config import (
    AttentionImplementation,
    ComputeDtype,
    Config,
    FusedImplementation,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
    Strategy,
)
from longctx.kernels.attention import passes
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.model.transformer import build, initial_value
from longctx.parallel import key_exchange
from longctx.parallel.load_balance import zigzag
from longctx.parallel.local_batch import LocalBatch
from longctx.parallel.loss import forward_backward, global_loss, token_weight
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from ranks import run_on_new_ranks, run_on_ranks
from small_models import BATCH, DOCUMENTS, GPT2, GQA, IGNORE, LENGTH, ONE_DOCUMENT, QWEN, WINDOW, make_inputs

KNOWN: dict[tuple[str, Batch, torch.dtype], dict[str, torch.Tensor]] = {}


def one_process(config: ModelConfig, inputs: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What `computed_by_one_process` gives, computed once."""
    key = repr(config), inputs, dtype
    if key not in KNOWN:
        KNOWN[key] = computed_by_one_process(config, inputs, dtype)
    return dict(KNOWN[key])


def computed_by_one_process(config: ModelConfig, inputs: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The loss and gradients of the whole batch, by the definition of the loss: a mean over all valid targets."""
    model = build(config, seed=0).to(dtype)
    mask = KeyIntervals.documents(inputs.document_start)
    losses = model(inputs.tokens, inputs.positions, mask, inputs.targets)
    loss = losses.sum() / (inputs.targets != IGNORE).sum()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_layout(
    rank: int, device_type: str, model: ModelConfig, parallel: ParallelConfig, inputs: Batch, accumulation=1, broken="",
    unit_bytes=1,
):  # fmt: skip
    """This layout's loss and gradients, as the trainer computes them, gathered whole: float32, on GPUs bfloat16.

    unit_bytes: of blocks that FSDP gathers together; 1: each block by itself, as large ones are.
    """
    world_size = torch.distributed.get_world_size()
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    mesh = make_mesh(parallel, world_size, device_type)
    config = Config(model=model, parallel=parallel)
    config.precision.compute = ComputeDtype.float32 if device_type == "cpu" else ComputeDtype.bfloat16
    with mock.patch.object(plan, "UNIT_BYTES", unit_bytes):
        parallel_model, _ = parallelize(config, mesh, world_size, device)
    with torch.no_grad():  # a GPU's generator draws other numbers than the CPU's, with which the results are compared
        for name, p in parallel_model.named_parameters():
            whole = initial_value(name, p, model, 0, torch.device("cpu")).to(device)
            p.to_local().copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local())
    split = zigzag(LENGTH, mesh.size("context"))
    if broken == "dropped hop":
        within = key_exchange._within
        key_exchange._within = lambda run, ranges: [] if run.owner == 1 else within(run, ranges)
    weight = token_weight(float((inputs.targets != IGNORE).sum()), device)
    if broken == "targets shifted after sharding":
        inputs = inputs._replace(targets=inputs.targets.roll(1, dims=1))
    micro_batch = BATCH // mesh.readers // accumulation
    total = torch.zeros((), device=device)
    for part in range(accumulation):
        first = (part * mesh.readers + mesh.reader) * micro_batch
        mine = Batch(*(x[first : first + micro_batch] for x in inputs))
        local = LocalBatch.of(mine, split, mesh, device)
        if broken == "shifted position":
            local = local._replace(positions=local.positions + mesh.rank("context"))
        if broken == "targets shifted after sharding":
            local = local._replace(targets=local.targets.roll(-1, dims=1))
        total += forward_backward(parallel_model, local, weight)
    results = {"loss": global_loss(total, mesh)}
    results |= {name: p.grad.full_tensor() for name, p in parallel_model.named_parameters() if p.grad is not None}
    return results if rank == 0 else None


def worst_ratio(
    model: ModelConfig, parallel: ParallelConfig, ranks: int, inputs: Batch, accumulation=1, broken="", unit_bytes=1
) -> tuple[float, str]:
    """Largest error against float64, per tensor, as a multiple of one process's; and the tensor's name."""
    truth = one_process(model, inputs, torch.float64)
    single = one_process(model, inputs, torch.float32), one_process(model, in_reverse(inputs), torch.float32)
    run = run_on_new_ranks if broken else run_on_ranks
    layout = run(ranks, on_layout, "cpu", model, parallel, inputs, accumulation, broken, unit_bytes)[0]
    return compare(layout, single, truth)


@cache
def in_reverse(inputs: Batch) -> Batch:
    """The same sequences from the last on: what is summed over them is summed in another order."""
    return Batch(*(x.flip(0) for x in inputs))


def compare(layout, singles, truth) -> tuple[float, str]:
    """Largest error against `truth` as a multiple of one process's, and where; at least a unit in the last place.

    One process's is the larger of `singles`, whose sums have other orders: of a gradient of few numbers one alone may
    be right by chance.
    """
    assert set(layout) == set(truth), set(layout) ^ set(truth)
    ratios = {}
    for name, true in truth.items():
        unit = 2.0**-23 * float(true.norm())
        error = float((layout[name].double() - true).norm())
        ratios[name] = error / max(*(float((single[name].double() - true).norm()) for single in singles), unit)
    return max((ratio, name) for name, ratio in ratios.items())


STRATEGIES = [Strategy.ring, Strategy.gather, Strategy.ulysses]
CONTEXT = [(ParallelConfig(context=n, strategy=s), n) for n in (2, 4) for s in STRATEGIES]
CONTEXT += [(ParallelConfig(context=4, strategy=Strategy.ulysses_ring, ulysses=2), 4)]


@pytest.mark.parametrize(("parallel", "ranks"), CONTEXT, ids=lambda x: getattr(x, "strategy", x))
@pytest.mark.parametrize("documents", [ONE_DOCUMENT, DOCUMENTS], ids=["one", "packed"])
def test_context_parallelism(parallel, ranks, documents):
    ratio, name = worst_ratio(GQA, parallel, ranks, make_inputs(documents))  # context 4 is larger than 2 K/V heads
    assert ratio < 1.5, (ratio, name)


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("blocks", [[1, 2, 2], [5]], ids=str)
def test_several_blocks_are_gathered_together(blocks, recompute):
    model, parallel = dataclasses.replace(GQA, layers=5), ParallelConfig(context=2, recompute=recompute)
    config = Config(model=model, precision=PrecisionConfig(compute=ComputeDtype.float32))
    unit_bytes = max(blocks) * 4 * (sum(plan.parameters(model)) - plan._root_parameters(model)) // 5
    with mock.patch.object(plan, "UNIT_BYTES", unit_bytes):
        assert [len(unit) for unit in plan.units_of_blocks(config)] == blocks
    ratio, name = worst_ratio(model, parallel, 2, make_inputs(DOCUMENTS), accumulation=2, unit_bytes=unit_bytes)
    assert ratio < 1.5, (ratio, name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_window_layers(strategy):
    ratio, name = worst_ratio(WINDOW, ParallelConfig(context=2, strategy=strategy), 2, make_inputs(DOCUMENTS))
    assert ratio < 1.5, (ratio, name)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        (strategy, ranks) if (strategy, ranks) in ((Strategy.ring, 2), (Strategy.ulysses, 2))
        else pytest.param(strategy, ranks, marks=pytest.mark.slow)
        for strategy in STRATEGIES for ranks in (2, 4)
    ],
)  # fmt: skip
def test_triton_kernels_under_context_parallelism(strategy, ranks):
    """The ring's kernels merge into one out and lse and add to one dq. Their products sum one term after the other."""
    plain = dataclasses.replace(GQA, layers=1)  # one layer proves what two do, in half of the interpreter's time
    inputs, triton = make_inputs(DOCUMENTS[::2]), dataclasses.replace(plain, attention=AttentionImplementation.triton)
    layout = run_on_ranks(ranks, on_layout, "cpu", triton, ParallelConfig(context=ranks, strategy=strategy), inputs)[0]
    ratio, name = compare(
        layout, [one_process(triton, inputs, torch.float32)], one_process(plain, inputs, torch.float64)
    )
    assert ratio < 1.5, (ratio, name)


FUSED_LAYOUTS = {
    "context 2": (ParallelConfig(context=2, strategy=Strategy.ulysses), 2),
    "tensor 2": (ParallelConfig(tensor=2), 2),
    "context 2 x tensor 2, recompute": (ParallelConfig(context=2, tensor=2, recompute=Recompute.full), 4),
}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3", "tensor 2"),
        pytest.param("qwen3", "context 2 x tensor 2, recompute", marks=pytest.mark.slow),
        pytest.param("qwen3", "context 2", marks=pytest.mark.slow),
        pytest.param("gpt2", "tensor 2", marks=pytest.mark.slow),
        pytest.param("gpt2", "context 2", marks=pytest.mark.slow),
        pytest.param("gpt2", "context 2 x tensor 2, recompute", marks=pytest.mark.slow),
    ],
)
def test_fused_ops_in_triton(name, layout):
    """Norms, rotary positions, SwiGLU and losses as kernels; under tensor parallelism on DTensors."""
    model = dataclasses.replace({"qwen3": QWEN, "gpt2": GPT2}[name], layers=1)
    (parallel, ranks), inputs = FUSED_LAYOUTS[layout], make_inputs(DOCUMENTS[2:3])
    triton = dataclasses.replace(model, fused_ops=FusedImplementation.triton)
    results = run_on_ranks(ranks, on_layout, "cpu", triton, parallel, inputs)[0]
    ratio, where = compare(
        results, [one_process(triton, inputs, torch.float32)], one_process(model, inputs, torch.float64)
    )
    assert ratio < 2, (ratio, where)  # of the eight numbers of a QK-norm, one process's error says little


LAYOUTS = {
    "shard 2": (ParallelConfig(), 2, 1),
    "replicate 2": (ParallelConfig(replicate=2), 2, 1),
    "replicate 2 x shard 2": (ParallelConfig(replicate=2), 4, 1),
    "tensor 2": (ParallelConfig(tensor=2), 2, 1),
    "shard 2 x context 2": (ParallelConfig(context=2), 4, 1),
    "context 2 x tensor 2": (ParallelConfig(context=2, tensor=2), 4, 1),
    "context 2 x tensor 2, gather": (ParallelConfig(context=2, tensor=2, strategy=Strategy.gather), 4, 1),
    "context 2 x tensor 2, ulysses": (ParallelConfig(context=2, tensor=2, strategy=Strategy.ulysses), 4, 1),
    "shard 2 x tensor 2": (ParallelConfig(tensor=2), 4, 1),
    "accumulation 2": (ParallelConfig(), 1, 2),
    "shard 2, accumulation 2": (ParallelConfig(), 2, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    parallel, ranks, accumulation = LAYOUTS[layout]
    ratio, name = worst_ratio(GQA, parallel, ranks, make_inputs(DOCUMENTS), accumulation)
    assert ratio < 1.5, (ratio, name)


@pytest.mark.parametrize("layout", ["replicate 2 x shard 2", "shard 2, accumulation 2"])
@pytest.mark.parametrize("model", [GQA, GPT2], ids=["rotary", "learned positions"])
def test_a_head_of_its_own(model, layout):
    """Embedding and head are units of their own; learned positions stay the root's."""
    parallel, ranks, accumulation = LAYOUTS[layout]
    model = dataclasses.replace(model, tied_embeddings=False)
    ratio, name = worst_ratio(model, parallel, ranks, make_inputs(DOCUMENTS), accumulation)
    assert ratio < 1.5, (ratio, name)


@pytest.mark.parametrize("model", [QWEN, GPT2], ids=["qwen3", "gpt2"])
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(context=2, tensor=2), ParallelConfig(context=4)], ids=["c2t2", "c4"]
)
def test_model_shapes(model, parallel):
    ratio, name = worst_ratio(model, parallel, 4, make_inputs(DOCUMENTS))
    assert ratio < 1.5, (ratio, name)


@pytest.mark.parametrize("recompute", [Recompute.attention_saved, Recompute.full])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recompute(recompute, strategy):
    parallel = ParallelConfig(context=2, strategy=strategy, recompute=recompute)
    ratio, name = worst_ratio(GQA, parallel, 2, make_inputs(DOCUMENTS))
    assert ratio < 1.5, (ratio, name)


@pytest.mark.parametrize(("recompute", "forward_passes"), [(Recompute.full, 4 + 2), (Recompute.attention_saved, 4)])
def test_recompute_by_layer(recompute, forward_passes):
    """Of two layers the last recomputes less: of attention in two steps only full recompute repeats the first's."""
    parallel = ParallelConfig(context=2, recompute=recompute, recompute_less_layers=1)
    ratio, name = worst_ratio(GQA, parallel, 2, make_inputs(DOCUMENTS))
    assert ratio < 1.5, (ratio, name)
    for (_, calls), _ in run_on_ranks(2, compiled, parallel, make_inputs(DOCUMENTS), GQA):
        assert calls == forward_passes


TILED = {
    "qwen3, ring, attention saved": (QWEN, ParallelConfig(context=2, strategy=Strategy.ring, tile=24), 2, 1),
    "gpt2, ulysses": (GPT2, ParallelConfig(context=2, strategy=Strategy.ulysses, tile=24), 2, 1),
    "windows, gather, offload": (
        WINDOW, ParallelConfig(context=2, strategy=Strategy.gather, tile=32, offload=2), 2, 1
    ),
    "shard 2, accumulation 2, offload alone": (GQA, ParallelConfig(offload=1), 2, 2),
    "replicate 2": (GQA, ParallelConfig(replicate=2, tile=128), 4, 1),
    "qwen3, ring, groups of heads": (
        QWEN, ParallelConfig(context=2, strategy=Strategy.ring, tile=24, head_groups=2), 2, 1
    ),
    "ulysses, groups of heads saved": (GQA, ParallelConfig(context=2, strategy=Strategy.ulysses, head_groups=2), 2, 1),
    "gather, groups of heads, accumulation 2, offload": (
        QWEN, ParallelConfig(context=2, strategy=Strategy.gather, head_groups=4, offload=1), 2, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", TILED)
def test_tiled_and_offloaded_blocks(layout):
    model, parallel, ranks, accumulation = TILED[layout]
    saves = "saved" in layout or "offload" in layout
    parallel = dataclasses.replace(parallel, recompute=Recompute.attention_saved if saves else Recompute.full)
    ratio, name = worst_ratio(model, parallel, ranks, make_inputs(DOCUMENTS), accumulation)
    assert ratio < 1.5, (ratio, name)


@pytest.mark.parametrize("broken", ["dropped hop", "shifted position", "targets shifted after sharding"])
def test_parity_notices(broken):
    ratio, _ = worst_ratio(GQA, ParallelConfig(context=2), 2, make_inputs(ONE_DOCUMENT), broken=broken)
    assert ratio > 1000, ratio


def compiled(_rank, parallel: ParallelConfig, inputs: Batch, model: ModelConfig):
    """Gradients without and with torch.compile, and how often attention ran forward in each."""
    results = []
    # the graphs without a C++ compiler, which a machine that runs the tests need not have
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    mesh = make_mesh(parallel, torch.distributed.get_world_size(), "cpu")
    for compile_blocks in (False, True):
        config = Config(model=model, parallel=dataclasses.replace(parallel, compile=compile_blocks))
        config.precision.compute = config.precision.compute.float32
        parallel_model, _ = parallelize(config, mesh, torch.distributed.get_world_size(), torch.device("cpu"))
        split = zigzag(LENGTH, mesh.size("context"))
        local = LocalBatch.of(inputs, split, mesh, torch.device("cpu"))
        calls = []
        original = passes.attention_forward
        passes.attention_forward = lambda *a, **k: calls.append(1) or original(*a, **k)  # noqa: B023
        forward_backward(parallel_model, local, token_weight(100, torch.device("cpu")))
        passes.attention_forward = original
        results.append(([p.grad.full_tensor() for p in parallel_model.parameters()], len(calls)))
    return results


@pytest.mark.parametrize(
    ("strategy", "recompute", "forwards"),
    [
        (Strategy.ring, Recompute.none, 4),  # where a block has to be one graph
        (Strategy.ring, Recompute.attention_saved, 4),
        pytest.param(Strategy.ring, Recompute.full, 8, marks=pytest.mark.slow),
        pytest.param(Strategy.gather, Recompute.attention_saved, 4, marks=pytest.mark.slow),
        pytest.param(Strategy.ulysses, Recompute.attention_saved, 4, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks(strategy, recompute, forwards):
    """The same gradients; and with `attention_saved` the two steps, or groups of heads, of the two layers run once."""
    parallel = ParallelConfig(context=2, strategy=strategy, recompute=recompute)
    for (plain, plain_calls), (fast, fast_calls) in run_on_ranks(2, compiled, parallel, make_inputs(DOCUMENTS), GQA):
        assert plain_calls == fast_calls == forwards
        for a, b in zip(plain, fast, strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(a.norm())


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_compiled_blocks_with_fused_ops(axis):
    """One graph a block, the kernels' custom ops and DTensors in it. The embedding's gradient was once lost there."""
    parallel = ParallelConfig(**{axis: 2})
    triton = dataclasses.replace(QWEN, layers=1, fused_ops=FusedImplementation.triton)
    for (plain, _), (fast, _) in run_on_ranks(2, compiled, parallel, make_inputs(DOCUMENTS), triton):
        for a, b in zip(plain, fast, strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(a.norm())


@pytest.mark.gpu(2)
@pytest.mark.parametrize("documents", [ONE_DOCUMENT, DOCUMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_context_parallelism_on_gpus(strategy, documents):
    """bfloat16 over NCCL: the error against float64 is at most 1.5 x one GPU's."""
    model = dataclasses.replace(GQA, width=64, head_dim=16)
    inputs = make_inputs(documents)
    truth = one_process(model, inputs, torch.float64)
    single = run_on_ranks(1, on_layout, "cuda", model, ParallelConfig(), inputs, device="cuda")[0]
    parallel = ParallelConfig(context=2, strategy=strategy)
    layout = run_on_ranks(2, on_layout, "cuda", model, parallel, inputs, device="cuda")[0]
    losses = [float(results.pop("loss")) for results in (layout, truth, single)]
    assert losses[0] == pytest.approx(losses[1], rel=2.0**-9)  # of one number, one process's error says little
    ratio, name = compare(layout, [single], truth)
    assert ratio < 1.5, (ratio, name)
