"""Trains a model: `torchrun --nproc-per-node N train.py recipe=gpt_32k optim.lr=1e-3`. `--help` lists the groups.

Hydra composes the configuration, `longctx.trainer` does the rest. Nothing heavy is imported before a run starts, so
completion and `--cfg job` stay instant.
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longctx.config import Config, ConfigError, explain_unknown_key

ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    from longctx.trainer import train

    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    train(config, as_written=OmegaConf.to_yaml(composed, resolve=False))


def explain(error: BaseException) -> str:
    """One message for an error of the composition: Hydra's own words, and the near misses of an unknown key."""
    lines = [str(error).strip()]
    cause: BaseException | None = error
    while cause is not None:
        key = getattr(cause, "full_key", None)
        if key and type(cause).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
            return explain_unknown_key(key)
        if cause is not error and str(cause).strip() not in lines[-1]:
            lines.append(str(cause).strip())
        cause = cause.__cause__
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handler below instead of a shortened trace
    try:
        main()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"train.py: {explain(error)}")
