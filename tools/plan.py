"""What fits on which GPUs: `python tools/plan.py recipe=llama3_8b_1m gpus=8 gpu=h200`.

Words as of train.py, and `gpus=N`, `per_machine=N` (8 of them), `gpu=NAME` (a file of longctx/rates), `gpu_gib=N` (if a
GPU has other memory than that one: 79 of an H100 of 80 GB), and `host_gib=N` (of each machine, for what may be
offloaded; without it nothing is). Prints each layout that the run may have, the
fastest that fits first, with the memory of a GPU, the seconds of a step and the longest sequence; the command that
starts the first; and what does not fit. `--json` prints the same for programs. No GPU is needed: memory and seconds are
those of longctx/plan.py and longctx/step_time.py, with each sequence one document, and communication hidden; of
strategies that are alike that of parallel.strategy=auto is first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longctx import plan, remedies, step_time, train
from longctx.command_line import config_folder, meeting_of, quoted, script, torchrun
from longctx.config import Config, Recompute, Strategy, less_recompute
from longctx.config_checks import check
from longctx.errors import ConfigError
from longctx.strategy import strategy_for

OWN = ("gpus", "per_machine", "gpu", "gpu_gib", "host_gib")  # words that are not train.py's
ANY_HOST_GIB = 1 << 20
EXAMPLES = {"gpu_gib": 79, "host_gib": 1024}


class Plan(NamedTuple):
    """One layout of a run."""

    words: list[str]  # that differ from what was typed
    strategy: str
    memory: plan.Memory
    seconds: float
    tokens_per_s: float  # a GPU
    mfu: float
    longest: int  # tokens of a sequence with which it still fits
    is_auto: bool  # whether `auto` would take this strategy
    context: int
    kept: str  # what blocks keep and where, in words
    host_gib: int  # that each machine must have for what is offloaded
    fits: bool  # on the GPUs, and in host memory, if that was said


class Machines(NamedTuple):
    """What is to be trained on."""

    gpus: int
    per_machine: int
    gpu: str
    host_gib: int
    gpu_gib: int = 0  # of a GPU; 0: as of the one whose rates are taken

    @property
    def host_bytes_of_a_rank(self) -> float:
        return self.host_gib * plan.GIB / self.per_machine


def parsed(words: list[str]) -> tuple[list[str], Machines]:
    """Words for Hydra, and the GPUs. Exits where these are not said right."""
    own: dict[str, list[str]] = {}
    for word in words:
        own.setdefault(word.partition("=")[0], []).append(word.partition("=")[2])
    for key in OWN:
        if len(own.get(key, [])) > 1:
            sys.exit(f"plan: {key}= is given {len(own[key])} times; give it once")
    numbers = {}
    for key, default in (("gpus", ""), ("per_machine", "8"), ("host_gib", "0"), ("gpu_gib", "0")):
        [value] = own.get(key, [default])
        if not value.isdecimal() or (int(value) < 1 and key in own):
            sys.exit(f"plan: {key}={value}: give a whole number from 1 on, such as {key}={EXAMPLES.get(key, 8)}")
        numbers[key] = int(value)
    gpus, per_machine = numbers["gpus"], min(numbers["per_machine"], numbers["gpus"])
    if gpus % per_machine:
        sys.exit(f"plan: gpus={gpus} are no whole machines of {per_machine}; give per_machine, or other gpus")
    rest = [word for word in words if word.partition("=")[0] not in OWN]
    return rest, Machines(gpus, per_machine, own.get("gpu", ["h200"])[0], numbers["host_gib"], numbers["gpu_gib"])


def composed(words: list[str], gpus: int | None = None, folder: Path | None = None) -> Config:
    """What train.py would have, on so many ranks or those there are; `folder`: of one's own recipes.

    Raises `ConfigError`, or what Hydra raises.
    """
    named = [] if "name" in keys_of(words) else ["name=plan"]  # else named by the clock
    where = [] if folder is None else [f"hydra.searchpath=[{quoted(f'file://{folder.resolve()}')}]"]
    ranks = mock.patch.dict(os.environ, {"WORLD_SIZE": str(gpus)} if gpus else {})  # which recipes make layouts of
    with ranks, initialize_config_dir(str(train.CONFIGS), version_base="1.3"):
        found = compose("train", overrides=[*where, *train.typed(words), *named])
        train.refuse_unknown_keys(found)
        config = OmegaConf.to_object(found)
    assert isinstance(config, Config)
    return config


def keys_of(words: list[str]) -> set[str]:
    """The keys that are on the command line, of groups that are given as a whole too."""
    found = set()
    for word in words:
        key, _, value = word.partition("=")
        found.add(key.lstrip("+"))
        if value.startswith("{"):
            found |= {f"{key.lstrip('+')}.{part.partition(':')[0].strip(' {')}" for part in value.split(",")}
    return found


def layouts(
    config: Config, typed: set[str], machines: Machines, usable: float, problems: list[ConfigError]
) -> Iterator[tuple[list[str], Config]]:
    """What may be changed of a run without changing its results: words that say it, and the configuration."""
    gpus = machines.gpus
    contexts = [n for n in range(1, gpus + 1) if gpus % n == 0]
    others = config.parallel.shard * config.parallel.replicate * config.parallel.tensor
    may_shard = not typed & {"parallel", "parallel.shard"}  # else a recipe for one sequence has context alone
    for context in contexts if "parallel.context" not in typed else [config.parallel.context]:
        strategies = [Strategy.gather, Strategy.ring, Strategy.ulysses] if context > 1 else [Strategy.auto]
        if context * config.parallel.tensor > machines.per_machine:
            strategies.append(Strategy.ulysses_ring)
        for strategy in strategies if "parallel.strategy" not in typed else [config.parallel.strategy]:
            shard = -1 if may_shard and context * others != gpus else config.parallel.shard
            parallel = replace(config.parallel, context=context, strategy=strategy, shard=shard)
            of_ranks = replace(config, parallel=parallel)
            try:
                check(of_ranks, gpus)
            except ConfigError as error:
                problems.append(error)
                continue
            for changed in memory_choices(of_ranks, typed, machines, usable):
                check(changed, gpus)
                parallel = changed.parallel
                always = [f"parallel.{name}={getattr(parallel, name)}" for name in ("context", "strategy", "recompute")]
                yield list(dict.fromkeys([*always, *remedies.words(config, changed)])), changed


def memory_choices(config: Config, typed: set[str], machines: Machines, usable: float) -> Iterator[Config]:
    """What blocks may keep and where: each policy of activation checkpointing, those between two of them where as many
    layers as fit keep more, and tiled blocks with as little in host memory as makes them fit."""
    choose = strategy_for(machines.per_machine)
    if typed & {f"parallel.{name}" for name in remedies.OF_MEMORY}:
        yield remedies.with_layers_chosen(config, machines.gpus, choose, usable)
        return
    plain = remedies.with_recompute(config, Recompute.none, tile=0, head_groups=1, offload=0, offload_optimizer=False)
    yield from (remedies.with_recompute(plain, policy) for policy in Recompute)
    mixed = remedies.as_much_kept_as_fits(plain, list(Recompute), machines.gpus, choose, usable)
    yield from (between for between in mixed if between.parallel.recompute_less_layers)
    tiled = remedies.tiled(plain, machines.gpus, choose, usable, machines.host_bytes_of_a_rank)
    if tiled is not None:
        yield tiled


def kept_in_words(config: Config) -> str:
    """What blocks keep, and where: for the table."""
    parallel, less = config.parallel, config.parallel.recompute_less_layers
    said = [
        str(parallel.recompute),
        f"{less} {less_recompute(parallel.recompute)}" if less else "",
        f"tile {parallel.tile}" if parallel.tile else "",
        f"{parallel.head_groups} groups of heads" if parallel.head_groups > 1 else "",
        f"{parallel.offload} on host" if parallel.offload else "",
        "optimizer on host" if parallel.offload_optimizer else "",
    ]
    return ", ".join(part for part in said if part)


def plans(config: Config, words: list[str], machines: Machines, rates: dict[str, Any], usable: float) -> list[Plan]:
    """Of all layouts: those that fit first, and of these the fastest. Raises `ConfigError` if there is none."""
    gpus, choose = machines.gpus, strategy_for(machines.per_machine)
    found, problems = [], []
    for said, changed in layouts(config, keys_of(words), machines, usable, problems):
        choice = choose(changed)
        seconds = sum(step_time.seconds(changed, gpus, rates).values())
        tokens = changed.data.sequence_length * changed.data.sequences_per_step / gpus
        attention, products = step_time.flops(changed)
        mfu = 3 * (attention + products) / gpus / seconds / (rates["peak_tflops"] * 1e12)
        longest = remedies.longest(changed, gpus, choose, usable)
        memory = plan.memory(changed, gpus, choice)
        auto = choose(replace(changed, parallel=replace(changed.parallel, strategy=Strategy.auto)))
        of_machine = sum(plan.host_memory(changed, gpus).values()) * machines.per_machine
        host_gib = math.ceil(of_machine / remedies.USABLE_OF_HOST / plan.GIB)
        fits = memory.total <= usable and (not machines.host_gib or host_gib <= machines.host_gib)
        found.append(
            Plan(
                said, str(choice.strategy), memory, seconds, tokens / seconds, mfu, longest, choice == auto,
                changed.parallel.context, kept_in_words(changed), host_gib, fits,
            )
        )  # fmt: skip
    if not found:
        check(config, gpus)  # what is wrong with the layout that was asked for, rather than with another one
        raise problems[0]
    return sorted(found, key=lambda p: (not p.fits, p.seconds, not p.is_auto))  # of equals the plainest, as they come


def command_of(p: Plan, words: list[str], machines: Machines) -> str:
    """What starts a plan: what was typed, and what it adds."""
    typed, count = keys_of(words), machines.gpus // machines.per_machine
    added = [word for word in p.words if word.partition("=")[0] not in typed]
    launcher = [torchrun(), *meeting_of(count, "HOST"), "--nproc-per-node", str(machines.per_machine)]
    return shlex.join([*launcher, *script(), *config_folder(sys.argv), *words, *added])


def what_would_fit(config: Config, words: list[str], machines: Machines, rates: dict[str, Any], usable: float) -> str:
    """What to say where nothing fits: the least host memory of a machine with which something does, if any does."""

    def fitting(host_gib: int) -> list[Plan]:
        return [p for p in plans(config, words, machines._replace(host_gib=host_gib), rates, usable) if p.fits]

    others = "more GPUs, a shorter sequence (see longest), or a smaller model"
    with_any = fitting(ANY_HOST_GIB)
    if not with_any:
        return f"nothing fits: {others}"
    without_copies = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))
    if config.checkpoint.asynchronous and any(p.fits for p in plans(without_copies, words, machines, rates, usable)):
        return "nothing fits: say checkpoint.asynchronous=false, for there is no room for its copies in host memory"
    most = min(p.host_gib for p in with_any)
    least = 1 + bisect_left(range(1, most), True, key=lambda host_gib: bool(fitting(host_gib)))
    return f"nothing fits: say host_gib={least} or more, if a machine has as much host memory; else {others}"


def precision_and_kernels(config: Config) -> str:
    """What decides whether memory and seconds of a run are known."""
    model, precision = config.model, config.precision
    return (
        f"precision.compute={precision.compute}, model.head_dim={model.head_dim}, model.attention={model.attention}, "
        f"model.fused_ops={model.fused_ops}"
    )


def row(p: Plan, usable: float, width: int) -> str:
    why = f"most in the {p.memory.point}" if p.memory.total > usable else "host memory is too small"
    return (
        f"{p.context:>7}  {p.strategy if p.context > 1 else '-':12} {p.kept:{width}} {p.memory.total / plan.GIB:8.1f} "
        f"{p.seconds:8.4g} {p.tokens_per_s:13,.0f} {p.mfu:5.1%} {p.longest:10,}"
        f"{'' if p.fits else f'  does not fit: {why}'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("words", nargs="+", help="recipe=... gpus=N, and any words of train.py")
    parser.add_argument("--config-dir", type=Path, help="folder of recipes of your own, as of train.py")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    words, machines = parsed(arguments.words)
    try:
        config, rates = composed(words, machines.gpus, arguments.config_dir), step_time.rates(machines.gpu)
        if not plan.is_foreseen(config.model.attention, config.model.fused_ops) or not step_time.is_timed(config):
            sys.exit(
                "plan: memory and seconds are known of 16 bits (precision=bf16), head dims up to 256 and the fused "
                f"kernels (model.attention=auto, model.fused_ops=auto); here {precision_and_kernels(config)}"
            )
        gpu_gib = machines.gpu_gib or rates["gib"]
        usable = remedies.usable(gpu_gib * plan.GIB)
        found = plans(config, words, machines, rates, usable)
    except KeyError as error:
        sys.exit(f"plan: {error.args[0]}")
    except ConfigError as error:
        sys.exit(f"plan: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"plan: {train.explain(error)}")
    fitting = [p for p in found if p.fits]
    command = command_of(fitting[0], words, machines) if fitting else None
    if arguments.json:
        of_plans = [p._asdict() | {"memory": p.memory._asdict()} for p in found]
        facts = {"gpus": machines.gpus, "gpu": rates["gpu"], "usable_gib": usable / plan.GIB, "command": command}
        print(json.dumps(facts | {"provenance": rates["provenance"], "plans": of_plans}, indent=1))
        return
    data, width = config.data, max(len(p.kept) for p in found)
    print(
        f"{data.sequences_per_step} sequences of {data.sequence_length:,} tokens a step on {machines.gpus} x "
        f"{rates['gpu']}, {usable / plan.GIB:.1f} of {gpu_gib} GiB usable\n"
        f"context  strategy     {'recompute':{width}}GiB a GPU  s/step  tokens/s/GPU   MFU    longest"
    )
    print("\n".join(row(p, usable, width) for p in found))
    best = (fitting or sorted(found, key=lambda p: p.memory.total))[0]
    which = "first" if fitting else "smallest"
    print(f"\n{which}, GiB: {best.memory.in_words()}; most in the {best.memory.point}")
    print(command or what_would_fit(config, words, machines, rates, usable))
    assumed = ", ".join(f"{name} {rates[name]}" for name in rates["assumed"])
    print(f"rates: {rates['provenance']}{f'; assumed, not measured: {assumed}' if assumed else ''}")


if __name__ == "__main__":
    main()
