"""One run from its start to its end: what is said before the first step, and what is left after the last."""

from __future__ import annotations

import math
import os
import signal
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longctx import plan, remedies, step_time
from longctx import runtime as runtime_module
from longctx.command_line import how_to_go_on
from longctx.config import (
    AS_FITS,
    Config,
    OnUsr1,
    Optimizer,
    Positions,
    RotaryScaling,
    less_recompute,
)
from longctx.config_checks import check
from longctx.errors import UserError
from longctx.evaluate import sample_texts
from longctx.metrics_file import is_validated, last_validation_loss
from longctx.model.implementations import implementations
from longctx.parallel.mesh import AXES
from longctx.run_info import Ending, RunInfo
from longctx.runtime import Runtime, check_machines, check_memory
from longctx.stopping import StopSignals, leave, say_after_launcher
from longctx.strategy import Choice, strategy_for
from longctx.trainer import Trainer
from longctx.watchdog import Watchdog

PEAKS_OF_MEMORY = Path("/proc/self/clear_refs")  # of Linux: 5 forgets this process's


class Outcome(NamedTuple):
    """How a run ended."""

    is_complete: bool  # it reached its last step, rather than being stopped
    loss: float  # of its last validation, nats a token; NaN if there was none


def train(run: RunInfo) -> Outcome:
    """Trains to the last step, or until a signal. Raises `UserError`."""
    config = run.config
    check(config, runtime_module.world_size())
    with StopSignals(config.parallel.stop_seconds, config.checkpoint.on_usr1 == OnUsr1.stop) as stop:
        runtime = runtime_module.start(config.parallel.timeout_seconds)
        forget_earlier_runs(runtime.device)
        check_machines(runtime)
        choose = strategy_for(runtime.ranks_of_a_machine)
        run = replace(run, config=choose_layers(config, runtime, choose))
        config = run.config
        if config.parallel.check_memory:
            is_foreseen = plan.is_foreseen(**implementations(config, runtime.device))
            runtime.run_on_all_ranks(lambda: check_memory(config, runtime, choose, is_foreseen))
        name = runtime.run_on_rank_0(lambda: uuid.uuid4().hex)
        stop.share(runtime_module.store(f"longctx/signals/{name}"))
        watchdog = Watchdog(runtime.rank, runtime.world_size, config.parallel.timeout_seconds, name)
        try:
            trainer = Trainer(run, runtime, stop)
            watchdog.heartbeat, watchdog.expected_s = trainer.heartbeat, lambda: trainer.expected_s
            stop.abandon = lambda: abandon(trainer)
            try:
                introduce(trainer)
                if trainer.step < config.optim.steps or not _was_finished(trainer):
                    results = trainer.run()
                    trainer.pass_gate_together(is_open=True)
                    finish(trainer, results)
                    trainer.pass_gate_together(is_open=False)
            except BaseException as error:
                if isinstance(error, torch.OutOfMemoryError) and (expected := expected_memory(trainer)):
                    error.add_note(expected)
                if stop.is_abandoning:  # the other ranks have left while this one was waiting for them
                    stop.wait_for_the_end()
                trainer.failure = error
                if runtime.is_main:
                    report = write_report(trainer, [])
                    with suppress(Exception):  # the error that ended the run is the one to be seen
                        trainer.metrics.attach(trainer.step, report, [])
                raise
            finally:
                trainer.close()
        finally:
            watchdog.stop()
        if trainer.is_stopped:
            stop.end_launcher_too()
        return Outcome(not trainer.is_stopped, last_loss(trainer))


def forget_earlier_runs(device: torch.device) -> None:
    """Of this process: compiled versions of blocks, which count against a limit, and peaks of memory."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    with suppress(OSError):  # what getrusage says, where the system can
        PEAKS_OF_MEMORY.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)


def choose_layers(config: Config, runtime: Runtime, choose: Callable[[Config], Choice]) -> Config:
    """The configuration with numbers of layers that are -1 chosen by the memory there is, the same on all ranks.

    Collective. Raises `UserError` where that cannot be planned.
    """
    parallel = config.parallel
    if AS_FITS not in (parallel.recompute_less_layers, parallel.offload):
        return config
    if runtime.device.type == "cpu":
        return remedies.with_layers_chosen(config, runtime.world_size, choose, math.inf)
    if not plan.is_foreseen(**implementations(config, runtime.device)):
        if parallel.offload == AS_FITS:
            raise UserError(
                "parallel.offload=-1 goes by a plan of memory that knows the fused kernels alone; give a number of "
                "layers, or leave model.attention and model.fused_ops as they are"
            )
        return remedies.with_recompute(config, parallel.recompute)  # so no layer recomputes less
    limit = runtime.least(min(remedies.usable(runtime.device_bytes), runtime.free_device_bytes()))
    return remedies.with_layers_chosen(config, runtime.world_size, choose, limit)


def introduce(trainer: Trainer) -> None:
    """Says on rank 0 what will run."""
    config, data, runtime, facts = trainer.config, trainer.config.data, trainer.runtime, trainer.facts
    axes = " x ".join(f"{axis} {facts['layout'][axis]}" for axis in AXES)
    context = f"context: {trainer.context_parallel}\n" if trainer.mesh.size("context") > 1 else ""
    trainer.metrics.say(
        f"longctx run {config.name}: {facts['parameters'] / 1e6:.1f}M parameters, {runtime.world_size} x "
        f"{runtime.device_name}, {axes}\n"
        f"data: {facts['data']}; {data.sequences_per_step} sequences of {data.sequence_length} tokens a step, "
        f"{trainer.loader.accumulation} micro-batches of {trainer.loader.micro_batch}\n"
        f"{context}{traffic_in_words(facts)}attention: {facts['attention']}, other fused ops: {facts['fused_ops']}\n"
        f"{kept_and_where(config)}{expected_memory(trainer)}{unused(config, trainer.run_info.overrides)}"
        f"steps {trainer.step} to {config.optim.steps}, files in {config.run_folder}"
    )


def traffic_in_words(facts: dict[str, Any]) -> str:
    """A line on what keys and gradients cost between machines that share sequences; empty where none do."""
    if "between_machines_gb_per_s" not in facts:
        return ""
    rate, said = facts["between_machines_gb_per_s"], []
    for which in ("forward", "backward"):
        megabytes = facts[f"between_machines_mb_{which}"]
        meanwhile = facts.get(f"attention_s_{which}")
        behind = f" beside {_shown(1000 * meanwhile)} ms of attention" if meanwhile else ""
        said.append(f"{_shown(megabytes)} MB {which}, {_shown(megabytes / rate)} ms{behind}")
    return f"between machines, a layer and micro-batch: {'; '.join(said)}; at the {rate:.3g} GB/s measured\n"


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"


def kept_and_where(config: Config) -> str:
    """A line on what blocks keep, how much at a time and where; empty for a run that does nothing to hold less."""
    parallel, layers = config.parallel, config.model.layers
    said = []
    if less := parallel.recompute_less_layers:
        said.append(
            f"activation checkpointing is {parallel.recompute} in {layers - less} layers, "
            f"{less_recompute(parallel.recompute)} in the last {less}"
        )
    if parallel.tile:
        said.append(f"blocks run in tiles of {parallel.tile} tokens")
    if parallel.head_groups > 1:
        said.append(f"attention runs over one of {parallel.head_groups} groups of heads after the other")
    if parallel.offload:
        said.append(f"what {parallel.offload} of {layers} layers keep is in host memory")
    if parallel.offload_optimizer:
        said.append("the optimizer's moments are in host memory")
    if parallel.is_tiled and parallel.compile:
        said.append("blocks are not compiled")
    return f"to hold less: {', '.join(said)}\n" if said else ""


def unused(config: Config, overrides: list[str]) -> str:
    """Lines on words of the command line that do nothing in this run; empty if all do something."""
    typed = {word.partition("=")[0].lstrip("+") for word in overrides}
    needed = {}
    if config.model.rotary.scaling == RotaryScaling.none:
        needed |= dict.fromkeys(("model.rotary.factor", "model.rotary.original_length"), "a model.rotary.scaling")
    if config.optim.optimizer != Optimizer.muon:
        needed |= dict.fromkeys(("optim.muon_lr", "optim.muon_momentum"), "optim.optimizer=muon")
    return "".join(f"{key} does nothing without {what}\n" for key, what in needed.items() if key in typed)


def expected_memory(trainer: Trainer) -> str:
    """A line with what a GPU is expected to need, and a step to take; empty where that cannot be said."""
    facts = trainer.facts
    if "predicted_gib" not in facts:
        return ""
    seconds = ""
    if "predicted_s" in facts:
        seconds = f"; about {_seconds(facts['predicted_s'])} a step with each sequence one document"
    return (
        f"memory: {facts['predicted_gib']:.1f} of {facts['device_gib']:.1f} GiB expected, in the "
        f"{facts['predicted_at']}: {facts['predicted_terms']}{seconds}\n"
    )


def _seconds(number: float) -> str:
    return f"{number:.2g} s" if number < 10 else step_time.in_words(number)


def _was_finished(trainer: Trainer) -> bool:
    """Says that a run which was resumed at its last step is complete; returns whether it was validated there."""
    steps = trainer.config.optim.steps
    trainer.metrics.say(
        f"complete: step {trainer.step} of {steps}; give optim.steps={2 * steps} to go on, or another name"
    )
    file = trainer.run_info.metrics_file
    return trainer.validation.source is None or trainer.runtime.run_on_rank_0(lambda: is_validated(file, steps))


def finish(trainer: Trainer, results: dict[str, float]) -> None:
    """Samples, unless a signal has stopped the run; the report; where it is and how to go on. Collective."""
    is_complete = trainer.step >= trainer.config.optim.steps and not trainer.is_stopped
    samples = []
    if is_complete and trainer.tokens:
        model, validation = trainer.config.model, trainer.config.validation
        longest = model.max_positions if model.positions == Positions.learned else None
        samples = sample_texts(trainer.model, trainer.tokens, validation, trainer.mesh, trainer.runtime.device, longest)
    if not trainer.runtime.is_main:
        return
    for sample in samples:
        trainer.metrics.say(f"--- sample ---\n{sample}")
    bits = results.get("loss/val_bits_per_byte")
    if results:
        shown = f" ({bits:.4f} bits a byte)" if bits else ""
        trainer.metrics.say(f"--- end ---\nvalidation loss {results['loss/val']:.4f} nats a token{shown}")
    report = write_report(trainer, samples)
    prompts = trainer.config.validation.sample_prompts
    trainer.metrics.attach(trainer.step, report, list(zip(prompts, samples, strict=False)))
    if trainer.saving.saved_step == trainer.step:
        say_how_to_go_on(trainer, is_complete)


def abandon(trainer: Trainer) -> None:
    """Saves the state before the step in progress, tells how to go on, and ends this process. Called on every rank.

    In a thread of its own: the main thread is somewhere in a step, or waits for ranks that are.
    """
    step, metrics, saving = trainer.step + 1, trainer.metrics, trainer.saving
    limit = trainer.config.parallel.stop_seconds
    why = f"step {step} would outlast parallel.stop_seconds={limit}, so it is left"
    metrics.say(why if trainer.began else "leaving what would take longer than parallel.stop_seconds")
    try:
        saving.wait()
        if trainer.step == trainer.progress.skipped:
            metrics.say("no step has changed anything yet, so there is nothing to save")
        elif path := saving.save_beside():
            metrics.say(f"saved {path}")
        saving.checkpoints.finish_beside()
        if saving.saved_step is not None and trainer.runtime.is_main:
            say_how_to_go_on(trainer, is_complete=False)
    except BaseException as error:
        metrics.say(f"the state before step {step} could not be saved: {error}")
        ending = Ending.by_error(error)
    else:
        ending = Ending.by_signal(trainer.stop.number or signal.SIGTERM)
    try:
        metrics.close(ending, seconds=3)
        trainer.stop.end_launcher_too()
    finally:
        leave(int(ending.exit_code == 1))


def write_report(trainer: Trainer, samples: list[str]) -> Path | None:
    """On rank 0: the page, None: it could not be written. A disk that is full is told, and ends nothing."""
    from longctx import report

    run, say = trainer.run_info, trainer.metrics.say
    try:
        trainer.metrics.log_last_step()
        trainer.metrics.record_end(trainer.ending())
        page = report.write_report(run.folder, samples)
        say(f"report: {page}")
        return page
    except OSError as error:
        say(f"no report: {error.filename or run.folder}: {error.strerror}")
    except Exception as error:
        if trainer.failure is None:  # else the error that ended the run is the one to be seen
            raise
        say(f"no report: {error}")
    return None


def say_how_to_go_on(trainer: Trainer, is_complete: bool) -> None:
    """The commands that resume the run, on rank 0."""
    run, stop = trainer.run_info, trainer.stop
    undecayed = trainer.saving.checkpoints.undecayed()
    lines = how_to_go_on(run.config, run.overrides, trainer.runtime.world_size, trainer.step, undecayed, is_complete)
    for line in lines:
        trainer.metrics.say(line)
    if (stop.came_here or stop.is_elsewhere) and not stop.is_orphan and "TORCHELASTIC_RUN_ID" in os.environ:
        say_after_launcher(lines[0])


def last_loss(trainer: Trainer) -> float:
    """Of the last validation, on every rank; NaN if there was none."""
    if trainer.progress.validated:
        return trainer.progress.validated[1]
    return trainer.runtime.run_on_rank_0(lambda: last_validation_loss(trainer.run_info.metrics_file))
