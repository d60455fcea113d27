"""A run from start to end: what it writes, how it resumes, what stops it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_on_ranks
from helpers import losses_of, small_config, trainer_of
from safetensors import safe_open
from torch.distributed import TCPStore

from longctx import runtime, straggler
from longctx import trainer as trainer_module
from longctx.checkpoint import Checkpoints, ShardWriter, verify_files
from longctx.config import (
    AttentionImplementation,
    ComputeDtype,
    ConfigError,
    DataSource,
    FusedImplementation,
    ModelConfig,
    Optimizer,
    ParallelConfig,
    Strategy,
    UserError,
    WandbMode,
)
from longctx.data.tokens import DataError
from longctx.metrics import read_metrics
from longctx.trainer import Trainer, train
from longctx.watch import Watch

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


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
        config = small_config(tmp_path, corpus, name=str(implementation), model__fused_ops=implementation)
        losses.append(losses_of(config, 4))
    assert losses[0][0] - losses[0][3] > 0.05
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_whole_run(tmp_path, corpus, capsys):
    config = small_config(
        tmp_path, corpus, logging__validate_every_steps=4, checkpoint__every_steps=4, logging__sample_tokens=5,
        logging__peak_tflops=1.0, logging__trace_step=6,
    )  # fmt: skip
    train(config, "seed: 0", ["recipe=gpt_tiny", "optim.lr=3e-3"])
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
    assert report.count("<svg") == 8
    assert "_backward" in (tmp_path / "test" / "trace_step_6.txt").read_text()
    assert json.loads(gzip.decompress((tmp_path / "test" / "trace_step_6.json.gz").read_bytes()))["traceEvents"]
    assert not re.search(r'(src|href)="https?:', report.replace("xlink:href", ""))  # nothing is fetched
    assert {p.name for p in (tmp_path / "test" / "checkpoints").iterdir()} == {"step_4", "step_8", "latest", "best"}


def run_steps(_rank, config, steps):
    return losses_of(config, steps)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_the_same_curve_in_every_layout(tmp_path, corpus, strategy):
    config = small_config(tmp_path / "one", corpus)
    single = run_on_ranks(1, run_steps, config, 8)[0]
    for parallel, ranks in (
        (ParallelConfig(context=2, strategy=strategy), 2),
        (ParallelConfig(), 2),
        (ParallelConfig(context=2, strategy=strategy), 4),
    ):
        config = dataclasses.replace(config, folder=str(tmp_path / f"{ranks}{parallel.context}"), parallel=parallel)
        losses = run_on_ranks(ranks, run_steps, config, 8)
        assert losses[0] == losses[-1]
        assert losses[0] == pytest.approx(single, rel=1e-5)


def run_and_save(_rank, config, steps):
    with trainer_of(config) as trainer:
        losses = [trainer.train_step()[0]["loss/train"] for _ in range(steps)]
        trainer.save()
        return losses


@pytest.mark.parametrize("optimizer", list(Optimizer))
@pytest.mark.parametrize(
    ("parallel", "ranks"), [(ParallelConfig(), 1), (ParallelConfig(context=2), 2)], ids=["1", "context 2"]
)
def test_resume_is_bit_equal(tmp_path, corpus, optimizer, parallel, ranks):
    config = small_config(tmp_path / "whole", corpus, optim__steps=30, optim__optimizer=optimizer, parallel=parallel)
    whole = run_on_ranks(ranks, run_steps, config, 30)[0]
    config = dataclasses.replace(config, folder=str(tmp_path / "parts"))
    first = run_on_ranks(ranks, run_and_save, config, 10)[0]
    second = run_on_ranks(ranks, run_steps, config, 20)[0]
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


def test_a_layout_is_verified_once(tmp_path, corpus):
    parallel = ParallelConfig(context=2, strategy=Strategy.ring)
    for changed, expected in (
        (parallel, 1),
        (parallel, 0),  # resumed
        (dataclasses.replace(parallel, strategy=Strategy.ulysses), 1),
        (dataclasses.replace(parallel, verify=False), 0),
    ):
        config = small_config(tmp_path, corpus, parallel=changed)
        for calls, waited_s in run_on_ranks(2, verifications, config):
            assert calls == expected
            assert 0 < waited_s < 30


def test_resume_on_another_layout(tmp_path, corpus):
    config = small_config(tmp_path / "whole", corpus, optim__steps=12)
    whole = run_on_ranks(1, run_steps, config, 12)[0]
    config = dataclasses.replace(config, folder=str(tmp_path / "parts"))
    losses = run_on_ranks(2, run_and_save, config, 4)[0]
    config.parallel = ParallelConfig(context=2)
    losses += run_on_ranks(4, run_and_save, config, 4)[0]
    config.parallel = ParallelConfig()
    losses += run_on_ranks(1, run_steps, config, 4)[0]
    assert losses == pytest.approx(whole, rel=1e-5)


def validate_and_save(_rank, config):
    """The float32 masters before, and the checkpoint written right after a validation."""
    with trainer_of(config) as trainer:
        trainer.train_step()
        masters = {f"model.{n}": p.detach().full_tensor().clone() for n, p in trainer.parameters.items()}
        trainer.validate()
        trainer.save()
        manifest = trainer.checkpoints.verify(trainer.checkpoints.committed()[-1])
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
    train(small_config(tmp_path, corpus, optim__steps=1), "", [])
    with pytest.raises(
        UserError, match=r"seed was 0, is 1; data.sequence_length was 64, is 32\. Some would be read twice"
    ):
        train(small_config(tmp_path, corpus, optim__steps=2, seed=1, data__sequence_length=32), "", [])


def test_a_branch_goes_on_with_its_own_checkpoints(tmp_path, corpus):
    train(small_config(tmp_path, corpus, optim__steps=4, checkpoint__every_steps=2), "", [])
    start = tmp_path / "test" / "checkpoints" / "step_2"
    branch = small_config(tmp_path, corpus, name="branch", optim__steps=3, seed=5, checkpoint__resume=str(start))
    with trainer_of(branch) as trainer:
        assert trainer.step == 2
        trainer.run()
    branch.optim.steps = 5
    with trainer_of(branch) as trainer:  # as a restart does it, with the same words
        assert trainer.step == 3

    again = small_config(tmp_path, corpus, optim__steps=3, checkpoint__resume=str(start))
    train(again, "", [])  # in the same folder: step 4 was another future
    names = sorted(p.name for p in start.parent.iterdir())
    assert [n.rsplit("_", 1)[0] for n in names if n.startswith("abandoned")] == ["abandoned_step_4"]
    assert {"step_2", "step_3"} <= set(names)


def sequences_and_losses(rank, config, steps):
    """Numbers of the sequences that this rank reads in each step, and the loss; saved at the end."""
    with trainer_of(config) as trainer:
        read: list[int] = []
        source = trainer.loader.source
        trainer.loader.source = SimpleNamespace(sequence=lambda number: read.append(number) or source.sequence(number))
        found = []
        for _ in range(steps):
            read.clear()
            loss = trainer.train_step()[0]["loss/train"]
            found.append((trainer.mesh.reader, tuple(read), loss))
        trainer.save()
        return found


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
    train(config, "", [])
    path = tmp_path / "test" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 9, "loss/train": 1}\n{"step": 4, "loss/tr')
    config.optim.steps = 5
    train(config, "", [])
    assert [r["step"] for r in read_metrics(path) if "loss/train" in r] == [1, 2, 3, 4, 5]


def test_restarts_and_what_they_cost(tmp_path, corpus):
    config = small_config(tmp_path, corpus, optim__steps=3)
    train(config, "", [])
    path = tmp_path / "test" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "loss/train": 1}\n')  # then it was killed
    first = read_metrics(path)[2]
    assert (first["run/restarts"], first["run/lost_steps"]) == (0, 0)
    config.optim.steps = 4
    started_at = json.loads((tmp_path / "test" / "history.json").read_text())["started_at"]
    train(config, "", [])
    last = [r for r in read_metrics(path) if "loss/train" in r][-1]
    trained = sum(r["perf/step_s"] for r in read_metrics(path) if "perf/step_s" in r)
    assert (last["run/restarts"], last["run/lost_steps"]) == (1, 2)
    assert trained / (time.time() - started_at) <= last["run/ettr"] < 1


# what goes wrong -----------------------------------------------------------------------------------------------------


def poison_one_step(_rank, config):
    """On rank 1 the second step's loss is NaN: returns metrics of three steps and whether step two changed anything."""
    with trainer_of(config) as trainer:
        first = trainer.train_step()[0]
        before = [p.detach().clone() for p in trainer.model.parameters()]
        head = trainer.model.head
        hook = head.register_forward_hook(lambda _m, _i, out: out * (math.nan if trainer.runtime.rank == 1 else 1))
        second = trainer.train_step()[0]
        hook.remove()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        third = trainer.train_step()[0]
        return [x["loss/train"] for x in (first, second, third)], unchanged, third["optim/skipped_steps"]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path, corpus):
    config = small_config(tmp_path, corpus, parallel=ParallelConfig(context=2))
    for losses, unchanged, skipped in run_on_ranks(2, poison_one_step, config):
        assert math.isfinite(losses[0])
        assert math.isnan(losses[1])
        assert math.isfinite(losses[2])
        assert unchanged
        assert skipped == 1


def steps_while_saving(rank, config, fails):
    """Saves that take a second, or fail on rank 1: the last step, the message, seconds stalled, checkpoints."""
    write_data = ShardWriter.write_data

    def slowly(*arguments):
        time.sleep(1)
        if fails and rank == 1:
            raise OSError(28, "No space left on device")
        return write_data(*arguments)

    with trainer_of(config) as trainer:
        trainer.train_step()  # its buffers are made
        ShardWriter.write_data = slowly
        message = ""
        try:
            trainer.run()
        except UserError as error:
            message = str(error)
        rows = read_metrics(config.run_folder / "metrics.jsonl") if rank == 0 else []
        stalls = [row["time/checkpoint_stall_s"] for row in rows if "time/checkpoint_stall_s" in row]
        return trainer.step, message, stalls, sorted(p.name for p in (config.run_folder / "checkpoints").iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, corpus, fails):
    config = small_config(
        tmp_path, corpus, optim__steps=100_000 if fails else 8, parallel=ParallelConfig(context=2),
        checkpoint__every_steps=2, checkpoint__at_end=False,
    )  # fmt: skip
    if not fails:
        config.checkpoint.every_steps = 5
    results = run_on_ranks(2, steps_while_saving, config, fails)
    (step, message, stalls, names), (other_step, other_message, _, _) = results
    assert step == other_step
    assert message == other_message
    if fails:
        assert 2 < step < 100_000
        assert re.search(r"failed on rank 1: .*No space left on device", message)
        assert names == []
    else:
        assert step == 8
        assert max(stalls) < 0.9  # a blocking save takes the second
        assert names == ["latest", "step_5"]


def test_an_error_lets_the_save_under_way_end(tmp_path, corpus, capsys, monkeypatch):
    hash_files = Checkpoints._hash_files
    monkeypatch.setattr(Checkpoints, "_hash_files", lambda *words: time.sleep(0.5) or hash_files(*words))

    def stop_in_the_middle():
        with trainer_of(small_config(tmp_path, corpus)) as trainer:
            trainer.train_step()
            trainer.save(in_background=True)
            raise UserError("some reason")

    with pytest.raises(UserError, match="some reason"):
        stop_in_the_middle()
    assert f"saved {tmp_path}/test/checkpoints/step_1" in capsys.readouterr().out
    assert verify_files(tmp_path / "test" / "checkpoints" / "step_1")["step"] == 1


def test_many_such_steps_end_the_run(tmp_path, corpus):
    config = small_config(tmp_path, corpus, optim__max_skipped_steps=3)
    with trainer_of(config) as trainer:
        trainer.model.head.register_forward_hook(lambda _m, _i, out: out * math.inf)
        with pytest.raises(UserError, match="3 steps in a row were not finite"):
            trainer.run()


def interrupted(rank, config, moment):
    """SIGTERM to rank 1 at a moment of its third step, or before the first: whether the run ended, and in how long."""

    def with_signal(function, condition=lambda *_: True):
        def wrapped(*arguments, **keywords):
            if rank == 1 and condition(*arguments):
                os.kill(os.getpid(), signal.SIGTERM)
                sent.append(time.monotonic())
            return function(*arguments, **keywords)

        return wrapped

    sent: list[float] = []
    if moment == "warm-up":
        trainer_module.parallelize = with_signal(trainer_module.parallelize)
    elif moment == "step":
        Trainer.train_step = with_signal(Trainer.train_step, lambda trainer: trainer.step == 3)
    elif moment == "validation":
        trainer_module.validate = with_signal(trainer_module.validate)
    elif moment == "save":
        Checkpoints.save = with_signal(Checkpoints.save)
    elif moment == "any":
        threading.Timer(0.5, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM)).start()
    is_complete = train(config, "", [])
    return is_complete, time.monotonic() - sent[0] if sent else 0.0


@pytest.mark.parametrize("moment", ["warm-up", "step", "validation", "save", "any"])
def test_sigterm_on_one_rank_saves_and_ends_all(tmp_path, corpus, moment):
    config = small_config(
        tmp_path, corpus, optim__steps=100_000, parallel=ParallelConfig(context=2), checkpoint__every_steps=4,
        logging__validate_every_steps=5,
    )  # fmt: skip
    results = run_on_ranks(2, interrupted, config, moment)
    assert [is_complete for is_complete, _ in results] == [False, False]
    assert results[1][1] < 25
    rows = read_metrics(tmp_path / "test" / "metrics.jsonl")
    step = int(max(row["step"] for row in rows))
    expected = {"warm-up": [1], "step": [4], "validation": [5], "save": [4, 5, 6]}.get(moment, range(1, 100_000))
    assert step in expected
    assert moment != "validation" or not any("loss/val" in row for row in rows)  # it was left
    assert verify_files(tmp_path / "test" / "checkpoints" / f"step_{step}")["facts"]["consumed"] == 4 * step


def test_a_folder_that_cannot_be_written(tmp_path, corpus):
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    with pytest.raises(UserError, match=r"run's folder .*file/test cannot be written: Not a directory; give folder="):
        train(small_config(tmp_path / "file", corpus), "", [])


def test_ids_outside_the_vocabulary(tmp_path, corpus):
    with pytest.raises(UserError, match="its tokenizer has 8192 ids, model.vocab_size is 4000"):
        train(small_config(tmp_path, corpus, model=ModelConfig(vocab_size=4000)), "", [])


def test_wrong_ranks(tmp_path, corpus):
    with pytest.raises(ConfigError, match="parallel.context=2 does not divide the 1 ranks"):
        train(small_config(tmp_path, corpus, parallel__context=2), "", [])


def test_too_little_text(tmp_path, corpus):
    with pytest.raises(DataError, match="a sequence needs 1000001"):
        train(small_config(tmp_path, corpus, data__sequence_length=1_000_000), "", [])


def test_never_resume_refuses_a_folder_with_checkpoints(tmp_path, corpus):
    train(small_config(tmp_path, corpus, optim__steps=1), "", [])
    with pytest.raises(UserError, match="has checkpoints and checkpoint.resume=never; give the run another name"):
        train(small_config(tmp_path, corpus, checkpoint__resume="never"), "", [])


def test_a_damaged_shard_on_one_rank_ends_all(tmp_path, corpus):
    messages = run_on_ranks(2, open_damaged, small_config(tmp_path, corpus))
    assert messages == ["rank 1: bad shard"] * 2


def open_damaged(rank, _config):
    from longctx import runtime

    def check():
        if rank == 1:
            raise DataError("bad shard")

    try:
        runtime.start(60).together(check)
    except UserError as error:
        return str(error)


def test_wandb_server_that_does_not_answer(tmp_path, corpus, monkeypatch, capsys):
    """A server that accepts and says nothing: the run is as fast as ever, and every number is in the file."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        config = small_config(tmp_path, corpus, logging__wandb=WandbMode.online, logging__wandb_timeout_seconds=2)
        started = time.perf_counter()
        train(config, "", [])
        assert time.perf_counter() - started < 30
    assert "every number is in" in capsys.readouterr().out
    assert len([r for r in read_metrics(tmp_path / "test" / "metrics.jsonl") if "loss/train" in r]) == 8


def test_wandb_offline(tmp_path, corpus, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    train(small_config(tmp_path, corpus, logging__wandb=WandbMode.offline), "", [])
    assert list((tmp_path / "test" / "wandb").glob("offline-run-*/*.wandb"))


def test_two_jobs_of_one_multirun(tmp_path, corpus):
    """`torchrun train.py -m`: the process group is made once and serves both jobs."""
    words = [
        "recipe=gpt_tiny", "name=a,b", f"folder={tmp_path}", "data=prepared",
        f"data.folder={corpus}", "logging=no_wandb", "data.sequence_length=64", "optim.steps=2",
        "logging.sample_tokens=0", "model.width=32", "logging.every_steps=1",
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


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_no_longer_runs_ends_the_job(tmp_path, corpus, how):
    """In the middle of a ring: within the timeout and ten seconds, by name."""
    timeout_seconds = 15
    words = [
        "recipe=gpt_tiny", f"folder={tmp_path}", "name=a", "data=prepared", f"data.folder={corpus}",
        "logging=no_wandb", "data.sequence_length=64", "optim.steps=1000000", "logging.sample_tokens=0",
        "model.width=32", "logging.every_steps=1", "parallel.context=2", "parallel.strategy=ring",
        f"parallel.timeout_seconds={timeout_seconds}",
    ]  # fmt: skip
    job = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", "train.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("step 5/"):
            break
    process = next(pid for pid in _children(job.pid) if _environment(pid).get("RANK") == "1")
    os.kill(process, how)
    started = time.monotonic()
    output, _ = job.communicate(timeout=timeout_seconds + 30)
    assert job.returncode != 0
    assert time.monotonic() - started < timeout_seconds + 10
    if how == signal.SIGSTOP:
        assert f"rank 1 (process {process} on {socket.gethostname()}) has given no sign of life for" in output
    assert re.search(rf"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9 \(pid: {process}\)", output)


HANGS = """
import time
from longctx.trainer import Trainer

original = Trainer.train_step

def hangs(trainer):
    if trainer.runtime.rank == 2 and trainer.step == 3:
        time.sleep(1000)
    return original(trainer)

Trainer.train_step = hangs
import runpy
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path, corpus):
    """It runs, and gives signs of life, but comes to no collective."""
    (tmp_path / "hangs.py").write_text(HANGS)
    words = [
        "recipe=gpt_tiny", f"folder={tmp_path}", "name=a", "data=prepared", f"data.folder={corpus}",
        "logging=no_wandb", "data.sequence_length=64", "data.sequences_per_step=3", "parallel.context=1",
        "data.sequences_per_micro_batch=1", "model.width=32", "parallel.timeout_seconds=15", "parallel.shard=-1",
    ]  # fmt: skip
    started = time.monotonic()
    result = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "3", str(tmp_path / "hangs.py"), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode != 0
    assert time.monotonic() - started < 100  # torchrun gives the rank that hangs 30 s to end
    assert "(parallel.timeout_seconds=15)\nthe others seem to wait for rank 2\nrank 2:\n" in result.stderr
    stacks = result.stderr.split("rank 2:\n")[1]
    assert "time.sleep(1000)" in stacks.split("ranks 0, 1:\n")[0]
    assert "dist.all_reduce(" in stacks.split("ranks 0, 1:\n")[1]


def compared_ranks(rank):
    assert straggler.compare_ranks(runtime.start(60))[0]["run/slowest_over_median"] >= 1  # as timed
    straggler.own_ms = lambda _device: 13.0 if rank == 1 else 10.0
    here = runtime.start(60)
    told = straggler.compare_ranks(here)
    straggler.own_ms = lambda _device: 11.0 if rank == 1 else 10.0
    return told, straggler.compare_ranks(here)


def test_a_rank_that_computes_slowly_is_named():
    for slow, usual in run_on_ranks(3, compared_ranks):
        assert slow[0] == {"run/slowest_rank": 1.0, "run/slowest_over_median": pytest.approx(1.3)}
        assert f"rank 1 on {socket.gethostname()} computes slowly" in slow[1]
        assert "13.00 ms for what takes the median rank 10.00 ms" in slow[1]
        assert usual == ({"run/slowest_rank": 1.0, "run/slowest_over_median": pytest.approx(1.1)}, None)


def test_torchrun_restarts_after_a_kill(tmp_path, corpus):
    """The run goes on from its newest checkpoint by itself, and its losses are those of an undisturbed one."""

    def start(name: str) -> subprocess.Popen:
        words = [
            "recipe=gpt_tiny", f"folder={tmp_path}", f"name={name}", "data=prepared", f"data.folder={corpus}",
            "logging=no_wandb", "data.sequence_length=64", "optim.steps=40", "logging.sample_tokens=0",
            "model.width=32", "logging.every_steps=1", "parallel.context=2", "checkpoint.every_steps=10",
        ]  # fmt: skip
        return subprocess.Popen(
            [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "train.py", *words],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def losses(name: str) -> dict[int, float]:
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        return {int(r["step"]): r["loss/train"] for r in rows if "loss/train" in r}

    assert start("whole").communicate(timeout=120) is not None
    job = start("killed")
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("step 25/"):
            break
    os.kill(next(pid for pid in _children(job.pid) if _environment(pid).get("RANK") == "1"), signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert re.search(r"resumed from .*step_(10|20|30): step (10|20|30), ", output)
    assert sorted(losses("whole")) == list(range(1, 41))
    assert losses("killed") == losses("whole")
    last = read_metrics(tmp_path / "killed" / "metrics.jsonl")[-2]
    assert last["run/restarts"] == 1
    assert 1 <= last["run/lost_steps"] <= 30


def test_a_rank_gives_a_sign_of_life_at_once(monkeypatch):
    """So that one which stops before its first period is missed, and before the collectives of others time out."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    watch = Watch(rank=1, size=2, timeout_seconds=600, name="a")
    assert store.check(["longctx/alive/a/1"])
    assert store.get("longctx/alive/a/1").decode().split()[0::2] == ["0", str(os.getpid())]
    assert (watch.period_s, watch.silence_s) == (5, 580)
    watch.stop()
    assert store.get("longctx/alive/a/1") == b"left"


def _children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found]


def _environment(process: int) -> dict[str, str]:
    pairs = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_recall_loss_falls_with_context(tmp_path):
    """A key's first value costs log(values) nats; a model that uses its context pays less at later positions."""
    config = small_config(
        tmp_path, tmp_path, data__source=DataSource.recall, data__folder="", data__sequence_length=128,
        data__sequences_per_step=16, data__sequences_per_micro_batch=16, data__validation_sequences=32,
        data__recall__keys=4, data__recall__values=16,
        model=ModelConfig(vocab_size=20, layers=2, width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=128),
        optim__steps=240, optim__lr=1e-2, optim__optimizer=Optimizer.muon, logging__every_steps=50,
    )  # fmt: skip
    train(config, "", [])
    last = [r for r in read_metrics(tmp_path / "test" / "metrics.jsonl") if "loss/val" in r][-1]
    assert last["loss/pos/1"] > 0.8 * math.log(16)
    assert last["loss/pos/64"] < 0.1
    assert min(last[f"recall/{distance}"] for distance in (2, 4, 8)) > 0.95
