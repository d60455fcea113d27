"""The result does not depend on the layout: loss and every gradient against one process and against float64."""

from __future__ import annotations

import dataclasses
from functools import partialmethod
from typing import NamedTuple

import pytest
import torch
from distributed import run_on_ranks
from torch.distributed.tensor import distribute_tensor

from longctx.config import (
    Activation,
    AttentionImplementation,
    ComputeDtype,
    Config,
    FusedImplementation,
    ModelConfig,
    Norm,
    ParallelConfig,
    Positions,
    Recompute,
    Strategy,
)
from longctx.kernels.attention import interface
from longctx.model.transformer import build, initial_value
from longctx.parallel import exchange
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.parallel.sequence import zigzag
from longctx.parallel.strategy import choose_strategy

LENGTH, BATCH, VOCAB = 64, 4, 97
IGNORE = -100

GQA = ModelConfig(vocab_size=VOCAB, layers=2, width=48, heads=4, kv_heads=2, head_dim=12, mlp_width=80)
WINDOW = dataclasses.replace(GQA, layers=3, window=11, full_attention_every=3)
QWEN = dataclasses.replace(GQA, qk_norm=True, tied_embeddings=False, heads=8, kv_heads=4, head_dim=8)
GPT2 = dataclasses.replace(
    GQA, kv_heads=4, norm=Norm.layer_norm, activation=Activation.gelu, positions=Positions.learned,
    max_positions=LENGTH, qkv_bias=True, projection_bias=True, logit_softcap=5.0,
)  # fmt: skip


class Inputs(NamedTuple):
    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    document_start: torch.Tensor


def make_inputs(document_starts: tuple[tuple[int, ...], ...]) -> Inputs:
    """One sequence for each tuple of the indices where its documents begin."""
    generator = torch.Generator().manual_seed(1)
    batch = len(document_starts)
    stream = torch.randint(VOCAB, (batch, LENGTH + 1), generator=generator)
    targets = stream[:, 1:].clone()
    start = torch.zeros(batch, LENGTH, dtype=torch.int64)
    for row, begins in enumerate(document_starts):
        for begin in begins:
            start[row, begin:] = begin
            if begin:
                targets[row, begin - 1] = IGNORE
    return Inputs(stream[:, :-1], targets, torch.arange(LENGTH) - start, start)


# Shard borders lie at multiples of 16 (context 2) and 8 (context 4).
ONE_DOCUMENT = ((0,), (0,), (0,), (0,))
DOCUMENTS = (
    (0, 13, 32, 33, 50),  # inside a shard, at a border, one token long, over a border
    (0, 16, 48),  # all at borders of chunks
    (0, 31, 34, 63),  # one of three tokens: shorter than 4 ranks and over a border
    (0, 7, 8, 9, 10, 40),
)


def loss_and_gradients(model, inputs: Inputs, mask, denominator) -> dict[str, torch.Tensor]:
    token_weight = (1 / denominator).to(inputs.tokens.device, next(model.parameters()).dtype)
    loss = model(inputs.tokens, inputs.positions, mask, inputs.targets, token_weight)
    loss.backward()
    return {"loss": loss.detach()}


def one_process(config: ModelConfig, inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = build(config, seed=0).to(dtype)
    valid = (inputs.targets != IGNORE).sum()
    results = loss_and_gradients(
        model, inputs, zigzag(LENGTH, 1).mask(inputs.document_start, torch.device("cpu")), valid
    )
    return results | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_layout(
    rank: int, device_type: str, model: ModelConfig, parallel: ParallelConfig, inputs: Inputs, accumulation=1, broken=""
):
    """This layout's loss and gradients, as the trainer computes them, gathered whole: float32, on GPUs bfloat16."""
    world_size = torch.distributed.get_world_size()
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    mesh = make_mesh(parallel, world_size, device_type)
    config = Config(model=model, parallel=parallel)
    config.precision.compute = ComputeDtype.float32 if device_type == "cpu" else ComputeDtype.bfloat16
    parallel_model = parallelize(config, mesh, choose_strategy(config, world_size), device)
    with torch.no_grad():  # a GPU's generator draws other numbers than the CPU's, with which the results are compared
        for name, p in parallel_model.named_parameters():
            whole = initial_value(name, p, model, 0, torch.device("cpu")).to(device)
            p.to_local().copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local())
    context_rank, split = mesh.rank("context"), zigzag(LENGTH, mesh.size("context"))
    if broken == "dropped hop":
        within = exchange._within
        exchange._within = lambda run, ranges: [] if run.owner == 1 else within(run, ranges)
    valid = (inputs.targets != IGNORE).sum()
    if broken == "targets shifted after sharding":
        inputs = inputs._replace(targets=inputs.targets.roll(1, dims=1))
    micro_batch = BATCH // mesh.readers // accumulation
    total = torch.zeros((), device=device)
    for part in range(accumulation):
        first = (part * mesh.readers + mesh.reader) * micro_batch
        mine = Inputs(*(x[first : first + micro_batch] for x in inputs))
        mask = split.mask(mine.document_start, device)
        local = Inputs(*(split.shard(x, context_rank).to(device) for x in mine))
        if broken == "shifted position":
            local = local._replace(positions=local.positions + context_rank)
        if broken == "targets shifted after sharding":
            local = local._replace(targets=local.targets.roll(-1, dims=1))
        total += loss_and_gradients(parallel_model, local, mask, valid)["loss"]
    torch.distributed.all_reduce(total)
    results = {"loss": total / mesh.size("tensor")}
    results |= {name: p.grad.full_tensor() for name, p in parallel_model.named_parameters() if p.grad is not None}
    return results if rank == 0 else None


def worst_ratio(model: ModelConfig, parallel: ParallelConfig, ranks: int, inputs: Inputs, accumulation=1, broken=""):
    """Largest error against float64, per tensor, as a multiple of one process's; and the tensor's name."""
    truth = one_process(model, inputs, torch.float64)
    single = one_process(model, inputs, torch.float32)
    layout = run_on_ranks(ranks, on_layout, "cpu", model, parallel, inputs, accumulation, broken)[0]
    return compare(layout, single, truth)


def compare(layout, single, truth) -> tuple[float, str]:
    """Largest error against `truth` as a multiple of one process's, and where; at least a unit in the last place."""
    assert set(layout) == set(truth), set(layout) ^ set(truth)
    ratios = {}
    for name, true in truth.items():
        unit = 2.0**-23 * float(true.norm())
        error = float((layout[name].double() - true).norm())
        ratios[name] = error / max(float((single[name].double() - true).norm()), unit)
    return max((ratio, name) for name, ratio in ratios.items())


STRATEGIES = [Strategy.ring, Strategy.gather, Strategy.ulysses]
CONTEXT = [(ParallelConfig(context=n, strategy=s), n) for n in (2, 4) for s in STRATEGIES]
CONTEXT += [(ParallelConfig(context=4, strategy=Strategy.ulysses_ring, ulysses=2), 4)]


@pytest.mark.parametrize(("parallel", "ranks"), CONTEXT, ids=lambda x: getattr(x, "strategy", x))
@pytest.mark.parametrize("documents", [ONE_DOCUMENT, DOCUMENTS], ids=["one", "packed"])
def test_context_parallelism(parallel, ranks, documents):
    ratio, name = worst_ratio(GQA, parallel, ranks, make_inputs(documents))  # context 4 is larger than 2 K/V heads
    assert ratio < 1.5, (ratio, name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_window_layers(strategy):
    ratio, name = worst_ratio(WINDOW, ParallelConfig(context=2, strategy=strategy), 2, make_inputs(DOCUMENTS))
    assert ratio < 1.5, (ratio, name)


@pytest.mark.interpreter
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_triton_kernels_under_context_parallelism(strategy, ranks):
    """The ring's kernels merge into one out and lse and add to one dq. Their products sum one term after the other."""
    inputs, triton = make_inputs(DOCUMENTS), dataclasses.replace(GQA, attention=AttentionImplementation.triton)
    layout = run_on_ranks(ranks, on_layout, "cpu", triton, ParallelConfig(context=ranks, strategy=strategy), inputs)[0]
    ratio, name = compare(layout, one_process(triton, inputs, torch.float32), one_process(GQA, inputs, torch.float64))
    assert ratio < 1.5, (ratio, name)


FUSED_LAYOUTS = {
    "context 2": (ParallelConfig(context=2, strategy=Strategy.ulysses), 2),
    "tensor 2": (ParallelConfig(tensor=2), 2),
    "context 2 x tensor 2, recompute": (ParallelConfig(context=2, tensor=2, recompute=Recompute.full), 4),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", FUSED_LAYOUTS)
@pytest.mark.parametrize("model", [QWEN, GPT2], ids=["qwen3", "gpt2"])
def test_fused_ops_in_triton(model, layout):
    """Norms, rotary positions, SwiGLU and losses as kernels; under tensor parallelism on DTensors."""
    (parallel, ranks), inputs = FUSED_LAYOUTS[layout], make_inputs(DOCUMENTS)
    triton = dataclasses.replace(model, fused_ops=FusedImplementation.triton)
    results = run_on_ranks(ranks, on_layout, "cpu", triton, parallel, inputs)[0]
    ratio, name = compare(
        results, one_process(triton, inputs, torch.float32), one_process(model, inputs, torch.float64)
    )
    assert ratio < 2, (ratio, name)  # of the eight numbers of a QK-norm, one process's error says little


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


@pytest.mark.parametrize("broken", ["dropped hop", "shifted position", "targets shifted after sharding"])
def test_parity_notices(broken):
    ratio, _ = worst_ratio(GQA, ParallelConfig(context=2), 2, make_inputs(ONE_DOCUMENT), broken=broken)
    assert ratio > 1000, ratio


def compiled(_rank, parallel: ParallelConfig, inputs: Inputs, model: ModelConfig):
    """Gradients without and with torch.compile, and how often attention ran forward in each."""
    results = []
    # the graphs without a C++ compiler, which a machine that runs the tests need not have
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    mesh = make_mesh(parallel, torch.distributed.get_world_size(), "cpu")
    for compile_blocks in (False, True):
        config = Config(model=model, parallel=dataclasses.replace(parallel, compile=compile_blocks))
        config.precision.compute = config.precision.compute.float32
        chosen = choose_strategy(config, torch.distributed.get_world_size())
        parallel_model = parallelize(config, mesh, chosen, torch.device("cpu"))
        split = zigzag(LENGTH, mesh.size("context"))
        local = Inputs(*(split.shard(x, mesh.rank("context")) for x in inputs))
        calls = []
        original = interface.forward
        interface.forward = lambda *a, **k: calls.append(1) or original(*a, **k)  # noqa: B023
        loss_and_gradients(
            parallel_model, local, split.mask(inputs.document_start, torch.device("cpu")), torch.tensor(100)
        )
        interface.forward = original
        results.append(([p.grad.full_tensor() for p in parallel_model.parameters()], len(calls)))
    return results


@pytest.mark.parametrize(
    ("strategy", "recompute", "forwards"),
    [
        (Strategy.ring, Recompute.none, 4),
        (Strategy.ring, Recompute.attention_saved, 4),
        (Strategy.ring, Recompute.full, 8),
        (Strategy.gather, Recompute.attention_saved, 4),
        (Strategy.ulysses, Recompute.attention_saved, 4),
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
@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(context=2)], ids=["tensor", "context"])
def test_compiled_blocks_with_fused_ops(parallel):
    """One graph a block, the kernels' custom ops and DTensors in it. The embedding's gradient was once lost there."""
    triton = dataclasses.replace(QWEN, fused_ops=FusedImplementation.triton)
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
    ratio, name = compare(layout, single, truth)
    assert ratio < 1.5, (ratio, name)
