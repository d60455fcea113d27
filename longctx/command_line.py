"""Words of the command line: help, strings taken as they were typed, names of a multirun's jobs, how to resume."""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from longctx.config import Config, attention_span, keys
from longctx.errors import ConfigError
from longctx.machine import ranks_of_a_machine
from longctx.schedule import schedule

OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'"


def as_typed(word: str, text_keys: set[str], parsed: Callable[[str], object]) -> str:
    """An override with its value quoted for Hydra, if its key holds text that Hydra would read as something else.

    `name=1.10` would be the number 1.1, `name=12e4567` infinity, `name=1_000` 1000. Every value of a sweep is treated
    so (`name=1.1,1.10`) and every part of a list. `parsed` tells what Hydra makes of `key=value`, and raises ValueError
    if it cannot read that. Raises `ConfigError` where a function of Hydra hides the words (`name=choice(1.1,1.10)`).
    """
    key, equals, value = word.partition("=")
    if not equals or key.lstrip("+") not in text_keys:
        return word
    return f"{key}={','.join(_quoted(key, part, parsed) for part in split(value))}"


def split(value: str) -> Iterator[str]:
    """The parts of a value between its commas, those inside quotes and brackets left alone."""
    part, depth, quote = "", 0, ""
    for i, character in enumerate(value):
        is_escaped = i > 0 and value[i - 1] == "\\"
        if quote:
            quote = "" if character == quote and not is_escaped else quote
        elif character in QUOTES and not is_escaped:
            quote = character
        elif character in OPENING + CLOSING:
            depth += 1 if character in OPENING else -1
        if character == "," and not quote and depth == 0 and not is_escaped:
            yield part
            part = ""
        else:
            part += character
    yield part


def _quoted(key: str, part: str, parsed: Callable[[str], object]) -> str:
    if part.startswith("[") and part.endswith("]") and part != "[]":
        return f"[{','.join(_quoted(key, inner, parsed) for inner in split(part[1:-1]))}]"
    if part[:1] in tuple(QUOTES) or not part.strip():
        return part
    try:
        found = parsed(f"{key}={part}")
    except ValueError:
        return quoted(part)
    if found is None or isinstance(found, str):  # null is refused, or meant
        return part
    if isinstance(found, bool | int | float):
        return quoted(part)
    if any(isinstance(value, bool | int | float) for value in getattr(found, "list", ())):
        raise ConfigError([f"{key}={part}: {key} is text, and its numbers would be rewritten; quote each: '1.10'"])
    return part


def quoted(text: str) -> str:
    """`text` as Hydra reads it back, whatever it holds."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    return "'" + re.sub(r"\\+$", lambda found: found[0] * 2, escaped) + "'"


def name_of_job(name: str, overrides: list[str], typed: list[str], swept: set[str]) -> str:
    """The name of one job of a multirun: with the values that are swept, unless the name itself is among them.

    `overrides`: the job's; `typed`: the words of the command line; `swept`: the keys that have several values there.
    What is not there at all a sweeper has added.
    """
    there = {word.partition("=")[0].lstrip("+") for word in typed}
    given = next((word for word in typed if word.startswith("name=")), "")
    if "name" in swept or "${" in given:
        return name
    parts = [name]
    for word in overrides:
        key, _, value = word.partition("=")
        key = key.lstrip("+")
        if key != "recipe" and (key in swept or key not in there):  # a name begins with the recipe by itself
            parts.append(f"{key.rsplit('.', 1)[-1]}_{value}")
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts)) if len(parts) > 1 else name


def script() -> list[str]:
    """What torchrun starts: `train.py` where this is a checkout, named as from here; else the installed module."""
    file = Path(__file__).parents[1] / "train.py"
    return [str(_as_from_here(file))] if file.exists() else ["-m", "longctx.train"]


def torchrun() -> str:
    """The one of this environment, named as from here."""
    return str(_as_from_here(Path(sys.executable).parent / "torchrun"))


def _as_from_here(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def config_folder(words: list[str]) -> list[str]:
    """Those words of a command line that name a folder of presets and recipes: `--config-dir FOLDER`."""
    places = [i for i, word in enumerate(words) if word.partition("=")[0] in ("--config-dir", "-cd")]
    return [part for i in places for part in words[i : i + (1 if "=" in words[i] else 2)]]


def resume_command(config: Config, overrides: list[str], world_size: int, **changes: str) -> str:
    """What to type, in any folder and on each machine, to go on with this run.

    `changes`: keys (`optim__steps`) with other values.
    """
    launcher = [str(_as_from_here(Path(sys.executable).parent / "python"))]
    if world_size > 1:
        per_machine = ranks_of_a_machine(world_size)
        meeting = meeting_of(world_size // per_machine, os.environ.get("MASTER_ADDR", "HOST"))
        launcher = [torchrun(), *meeting, "--nproc-per-node", str(per_machine)]
    given = {"name": config.name} | {key.replace("__", "."): value for key, value in changes.items()}
    kept = [w for w in overrides if w.partition("=")[0].lstrip("+") not in (*given, "optim.steps", "checkpoint.resume")]
    given.setdefault("optim.steps", str(config.optim.steps))
    words = [f"{key}={value if _is_plain(value) else quoted(value)}" for key, value in given.items()]
    command = shlex.join([*launcher, *script(), *config_folder(sys.argv), *kept, *words])
    return f"cd {shlex.quote(str(Path.cwd()))} && {command}"


def meeting_of(machines: int, first: str) -> list[str]:
    """Words for torchrun, on each of so many machines, by which they find each other: at the first of these."""
    words = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:29500"]
    return words if machines > 1 else []


def how_to_go_on(
    config: Config, overrides: list[str], world_size: int, step: int, undecayed: Path | None, is_complete: bool
) -> list[str]:
    """The command that resumes; of a complete run also what learning rate and span would do, and how to avoid that.

    `undecayed`: a checkpoint from before the learning rate fell.
    """
    optim = config.optim
    steps = optim.steps * (2 if is_complete else 1)
    machines = world_size // ranks_of_a_machine(world_size)
    where = f", on each of {machines} machines" if machines > 1 else ""
    lines = [f"resume{where}: {resume_command(config, overrides, world_size, optim__steps=str(steps))}"]
    longer = replace(config, optim=replace(optim, steps=steps))
    before, after = attention_span(config, step - 1), attention_span(longer, step)
    if is_complete and after is not None and after != before:
        lines.append(f"  attention will be cut every {after} tokens again, until data.curriculum lets it grow")
    now = optim.lr * schedule(step - 1, optim)
    then = optim.lr * schedule(step, longer.optim)
    if not is_complete or then <= 1.01 * now:
        return lines
    lines.append(f"  the learning rate will go back up, from {now:.2g} to {then:.2g} (optim.schedule={optim.schedule})")
    if undecayed:
        words = {"name": f"{config.name}-longer", "optim__steps": str(steps), "checkpoint__resume": str(undecayed)}
        command = resume_command(config, overrides, world_size, **words)
        lines.append(f"  or branch off from before it fell: {command}")
    return lines


def _is_plain(value: str) -> bool:
    """Whether a value can stand in a command as it is: words as they are typed are taken so."""
    return value != "null" and bool(re.fullmatch(r"[\w./+=@: -]+", value))


def help_of_keys(config: Config) -> str:
    """Every key with its default, its limits or choices, and what it means: as they stand at the fields of `Config`."""
    lines, group = [], None
    for key in keys(config):
        head = key.path.rpartition(".")[0]
        if head != group:
            group = head
            lines.append(f"\n== {group or 'the run'} ==")
        value = "null" if key.value is None else str(key.value).lower() if isinstance(key.value, bool) else key.value
        allowed = ", ".join(type(key.value)) if isinstance(key.value, StrEnum) else str(key.limits)
        text = f"{key.help}{f' ({allowed})' if allowed else ''}"
        lines.append(f"  {key.path}={value}")
        lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def refuse_foreign_launchers(environment: Mapping[str, str]) -> None:
    """Raises `ConfigError` if several processes were started by what tells them nothing of each other: each would be
    alone. Those of torchrun know, and those of srun, see `slurm.join`."""
    if "RANK" in environment:
        return
    for launcher, names in (
        ("srun", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
        ("mpirun", ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")),
    ):
        name = next((name for name in names if name in environment), None)
        count = environment[name] if name else ""
        if name and count.isdigit() and int(count) > 1:
            raise ConfigError(
                [
                    f"{name}={count} and no torchrun: if {launcher} has started {count} processes, they know nothing "
                    "of each other, and each would train alone in the same folder; start a torchrun a machine instead: "
                    f"torchrun --nproc-per-node {count} {' '.join(map(shlex.quote, sys.argv))} "
                    f"(or unset {name} to train with this process alone)"
                ]
            )
