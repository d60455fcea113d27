"""What a run that goes on from a checkpoint has otherwise than the one that wrote it."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

PLACES = ("name", "folder", "checkpoint.resume")  # where the run is, not what it is
# of the model: how it is computed, or how it began
HARMLESS = ("model.attention", "model.fused_ops", "model.init_from", "model.init_std")


def changes(before: str, now: str) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its value before and now, of two configurations as YAML; keys that only one has are left out."""
    old, new = (_flat(OmegaConf.to_container(OmegaConf.create(text))) for text in (before, now))
    return {key: (old[key], new[key]) for key in new if key in old and old[key] != new[key] and key not in PLACES}


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


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree} if prefix else {}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}
