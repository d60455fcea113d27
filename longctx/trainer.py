"""The run: set-up, one line a part; the step as prose; what is left at the end."""

from __future__ import annotations

import math
import os
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from longctx import resume
from longctx import runtime as runtime_module
from longctx.checkpoint import BEST_BY, Checkpoints, state_tensors
from longctx.command_line import how_to_go_on
from longctx.config import Config, OnUsr1, Schedule, UserError, attention_span, check
from longctx.data.loader import Batch, Loader
from longctx.data.packing import IGNORE_INDEX
from longctx.evaluate import Held, StoppedError, recall, sample_texts, validate
from longctx.metrics import Metrics, is_validated, last_validation_loss
from longctx.model.implementations import attention_implementation, fused_implementation
from longctx.model.transformer import keys_seen, training_flops
from longctx.optim import Optimizers, global_norm
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.parallel.pretrained import PretrainedWeights
from longctx.parallel.sequence import Split, balanced, in_order
from longctx.parallel.strategy import choose_strategy
from longctx.parallel.transport import forget as forget_transports
from longctx.parallel.transport import in_use as transports_in_use
from longctx.parallel.verify import verify_layout
from longctx.run_folder import RunFolder
from longctx.runtime import Runtime, check_memory, raise_together
from longctx.schedule import decay_start, schedule
from longctx.sources import Validation, keep_tokenizer, open_tokens, probes, training_source, validation_source
from longctx.stopping import StopSignals, leave, say_after_launcher
from longctx.straggler import compare_ranks
from longctx.throughput import Summed, Throughput, device_name
from longctx.trace import traced
from longctx.watch import Watch


class Outcome(NamedTuple):
    """How a run ended."""

    is_complete: bool  # it reached its last step, rather than being stopped
    loss: float  # of its last validation, nats a token; NaN if there was none


def train(config: Config, as_written: str, overrides: list[str]) -> Outcome:
    """Runs `config` to its last step, or until a signal. Raises `UserError`.

    `as_written` is its text with nothing resolved, for the logs; `overrides` the words of the command line.
    """
    check(config, runtime_module.world_size())
    with StopSignals(config.parallel.stop_seconds, config.checkpoint.on_usr1 == OnUsr1.stop) as stop:
        runtime = runtime_module.start(config.parallel.timeout_seconds)
        if config.parallel.check_memory:
            runtime.together(lambda: check_memory(config, runtime))
        name = runtime.on_main(lambda: uuid.uuid4().hex)
        stop.share(runtime_module.store(f"longctx/signals/{name}"))
        watch = Watch(runtime.rank, runtime.world_size, config.parallel.timeout_seconds, name)
        try:
            trainer = Trainer(config, as_written, overrides, runtime, stop, watch.gets_on)
            try:
                trainer.run()
            except BaseException:
                if stop.is_abandoning:  # the other ranks have left while this one was waiting for them
                    stop.wait_for_the_end()
                trainer.has_failed = True
                raise
            finally:
                trainer.close()
        finally:
            watch.stop()
    return Outcome(not trainer.is_stopped, trainer.last_loss())


class Largest(NamedTuple):
    """Of a step, the largest over all ranks."""

    imbalance: float  # of attention: work of the most loaded rank of a context axis over the mean
    stop_signal: float  # that some rank has received; 0: none
    save_asked: float  # 1 if some rank was asked for a checkpoint
    save_failed: float  # 1 if some rank knows that the checkpoint being written came to nothing


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
        self.has_failed = False
        self.folder = RunFolder(config.run_folder, runtime)
        try:
            self._set_up()
        except BaseException:
            self.folder.close()
            raise

    def _set_up(self) -> None:
        config, runtime, folder = self.config, self.runtime, self.config.run_folder
        self.tokens = open_tokens(config, runtime)
        runtime.on_main(lambda: keep_tokenizer(self.tokens, folder, runtime))
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
        undecayed = decay_start(config.optim) if config.optim.schedule == Schedule.wsd else None
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, runtime, undecayed)
        self.throughput = Throughput(config, self.mesh, self.context, runtime)

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
                config.logging, folder, config.name, self.as_written, self.step, config.optim.steps, runtime.is_main
            )
        )
        self._introduce()
        self.gets_on()
        self.began, self.parts_done = 0.0, 0  # of the step in progress: when, 0: none; micro-batches
        self.expected_s = self.throughput.expected_s(say_so=self.step < config.optim.steps)
        self.stop.say, self.stop.left_s, self.stop.abandon = self.metrics.say, self.left_s, self.abandon
        if config.checkpoint.asynchronous and config.checkpoint.every_steps:
            self.checkpoints.prepare(self._state())

    def run(self) -> None:
        """Trains to the last step, or until a signal; saves, and shows what came of it."""
        config = self.config
        if self.step == config.optim.steps and self._was_finished():
            return
        started, first_step = time.perf_counter(), self.step
        while self.step < config.optim.steps:
            is_traced = self.runtime.is_main and self.step + 1 == config.logging.trace_step
            with (
                traced(config.run_folder, self.step + 1, self.runtime.device, self.metrics.say)
                if is_traced
                else nullcontext()
            ):
                values, asked = self.train_step()
            self.gets_on()
            values["time/left_s"] = (
                (config.optim.steps - self.step) * (time.perf_counter() - started) / (self.step - first_step)
            )
            self.trained_s += values["perf/step_s"]
            if self.runtime.is_main:
                values |= self.metrics.history.values(self.trained_s)
            is_last = self.step == config.optim.steps
            must_end = self.skipped_in_row >= config.optim.max_skipped_steps
            if is_last or must_end or self.step % config.logging.every_steps == 0:
                self.metrics.log(self.step, values)
                self.metrics.show(self.step, values)
                self.checkpoint_stall_s = 0.0
            if must_end:
                raise UserError(
                    f"{self.skipped_in_row} steps in a row were not finite (optim.max_skipped_steps); stopping at step "
                    f"{self.step}. Lower optim.lr, or resume from an earlier checkpoint (checkpoint.resume=PATH)"
                )
            if asked.stop_signal:
                self.is_stopped = True
                name = signal.Signals(int(asked.stop_signal)).name
                self.metrics.say(f"stopping after step {self.step} on signal {name}")
                break
            every = config.logging.validate_every_steps
            if every and self.step % every == 0 and not is_last:
                self.validate()
                if self.is_stopped:
                    break
            every = config.checkpoint.every_steps
            if not is_last and (asked.save_asked or (every and self.step % every == 0)):
                self.save(in_background=config.checkpoint.asynchronous)
            if self.checkpoints.has_ended and not self.checkpoints.has_failed:
                self._await_save()
        if config.checkpoint.at_end:
            self.save(in_background=config.checkpoint.asynchronous)
        self._await_save()
        results = {} if self.is_stopped else self.validate()
        self._pass_gate_together(is_open=False)
        if results and self.saved_step == self.step:
            self._record_loss(results["loss/val"])
        self._pass_gate_together(is_open=True)
        self._finish(results)
        self._pass_gate_together(is_open=False)

    def _pass_gate_together(self, is_open: bool) -> None:
        self.stop.gate(is_open)
        dist.all_reduce(torch.zeros(1))  # on the CPU, and waited for

    def _was_finished(self) -> bool:
        """Says that a run which was resumed at its last step is complete; returns whether it was validated there."""
        steps = self.config.optim.steps
        self.metrics.say(
            f"complete: step {self.step} of {steps}; give optim.steps={2 * steps} to go on, or another name"
        )
        file = self.config.run_folder / "metrics.jsonl"
        return self.validation is None or self.runtime.on_main(lambda: is_validated(file, steps))

    def train_step(self) -> tuple[dict[str, float], Largest]:
        """One step: fetch, forward, backward, clip, update. Returns its metrics, and what was asked for meanwhile."""
        self.began, self.parts_done = time.perf_counter(), 0
        batches, problem = self._fetch()
        splits = [self._split(batch) for batch in batches]
        fetched = time.perf_counter()

        # loss: the sum over all valid tokens of the global batch over their number, never a mean of means
        device = self.runtime.device
        self.stop.gate(is_open=True)  # from here to the next gate the step can be abandoned
        counts = torch.tensor(self._count(batches, problem), dtype=torch.float64, device=device)
        dist.all_reduce(counts)
        if counts[-1] > 0:
            raise_together(problem)
        valid_tokens = counts[0].clamp(min=1) / self.mesh.size("tensor") / self.mesh.size("context")
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for batch, split in zip(batches, splits, strict=True):
            part = self.model(*Held.of(batch, split, self.mesh, device), (1 / valid_tokens).float())
            part.backward()
            loss += part.detach()
            self.parts_done += 1
            self.metrics.show_progress(self.step + 1, self.parts_done, len(batches))
            self.gets_on()
        dist.all_reduce(loss)
        loss /= self.mesh.size("tensor")

        norm = global_norm(list(self.parameters.values()))
        results = torch.cat((torch.stack((loss, norm.double())), counts))
        loss_value, norm_value, *summed = results.tolist()  # waits for the device
        self.stop.gate(is_open=False)
        largest = torch.tensor(self._look_around(batches, splits), dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)  # on the CPU: here every rank knows that none abandons the step
        asked = Largest(*largest.tolist())
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            if self.config.optim.clip_norm and norm_value > self.config.optim.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.optim.clip_norm, norm)
            self.optimizer.step(self.step)
            self.skipped_in_row = 0
        else:  # every rank has the same numbers and skips too; parameters and optimizer stay as they were
            self.skipped += 1
            self.skipped_in_row += 1
            self.metrics.say(
                f"step {self.step + 1} skipped on all ranks: loss {loss_value}, gradient norm {norm_value}"
            )
        self.optimizer.zero_grad()
        lr = self.config.optim.lr * schedule(self.step, self.config.optim)
        self.step += 1
        self.consumed += self.config.data.sequences_per_step
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        values = {"loss/train": loss_value, "optim/grad_norm": norm_value, "optim/lr": lr}
        if asked.save_failed:
            self.checkpoints.wait()  # raises, on every rank in the same step
            raise UserError("another rank could not write the checkpoint; its message says why")
        values |= self.throughput.of_step(seconds, Summed(*summed)) | {
            "time/data_s": fetched - self.began,
            "time/checkpoint_stall_s": self.checkpoint_stall_s,
            "data/tokens": self.consumed * self.config.data.sequence_length,
            "data/attention_imbalance": asked.imbalance,
            "optim/skipped_steps": self.skipped,
        }
        self.began, self.expected_s = 0.0, seconds
        return values, asked

    def _fetch(self) -> tuple[list[Batch], UserError | None]:
        """The step's micro-batches, or why they cannot be read here."""
        try:
            return self.loader.step(self.consumed, attention_span(self.config.data, self.step)), None
        except UserError as error:
            return [], error

    def left_s(self) -> float:
        """Seconds that the step in progress may still take, by the one before and its micro-batches so far."""
        if not self.began:
            return 0.0
        elapsed, expected = time.perf_counter() - self.began, self.expected_s
        if self.parts_done and self.runtime.device.type == "cpu":  # a GPU's are counted when they are launched
            expected = elapsed / self.parts_done * self.loader.accumulation
        return max(0.0, expected - elapsed)

    def abandon(self) -> None:
        """Saves the state before the step in progress, tells how to go on, and ends this process. Called on every rank.

        In a thread of its own: the main thread is somewhere in a step, or waits for ranks that are.
        """
        step = self.step + 1
        why = f"step {step} would outlast parallel.stop_seconds={self.config.parallel.stop_seconds}, so it is left"
        self.metrics.say(why if self.began else "leaving what would take longer than parallel.stop_seconds")
        try:
            self._await_save()
            if self.step == self.skipped:
                self.metrics.say("no step has changed anything yet, so there is nothing to save")
            elif self.saved_step != self.step and self.config.checkpoint.at_end:
                path = self.checkpoints.save_beside(self.step, self._state(), self._facts())
                self.metrics.say(f"saved {path}")
                self.saved_step = self.step
            self.checkpoints.finish_beside()
            if self.saved_step is not None and self.runtime.is_main:
                self._say_how_to_go_on(is_complete=False)
        except BaseException as error:
            self.metrics.say(f"the state before step {step} could not be saved: {error}")
            leave(1)
        self.metrics.close(exit_code=0, seconds=3)
        leave(0)

    def _split(self, batch: Batch) -> Split:
        """Which rank of the context axis holds which tokens: so that attention is as much work on each."""
        length, size = batch.positions.shape[1], self.mesh.size("context")
        if size == 1 or self.context.splits_heads:
            return in_order(length, size)
        return balanced(keys_seen(self.config.model, batch.positions).sum(0), size)

    def _count(self, batches: list[Batch], problem: UserError | None) -> Summed:
        """Of this rank, before ranks have added them up."""
        return Summed(
            valid_targets=sum(float((b.targets != IGNORE_INDEX).sum()) for b in batches),
            tflops=sum(training_flops(self.config.model, b.positions) for b in batches) / 1e12,
            documents=sum(float((b.positions == 0).sum()) for b in batches),
            unread=problem is not None,
        )

    def _look_around(self, batches: list[Batch], splits: list[Split]) -> Largest:
        """Of this rank, before the largest are taken."""
        return Largest(
            imbalance=self.throughput.imbalance(batches, splits),
            stop_signal=self.stop.number,
            save_asked=self.stop.take_save_asked(),
            save_failed=self.checkpoints.has_failed,
        )

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
            self.stop.gate(is_open=True)
            return bool(self.stop.number)

        results = validate(self.model, source, source.size, *where, bytes_of, must_stop)
        if not results:
            return {}
        count = self.config.data.recall_sequences
        return results | recall(self.model, self.probes, count, *where, must_stop)

    def save(self, in_background: bool = False) -> None:
        """Writes a checkpoint of the run as it is, unless that one exists already."""
        self.gets_on()
        self._pass_gate_together(is_open=False)
        started = time.perf_counter()
        self._await_save()
        if self.saved_step == self.step:
            return
        facts = self._facts()
        if in_background:
            self.checkpoints.save_in_background(self.step, self._state(), facts)
        else:
            self.metrics.say(f"saved {self.checkpoints.save(self.step, self._state(), facts)}")
        self.saved_step = self.step
        self.checkpoint_stall_s += time.perf_counter() - started
        self.gets_on()

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says beside the tensors."""
        return {
            "consumed": self.consumed,
            "updates": self.step - self.skipped,
            "skipped": self.skipped,
            "trained_s": self.trained_s,
            "data": self._data_order(),
            "end_of_document": self.tokens.end_of_document if self.tokens else None,
            "resumed_from": self.origin,
            **({BEST_BY: self.validated[1]} if self.validated and self.validated[0] == self.step else {}),
            **self._layout(),
            "torch": torch.__version__,
            "configuration": self.as_written,
        }

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
        given = self.config.checkpoint.resume
        newest = self.checkpoints.newest()
        if given == "never" and newest:
            raise UserError(
                f"{self.checkpoints.folder} has checkpoints and checkpoint.resume=never; give the run another name"
            )
        if given not in ("auto", "never"):
            self.origin = given
            if not newest or newest[1]["facts"]["resumed_from"] != given:  # else a restart: go on where it was
                newest = Path(given), self.checkpoints.verify(Path(given))
        if not newest:
            return False
        path, manifest = newest
        facts = manifest["facts"]
        is_own = path.resolve().parent == self.checkpoints.folder.resolve()
        if is_own:
            resume.check_order(path, facts["data"], self._data_order())
        if message := resume.compare(path, manifest, self.config, self.as_written, is_own):
            self.runtime.say(message)
        self.checkpoints.load(path, manifest, self._state())
        self.step, self.consumed = int(manifest["step"]), int(facts["consumed"])
        self.skipped, self.optimizer.updates = int(facts["skipped"]), int(facts["updates"])
        self.trained_s = facts["trained_s"] if is_own else 0.0
        self.checkpoints.set_aside_after(self.step if is_own else -1)
        self.saved_step = self.step if is_own else None
        self.runtime.say(f"resumed from {path}: step {self.step}, {self.consumed} sequences read")
        here, layout = self._layout(), facts["layout"]
        return here == {key: facts.get(key) for key in here} | {
            "layout": {key: layout.get(key) for key in here["layout"]}
        }

    def _start_from_pretrained(self, folder: Path) -> None:
        """Fills the model with weights of Hugging Face; every rank reads its own part of the files."""
        weights = self.runtime.together(lambda: PretrainedWeights(folder))
        rotary = self.runtime.together(lambda: weights.check(self.config.model))
        self.runtime.together(lambda: weights.load(self.model, self.config.model))
        other = f"; its rotary positions had {' '.join(rotary)}" if rotary else ""
        self.runtime.say(f"started with the weights of {folder}{other}")

    def _layout(self) -> dict[str, Any]:
        """What decides how a step is computed on these ranks."""
        layout = asdict(self.config.parallel)
        for key in ("timeout_seconds", "stop_seconds", "check_memory", "verify"):
            layout.pop(key)
        return {
            "layout": layout,
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

    def _introduce(self) -> None:
        config, mesh = self.config, self.mesh
        count = sum(p.numel() for p in self.parameters.values())
        axes = " x ".join(f"{axis} {mesh.size(axis)}" for axis in ("replicate", "shard", "context", "tensor"))
        data = f"{self.tokens} ({self.tokens.fingerprint()})" if self.tokens else "synthetic recall"
        self.runtime.say(
            f"longctx run {config.name}: {count / 1e6:.1f}M parameters, {self.runtime.world_size} x "
            f"{device_name(self.runtime.device)}, {axes}\n"
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
        is_complete = self.step >= self.config.optim.steps
        samples = []
        if is_complete and not self.is_stopped and self.tokens:
            samples = sample_texts(self.model, self.tokens, self.config.logging, self.mesh, self.runtime.device)
        if not self.runtime.is_main:
            return
        for sample in samples:
            self.metrics.say(f"--- sample ---\n{sample}")
        bits = results.get("loss/val_bits_per_byte")
        if results:
            shown = f" ({bits:.4f} bits a byte)" if bits else ""
            self.metrics.say(f"--- end ---\nvalidation loss {results['loss/val']:.4f} nats a token{shown}")
        self._write_report(samples)
        if self.saved_step == self.step:
            self._say_how_to_go_on(is_complete)

    def _write_report(self, samples: list[str]) -> None:
        """On rank 0. A disk that is full is told, and ends nothing."""
        from longctx.report import write_report

        try:
            report = write_report(self.config.run_folder, self.config.name, self.as_written, samples)
            self.metrics.say(f"report: {report}")
        except OSError as error:
            self.metrics.say(f"no report: {error.filename or self.config.run_folder}: {error.strerror}")
        except Exception as error:
            if not self.has_failed:  # else the error that ended the run is the one to be seen
                raise
            self.metrics.say(f"no report: {error}")

    def _say_how_to_go_on(self, is_complete: bool) -> None:
        lines = how_to_go_on(
            self.config, self.overrides, self.runtime.world_size, self.step, self.checkpoints.undecayed(), is_complete
        )
        for line in lines:
            self.metrics.say(line)
        if self.stop.came_here and not self.stop.is_orphan and "TORCHELASTIC_RUN_ID" in os.environ:
            say_after_launcher(lines[0])

    def last_loss(self) -> float:
        """Of the last validation, on every rank; NaN if there was none."""
        if self.validated:
            return self.validated[1]
        return self.runtime.on_main(lambda: last_validation_loss(self.config.run_folder / "metrics.jsonl"))

    def close(self) -> None:
        """Ends logging; the run can be resumed from what it has saved. One that has failed has its report too."""
        forget_transports()
        self.checkpoints.close()
        if self.has_failed and self.runtime.is_main:
            self._write_report([])
        self.metrics.close(exit_code=int(self.has_failed))
        self.folder.close()
