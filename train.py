"""Trains a model: `torchrun --nproc-per-node N train.py recipe=gpt_32k optim.lr=1e-3`.

`python train.py` alone lists the recipes, `python train.py recipe=gpt_32k --help` the groups. Hydra composes the
configuration, `longctx.trainer` does the rest. Nothing heavy is imported before a run starts, so completion and
`--cfg job` stay instant.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longctx.config import Config, ConfigError, UserError, all_keys, explain_unknown_key

schema = OmegaConf.structured(Config)
for mapping in (schema.data.mixture, schema.data.curriculum):  # whose keys are the user's
    OmegaConf.set_struct(mapping, False)
ConfigStore.instance().store(name="schema", node=schema)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    try:
        refuse_unknown_keys(composed)
        config = OmegaConf.to_object(composed)
        assert isinstance(config, Config)
        from longctx.trainer import train

        overrides = [str(word) for word in HydraConfig.get().overrides.task]
        is_complete = train(config, as_written=OmegaConf.to_yaml(composed, resolve=False), overrides=overrides)
    except UserError as error:
        fail(str(error))
    if not is_complete:  # a signal ends the jobs of a multirun that are still to come, too
        leave()
        sys.exit(0)


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
    sys.exit(f"train.py: {message}" if os.environ.get("RANK", "0") == "0" else 2)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handler below instead of a shortened trace
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    leave()
