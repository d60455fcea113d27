"""A run from start to end: what it writes, how it resumes; what goes wrong is in test_faults.py."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import re
import subprocess
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from corpora import find_pieces
from longctx import trainer as trainer_module
from longctx.config import (
    AttentionImplementation,
    ComputeDtype,
    DataSource,
    FusedImplementation,
    ModelConfig,
    Optimizer,
    ParallelConfig,
    Recompute,
    Strategy,
)
from longctx.data.loader import Loader
from longctx.data.packing import IGNORE_INDEX
from longctx.data.prepare import prepare
from longctx.errors import UserError
from longctx.machine import this_machine
from longctx.metrics_file import read_metrics
from ranks import run_on_ranks
from runs import ROOT, TORCHRUN, losses_of, small_config, train, trainer_of


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": AttentionImplementation.triton}, r"model.attention=triton: .*cannot serve this call"),
        ({"fused_ops": FusedImplementation.triton}, r"model.fused_ops=triton: .*interpreter computes bfloat16 wrong"),
    ],
)
def test_an_implementation_that_cannot_serve_is_refused_at_the_start(tmp_path, corpus, change, message):
    config = small_config(tmp_path, corpus)
    config.model = dataclasses.replace(config.model, **change)
    config.precision.compute = ComputeDtype.bfloat16
    with pytest.raises(UserError, match=message), trainer_of(config):
        pass


@pytest.mark.interpreter
def test_training_on_fused_ops(tmp_path, corpus):
    """The same losses as with the reference, step by step."""
    losses = []
    for implementation in (FusedImplementation.reference, FusedImplementation.triton):
        config = small_config(
            tmp_path, corpus, name=str(implementation), model__fused_ops=implementation, model__layers=1,
            data__sequences_per_step=2,
        )  # fmt: skip
        losses.append(losses_of(config, 3))
    assert losses[0][0] - losses[0][2] > 0.02
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_whole_run(tmp_path, corpus, capsys):
    config = small_config(
        tmp_path, corpus, validation__every_steps=4, checkpoint__every_steps=4, validation__sample_tokens=5,
        logging__peak_tflops=1.0, logging__trace_step=6,
    )  # fmt: skip
    train(config, ["recipe=gpt_tiny", "optim.lr=3e-3"])
    out = capsys.readouterr().out
    assert "step 8/8  loss " in out
    assert out.count("--- sample ---\n") == 3
    assert f"report: {tmp_path}/test/report.html" in out
    assert "python train.py recipe=gpt_tiny optim.lr=3e-3 name=test optim.steps=16" in out

    rows = read_metrics(tmp_path / "test" / "metrics.jsonl")
    steps = [row for row in rows if "loss/train" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[-1]["loss/train"] < steps[0]["loss/train"] - 0.3
    assert steps[-1]["data/tokens"] == 8 * 4 * 64
    assert {
        "optim/lr", "optim/grad_norm", "optim/skipped_steps", "perf/tokens_per_s", "perf/tokens_per_s_per_gpu",
        "perf/step_s", "perf/tflops_per_gpu", "perf/mfu", "perf/mfu_palm", "time/data_s", "time/checkpoint_stall_s",
        "data/documents_per_sequence", "mem/peak_alloc_gib", "data/attention_imbalance",
    } <= set(steps[-1])  # fmt: skip
    assert steps[-1]["data/documents_per_sequence"] > 1
    validations = [row for row in rows if "loss/val" in row]
    assert [row["step"] for row in validations] == [4, 8]
    assert "loss/val_bits_per_byte" in validations[0]
    assert {"loss/pos/1", "loss/pos/16", "recall/32"} <= set(validations[0])
    report = (tmp_path / "test" / "report.html").read_text()
    assert report.count("<svg") == 11
    assert "_backward" in (tmp_path / "test" / "trace_step_6.txt").read_text()
    assert json.loads(gzip.decompress((tmp_path / "test" / "trace_step_6.json.gz").read_bytes()))["traceEvents"]
    assert not re.search(r'(src|href)="https?:', report.replace("xlink:href", ""))  # nothing is fetched
    assert {p.name for p in (tmp_path / "test" / "checkpoints").iterdir()} == {"step_4", "step_8", "latest", "best"}


def run_steps(_rank, config, steps):
    return losses_of(config, steps)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses_ring", "auto", "ring", "gather", "ulysses"])
def test_the_same_curve_in_every_layout(tmp_path, corpus, strategy):
    config, context = small_config(tmp_path / "one", corpus), ParallelConfig(context=2, strategy=Strategy(strategy))
    single = run_on_ranks(1, run_steps, config, 8)[0]
    for parallel, ranks in (
        (context, 2),
        (ParallelConfig(), 2),
        (context, 4),
    ):
        config = dataclasses.replace(config, folder=str(tmp_path / f"{ranks}{parallel.context}"), parallel=parallel)
        losses = run_on_ranks(ranks, run_steps, config, 8)
        assert losses[0] == losses[-1]
        assert losses[0] == pytest.approx(single, rel=1e-5)


def test_the_loss_is_over_trained_tokens_in_every_layout(tmp_path):
    """Of prompts and completions of all lengths, so that shares and micro-batches have other numbers of targets."""
    records = [{"prompt": f"f({n}) " * (1 + n * 7 % 23), "completion": f" {n} " * (1 + n % 11)} for n in range(400)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(find_pieces([tmp_path / "pairs.jsonl"]), tmp_path / "pairs", validation_fraction=0.1)
    config = small_config(tmp_path / "one", tmp_path / "pairs")
    single = run_on_ranks(1, run_steps, config, 4)[0]
    for name, parallel, ranks, micro_batch in (
        ("shard", ParallelConfig(), 2, 1),
        ("context", ParallelConfig(context=2), 2, 1),
        ("accumulation", ParallelConfig(), 1, 4),
    ):
        data = dataclasses.replace(config.data, sequences_per_micro_batch=micro_batch)
        other = dataclasses.replace(config, folder=str(tmp_path / name), parallel=parallel, data=data)
        assert run_on_ranks(ranks, run_steps, other, 4)[0] == pytest.approx(single, rel=1e-5)


def run_and_save(_rank, config, steps):
    with trainer_of(config) as trainer:
        losses = [trainer.train_step()[0]["loss/train"] for _ in range(steps)]
        trainer.save()
        return losses


def test_a_step_without_a_target_has_no_loss(tmp_path, corpus, capsys):
    """0 would be the best loss of the run, in its line, its report and its summary."""
    config = small_config(tmp_path, corpus, optim__steps=3)
    read = Loader.step

    def without_targets(loader, consumed, *others):
        batches = read(loader, consumed, *others)
        if consumed == config.data.sequences_per_step:
            for batch in batches:
                batch.targets.fill_(IGNORE_INDEX)
        return batches

    with mock.patch.object(Loader, "step", without_targets):
        train(config)
    losses = [row["loss/train"] for row in read_metrics(config.run_folder / "metrics.jsonl") if "loss/train" in row]
    assert [math.isnan(loss) for loss in losses] == [False, True, False]
    assert min(losses[0], losses[2]) > 1
    printed = capsys.readouterr().out
    assert "step 2/3  loss nan  norm 0.000" in printed
    assert "skipped" not in printed


OFFLOADED = {"tile": 24, "recompute": Recompute.attention_saved, "offload": 1, "offload_optimizer": True}


@pytest.mark.parametrize(
    ("optimizer", "context", "changes"),
    [
        (Optimizer.adamw, 1, {}),
        (Optimizer.muon, 2, {}),
        pytest.param(Optimizer.adamw, 2, OFFLOADED, marks=pytest.mark.slow),
        pytest.param(Optimizer.muon, 1, {}, marks=pytest.mark.slow),
        pytest.param(Optimizer.adamw, 2, {}, marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_equal(tmp_path, corpus, optimizer, context, changes):
    """And what is offloaded before and after is as if it were not in the run that is whole."""
    here = changes | ({"offload": 0, "offload_optimizer": False} if changes else {})
    parallel, ranks = ParallelConfig(context=context, **here), context
    config = small_config(tmp_path / "whole", corpus, optim__steps=12, optim__optimizer=optimizer, parallel=parallel)
    whole = run_on_ranks(ranks, run_steps, config, 12)[0]
    parallel = ParallelConfig(context=context, **changes)
    config = dataclasses.replace(config, folder=str(tmp_path / "parts"), parallel=parallel)
    first = run_on_ranks(ranks, run_and_save, config, 5)[0]
    second = run_on_ranks(ranks, run_steps, config, 7)[0]
    assert first + second == whole


def verifications(_rank, config) -> tuple[int, float]:
    """How often a run has compared split and whole sequences, and how long it then waited for others, in seconds."""
    calls = []
    original = trainer_module.verify_layout
    trainer_module.verify_layout = lambda *arguments: calls.append(1) or original(*arguments)
    with trainer_of(config) as trainer:
        waited_s = trainer.train_step()[0]["time/context_exposed_s"]
        trainer.save()
        return len(calls), waited_s


def step_with_a_slow_rank(rank: int, config) -> dict[str, float]:
    """The numbers of a step in which rank 1 takes 0.3 s longer for its first block."""
    with trainer_of(config) as trainer:
        trainer.train_step()  # starts what starts once
        if rank == 1:
            trainer.model.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
        return trainer.train_step()[0]


def test_a_slow_rank_is_seen(tmp_path, corpus):
    config = small_config(tmp_path, corpus, parallel=ParallelConfig(shard=2))
    waiting, slow = run_on_ranks(2, step_with_a_slow_rank, config)
    assert waiting["time/fsdp_exposed_s"] > 0.2  # for the parameters of the second block
    assert slow["time/fsdp_exposed_s"] < 0.1
    assert waiting["perf/slowest_over_fastest"] == slow["perf/slowest_over_fastest"] > 2


def test_a_layout_is_verified_once(tmp_path, corpus):
    parallel = ParallelConfig(context=2, strategy=Strategy.ring)
    for changed, attention, expected in (
        (parallel, "auto", 1),
        (parallel, "auto", 0),  # resumed
        (parallel, "reference", 1),  # by other kernels
        (dataclasses.replace(parallel, strategy=Strategy.ulysses), "reference", 1),
        (dataclasses.replace(parallel, verify=False), "auto", 0),
    ):
        config = small_config(tmp_path, corpus, parallel=changed, model__attention=AttentionImplementation(attention))
        for calls, waited_s in run_on_ranks(2, verifications, config):
            assert calls == expected
            assert 0 < waited_s < 30


def step_of_replicas(rank: int, config, norm: float | None) -> tuple[float, float, int]:
    """Loss and skipped steps of two steps, in the second of which rank 1 has another norm; sums of whole gradients."""
    reduced, all_reduce = [], torch.distributed.all_reduce

    def counted(tensor, *arguments, **named):
        reduced.append(tensor.numel())
        return all_reduce(tensor, *arguments, **named)

    with trainer_of(config) as trainer, mock.patch.object(torch.distributed, "all_reduce", counted):
        trainer.train_step()
        if norm is not None and rank == 1:
            with mock.patch.object(trainer_module, "global_norm", return_value=torch.tensor(norm)):
                values, _ = trainer.train_step()
        else:
            values, _ = trainer.train_step()
        return values["loss/train"], trainer.progress.skipped, sum(n > 500 for n in reduced)


def test_gradients_cross_between_replicas_once_a_step(tmp_path, corpus):
    """However many micro-batches it has: between machines nothing else is sent."""
    parallel, found = ParallelConfig(replicate=2, shard=1), []
    for micro_batch in (4, 1):
        config = small_config(
            tmp_path / str(micro_batch), corpus, parallel=parallel, data__sequences_per_step=8,
            data__sequences_per_micro_batch=micro_batch,
        )  # fmt: skip
        (loss, _, sums), other = run_on_ranks(2, step_of_replicas, config, None)
        assert other == (loss, 0, sums)
        found.append((loss, sums))
    (loss, sums), (loss_of_four, sums_of_four) = found
    assert sums == sums_of_four > 0
    assert loss_of_four == pytest.approx(loss, rel=1e-6)


def test_replicas_skip_a_step_together(tmp_path, corpus):
    """Where one alone has a norm that is not finite, as a GPU that fails can have after gradients were summed."""
    config = small_config(tmp_path, corpus, parallel=ParallelConfig(replicate=2, shard=1))
    assert [skipped for _, skipped, _ in run_on_ranks(2, step_of_replicas, config, math.nan)] == [1, 1]


def test_replicas_that_have_drifted_apart_end_the_run(tmp_path, corpus):
    config = small_config(tmp_path, corpus, parallel=ParallelConfig(replicate=2, shard=1))
    for message in run_on_ranks(2, said_by_replicas, config):
        assert re.search(r"step 2: the norm of the gradient is .* on one rank and 1000 on another.*drifted", message)


def said_by_replicas(rank: int, config) -> str:
    with pytest.raises(UserError) as caught:
        step_of_replicas(rank, config, 1e3)
    return str(caught.value)


def validate_and_save(_rank, config):
    """The float32 masters before, and the checkpoint written right after a validation."""
    with trainer_of(config) as trainer:
        trainer.train_step()
        masters = {f"model.{n}": p.detach().full_tensor().clone() for n, p in trainer.parameters.items()}
        trainer.validate()
        trainer.save()
        manifest = trainer.saving.checkpoints.verify(trainer.saving.checkpoints.committed()[-1])
        return masters, manifest["tensors"]


def test_a_checkpoint_after_a_validation_holds_the_float32_masters(tmp_path, corpus):
    """Without a backward pass the model's own parameters are left as the gathered bfloat16 copies."""
    config = small_config(tmp_path, corpus, precision__compute=ComputeDtype.bfloat16)
    masters, kinds = run_on_ranks(2, validate_and_save, config)[0]
    assert {kind.split()[0] for kind in kinds.values()} == {"float32"}
    folder = tmp_path / "test" / "checkpoints" / "step_1"
    saved = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
    weight = torch.cat([file.get_tensor("model.embedding.weight") for file in saved])
    assert torch.equal(weight, masters["model.embedding.weight"])


def test_another_order_of_sequences_is_refused(tmp_path, corpus):
    train(small_config(tmp_path, corpus, optim__steps=1))
    with pytest.raises(
        UserError, match=r"seed was 0, is 1; data.sequence_length was 64, is 32\. Some would be read twice"
    ):
        train(small_config(tmp_path, corpus, optim__steps=2, seed=1, data__sequence_length=32))


def test_a_branch_goes_on_with_its_own_checkpoints(tmp_path, corpus):
    train(small_config(tmp_path, corpus, optim__steps=4, checkpoint__every_steps=2))
    start = tmp_path / "test" / "checkpoints" / "step_2"
    branch = small_config(tmp_path, corpus, name="branch", optim__steps=3, seed=5, checkpoint__resume=str(start))
    with trainer_of(branch) as trainer:
        assert trainer.step == 2
        trainer.run()
    branch.optim.steps = 5
    with trainer_of(branch) as trainer:  # as a restart does it, with the same words
        assert trainer.step == 3
    branch.checkpoint.resume = os.path.relpath(start) + "/"  # or with others for the same place
    with trainer_of(branch) as trainer:
        assert trainer.step == 3
    (tmp_path / "link").symlink_to(tmp_path / "test")
    branch.checkpoint.resume, branch.optim.steps = "auto", 4  # the command that a run prints
    train(branch)
    branch.checkpoint.resume, branch.optim.steps = str(tmp_path / "link" / "checkpoints" / "step_2"), 5
    with trainer_of(branch) as trainer:
        assert trainer.step == 4
    branch.checkpoint.resume = str(start.parent / "step_4")
    with pytest.raises(UserError, match=r"branch/checkpoints has checkpoints of a run that began at .*step_2, not at"):
        train(branch)
    assert (tmp_path / "branch" / "checkpoints" / "step_3").is_dir()

    again = small_config(tmp_path, corpus, optim__steps=3, checkpoint__resume=str(start))
    train(again)  # in the same folder: step 4 was another future
    names = sorted(p.name for p in start.parent.iterdir())
    assert [n.rsplit("_", 1)[0] for n in names if n.startswith("abandoned")] == ["abandoned_step_4"]
    assert {"step_2", "step_3"} <= set(names)


def test_a_branch_reads_another_order_from_its_beginning(tmp_path, corpus):
    """Its tokens are those of all the steps, each at its length; with the same order it goes on where it was."""
    first = small_config(tmp_path, corpus, optim__steps=2)
    train(first)
    read = 2 * first.data.sequences_per_step
    start = str(tmp_path / "test" / "checkpoints" / "step_2")
    shorter = {"name": "shorter", "data__sequence_length": 32}
    for changed, consumed in ({"name": "same"}, read), (shorter, 0):
        branch = small_config(tmp_path, corpus, optim__steps=3, checkpoint__resume=start, **changed)
        with trainer_of(branch) as trainer:
            assert (trainer.progress.consumed, trainer.progress.tokens) == (consumed, read * 64)
            trainer.run()
            tokens = trainer.progress.tokens
            assert tokens == read * 64 + first.data.sequences_per_step * branch.data.sequence_length
        with trainer_of(branch) as trainer:  # started again
            assert trainer.progress.consumed == consumed + first.data.sequences_per_step
            assert trainer.progress.tokens == tokens


def sequences_and_losses(rank, config, steps):
    """Numbers of the sequences that this rank reads in each step, and the loss; saved at the end."""
    with trainer_of(config) as trainer:
        read: list[int] = []
        source = trainer.loader.source
        trainer.loader.source = SimpleNamespace(
            sequence=lambda number, span: read.append(number) or source.sequence(number)
        )
        found = []
        for _ in range(steps):
            read.clear()
            loss = trainer.train_step()[0]["loss/train"]
            found.append((trainer.mesh.reader, tuple(read), loss))
        trainer.save()
        return found


@pytest.mark.slow
def test_another_layout_after_each_resume(tmp_path, corpus):
    """shard 4, then shard 2 x context 2, then context 4, then one process: the same sequences, and the same losses."""
    config = small_config(tmp_path / "whole", corpus, optim__steps=12)
    whole = run_on_ranks(1, sequences_and_losses, config, 12)[0]
    config = dataclasses.replace(config, folder=str(tmp_path / "parts"))
    losses, numbers = [], []
    for parallel, ranks in (
        (ParallelConfig(), 4),
        (ParallelConfig(context=2), 4),
        (ParallelConfig(context=4), 4),
        (ParallelConfig(), 1),
    ):
        config.parallel = parallel
        of_ranks = run_on_ranks(ranks, sequences_and_losses, config, 3)
        for step in zip(*of_ranks, strict=True):
            assert len({loss for _, _, loss in step}) == 1
            losses.append(step[0][2])
            readers = {reader: read for reader, read, _ in step}  # ranks of a context axis read the same
            assert all(readers[reader] == read for reader, read, _ in step)
            numbers.append(sorted(number for read in readers.values() for number in read))
    assert numbers == [list(range(4 * step, 4 * step + 4)) for step in range(12)]
    assert numbers == [sorted(read) for _, read, _ in whole]
    assert losses == pytest.approx([loss for *_, loss in whole], rel=1e-6)


def test_metrics_of_steps_taken_again_are_dropped(tmp_path, corpus):
    config = small_config(tmp_path, corpus, optim__steps=3)
    train(config)
    path = tmp_path / "test" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 9, "loss/train": 1}\n{"step": 4, "loss/tr')
    config.optim.steps = 5
    train(config)
    assert [r["step"] for r in read_metrics(path) if "loss/train" in r] == [1, 2, 3, 4, 5]


def test_restarts_and_what_they_cost(tmp_path, corpus):
    config = small_config(tmp_path, corpus, optim__steps=3)
    train(config)
    path = tmp_path / "test" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "loss/train": 1}\n')  # then it was killed
    first = read_metrics(path)[2]
    assert (first["run/restarts"], first["run/lost_steps"]) == (0, 0)
    config.optim.steps = 4
    started_at = json.loads((tmp_path / "test" / "history.json").read_text())["started_at"]
    train(config)
    last = [r for r in read_metrics(path) if "loss/train" in r][-1]
    trained = sum(r["perf/step_s"] for r in read_metrics(path) if "perf/step_s" in r)
    assert (last["run/restarts"], last["run/lost_steps"]) == (1, 2)
    assert trained / (time.time() - started_at) <= last["run/ettr"] < 1
    work = sum(r["perf/tflops_per_gpu"] * r["perf/step_s"] for r in read_metrics(path) if "perf/step_s" in r) / 1000
    assert (last["run/device_s"], last["run/pflop"]) == pytest.approx((trained, work))


@pytest.mark.slow
def test_two_jobs_of_one_multirun(tmp_path, corpus):
    """`torchrun train.py -m`: the process group is made once and serves both jobs."""
    words = [
        "recipe=gpt_tiny", "name=a,b", f"folder={tmp_path}", "data=prepared",
        f"data.folder={corpus}", "logging=no_wandb", "data.sequence_length=64", "optim.steps=2",
        "validation.sample_tokens=0", "model.width=32", "logging.every_steps=1",
    ]  # fmt: skip
    result = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "2", "train.py", "-m", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("a", "b"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows if "loss/train" in r] == [1, 2]
    assert not {"outputs", "multirun", "multirun.yaml", "train.log"} & {p.name for p in ROOT.iterdir()}


@pytest.mark.slow
def test_recall_loss_falls_with_context(tmp_path):
    """A key's first value costs log(values) nats; a model that uses its context pays less at later positions."""
    config = small_config(
        tmp_path, tmp_path, data__source=DataSource.recall, data__folder="", data__sequence_length=128,
        data__sequences_per_step=16, data__sequences_per_micro_batch=16, validation__sequences=32,
        data__recall__keys=4, data__recall__values=16,
        model=ModelConfig(vocab_size=20, layers=2, width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=128),
        optim__steps=240, optim__lr=1e-2, optim__optimizer=Optimizer.muon, logging__every_steps=50,
    )  # fmt: skip
    train(config)
    last = [r for r in read_metrics(tmp_path / "test" / "metrics.jsonl") if "loss/val" in r][-1]
    assert last["loss/pos/1"] > 0.8 * math.log(16)
    assert last["loss/pos/64"] < 0.1
    assert min(last[f"recall/{distance}"] for distance in (2, 4, 8)) > 0.95


def start_counted(_rank: int, config):
    """How often this rank gathers what all ranks give at its start, and what it gives to rank 0."""
    gathered, given = [], []
    all_gather, gather = dist.all_gather_object, dist.gather_object
    with (
        mock.patch.object(dist, "all_gather_object", lambda *a, **k: gathered.append(a) or all_gather(*a, **k)),
        mock.patch.object(dist, "gather_object", lambda mine, *a, **k: given.append(mine) or gather(mine, *a, **k)),
        trainer_of(config),
    ):
        return len(gathered), given


def test_what_a_rank_hears_at_a_start_does_not_grow_with_their_number(tmp_path, corpus):
    """A thousand ranks that all tell all others something would send a million messages."""
    config = small_config(tmp_path, corpus, parallel=ParallelConfig(shard=2))
    assert run_on_ranks(2, start_counted, config) == [(0, [this_machine()])] * 2
