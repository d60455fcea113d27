"""What a run that goes on from a checkpoint has otherwise than the one that wrote it."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from longctx.config import Config, OptimConfig, Schedule, warmup_steps
from longctx.errors import UserError
from longctx.schedule import decay_start

WINDOWS = "windows"  # key of a checkpoint's facts on its data: how text is cut into sequences
ESCAPED = "\\${"  # which OmegaConf takes for text
# keys that the weights of a step depend on
LEARNED_BY = (
    "model.", "optim.", "precision.", "data.sequences_per_step", "data.curriculum", "data.mixture", "data.copies"
)  # fmt: skip
PLACES = ("name", "folder", "checkpoint.resume")  # where the run is, not what it is
WHOLE = ("data.mixture", "data.curriculum")  # whose keys are the user's: compared as one value
# of the model: how it is computed, or how it began
HARMLESS = ("model.attention", "model.fused_ops", "model.init_from", "model.init_std")


def compare(path: Path, manifest: dict[str, Any], config: Config, now: str, is_own: bool) -> str | None:
    """What to say of the configuration `now` beside that of the checkpoint at `path`; None: they are alike.

    `is_own`: the run goes on, rather than branching off from another. Raises `UserError` if it cannot be the same run.
    """
    step = int(manifest["step"])
    if is_own and step > config.optim.steps:
        raise UserError(
            f"{path}: the run is at step {step}, after its last one, optim.steps={config.optim.steps}; give "
            f"optim.steps={step} or more, another name, or with that an earlier step's checkpoint as checkpoint.resume"
        )
    if not is_own and step >= config.optim.steps:
        raise UserError(
            f"{path}: is of step {step}, and a branch counts on from there: optim.steps={config.optim.steps} leaves it "
            f"no step; give optim.steps={step + config.optim.steps} for {config.optim.steps} more"
        )
    changed = changes(manifest["facts"]["configuration"], now)
    if is_own and (other := of_another_run(changed)):
        raise UserError(
            f"{path}: with {in_words(other)} this would be another run than the one saved here; restore that, or start "
            f"one with another name: from its beginning, or, with a model of the same shapes, checkpoint.resume={path}"
        )
    warmup, before = warmup_steps(config.optim), warmup_steps(_saved_optim(manifest["facts"]["configuration"]))
    again = f"; the learning rate is in its warm-up of {warmup} steps again" if max(1, before) <= step < warmup else ""
    return f"changed since {path}: {in_words(changed)}{again}" if changed else None


def is_same_order(path: Path, saved: dict[str, Any], here: dict[str, Any], is_own: bool) -> bool:
    """Whether what decides which sequence comes when is as it was saved at `path`.

    Raises `UserError` if it is not and the run is that of the checkpoint (`is_own`), rather than a branch of it.
    """
    changed = [f"{key} was {saved.get(key)}, is {value}" for key, value in here.items() if saved.get(key) != value]
    if changed and is_own:
        if WINDOWS in here and WINDOWS not in saved:
            changed = ["an earlier version of longctx cut text otherwise"]
        raise UserError(
            f"{path} was trained on another order of sequences: {'; '.join(changed)}. Some would be read twice and "
            f"some never; restore it, or start a run with another name and checkpoint.resume={path}"
        )
    return not changed


def as_yaml(configuration: dict[str, Any]) -> str:
    """A nested configuration as checkpoints keep it: texts with `${` are texts there, and refer to nothing."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(configuration)))


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return value.replace("${", ESCAPED) if isinstance(value, str) and not isinstance(value, Enum) else value


def changes(before: str | dict[str, Any], now: str | dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its value before and now, of two configurations, nested or as YAML.

    Left out are keys that only one has, and those of an earlier version's that say where a value was to be found
    (`${...}`) in place of it.
    """
    old, new = (_flat(_nested(found)) for found in (before, now))
    compared = {
        key for key in new if key in old and key not in PLACES and "${" not in str(old[key]).replace(ESCAPED, "")
    }
    return {key: (old[key], new[key]) for key in new if key in compared and old[key] != new[key]}


def _nested(configuration: str | dict[str, Any]) -> Any:
    if isinstance(configuration, dict):
        configuration = as_yaml(configuration)
    return OmegaConf.to_container(OmegaConf.create(configuration))


def learns_otherwise(before: str, now: str) -> bool:
    """Whether two configurations as YAML differ in what the weights of a step depend on."""
    changed = set(changes(before, now)) - set(HARMLESS) - {"optim.steps", "optim.max_skipped_steps"}
    return any(key.startswith(LEARNED_BY) for key in changed)


def of_same_branch(before: str, now: str) -> bool:
    """Whether two configurations as YAML begin at the same checkpoint of another run."""
    places = [OmegaConf.create(text).checkpoint.resume for text in (before, now)]
    return len({in_one_way(os.path.expanduser(place)) for place in places}) == 1


def in_one_way(checkpoint: str) -> str:
    """The path of a checkpoint however it is written; `latest` stays that, since what it points to moves."""
    path = Path(os.path.abspath(checkpoint))
    return str(path.parent.resolve() / path.name)


def in_words(changed: dict[str, tuple[Any, Any]]) -> str:
    """`optim.lr 0.001 -> 0.005, optim.steps 6 -> 12`"""
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())


def of_another_run(changed: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Those with which it would be another model, or another optimizer's state, than was trained so far."""
    return {
        key: values
        for key, values in changed.items()
        if key == "optim.optimizer" or (key.startswith("model.") and key not in HARMLESS)
    }


def undecayed_until(manifest: dict[str, Any]) -> int | None:
    """The step from which on the learning rate had fallen, by the schedules up to a checkpoint; None: by none."""
    facts = manifest["facts"]
    if "undecayed_until" in facts:
        return facts["undecayed_until"]
    if OmegaConf.create(facts["configuration"]).optim.get("schedule") != Schedule.wsd:
        return None
    return decay_start(_saved_optim(facts["configuration"]))


def _saved_optim(configuration: str) -> OptimConfig:
    """What schedules go by, of a configuration as YAML."""
    optim = OmegaConf.create(configuration).optim
    given = {key: optim[key] for key in ("warmup_steps", "decay_fraction") if key in optim}
    return OptimConfig(steps=optim.steps, **given)


def _number(key: Any) -> Any:
    """A key that spells a number as that."""
    for kind in (int, float):
        try:
            return kind(key) if isinstance(key, str) else key
        except ValueError:
            continue
    return key


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    path = prefix.removesuffix(".")
    if path in WHOLE and isinstance(tree, dict):
        return {path: {_number(key): value for key, value in tree.items()}}  # steps are texts in what was JSON once
    if not isinstance(tree, dict) or not tree:
        return {path: tree} if prefix else {}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}
