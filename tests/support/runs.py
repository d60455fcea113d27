"""Small runs for tests: a configuration, a trainer, a whole run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from in_process import output_of
from longctx import (
    run,
    runtime,
)
from longctx import (
    train as command,  # noqa: F401  registers the schema with Hydra
)
from longctx.config import ComputeDtype, Config, DataSource, ModelConfig, Optimizer, WandbMode
from longctx.run import Outcome
from longctx.run_info import RunInfo
from longctx.stopping import StopSignals
from longctx.trainer import Trainer

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TINY = ModelConfig(vocab_size=8192, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=64)


def composed(*overrides: str) -> Config:
    """The configuration that a command line gives; its name is `test` if none of the words is one."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=["name=test", *overrides])
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


def small_config(folder: Path, corpus: Path, **changes) -> Config:
    """8 steps of 4 sequences of 64 tokens in float32; `changes` are dotted keys with `__` for the dot."""
    config = Config(name="test", folder=str(folder), model=dataclasses.replace(TINY))
    config.data.source, config.data.folder = DataSource.prepared, str(corpus)
    config.data.sequence_length, config.data.sequences_per_step, config.validation.sequences = 64, 4, 4
    config.optim.steps, config.optim.warmup_steps, config.optim.lr = 8, 2, 3e-3
    config.optim.optimizer = Optimizer.adamw
    config.precision.compute = ComputeDtype.float32
    config.logging.wandb, config.validation.sample_tokens = WandbMode.disabled, 0
    for path, value in changes.items():
        *groups, key = path.split("__")
        target = config
        for group in groups:
            target = getattr(target, group)
        assert hasattr(target, key), path
        setattr(target, key, value)
    if config.optim.steps <= 2 and "optim__warmup_steps" not in changes:
        config.optim.warmup_steps = 0
    return config


def run_info(config: Config, overrides: list[str] | None = None) -> RunInfo:
    """What a run is started with."""
    return RunInfo(config, OmegaConf.to_yaml(OmegaConf.structured(config)), overrides or [])


def train(config: Config, overrides: list[str] | None = None) -> Outcome:
    """A whole run in this process."""
    return run.train(run_info(config, overrides))


def run_as_typed(typed: list[str], *more: str, folder: Path) -> str:
    """What a page's command, `python TOOL` or `torchrun ... train.py`, prints in `folder`, in this process alone.

    `more`: words behind those, which make a run small. Words in brackets, which may be left out, are left out.
    """
    program, *rest = (word for word in typed if not word.startswith("["))
    if Path(program).name == "python":
        return output_of(ROOT / rest[0], *rest[1:], *more, folder=folder)
    option, ranks, script, *words = rest
    assert (Path(program).name, option, script) == ("torchrun", "--nproc-per-node", "train.py"), typed
    assert ranks == "gpu" or int(ranks) > 0
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        assert train(composed(*words, *more), [*words, *more]).is_complete
    return out.getvalue()


@contextlib.contextmanager
def trainer_of(config: Config) -> Iterator[Trainer]:
    """A trainer in this process, closed at the end; the process group stays for the next one."""
    with StopSignals() as stop:
        trainer = Trainer(run_info(config), runtime.start(60), stop)
        try:
            yield trainer
        finally:
            trainer.close()


def losses_of(config: Config, steps: int) -> list[float]:
    """Training losses of the next `steps` steps of a run."""
    with trainer_of(config) as trainer:
        return [trainer.train_step()[0]["loss/train"] for _ in range(steps)]
