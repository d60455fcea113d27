"""Trains a model: `torchrun --nproc-per-node N train.py recipe=gpt_32k optim.lr=1e-3`.

Where longctx is installed, `longctx recipe=...` and `torchrun -m longctx.train recipe=...` do the same. Without words
it lists the recipes, with `--help` every key and the groups. Hydra composes the configuration, `longctx.run` does the
rest. Nothing heavy is imported before a run starts, so completion and `--cfg job` stay instant.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

try:
    import hydra
    from hydra.conf import HydraConf
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ModuleNotFoundError as error:
    sys.exit(
        f"longctx: {error.name} is not installed; to train, in a checkout of longctx: make train, or pip install "
        "'.[train]'"
    )

from longctx import slurm
from longctx.command_line import (
    as_typed,
    config_folder,
    help_of_keys,
    name_of_job,
    quoted,
    refuse_foreign_launchers,
    script,
)
from longctx.config import Config
from longctx.errors import ConfigError, UserError
from longctx.suggest import all_keys, explain_unknown_key, text_keys

if TYPE_CHECKING:
    from longctx.run_info import RunInfo

schema = OmegaConf.structured(Config)
for mapping in (schema.data.mixture, schema.data.curriculum):  # whose keys are the user's
    OmegaConf.set_struct(mapping, False)
ConfigStore.instance().store(name="schema", node=schema)


CONFIGS = Path(__file__).parent / "configs"
COMMAND_LINE = "LONGCTX_COMMAND_LINE"  # variable that tells jobs which a launcher starts elsewhere what was typed
names: list[str] = []  # of the runs of this process: one, or the jobs of a multirun
failed: list[str] = []  # and those that ended with an error


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(composed: DictConfig) -> float:
    """One run. Returns its last validation loss, which is what Hydra's optimizing sweepers lower."""
    hydra_config = HydraConfig.get()
    overrides = [str(word) for word in hydra_config.overrides.task]
    is_multirun = hydra_config.mode == RunMode.MULTIRUN
    has_ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        if is_multirun:
            words = json.loads(os.environ.get(COMMAND_LINE, "null")) or sys.argv[1:]
            composed.name = name_of_job(composed.name, overrides, words, swept_keys(words))
        if composed.name in names and not is_grid(hydra_config):
            composed.name = f"{composed.name}-{hydra_config.job.num}"  # a sweeper may draw the same values again
        if "WANDB_SWEEP_ID" in os.environ and (trial := os.environ.get("WANDB_RUN_ID")):  # started by a sweep's agent
            composed.name = f"{composed.name}-{trial}"
        refuse_unknown_keys(composed)
        if is_multirun and not is_grid(hydra_config) and not composed.validation.sequences:
            raise ConfigError(["a sweeper lowers the validation loss, and validation.sequences=0 leaves none"])
        if "submitit" in hydra_config.launcher._target_ and "RANK" not in os.environ:
            return start_torchrun(composed, overrides, hydra_config.launcher)
        refuse_foreign_launchers(os.environ)
        config = OmegaConf.to_object(composed)
        assert isinstance(config, Config)
        from longctx.run import train
        from longctx.run_info import RunInfo

        run = RunInfo(config, OmegaConf.to_yaml(composed, resolve=False), overrides)
        if is_multirun and has_ranks:
            run = as_on_rank_0(run)
        if run.config.name in names:
            raise ConfigError(
                [f"name={run.config.name} is that of an earlier job of this multirun; sweep the name too"]
            )
        names.append(run.config.name)
        outcome = train(run)
    except UserError as error:
        if not is_multirun:
            fail(str(error))
        failed.append(f"{composed.name}: {error}")
        if is_main():
            print(f"{Path(sys.argv[0]).name}: {failed[-1]}", file=sys.stderr, flush=True)
        return math.inf
    except Exception as error:
        if not is_multirun or has_ranks:
            raise
        traceback.print_exc()
        failed.append(f"{composed.name}: {type(error).__name__}: {error}")
        return math.inf
    if not outcome.is_complete:  # a signal ends the jobs of a multirun that are still to come, too
        end_of_jobs()
        leave()
        sys.exit(0)
    return to_lower(outcome.loss)


def is_grid(hydra_config: HydraConf) -> bool:
    """Whether the jobs of a multirun are given beforehand, rather than chosen by what earlier ones have reached."""
    return "BasicSweeper" in hydra_config.sweeper._target_


def to_lower(loss: float) -> float:
    """What an optimizing sweeper is told of a run: one that diverged is as bad as one that failed."""
    return loss if math.isfinite(loss) else math.inf


def as_on_rank_0(run: RunInfo) -> RunInfo:
    """What rank 0's sweeper has chosen: those of other ranks draw other values, which are not used."""
    from longctx import runtime

    return runtime.start(run.config.parallel.timeout_seconds).run_on_rank_0(lambda: run)


def words_of_rank(words: list[str]) -> list[str]:
    """Of a multirun, the command line of this rank: the sweepers of other ranks than 0 keep their results elsewhere."""
    if is_main() or not {"-m", "--multirun"} & set(words):
        return words
    kept = [word for word in words if not word.startswith(("hydra.sweeper.storage=", "hydra.sweep.dir="))]
    storage = ["hydra.sweeper.storage=null"] if "hydra/sweeper=optuna" in words else []
    return [*kept, *storage, f"hydra.sweep.dir={tempfile.mkdtemp(prefix='longctx-sweep-')}"]


def start_torchrun(composed: DictConfig, overrides: list[str], launcher: DictConfig) -> float:
    """In a job of submitit, which runs this process once a machine: starts the ranks of this machine.

    As many as `hydra.launcher.gpus_per_node`, else one. Returns the last validation loss.
    """
    import submitit  # pyright: ignore[reportMissingImports]: of those who use it

    from longctx.metrics_file import last_validation_loss

    job = submitit.JobEnvironment()
    ranks = ["--nproc-per-node", str(launcher.get("gpus_per_node") or 1)]
    if job.num_nodes > 1:
        port = slurm.port_of(job.job_id)
        ranks += ["--nnodes", str(job.num_nodes), "--node-rank", str(job.node), "--rdzv-backend", "c10d"]
        ranks += ["--rdzv-id", job.job_id, "--rdzv-endpoint", f"{job.hostnames[0]}:{port}"]
    else:
        ranks.append("--standalone")
    where = config_folder(json.loads(os.environ.get(COMMAND_LINE, "[]")))
    kept = [word for word in overrides if not word.startswith("name=")]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, *script()]
    command += [*where, *kept, f"name={quoted(composed.name)}"]
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SWEEP_ID"}  # the name has its trial
    if subprocess.run(command, env=environment).returncode:
        raise RuntimeError(f"{composed.name} failed; its output says why")
    return to_lower(last_validation_loss(Path(os.path.expanduser(composed.folder)) / composed.name / "metrics.jsonl"))


def end_of_jobs() -> None:
    """Fails if a job of this process has failed."""
    if failed:
        jobs = max(len(names), len(failed))  # those that failed early have no name
        fail(f"{len(failed)} of {jobs} jobs ended with an error:\n" + "\n".join(f"  - {one}" for one in failed))


def swept_keys(words: list[str]) -> set[str]:
    """The keys of the command line that have several values there."""
    parser = OverridesParser.create()
    given = [parser.parse_override(word) for word in words if "=" in word and not word.startswith("-")]
    return {one.key_or_group for one in given if one.is_sweep_override()}


def typed(words: list[str]) -> list[str]:
    """The command line for Hydra: values of text as they were typed."""
    parser, keys = OverridesParser.create(), set(text_keys())
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    if none := next((word for word in words if word.endswith("=null") and word.partition("=")[0] in groups), None):
        name = none.partition("=")[0]
        there = ", ".join(sorted(file.stem for file in (CONFIGS / name).glob("*.yaml")))
        raise ConfigError([f"{none}: {name} is a group of keys; give one of {there}"])

    def parsed(word: str) -> object:
        try:
            return parser.parse_override(word).value()
        except HydraException as error:
            raise ValueError from error

    at_home = [re.sub(r"^folder=~(?=/|$)", f"folder={Path.home()}", word) for word in words]  # Hydra writes there too
    return [as_typed(word, keys, parsed) for word in at_home]


def refuse_unknown_keys(composed: DictConfig) -> None:
    """Keys that `+key=value` has added: Hydra lets them pass."""
    known = set(all_keys())
    groups = {key.rsplit(".", 1)[0] for key in known if "." in key}

    def unknown(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in node:
            path = f"{prefix}{key}"
            if path not in known:
                found.append(path)
            elif path in groups and not OmegaConf.is_missing(node, key):
                found += unknown(node[key], f"{path}.")
        return found

    problems = [explain_unknown_key(key) for key in unknown(composed, "")]
    if problems:
        raise ConfigError(problems)


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def explain(error: BaseException) -> str:
    """One message for an error of the composition: Hydra's own words, and the near misses of an unknown key."""
    lines = [str(error).strip()]
    cause: BaseException | None = error
    while cause is not None:
        key = getattr(cause, "full_key", None)
        if key and type(cause).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
            return explain_unknown_key(key)
        if key == "logging.wandb" and "expected one of" in str(cause):
            lines.append("logging.wandb=disabled turns it off")
        if cause is not error and str(cause).strip() not in lines[-1]:
            lines.append(str(cause).strip())
        cause = cause.__cause__
    return "\n".join(lines)


def leave() -> None:
    """Leaves the process group, if one was joined; not after an error of one rank alone, where it would wait."""
    if "longctx.runtime" in sys.modules:
        sys.modules["longctx.runtime"].stop()


def fail(message: str) -> NoReturn:
    """Ends this process. All ranks fail alike: rank 0 says why, and torchrun repeats it where its own report ends."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        extra = {"timestamp": str(int(time.time())), "py_callstack": message}
        Path(error_file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    leave()
    sys.exit(f"{Path(sys.argv[0]).name}: {message}" if is_main() else 2)


def leave_outside_of_a_run(number: int, _frame: object) -> NoReturn:
    """What a signal does until a run answers it, and between the jobs of a multirun; the exit code tells torchrun."""
    if is_main():
        print(f"{signal.Signals(number).name} while no run is in progress: nothing to save", flush=True)
    sys.exit(128 + number)


def start() -> None:
    """What the command line asks for, in this process."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handler below instead of a shortened trace
    if sys.stderr is not None:
        faulthandler.enable()  # tells where a rank stood when the system ended it (SIGBUS of a file that was cut short)
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:
            signal.signal(number, leave_outside_of_a_run)
    try:
        slurm.join(os.environ)
    except ConfigError as error:
        fail(str(error))
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_of_keys(Config()))
        if not any(word.startswith("recipe=") for word in sys.argv):
            sys.argv.append("recipe=gpt_tiny")  # Hydra composes before it helps
    try:
        sys.argv[1:] = typed(words_of_rank(sys.argv[1:]))
        os.environ[COMMAND_LINE] = json.dumps(sys.argv[1:])
        main()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except ConfigError as error:
        fail(str(error))
    except OSError as error:  # of a disk, outside the run's own files
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    end_of_jobs()
    leave()


if __name__ == "__main__":
    start()
