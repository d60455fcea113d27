"""The run of one rank: its parts, the loop over steps, and the step."""

from __future__ import annotations

import math
import signal
import time
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
import torch.distributed as dist

from longctx import run_facts
from longctx.batch import Batch
from longctx.config import attention_span
from longctx.data.loader import Loader
from longctx.errors import UserError
from longctx.hugging_face.load import start_from_pretrained
from longctx.metrics import Metrics
from longctx.metrics_file import is_validated
from longctx.model.implementations import implementations
from longctx.optim import Optimizers, global_norm
from longctx.parallel.fsdp import sum_over_replicas, time_waits
from longctx.parallel.local_batch import LocalBatch
from longctx.parallel.loss import forward_backward, global_loss, token_weight
from longctx.parallel.mesh import make_mesh
from longctx.parallel.parallelize import parallelize
from longctx.parallel.verify import verify_layout
from longctx.run_folder import RunFolder
from longctx.run_info import COMPLETE, Ending, RunInfo
from longctx.runtime import Runtime, raise_together
from longctx.saving import Progress, Saving
from longctx.sources import check_tokenizers, keep_tokenizer, open_tokens, training_source
from longctx.step_clock import StepClock
from longctx.step_counters import Largest, Memory, largest, summed
from longctx.stopping import StopSignals
from longctx.throughput import Pace, Throughput
from longctx.trace import traced
from longctx.validation import Validation


class Trainer:
    """One run on this rank."""

    def __init__(self, run: RunInfo, runtime: Runtime, stop: StopSignals) -> None:
        """Collective. Raises `UserError` on all ranks if the run cannot start."""
        self.run_info, self.config, self.runtime, self.stop = run, run.config, runtime, stop
        torch.set_float32_matmul_precision("high" if self.config.precision.tf32 else "highest")
        self.progress = Progress()
        self.stopped_by = 0  # the number of a signal; 0: of none
        self.failure: BaseException | None = None
        self.began, self.parts_done = 0.0, 0  # of the step in progress: when, 0: none; its micro-batches done
        self.folder = RunFolder(run.folder, runtime)
        with ExitStack() as if_it_fails:
            if_it_fails.callback(self.folder.close)
            self._set_up(if_it_fails)
            if_it_fails.pop_all()  # from here on `close` does it

    def _set_up(self, if_it_fails: ExitStack) -> None:
        config, runtime, progress = self.config, self.runtime, self.progress
        self.tokens = open_tokens(config, runtime)
        check_tokenizers(config, self.tokens, runtime)
        self.mesh = make_mesh(config.parallel, runtime.world_size, runtime.device.type)
        self.loader = Loader(training_source(config, self.tokens), config.data, self.mesh.reader, self.mesh.readers)
        compute = getattr(torch, config.precision.compute)
        self.implementations = implementations(config, runtime.device)
        self.model, self.context_parallel = parallelize(config, self.mesh, runtime.ranks_of_a_machine, runtime.device)
        if_it_fails.callback(self.context_parallel.close)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = Optimizers(self.model, config.optim, compute, config.parallel.offload_optimizer)
        self.saving = Saving(
            self.run_info, runtime, progress, self.parameters, self.optimizer, self.context_parallel, self.tokens
        )
        self.clock = StepClock(runtime.device)
        self.throughput = Throughput(config, self.mesh, self.context_parallel, runtime)
        self.validation = Validation(config, self.tokens, self.model, self.mesh, runtime)

        is_known_layout = self.saving.resume()  # which may refuse what is asked for, with nothing of the run changed
        runtime.run_on_rank_0(
            lambda: keep_tokenizer(self.tokens, self.run_info.folder, runtime, config.model.init_from)
        )
        if progress.step == 0 and config.model.init_from:
            progress.context = start_from_pretrained(self.model, config.model, runtime)
        if self.mesh.size("context") > 1 and config.parallel.verify and not is_known_layout:
            self._verify_layout()
        self.context_parallel.time_waits(partial(self.clock.part, "context_exposed"))
        time_waits(self.model, partial(self.clock.part, "fsdp_exposed"))
        self.facts = run_facts.collect(
            config, runtime, self.mesh, self.parameters, self.context_parallel, self.implementations, self.tokens
        )
        predicted = {"mem/predicted_gib": "predicted_gib", "time/predicted_s": "predicted_s"}
        self.predicted = {name: self.facts[fact] for name, fact in predicted.items() if fact in self.facts}
        self.metrics = runtime.run_on_all_ranks(
            lambda: Metrics(self.run_info, self.facts, progress.step, runtime.is_main, self.saving.is_branching)
        )
        if_it_fails.callback(lambda: self.metrics.close(Ending(1, "failed at its start")))
        tflops = self.facts["flops_per_token"] * self.facts["tokens_per_step"] / 1e12
        is_unsaid = progress.step < config.optim.steps and "predicted_s" not in self.facts
        self.expected_s = self.throughput.expected_s(tflops, self.metrics.say if is_unsaid else lambda _: None)
        self.stop.say = self.saving.say = self.validation.say = self.metrics.say
        self.validation.alert = self.metrics.alert
        self.stop.left_s = self.left_s
        self.saving.prepare()

    def _verify_layout(self) -> None:
        found = verify_layout(self.model, self.config, self.mesh, self.context_parallel, self.runtime.device)
        self.runtime.say(f"split and whole sequences agree: gradients differ by {found:.1e} of their norm, as rounded")
        if self.runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @property
    def step(self) -> int:
        """Steps taken so far, skipped ones included."""
        return self.progress.step

    @property
    def is_stopped(self) -> bool:
        """Whether a signal ends the run here."""
        return self.stopped_by > 0

    def run(self) -> dict[str, float]:
        """Trains to the last step or until a signal, and saves; returns the last validation's results, if there are."""
        config, progress = self.config, self.progress
        if self._lacks_validation():
            self._record(self.validate())
        pace = Pace()
        while self.step < config.optim.steps and not self.is_stopped:
            is_traced = self.runtime.is_main and self.step + 1 == config.logging.trace_step
            trace = traced(self.run_info.folder, self.step + 1, self.runtime.device, self.metrics.say)
            with trace if is_traced else nullcontext():
                values, asked = self.train_step()
            progress.add_costs(values, self.runtime.world_size)
            left_s = (config.optim.steps - self.step) * pace.of_steps()
            self._log(values | progress.costs() | {"time/left_s": left_s})
            self._refuse_to_go_on_skipping()
            if asked.stop_signal:
                self.stopped_by = int(asked.stop_signal)
                name = signal.Signals(self.stopped_by).name
                self.metrics.say(f"stopping after step {self.step} on signal {name}")
                break
            if self._is_due(config.validation.every_steps):
                self.validate()
            is_asked = asked.save_asked and self.step < config.optim.steps
            if not self.is_stopped and (self._is_due(config.checkpoint.every_steps) or is_asked):
                self.save(config.checkpoint.asynchronous)
            if self.saving.checkpoints.has_ended and not self.saving.checkpoints.has_failed:
                self.saving.wait()
        if config.checkpoint.at_end:
            self.save(config.checkpoint.asynchronous)
        self.saving.wait()
        results = {} if self.is_stopped else self.validate()
        self.pass_gate_together(is_open=False)
        self._record(results)
        return results

    def _lacks_validation(self) -> bool:
        """Whether the step that the run goes on from is to be validated and was not, as after a signal. Collective."""
        if self.validation.source is None or self.saving.saved_step != self.step:
            return False
        file = self.run_info.metrics_file
        return self._is_due(self.config.validation.every_steps) and not self.runtime.run_on_rank_0(
            lambda: is_validated(file, self.step)
        )

    def _record(self, results: dict[str, float]) -> None:
        """Adds what validation has found to the checkpoint of this step, if there are both."""
        if results and self.saving.saved_step == self.step:
            self.saving.record_loss(results["loss/val"])

    def _is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps, 0: never, is to be done before the next one."""
        return bool(every) and self.step % every == 0 and self.step < self.config.optim.steps

    def _log(self, values: dict[str, float]) -> None:
        every, is_last = self.config.logging.every_steps, self.step == self.config.optim.steps
        if self.runtime.is_main:
            values = values | self.metrics.history.values(self.progress.trained_s)
        is_due = is_last or self._must_end() or self.step % every == 0
        self.metrics.log_step(self.step, values, is_due)
        if is_due:
            self.saving.stall_s = 0.0

    def _must_end(self) -> bool:
        return self.progress.skipped_in_row >= self.config.optim.max_skipped_steps

    def _refuse_to_go_on_skipping(self) -> None:
        if self._must_end():
            raise UserError(
                f"{self.progress.skipped_in_row} steps in a row were not finite (optim.max_skipped_steps); stopping at "
                f"step {self.step}. Lower optim.lr, or resume from an earlier checkpoint (checkpoint.resume=PATH)"
            )

    def train_step(self) -> tuple[dict[str, float], Largest]:
        """One step: fetch, forward, backward, clip, update. Returns its metrics, and what was asked for meanwhile."""
        began = time.perf_counter()
        self.began, self.parts_done = began, 0
        self.clock.start()
        batches, problem = self._fetch()
        splits = [self.context_parallel.split(self.config.model, batch.positions) for batch in batches]
        fetched = time.perf_counter()

        self.stop.gate(is_open=True)  # from here to the next gate the step can be abandoned
        counts = summed(self.throughput.count(batches, is_unread=problem is not None))
        if counts.unread:
            raise_together(problem)
        device = self.runtime.device
        weight = token_weight(counts.valid_targets / self.mesh.ranks_of_a_reader, device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for number, (batch, split) in enumerate(zip(batches, splits, strict=True), 1):
            sum_over_replicas(self.model, number == len(batches))
            loss += forward_backward(
                self.model, LocalBatch.of(batch, split, self.mesh, device), weight, self.clock.part
            )
            self.parts_done += 1
            self.metrics.show_progress(self.step + 1, self.parts_done, len(batches))
        with self.clock.part("optimizer"):
            norm = global_norm(list(self.parameters.values()))
        memory, watts = self.throughput.memory(), self.throughput.power.watts()  # while a GPU works: both take a while
        imbalance = self.throughput.imbalance(batches, splits)
        loss_value, norm_value = torch.stack((global_loss(loss, self.mesh), norm.double())).tolist()  # waits for a GPU

        self.stop.gate(is_open=False)
        asked = largest(self._look_around(memory, imbalance, norm_value))  # all know that none abandons the step
        if asked.save_failed:
            self.saving.checkpoints.wait()  # raises, on every rank in the same step
            raise UserError("another rank could not write the checkpoint; its message says why")
        if asked.are_norms_apart:
            raise UserError(
                f"step {self.step + 1}: the norm of the gradient is {-asked.minus_norm:.6g} on one rank and "
                f"{asked.norm:.6g} on another, though all hold the same gradients: replicas have drifted apart, as "
                "where a GPU computes wrong; resume from the last checkpoint, without that machine"
            )
        if asked.is_not_finite and math.isfinite(norm_value):  # of one rank alone: all skip the step
            norm_value = math.nan
        rates = self.optimizer.rates(self.step)
        span = attention_span(self.config, self.step)
        with self.clock.part("optimizer"):
            is_clipped = self._update(loss_value, norm_value, norm)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.began, self.expected_s = 0.0, seconds
        return {
            "loss/train": loss_value if counts.valid_targets else math.nan,
            "optim/grad_norm": norm_value,
            "optim/clipped": float(is_clipped),
            "optim/skipped_steps": self.progress.skipped,
            "time/data_s": fetched - began,
            "time/checkpoint_stall_s": self.saving.stall_s,
            "data/tokens": self.progress.tokens,
            "data/attention_imbalance": asked.imbalance,
            "perf/slowest_over_fastest": asked.slowest_over_fastest,
            **rates,
            **self.predicted,
            **({} if span is None else {"data/span": float(span)}),
            **self.throughput.of_step(seconds, watts, counts),
            **{f"time/{part}_s": part_s for part, part_s in self.clock.seconds().items()},
            **{f"mem/{name}": value for name, value in asked.memory._asdict().items() if value},
            **self.saving.checkpoints.speed,
        }, asked

    def _update(self, loss: float, norm_value: float, norm: torch.Tensor) -> bool:
        """Clips and updates, or skips, alike on all ranks, which have the same numbers; returns whether it clipped."""
        progress, clip_norm = self.progress, self.config.optim.clip_norm
        is_clipped = bool(clip_norm) and math.isfinite(norm_value) and norm_value > clip_norm
        if math.isfinite(loss) and math.isfinite(norm_value):
            if is_clipped:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), clip_norm, norm)
            self.optimizer.step(self.step)
            progress.skipped_in_row = 0
        else:  # parameters and optimizer stay as they were
            progress.skipped += 1
            progress.skipped_in_row += 1
            what = f"step {self.step + 1} skipped on all ranks: loss {loss}, gradient norm {norm_value}"
            self.metrics.say(what)
            self.metrics.alert("not finite", what)
        self.optimizer.zero_grad()
        progress.step += 1
        data = self.config.data
        progress.consumed += data.sequences_per_step
        progress.tokens += data.sequences_per_step * data.sequence_length
        return is_clipped

    def _fetch(self) -> tuple[list[Batch], UserError | None]:
        """The step's micro-batches, or why they cannot be read here."""
        try:
            return self.loader.step(self.progress.consumed, attention_span(self.config, self.step)), None
        except UserError as error:
            return [], error

    def _look_around(self, memory: Memory, imbalance: float, norm: float) -> Largest:
        busy_s, is_finite = self.clock.busy_s(), math.isfinite(norm)
        return Largest(
            norm=norm if is_finite else -math.inf,
            minus_norm=-norm if is_finite else -math.inf,
            is_not_finite=not is_finite,
            imbalance=imbalance,
            busy_s=busy_s,
            minus_busy_s=-busy_s,
            stop_signal=self.stop.number,
            save_asked=self.stop.take_save_asked(),
            save_failed=self.saving.checkpoints.has_failed,
            memory=memory,
        )

    def left_s(self) -> float:
        """Seconds that the step in progress may still take, by the one before and its micro-batches so far."""
        if not self.began:
            return 0.0
        elapsed, expected = time.perf_counter() - self.began, self.expected_s
        if self.parts_done and self.runtime.device.type == "cpu":  # a GPU's are counted when they are launched
            expected = elapsed / self.parts_done * self.loader.accumulation
        return max(0.0, expected - elapsed)

    def heartbeat(self) -> tuple[int, ...]:
        """Numbers of which one grows as long as this rank gets on: what the watchdog looks at."""
        return self.step, self.parts_done, self.stop.gates_passed, self.saving.saved_step or 0

    def pass_gate_together(self, is_open: bool) -> None:
        """A gate of `StopSignals`, and the collective behind it, on the CPU and waited for."""
        self.stop.gate(is_open)
        dist.all_reduce(torch.zeros(1))

    def save(self, in_background: bool = False) -> None:
        """Writes a checkpoint of the run as it is, unless that one exists already."""
        self.pass_gate_together(is_open=False)
        if path := self.saving.save(in_background):
            self.metrics.say(f"saved {path}")

    def validate(self) -> dict[str, float]:
        """Validation metrics of the model as it is, logged and said; none if there is nothing to validate with."""
        results = self.validation.run(self.stop)
        if results is None:
            self.stopped_by = self.stop.number or signal.SIGTERM  # of another rank
            self.metrics.say(f"validation after step {self.step} left on a signal to stop")
            return {}
        if results:
            costs = self.progress.costs() | self.validation.costs()
            self.metrics.log(self.step, {"data/tokens": self.progress.tokens, **results, **costs})
            bits = results.get("loss/val_bits_per_byte")
            more = f", {bits:.4f} bits a byte" if bits else ""
            self.metrics.say(f"validation after step {self.step}: loss {results['loss/val']:.4f}{more}")
            self.progress.validated = self.step, results["loss/val"]
        return results

    def ending(self) -> Ending:
        """How the run ends, if it ends now."""
        if self.failure is not None:
            return Ending.by_error(self.failure)
        return Ending.by_signal(self.stopped_by) if self.is_stopped else COMPLETE

    def close(self) -> None:
        """Ends logging; the run can be resumed from what it has saved."""
        self.context_parallel.close()
        self.saving.checkpoints.close()
        self.metrics.close(self.ending())
        self.folder.close()
