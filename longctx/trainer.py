"""The run: set-up, one line a part; the step as prose; what is left at the end."""

from __future__ import annotations

import math
import os
import resource
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from longctx import runtime as runtime_module
from longctx.checkpoint import BEST_BY, Checkpoints, state_tensors
from longctx.config import Config, DataSource, UserError, attention_span, check
from longctx.data import builtin
from longctx.data.loader import Batch, Copies, Loader, Probes, RecallStream, Source
from longctx.data.mixture import ChainedTokens, Mixture
from longctx.data.other_formats import open_corpus
from longctx.data.packing import IGNORE_INDEX
from longctx.data.tokens import DataError
from longctx.evaluate import Held, StoppedError, generate, recall, validate
from longctx.metrics import Metrics, peak_tflops
from longctx.model.implementations import attention_implementation, fused_implementation
from longctx.model.transformer import keys_seen, palm_flops, training_flops
from longctx.optim import Optimizers, global_norm, schedule
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.parallel.pretrained import PretrainedWeights
from longctx.parallel.sequence import Split, balanced, in_order
from longctx.parallel.strategy import choose_strategy
from longctx.parallel.transport import forget as forget_transports
from longctx.parallel.transport import in_use as transports_in_use
from longctx.parallel.verify import verify_layout
from longctx.runtime import Runtime, StopSignals
from longctx.straggler import compare_ranks
from longctx.trace import traced
from longctx.watch import Watch

GIB = 2.0**30
Validation = ChainedTokens | RecallStream


def train(config: Config, as_written: str, overrides: list[str]) -> bool:
    """Runs `config`; returns whether it reached its last step, rather than being stopped. Raises `UserError`.

    `as_written` is its text with nothing resolved, for the logs; `overrides` the words of the command line.
    """
    check(config, runtime_module.world_size())
    runtime = runtime_module.start(config.parallel.timeout_seconds)
    name = runtime.on_main(lambda: uuid.uuid4().hex)
    watch = Watch(runtime.rank, runtime.world_size, config.parallel.timeout_seconds, name)
    try:
        with StopSignals() as stop:
            trainer = Trainer(config, as_written, overrides, runtime, stop, watch.gets_on)
            try:
                trainer.run()
            finally:
                trainer.close()
    finally:
        watch.stop()
    return not trainer.is_stopped


class StepCounts(NamedTuple):
    """What ranks tell each other of a step's sequences: the first `SUMMED` are added up, of the rest the largest."""

    valid_targets: float
    tflops: float  # of forward and backward
    documents: float
    imbalance: float  # of attention: work of the most loaded rank of a context axis over the mean
    stop_signal: float  # that some rank has received; 0: none
    save_failed: float  # 1 if some rank knows that the checkpoint being written came to nothing


SUMMED = 3


class Trainer:
    """One run on this rank."""

    def __init__(
        self, config: Config, as_written: str, overrides: list[str], runtime: Runtime, stop: StopSignals,
        gets_on: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`gets_on` is called after each micro-batch, and before and after what else takes long."""
        self.config, self.as_written, self.overrides, self.runtime = config, as_written, overrides, runtime
        self.stop, self.is_stopped, self.gets_on = stop, False, gets_on
        torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
        folder = config.run_folder
        runtime.on_main(lambda: _make_run_folder(folder))
        runtime.together(lambda: _check_run_folder(folder))
        self.tokens = open_tokens(config, runtime)
        self.mesh = make_mesh(config.parallel, runtime.world_size, runtime.device.type)
        self.loader = Loader(training_source(config, self.tokens), config.data, self.mesh.reader, self.mesh.readers)
        self.validation = validation_source(config, self.tokens, runtime)
        self.probes = probes(config, self.tokens)
        compute = getattr(torch, config.precision.compute)
        self.attention = attention_implementation(config.model, runtime.device, compute)
        self.fused_ops = fused_implementation(config.model, runtime.device, compute)
        self.context = choose_strategy(config, runtime.ranks_of_a_machine)
        self.model = parallelize(config, self.mesh, self.context, runtime.device)
        self.optimizer = Optimizers(self.model, config.optim)
        self.parameters = dict(self.model.named_parameters())
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, runtime)
        self.peak_tflops = peak_tflops(runtime.device, config.logging.peak_tflops)

        self.step = 0  # steps taken, skipped ones included
        self.consumed = 0  # sequences read, over all ranks
        self.skipped, self.skipped_in_row = 0, 0
        self.trained_s = 0.0  # in steps that counted, over all starts of the run
        self.checkpoint_stall_s = 0.0
        self.saved_step: int | None = None
        self.validated: tuple[int, float] | None = None  # step, and loss there
        self.origin: str | None = None  # the checkpoint of which this run is a branch
        is_known_layout = self._resume()
        if self.step == 0 and config.model.init_from:
            self._start_from_pretrained(Path(config.model.init_from).expanduser())
        if self.mesh.size("context") > 1 and config.parallel.verify and not is_known_layout:
            difference = verify_layout(self.model, config, self.mesh, runtime.device)
            runtime.say(
                f"split and whole sequences agree: gradients differ by {difference:.1e} of their norm, as rounded"
            )
            if runtime.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        for transport in transports_in_use():
            transport.is_timed = True
        self.metrics = runtime.together(
            lambda: Metrics(
                config.logging, folder, config.name, as_written, self.step, config.optim.steps, runtime.is_main
            )
        )
        self._introduce()
        self.gets_on()
        if config.checkpoint.asynchronous and config.checkpoint.every_steps:
            self.checkpoints.prepare(self._state())

    def run(self) -> None:
        """Trains to the last step, or until a signal; saves, and shows what came of it."""
        config = self.config
        started, first_step = time.perf_counter(), self.step
        while self.step < config.optim.steps:
            is_traced = self.runtime.is_main and self.step + 1 == config.logging.trace_step
            with traced(config.run_folder, self.step + 1, self.runtime.device) if is_traced else nullcontext():
                values, stop = self.train_step()
            self.gets_on()
            values["time/left_s"] = (
                (config.optim.steps - self.step) * (time.perf_counter() - started) / (self.step - first_step)
            )
            self.trained_s += values["perf/step_s"]
            if self.runtime.is_main:
                values |= self.metrics.history.values(self.trained_s)
            is_last = self.step == config.optim.steps
            if is_last or self.step % config.logging.every_steps == 0:
                self.metrics.log(self.step, values)
                self.metrics.show(self.step, values)
                self.checkpoint_stall_s = 0.0
            if stop:
                self.is_stopped = True
                self.metrics.say(f"stopping after step {self.step} on signal {signal.Signals(stop).name}")
                break
            every = config.logging.validate_every_steps
            if every and self.step % every == 0 and not is_last:
                self.validate()
                if self.is_stopped:
                    break
            every = config.checkpoint.every_steps
            if every and self.step % every == 0 and not is_last:
                self.save(in_background=config.checkpoint.asynchronous)
            if self.checkpoints.has_ended and not self.checkpoints.has_failed:
                self._await_save()
        if config.checkpoint.at_end:
            self.save(in_background=config.checkpoint.asynchronous)
        self._await_save()
        results = {} if self.is_stopped else self.validate()
        if results and self.saved_step == self.step:
            self._record_loss(results["loss/val"])
        self._finish(results)

    def train_step(self) -> tuple[dict[str, float], int]:
        """One step: fetch, forward, backward, clip, update. Returns its metrics and the signal that asks to stop."""
        started = time.perf_counter()
        batches = self.loader.step(self.consumed, attention_span(self.config.data, self.step))
        splits = [self._split(batch) for batch in batches]
        fetched = time.perf_counter()

        # loss: the sum over all valid tokens of the global batch over their number, never a mean of means
        device = self.runtime.device
        counts = torch.tensor(self._count(batches, splits), dtype=torch.float64, device=device)
        dist.all_reduce(counts[:SUMMED])
        dist.all_reduce(counts[SUMMED:], op=dist.ReduceOp.MAX)
        valid_tokens = counts[0].clamp(min=1) / self.mesh.size("tensor") / self.mesh.size("context")
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for batch, split in zip(batches, splits, strict=True):
            part = self.model(*Held.of(batch, split, self.mesh, device), (1 / valid_tokens).float())
            part.backward()
            loss += part.detach()
            self.gets_on()
        dist.all_reduce(loss)
        loss /= self.mesh.size("tensor")

        norm = global_norm(list(self.parameters.values()))
        results = torch.cat((torch.stack((loss, norm.double())), counts))
        loss_value, norm_value, *counted = results.tolist()  # the step's one wait for the device before the update
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            if self.config.optim.clip_norm and norm_value > self.config.optim.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.optim.clip_norm, norm)
            self.optimizer.step(self.step)
            self.skipped_in_row = 0
        else:  # every rank has the same numbers and skips too; parameters and optimizer stay as they were
            self._skip(loss_value, norm_value)
        self.optimizer.zero_grad()
        lr = self.config.optim.lr * schedule(self.step, self.config.optim)
        self.step += 1
        self.consumed += self.config.data.sequences_per_step
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        values = {"loss/train": loss_value, "optim/grad_norm": norm_value, "optim/lr": lr}
        step_counts = StepCounts(*counted)
        if step_counts.save_failed:
            self.checkpoints.wait()  # raises, on every rank in the same step
            raise UserError("another rank could not write the checkpoint; its message says why")
        values |= self._work_done(seconds, step_counts) | {"time/data_s": fetched - started}
        return values, int(step_counts.stop_signal)

    def _split(self, batch: Batch) -> Split:
        """Which rank of the context axis holds which tokens: so that attention is as much work on each."""
        length, size = batch.positions.shape[1], self.mesh.size("context")
        if size == 1 or self.context.splits_heads:
            return in_order(length, size)
        return balanced(keys_seen(self.config.model, batch.positions).sum(0), size)

    def _count(self, batches: list[Batch], splits: list[Split]) -> StepCounts:
        """Of this rank, before ranks have added them up."""
        return StepCounts(
            valid_targets=sum(float((b.targets != IGNORE_INDEX).sum()) for b in batches),
            tflops=sum(training_flops(self.config.model, b.positions) for b in batches) / 1e12,
            documents=sum(float((b.positions == 0).sum()) for b in batches),
            imbalance=self._imbalance(batches, splits),
            stop_signal=self.stop.number,
            save_failed=self.checkpoints.has_failed,
        )

    def _imbalance(self, batches: list[Batch], splits: list[Split]) -> float:
        """Attention of this rank over the mean of its context axis; ranks that trade heads share theirs."""
        size, together = self.mesh.size("context"), self.context.ulysses
        if size == together:
            return 1.0
        first = self.mesh.rank("context") // together * together
        mine, whole = 0.0, 0.0
        for batch, split in zip(batches, splits, strict=True):
            keys = keys_seen(self.config.model, batch.positions)
            mine += sum(float(split.shard(keys, rank).sum()) for rank in range(first, first + together))
            whole += float(keys.sum())
        return mine / together / (whole / size)

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        self.metrics.say(f"step {self.step + 1} skipped on all ranks: loss {loss}, gradient norm {norm}")
        if self.skipped_in_row >= self.config.optim.max_skipped_steps:
            raise UserError(
                f"{self.skipped_in_row} steps in a row were not finite (optim.max_skipped_steps); stopping at step "
                f"{self.step + 1}. Lower optim.lr, or resume from an earlier checkpoint (checkpoint.resume=PATH)"
            )

    def _work_done(self, seconds: float, counts: StepCounts) -> dict[str, float]:
        """Throughput, utilisation and memory of a step that took `seconds`."""
        config, world_size = self.config, self.runtime.world_size
        copies = world_size / self.mesh.readers  # ranks that count the same sequences
        tokens = config.data.sequences_per_step * config.data.sequence_length
        tflops = counts.tflops / copies / seconds / world_size
        values = {
            "optim/skipped_steps": self.skipped,
            "perf/tokens_per_s": tokens / seconds,
            "perf/tokens_per_s_per_gpu": tokens / seconds / world_size,
            "perf/step_s": seconds,
            "perf/tflops_per_gpu": tflops,
            "time/checkpoint_stall_s": self.checkpoint_stall_s,
            "data/tokens": self.consumed * config.data.sequence_length,
            "data/documents_per_sequence": counts.documents / copies / config.data.sequences_per_step,
            "time/context_exposed_s": sum(transport.take_waited_s() for transport in transports_in_use()),
            "data/attention_imbalance": counts.imbalance,
        }
        if self.peak_tflops:
            palm = palm_flops(config.model, tokens, config.data.sequence_length) / 1e12 / seconds / world_size
            values |= {"perf/mfu": tflops / self.peak_tflops, "perf/mfu_palm": palm / self.peak_tflops}
        if self.runtime.device.type == "cuda":
            beside = sum(transport.shared_bytes() for transport in transports_in_use())
            values["mem/peak_alloc_gib"] = (torch.cuda.max_memory_allocated() + beside) / GIB
            values["mem/peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        else:  # of the whole process
            values["mem/peak_alloc_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        return values

    def validate(self) -> dict[str, float]:
        """Validation metrics of the model as it is, logged and said."""
        if not self.validation:
            return {}
        try:
            results = self._look_at_model(self.validation)
        except StoppedError:
            self.is_stopped = True
            self.metrics.say(f"validation after step {self.step} left on a signal to stop")
            return {}
        if not results:
            return {}
        speeds, message = compare_ranks(self.runtime) if self.runtime.world_size > 1 else ({}, None)
        if message:
            self.metrics.say(message)
        tokens = self.consumed * self.config.data.sequence_length
        self.metrics.log(self.step, {"data/tokens": tokens, **results, **speeds})
        for transport in transports_in_use():
            transport.take_waited_s()  # which no training step has waited
        bits = results.get("loss/val_bits_per_byte")
        more = f", {bits:.4f} bits a byte" if bits else ""
        self.metrics.say(f"validation after step {self.step}: loss {results['loss/val']:.4f}{more}")
        self.validated = self.step, results["loss/val"]
        return results

    def _look_at_model(self, source: Validation) -> dict[str, float]:
        bytes_of = self.tokens.token_bytes if self.tokens else None
        where = self.mesh, self.runtime.device

        def must_stop() -> bool:  # asked before each sequence
            self.gets_on()
            return bool(self.stop.number)

        results = validate(self.model, source, source.size, *where, bytes_of, must_stop)
        if not results:
            return {}
        count = self.config.data.recall_sequences
        return results | recall(self.model, self.probes, count, *where, must_stop)

    def save(self, in_background: bool = False) -> None:
        """Writes a checkpoint of the run as it is, unless that one exists already."""
        self.gets_on()
        started = time.perf_counter()
        self._await_save()
        if self.saved_step == self.step:
            return
        facts = {
            "consumed": self.consumed,
            "updates": self.optimizer.updates,
            "skipped": self.skipped,
            "trained_s": self.trained_s,
            "data": self._data_order(),
            "resumed_from": self.origin,
            **({BEST_BY: self.validated[1]} if self.validated and self.validated[0] == self.step else {}),
            **self._layout(),
            "torch": torch.__version__,
            "configuration": self.as_written,
        }
        if in_background:
            self.checkpoints.save_in_background(self.step, self._state(), facts)
        else:
            self.metrics.say(f"saved {self.checkpoints.save(self.step, self._state(), facts)}")
        self.saved_step = self.step
        self.checkpoint_stall_s += time.perf_counter() - started
        self.gets_on()

    def _record_loss(self, loss: float) -> None:
        """Of the last step, which is saved before it is validated."""
        try:
            self.checkpoints.record(self.checkpoints.folder / f"step_{self.step}", {BEST_BY: loss})
        except UserError as error:
            self.metrics.say(f"the validation loss is not in the checkpoint: {error}")

    def _await_save(self) -> None:
        if path := self.checkpoints.wait():
            self.metrics.say(f"saved {path}")

    def _state(self) -> dict[str, torch.Tensor]:
        # The parameters as they were handed out at the start: after a forward pass without a backward one, the model's
        # own are the gathered copies in the compute dtype.
        return state_tensors(self.parameters, self.optimizer.state())

    def _resume(self) -> bool:
        """Continues from the newest checkpoint of this run, or from the one `checkpoint.resume` names.

        Returns whether there is one, made by the layout of this run.
        """
        resume = self.config.checkpoint.resume
        newest = self.checkpoints.newest()
        if resume == "never" and newest:
            raise UserError(
                f"{self.checkpoints.folder} has checkpoints and checkpoint.resume=never; give the run another name"
            )
        if resume not in ("auto", "never"):
            self.origin = resume
            if not newest or newest[1]["facts"]["resumed_from"] != resume:  # else a restart: go on where it was
                newest = Path(resume), self.checkpoints.verify(Path(resume))
        if not newest:
            return False
        path, manifest = newest
        facts = manifest["facts"]
        is_own = path.resolve().parent == self.checkpoints.folder.resolve()
        if is_own:
            self._check_data_order(path, facts["data"])
        self.checkpoints.load(path, manifest, self._state())
        self.step, self.consumed = int(manifest["step"]), int(facts["consumed"])
        self.skipped, self.optimizer.updates = int(facts["skipped"]), int(facts["updates"])
        self.trained_s = facts["trained_s"] if is_own else 0.0
        self.checkpoints.set_aside_after(self.step if is_own else -1)
        self.saved_step = self.step if is_own else None
        self.runtime.say(f"resumed from {path}: step {self.step}, {self.consumed} sequences read")
        return self._layout() == {key: facts.get(key) for key in self._layout()}

    def _start_from_pretrained(self, folder: Path) -> None:
        """Fills the model with weights of Hugging Face; every rank reads its own part of the files."""
        weights = self.runtime.together(lambda: PretrainedWeights(folder))
        rotary = self.runtime.together(lambda: weights.check(self.config.model))
        self.runtime.together(lambda: weights.load(self.model, self.config.model))
        other = f"; its rotary positions had {' '.join(rotary)}" if rotary else ""
        self.runtime.say(f"started with the weights of {folder}{other}")

    def _layout(self) -> dict[str, Any]:
        """What decides how a step is computed on these ranks."""
        return {
            "layout": asdict(self.config.parallel),
            "world_size": self.runtime.world_size,
            "context": self._context(),
        }

    def _data_order(self) -> dict[str, Any]:
        """All that decides which sequence is number 0, 1, 2 ..."""
        data = self.config.data
        return {
            "corpus": self.tokens.fingerprint() if self.tokens else str(data.recall),
            "seed": self.config.seed,
            "data.sequence_length": data.sequence_length,
            "data.separate_documents": data.separate_documents,
        }

    def _check_data_order(self, path: Path, saved: dict[str, Any]) -> None:
        here = self._data_order()
        changes = [f"{key} was {saved.get(key)}, is {value}" for key, value in here.items() if saved.get(key) != value]
        if changes:
            raise UserError(
                f"{path} was trained on another order of sequences: {'; '.join(changes)}. Some would be read twice and "
                f"some never; restore it, or start a run with another name and checkpoint.resume={path}"
            )

    def _introduce(self) -> None:
        config, mesh = self.config, self.mesh
        count = sum(p.numel() for p in self.parameters.values())
        axes = " x ".join(f"{axis} {mesh.size(axis)}" for axis in ("replicate", "shard", "context", "tensor"))
        data = f"{self.tokens} ({self.tokens.fingerprint()})" if self.tokens else "synthetic recall"
        self.runtime.say(
            f"longctx run {config.name}: {count / 1e6:.1f}M parameters, {self.runtime.world_size} x "
            f"{_device_name(self.runtime.device)}, {axes}\n"
            f"data: {data}; {config.data.sequences_per_step} sequences of {config.data.sequence_length} tokens a step, "
            f"{self.loader.accumulation} micro-batches of {config.data.sequences_per_micro_batch}\n"
            f"{self._context()}attention: {self.attention}, other fused ops: {self.fused_ops}\n"
            f"steps {self.step} to {config.optim.steps}, files in {config.run_folder}"
        )

    def _context(self) -> str:
        if self.mesh.size("context") == 1:
            return ""
        how = ", ".join(sorted({transport.description for transport in transports_in_use()}))
        return f"context: {self.context.strategy} ({self.context.why}) by {how}\n"

    def _finish(self, results: dict[str, float]) -> None:
        """Samples, unless a signal has stopped the run; the report; where it is and how to go on."""
        from longctx.report import write_report

        is_complete = self.step >= self.config.optim.steps
        samples = self._samples() if is_complete and not self.is_stopped else []
        if not self.runtime.is_main:
            return
        for sample in samples:
            self.metrics.say(f"--- sample ---\n{sample}")
        report = write_report(self.config.run_folder, self.config.name, self.as_written, samples)
        bits = results.get("loss/val_bits_per_byte")
        if results:
            shown = f" ({bits:.4f} bits a byte)" if bits else ""
            self.metrics.say(f"--- end ---\nvalidation loss {results['loss/val']:.4f} nats a token{shown}")
        self.metrics.say(f"report: {report}")
        if self.saved_step == self.step:
            command = resume_command(self.config, self.overrides, self.runtime.world_size, is_complete)
            self.metrics.say(f"resume: {command}")

    def _samples(self) -> list[str]:
        logging = self.config.logging
        if not self.tokens or not self.tokens.tokenizer_file or not logging.sample_tokens or not logging.sample_prompts:
            return []
        tokenizer = Tokenizer.from_file(str(self.tokens.tokenizer_file))
        prompts = [tokenizer.encode(p, add_special_tokens=False).ids or [0] for p in logging.sample_prompts]
        vocab_size = self.tokens.tokenizer_vocab
        texts = generate(self.model, prompts, logging.sample_tokens, self.mesh, self.runtime.device, vocab_size)
        return [tokenizer.decode(ids, skip_special_tokens=False) for ids in texts]

    def close(self) -> None:
        """Ends logging; the run can be resumed from what it has saved."""
        forget_transports()
        self.checkpoints.close()
        self.metrics.close()


# the parts that depend on the data source ----------------------------------------------------------------------------


def open_tokens(config: Config, runtime: Runtime) -> Mixture | None:
    """The run's token files, checked, on every rank; None for synthetic data."""
    data = config.data
    if data.source == DataSource.recall:
        return None
    weights = data.mixture or {data.folder: 1.0}
    if data.source == DataSource.builtin:
        folder = builtin.folder(data.cache_folder)
        runtime.together(lambda: builtin.build(folder) if runtime.local_rank == 0 else None)
        weights = {str(folder): 1.0}
    folders = [Path(folder).expanduser() for folder in weights]
    vocab_size, rank, ranks = config.model.vocab_size, runtime.rank, runtime.world_size
    tokens = runtime.together(
        lambda: Mixture([open_corpus(f, vocab_size, data, rank, ranks) for f in folders], list(weights.values()))
    )
    seen_by_main = runtime.on_main(tokens.fingerprint)

    def check_same() -> None:  # machines with other versions of Python or torch have other sources
        if tokens.fingerprint() != seen_by_main:
            raise DataError(
                f"{tokens}: tokens {tokens.fingerprint()}, rank 0 has {seen_by_main}; copy one to all machines"
            )

    runtime.together(check_same)
    return tokens


def training_source(config: Config, tokens: Mixture | None) -> Source:
    return RecallStream(config.data, config.seed) if tokens is None else tokens.training(config.data, config.seed)


def validation_source(config: Config, tokens: Mixture | None, runtime: Runtime) -> Validation | None:
    """Held-out sequences; None if `data.validation_sequences` is 0, or, said aloud, if there is too little text."""
    if not config.data.validation_sequences:
        return None
    if tokens is None:
        return RecallStream(config.data, config.seed + 1)
    source, problems = tokens.validation(config.data)
    for problem in problems:
        runtime.say(f"no validation: {problem}")
    return source


def probes(config: Config, tokens: Mixture | None) -> Probes:
    """What asks the model over which distances it recalls: the stream it is trained on, or random copies."""
    if tokens is None:
        return RecallStream(config.data, config.seed + 2)
    return Copies(config.data, tokens.tokenizer_vocab, config.seed)


def resume_command(config: Config, overrides: list[str], world_size: int, is_complete: bool) -> str:
    """What to type to go on with this run; for as many steps again if it is complete."""
    tools = Path(os.path.relpath(Path(sys.executable).parent))  # .venv/bin, if that is where this runs
    tools = Path() if ".." in tools.parts else tools
    per_machine = os.environ.get("LOCAL_WORLD_SIZE", str(world_size))
    launcher = (
        [str(tools / "python")] if world_size == 1 else [str(tools / "torchrun"), "--nproc-per-node", per_machine]
    )
    words = [w for w in overrides if w.split("=")[0] not in ("name", "optim.steps", "checkpoint.resume")]
    steps = config.optim.steps * (2 if is_complete else 1)
    return shlex.join([*launcher, "train.py", *words, f"name={config.name}", f"optim.steps={steps}"])


def _make_run_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be written: {error.strerror}; give folder=ANOTHER") from None


def _check_run_folder(folder: Path) -> None:
    if not (folder / "checkpoints").is_dir():
        raise UserError(
            f"the run's folder {folder.resolve()} is not seen here; give folder=ONE THAT ALL MACHINES SHARE"
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
