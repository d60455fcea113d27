"""What fits on which GPUs: `python tools/plan.py recipe=llama3_8b_1m gpus=8 gpu=h200`.

Words as of train.py, and `gpus=N`, `gpu=NAME` (a file of longctx/rates). Prints each layout that the run may have, the
fastest that fits first, with the memory of a GPU, the seconds of a step and the longest sequence; the command that
starts the first; and what does not fit. `--json` prints the same for programs. No GPU is needed: memory and seconds are
those of longctx/plan.py, with each sequence one document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longctx import plan, train
from longctx.config import Config, Recompute, Strategy
from longctx.config_checks import check
from longctx.errors import ConfigError
from longctx.parallel.strategy import strategy_for

RESERVED_GIB, GAPS = 1.5, 0.03  # of a GPU: driver, NCCL and cuBLAS; and what lies between allocations


class Plan(NamedTuple):
    """One layout of a run."""

    words: list[str]  # that differ from what was typed
    strategy: str
    memory: plan.Memory
    seconds: float
    tokens_per_s: float  # a GPU
    mfu: float
    longest: int  # tokens of a sequence with which it still fits


def parsed(words: list[str]) -> tuple[list[str], int, str]:
    """Words for Hydra, the number of GPUs and their name."""
    own = dict(word.split("=", 1) for word in words if word.startswith(("gpus=", "gpu=")))
    if not own.get("gpus", "").isdecimal() or int(own["gpus"]) < 1:
        sys.exit(f"plan: gpus={own.get('gpus', '')}: give a whole number from 1 on, such as gpus=8")
    rest = [word for word in words if not word.startswith(("gpus=", "gpu="))]
    return rest, int(own["gpus"]), own.get("gpu", "h200")


def composed(words: list[str]) -> Config:
    named = [] if any(word.startswith("name=") for word in words) else ["name=plan"]  # else named by the clock
    with initialize_config_dir(str(train.CONFIGS), version_base="1.3"):
        found = OmegaConf.to_object(compose("train", overrides=[*words, *named]))
    assert isinstance(found, Config)
    return found


def layouts(config: Config, words: list[str], gpus: int, usable: float) -> Iterator[tuple[list[str], Config]]:
    """What may be changed of a run without changing its results: words that say it, and the configuration."""
    typed = {word.split("=", 1)[0] for word in words}
    contexts = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for context in contexts if "parallel.context" not in typed else [config.parallel.context]:
        strategies = [Strategy.gather, Strategy.ring, Strategy.ulysses] if context > 1 else [Strategy.auto]
        for strategy in strategies if "parallel.strategy" not in typed else [config.parallel.strategy]:
            of_ranks = replace(config, parallel=replace(config.parallel, context=context, strategy=strategy))
            for recompute, saved in policies(of_ranks, typed, gpus, usable):
                parallel = replace(of_ranks.parallel, recompute=recompute, attention_saved_layers=saved)
                changed = replace(config, parallel=parallel)
                names = ["context", "strategy", "recompute", *(["attention_saved_layers"] if saved else [])]
                try:
                    check(changed, gpus)
                except ConfigError:
                    continue
                yield [f"parallel.{name}={getattr(parallel, name)}" for name in names], changed


def policies(config: Config, typed: set[str], gpus: int, usable: float) -> Iterator[tuple[Recompute, int]]:
    """Of activation checkpointing, and of how many layers attention is saved all the same: as many as fit."""
    if typed & {"parallel.recompute", "parallel.attention_saved_layers"}:
        yield config.parallel.recompute, config.parallel.attention_saved_layers
        return
    yield from ((policy, 0) for policy in Recompute)
    saved = plan.most_attention_saved(config, gpus, strategy_for(gpus), usable)
    if 0 < saved < config.model.layers:
        yield Recompute.full, saved


def plans(config: Config, words: list[str], gpus: int, rates: dict[str, Any], usable: float) -> list[Plan]:
    """Of all layouts: those that fit first, and of these the fastest."""
    choose, found = strategy_for(gpus), []
    for said, changed in layouts(config, words, gpus, usable):
        strategy = choose(changed)
        seconds = sum(plan.seconds(changed, gpus, rates).values())
        tokens = changed.data.sequence_length * changed.data.sequences_per_step / gpus
        attention, products = plan.flops(changed)
        mfu = 3 * (attention + products) / gpus / seconds / (rates["peak_tflops"] * 1e12)
        longest = plan.longest(changed, gpus, choose, usable, 1024 * changed.parallel.context)
        memory = plan.memory(changed, gpus, strategy)
        found.append(Plan(said, str(strategy), memory, seconds, tokens / seconds, mfu, longest))
    return sorted(found, key=lambda p: (p.memory.total > usable, p.seconds, p.memory.total))


def row(p: Plan, usable: float) -> str:
    context, _, recompute, *saved = (word.split("=")[1] for word in p.words)
    recompute += f", {saved[0]} saved" if saved else ""
    fits = "" if p.memory.total <= usable else f"  does not fit: most in the {p.memory.point}"
    return (
        f"{context:>7}  {p.strategy if context != '1' else '-':8} {recompute:15} {p.memory.total / plan.GIB:8.1f} "
        f"{p.seconds:8.3g} {p.tokens_per_s:13,.0f} {p.mfu:5.1%} {p.longest:10,}{fits}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="recipe=... gpus=N, and any words of train.py")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    words, gpus, gpu = parsed(arguments.words)
    try:
        config, rates = composed(words), plan.rates(gpu)
    except KeyError as error:
        sys.exit(f"plan: {error.args[0]}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"plan: {train.explain(error)}")
    usable = ((1 - GAPS) * rates["gib"] - RESERVED_GIB) * plan.GIB
    found = plans(config, words, gpus, rates, usable)
    if not found:
        sys.exit(f"plan: no layout of {gpus} GPUs is one that train.py would take; it says why")
    fitting = [p for p in found if p.memory.total <= usable]
    command = None
    if fitting:
        launcher = f"torchrun --nproc-per-node {gpus} train.py"
        command = " ".join([launcher, *words, *(w for w in fitting[0].words if w.split("=")[0] not in " ".join(words))])
    if arguments.json:
        of_plans = [p._asdict() | {"memory": p.memory._asdict(), "fits": p in fitting} for p in found]
        print(json.dumps({"gpus": gpus, "gpu": rates["gpu"], "usable_gib": usable / plan.GIB, "command": command,
                          "provenance": rates["provenance"], "plans": of_plans}, indent=1))  # fmt: skip
        return
    data = config.data
    print(
        f"{data.sequences_per_step} sequences of {data.sequence_length:,} tokens a step on {gpus} x {rates['gpu']}, "
        f"{usable / plan.GIB:.1f} of {rates['gib']} GiB usable\n"
        f"context  strategy recompute      GiB a GPU  s/step  tokens/s/GPU   MFU    longest"
    )
    print("\n".join(row(p, usable) for p in found))
    best = (fitting or sorted(found, key=lambda p: p.memory.total))[0]
    which = "first" if fitting else "smallest"
    print(f"\n{which}, GiB: {best.memory.in_words()}; most in the {best.memory.point}")
    print(command or "nothing fits: more GPUs, a shorter sequence (see longest), or a smaller model")
    print(f"rates: {rates['provenance']}; assumed: {json.dumps(rates['assumed'])}")


if __name__ == "__main__":
    main()
