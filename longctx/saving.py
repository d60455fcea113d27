"""The state of a run, its checkpoints, and how it goes on from one."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longctx import resume
from longctx.checkpoint import BEST_BY, VALIDATED_ON, Checkpoints, state_tensors
from longctx.config import Schedule
from longctx.data.mixture import Mixture
from longctx.errors import UserError
from longctx.model.implementations import implementations
from longctx.optim import Optimizers
from longctx.parallel.context_parallel import ContextParallel
from longctx.plan import checkpoint_bytes
from longctx.run_info import RunInfo
from longctx.run_record import shown_configuration
from longctx.runtime import Runtime
from longctx.schedule import decay_start

# of parallel: computes nothing differently
NO_LAYOUT = ("timeout_seconds", "stop_seconds", "check_memory", "verify", "offload_optimizer")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # steps taken, skipped ones included
    consumed: int = 0  # sequences of this order of the data that were read, over all ranks
    tokens: int = 0  # read, over all ranks, those of the run of which this is a branch too
    context: int = 0  # tokens that the weights have been trained for, before this start too; 0: not known
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_row: int = 0
    trained_s: float = 0.0  # in steps that counted, over all starts of the run
    device_s: float = 0.0  # in all steps, skipped ones too, times the ranks of each start
    pflop: float = 0.0  # of these steps
    validated: tuple[int, float] | None = None  # step, and loss there in nats a token

    def add_costs(self, values: dict[str, float], ranks: int) -> None:
        """Counts a step by its metrics."""
        seconds = values["perf/step_s"]
        if not self.skipped_in_row:
            self.trained_s += seconds
        self.device_s += seconds * ranks
        self.pflop += values["perf/tflops_per_gpu"] * seconds * ranks / 1000

    def costs(self) -> dict[str, float]:
        """What the steps so far have cost, as metrics."""
        return {"run/device_s": self.device_s, "run/pflop": self.pflop}


class Saving:
    """Writes the checkpoints of a run on this rank, and restores it from one."""

    def __init__(
        self, run: RunInfo, runtime: Runtime, progress: Progress, parameters: dict[str, torch.nn.Parameter],
        optimizer: Optimizers, context_parallel: ContextParallel, tokens: Mixture | None,
    ) -> None:  # fmt: skip
        # The parameters as they are handed out at the start: after a forward pass without a backward one, the model's
        # own are the gathered copies in the compute dtype.
        self.configuration = resume.as_yaml(shown_configuration(run))  # what a run that goes on is compared with
        self.run, self.runtime, self.progress, self.parameters = run, runtime, progress, parameters
        self.optimizer, self.context_parallel, self.tokens = optimizer, context_parallel, tokens
        config = run.config
        undecayed = decay_start(config.optim) if config.optim.schedule == Schedule.wsd else None
        self.checkpoints = Checkpoints(run.folder / "checkpoints", config.checkpoint.keep, runtime, undecayed)
        self.say = runtime.say  # that of the metrics, once there are any
        self.saved_step: int | None = None
        self.origin: str | None = None  # the checkpoint of another run of which this run is a branch
        self.went_back_to: str | None = None  # the checkpoint of its own that it was last told to go on from
        self.is_branching = False  # this start begins at a checkpoint of another run
        self.stall_s = 0.0  # that training has waited for checkpoints, since it was last asked

    def prepare(self) -> None:
        """Makes room for copies in host memory, if checkpoints are written in the background."""
        if self.run.config.checkpoint.asynchronous and self.run.config.checkpoint.every_steps:
            self.checkpoints.prepare(self.state())

    def _check_room(self) -> None:
        """Raises `UserError` if the disk cannot hold what the run will save from here on. Collective."""
        config, step, steps = self.run.config, self.progress.step, self.run.config.optim.steps
        every = config.checkpoint.every_steps
        validated_every = config.validation.every_steps if config.validation.sequences else 0
        to_come = list(range((step // every + 1) * every, steps, every)) if every else []
        keeps_best = bool(validated_every) and any(s % validated_every == 0 for s in to_come)
        if config.checkpoint.at_end and step < steps:
            to_come.append(steps)
        self.checkpoints.check_room(step, to_come, checkpoint_bytes(config), keeps_best)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint, by name."""
        return state_tensors(self.parameters, self.optimizer.state())

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says beside the tensors."""
        progress = self.progress
        best = {BEST_BY: progress.validated[1]} if progress.validated and progress.validated[0] == progress.step else {}
        return {
            "consumed": progress.consumed,
            "tokens": progress.tokens,
            "context": progress.context,
            "updates": progress.step - progress.skipped,
            "skipped": progress.skipped,
            "trained_s": progress.trained_s,
            "device_s": progress.device_s,
            "pflop": progress.pflop,
            "data": self.data_order(),
            "end_of_document": self.tokens.end_of_document if self.tokens else None,
            "ends": self.tokens.ends if self.tokens else [],
            "resumed_from": self.origin,
            "went_back_to": self.went_back_to,
            VALIDATED_ON: self.run.config.validation.sequences,
            "undecayed_until": self.checkpoints.undecayed_until,
            **best,
            "layout": self.layout(),
            "torch": torch.__version__,
            "configuration": self.configuration,
        }

    def layout(self) -> dict[str, Any]:
        """What decides how a step is computed on these ranks, as data."""
        parallel = {key: value for key, value in asdict(self.run.config.parallel).items() if key not in NO_LAYOUT}
        computed = implementations(self.run.config, self.runtime.device)
        computed |= {"compute": str(self.run.config.precision.compute)}
        return parallel | computed | {"world_size": self.runtime.world_size} | self.context_parallel.identity()

    def data_order(self) -> dict[str, Any]:
        """All that decides which sequence is number 0, 1, 2 ..."""
        data = self.run.config.data
        copies = f" with {data.copies} copies" if data.copies else ""
        packed = ", conversations packed by length" if self.tokens and self.tokens.is_packed(data) else ""
        windows = {resume.WINDOWS: "to the last token, conversations whole"} if self.tokens else {}
        return windows | {
            "corpus": self.tokens.fingerprint() + copies + packed if self.tokens else str(data.recall),
            "seed": self.run.config.seed,
            "data.sequence_length": data.sequence_length,
            "data.separate_documents": data.separate_documents,
        }

    def save(self, in_background: bool) -> Path | None:
        """Writes a checkpoint of the run as it is, unless that one exists; returns where it is, once it is there."""
        started = time.perf_counter()
        self.wait()
        step, written = self.progress.step, None
        if self.saved_step == step:
            return None
        if in_background:
            self.checkpoints.save_in_background(step, self.state(), self.facts())
        else:
            written = self.checkpoints.save(step, self.state(), self.facts())
        self.saved_step = step
        self.stall_s += time.perf_counter() - started
        return written

    def save_beside(self) -> Path | None:
        """As `save`, from another thread than the training step's."""
        if self.saved_step == self.progress.step or not self.run.config.checkpoint.at_end:
            return None
        path = self.checkpoints.save_beside(self.progress.step, self.state(), self.facts())
        self.saved_step = self.progress.step
        return path

    def wait(self) -> None:
        """Until the checkpoint being written is there, which is then said. Raises `UserError` if it failed."""
        if path := self.checkpoints.wait():
            self.say(f"saved {path}")

    def record_loss(self, loss: float) -> None:
        """Adds the validation loss to the last checkpoint, which is written before the loss is known."""
        try:
            self.checkpoints.record(self.checkpoints.folder / f"step_{self.progress.step}", {BEST_BY: loss})
        except UserError as error:
            self.say(f"the validation loss is not in the checkpoint: {error}")

    def resume(self) -> bool:
        """Goes on from the newest checkpoint of this run, or from the one that `checkpoint.resume` names.

        Returns whether there is one that was made by the layout of this run. Collective. Raises `UserError` if there is
        one that this run cannot go on from, or no room for what it will save.
        """
        found = self._to_go_on_from()
        if found is None:
            self._check_room()
            return False
        return self._restore(*found)

    def _to_go_on_from(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to begin with, and its manifest; None: the run begins anew. As `resume`."""
        checkpoint, newest = self.run.config.checkpoint, self.checkpoints.newest()
        if checkpoint.resume == "never" and newest:
            raise UserError(
                f"{self.checkpoints.folder} has checkpoints and checkpoint.resume=never; give the run another name"
            )
        if given := checkpoint.branches_from:
            is_there = self.runtime.run_on_rank_0(lambda: os.path.exists(given))
            if Path(given).name == given and not is_there:  # a word
                raise UserError(f"checkpoint.resume={given}: must be auto, never, or the folder of a checkpoint")
            given = resume.in_one_way(given)
            names_own = self._is_own(Path(given))
            origin, back = self._beginnings(newest[1]["facts"]) if newest else (None, None)
            if names_own:
                self.went_back_to = given
                is_restart = newest is not None and back == given and not self._learns_otherwise(newest[1])
            else:
                self.origin = given
                is_restart = origin is not None and resume.in_one_way(origin) == given
            if newest and not is_restart and not names_own:
                began = f"at {origin}" if origin else "anew"
                raise UserError(
                    f"{self.checkpoints.folder} has checkpoints of a run that began {began}, "
                    f"not at {given}: give the branch another name, or remove the folder"
                )
            if not is_restart:  # which goes on where it was
                self.is_branching = not names_own
                # `latest` of a run that goes on may lead elsewhere by the time that the tensors are read
                path = Path(self.runtime.run_on_rank_0(lambda: str(Path(given).resolve())))
                newest = path, self.checkpoints.verify(path)
        return newest

    def _restore(self, path: Path, manifest: dict[str, Any]) -> bool:
        """Goes on from a checkpoint. Returns and raises as `resume`."""
        progress, is_own, facts = self.progress, not self.is_branching, manifest["facts"]
        if is_own:  # a branch that goes on without saying so stays one
            origin, back = self._beginnings(facts)
            self.origin, self.went_back_to = self.origin or origin, self.went_back_to or back
        is_same_order = resume.is_same_order(path, facts["data"], self.data_order(), is_own)
        if message := resume.compare(path, manifest, self.run.config, self.configuration, is_own):
            self.runtime.say(message)
        self.checkpoints.load(path, manifest, self.state())
        progress.step, progress.consumed = int(manifest["step"]), int(facts["consumed"])
        progress.tokens = facts.get("tokens", progress.consumed * facts["data"]["data.sequence_length"])
        progress.context = max(facts.get("context", 0), facts["data"]["data.sequence_length"])
        if not is_same_order:
            progress.consumed = 0
        progress.skipped, self.optimizer.updates = int(facts["skipped"]), int(facts["updates"])
        if is_own:
            progress.trained_s = facts["trained_s"]
        # what the weights have cost, those of a branch too; of a checkpoint that does not say it: unknown, or nearly
        progress.pflop = facts.get("pflop", math.nan)
        progress.device_s = facts.get("device_s", facts["trained_s"] * facts["layout"]["world_size"])
        fell_at = resume.undecayed_until(manifest)
        if fell_at is not None and progress.step > fell_at:  # no later checkpoint is of before the rate fell
            self.checkpoints.undecayed_until = fell_at
        self._check_room()
        self.checkpoints.set_aside_after(progress.step if is_own else -1)
        self.saved_step = progress.step if is_own else None
        anew = "" if is_same_order else "; the data comes in another order here and is read from its first sequence on"
        self.runtime.say(f"resumed from {path}: step {progress.step}, {progress.tokens} tokens read{anew}")
        # as rank 0 has it, as others may have other GPUs: what follows of it is done together
        layout = self.layout()
        return self.runtime.run_on_rank_0(lambda: layout == {key: facts["layout"].get(key) for key in layout})

    def _beginnings(self, facts: dict[str, Any]) -> tuple[str | None, str | None]:
        """Of which checkpoint a run is a branch, and to which of its own it went back, by a checkpoint's facts."""
        origin, back = facts["resumed_from"], facts.get("went_back_to")
        if origin and self._is_own(Path(origin)):  # as earlier versions kept it
            return None, origin
        return origin, back

    def _learns_otherwise(self, newest: dict[str, Any]) -> bool:
        """Whether the run learns by other values than that of the newest manifest, which had gone back to a checkpoint.

        Rank 0 says so for all: others may have folders of their own.
        """
        before = newest["facts"]["configuration"]
        return self.runtime.run_on_rank_0(lambda: resume.learns_otherwise(before, self.configuration))

    def _is_own(self, checkpoint: Path) -> bool:
        """Whether a checkpoint, which may be a link to another disk, is named as one of this run."""
        return checkpoint.parent.resolve() == self.checkpoints.folder.resolve()
