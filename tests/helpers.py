"""Small runs for tests: a corpus, a configuration, a trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from longctx import runtime
from longctx.config import ComputeDtype, Config, DataSource, ModelConfig, Optimizer, WandbMode
from longctx.data.prepare import prepare
from longctx.data.text import Document, FilePiece, cut_files, find_files
from longctx.stopping import StopSignals
from longctx.trainer import Trainer

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TINY = ModelConfig(vocab_size=8192, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=64)


class Documents(list[Document]):
    """A piece of input for `prepare`, of documents at hand."""

    @property
    def size(self) -> int:
        return sum(len(text) for document in self for text in document.pieces)

    @property
    def identity(self) -> str:
        return repr(self)

    def documents(self) -> Iterator[Document]:
        return iter(self)


def find_pieces(paths: list[Path], text_field: str = "text", skip_unreadable: bool = False) -> list[FilePiece]:
    """The files of `paths`, cut into pieces, as tools/prepare_data.py does it."""
    return cut_files(find_files(paths).files, text_field, skip_unreadable)


def make_corpus(folder: Path, documents: int = 40) -> Path:
    """Token shards of short numbered texts, every eighth held out."""
    texts = Documents(
        Document(
            f"text {i}",
            ["".join(f"def function_{i}_{j}(x):\n    return x + {j}\n\n" for j in range(1 + i % 9))],
            i % 8 == 0,
        )
        for i in range(documents)
    )
    prepare([texts], folder)
    return folder


def small_config(folder: Path, corpus: Path, **changes) -> Config:
    """8 steps of 4 sequences of 64 tokens in float32; `changes` are dotted keys with `__` for the dot."""
    config = Config(name="test", folder=str(folder), model=dataclasses.replace(TINY))
    config.data.source, config.data.folder = DataSource.prepared, str(corpus)
    config.data.sequence_length, config.data.sequences_per_step, config.data.validation_sequences = 64, 4, 4
    config.optim.steps, config.optim.warmup_steps, config.optim.lr = 8, 2, 3e-3
    config.optim.optimizer = Optimizer.adamw
    config.precision.compute = ComputeDtype.float32
    config.logging.wandb, config.logging.sample_tokens = WandbMode.disabled, 0
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


@contextlib.contextmanager
def trainer_of(config: Config) -> Iterator[Trainer]:
    """A trainer in this process, closed at the end; the process group stays for the next one."""
    with StopSignals() as stop:
        written = OmegaConf.to_yaml(OmegaConf.structured(config))
        trainer = Trainer(config, written, [], runtime.start(60), stop)
        try:
            yield trainer
        finally:
            trainer.close()


def losses_of(config: Config, steps: int) -> list[float]:
    """Training losses of the next `steps` steps of a run."""
    with trainer_of(config) as trainer:
        return [trainer.train_step()[0]["loss/train"] for _ in range(steps)]
