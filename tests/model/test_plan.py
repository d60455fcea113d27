"""What a run is expected to need: the formula against the model as it is spread, and against what GPUs measured."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longctx import plan, remedies, run_facts, step_time
from longctx.config import ComputeDtype, Optimizer, Recompute, Strategy, ulysses_groups
from longctx.config_checks import check
from longctx.errors import UserError
from longctx.model.transformer import attention_pairs
from longctx.run import choose_layers, expected_memory, kept_and_where
from longctx.runtime import check_memory
from longctx.strategy import WHOLE_SEQUENCES, Choice, strategy_for
from runs import ROOT, composed

GIB = plan.GIB


@pytest.mark.slow
@pytest.mark.parametrize("words", [("1", "short"), ("4", "short"), ("1",), ("2",), ("4",), ("8",)], ids=str)
def test_the_formula_is_what_is_traced(words):
    """Of every op of a step, on fake tensors, without the optimizer's state and what ranks exchange: to 0.5 % and 0.25
    MiB, with tensor parallelism to 6 %."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    command = [sys.executable, ROOT / "tests" / "support" / "traced_memory.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == {("1", "short"): 12, ("4", "short"): 12, ("4",): 74}.get(words, 59)
    for row in rows:
        expected = sum(row["terms"].values()) - row["terms"]["optimizer"] - row["terms"]["exchange of keys"]
        share = 6e-2 if "tensor" in row["case"] else 5e-3
        assert expected == pytest.approx(row["traced"], rel=share, abs=2**18), row


ON_TWO_FULL = [
    "recipe=llama3_8b_128k", "parallel.context=2", "data.sequence_length=262144", "parallel.recompute=full",
]  # fmt: skip
MEASURED = [  # on H200s: words, GPUs, GiB (docs/benchmarks.md)
    (["recipe=llama3_8b_256k_1gpu"], 1, 125.4),
    (["recipe=llama3_8b_512k_1gpu"], 1, 128.5),
    (["recipe=llama3_8b_512k_1gpu", "parallel.offload=12"], 1, 132.5),
    (["recipe=gpt_32k"], 1, 19.4),
    (["recipe=llama3_8b_128k", "parallel.context=4"], 4, 49.4),
    (["recipe=gpt_128k", "parallel.context=2"], 2, 20.5),
]


@pytest.mark.parametrize(("words", "gpus", "gib"), MEASURED, ids=str)
def test_measured_peaks(words, gpus, gib):
    config = composed(*words)
    found = plan.memory(config, gpus, strategy_for(gpus)(config))
    assert found.total / GIB == pytest.approx(gib, rel=0.01)


def test_what_optimizers_keep():
    """Two float32 moments a parameter with AdamW, one less of each matrix of the blocks with Muon, over all ranks."""
    for words, ranks in ([], 1), (["parallel.tensor=2"], 2), (["parallel.shard=4"], 4):
        config = composed("recipe=llama3_8b_128k", "parallel.context=1", "data.sequences_per_step=4", *words)
        kept = {}
        for optimizer in Optimizer:
            config.optim.optimizer = optimizer
            kept[optimizer] = plan.memory(config, ranks, strategy_for(ranks)(config)).terms["optimizer"]
        blocks = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
        everything = blocks + 2 * 128256 * 4096 + 65 * 4096
        assert kept[Optimizer.adamw] * ranks == pytest.approx(8 * everything, rel=1e-4)
        assert kept[Optimizer.muon] * ranks == pytest.approx(8 * everything - 4 * blocks, rel=1e-4)


OLD_GPT_128K = [
    "recipe=gpt_128k", "model=gpt_124m", "optim=adamw", "parallel.recompute=attention_saved",
    "data.sequences_per_step=2",
]  # fmt: skip
# the attention kernels until 2026-11-28
BEFORE = {"attention_tflops": {"64": {"forward": 463, "backward": 490}, "128": {"forward": 643, "backward": 542}}}
TIMED = [  # on H200s: words, GPUs, tokens/s a GPU, rates that were others then
    (["recipe=gpt_32k"], 1, 203e3, {}),
    (["recipe=gpt_128k", "parallel.context=2"], 2, 62.1e3, {}),
    (["recipe=extend_qwen3_0_6b_1m"], 1, 1462, {}),
    (["recipe=llama3_8b_128k", "parallel.context=4"], 4, 3279, {}),
    (["recipe=gpt_32k"], 1, 190e3, BEFORE),
    ([*OLD_GPT_128K, "parallel.context=4"], 4, 48.5e3, BEFORE),
    (["recipe=llama3_8b_128k", "parallel.context=4"], 4, 3163, BEFORE),
    (["recipe=llama3_8b_128k", "parallel.context=4", "data.sequence_length=262144"], 4, 1849, BEFORE),
    (["recipe=llama3_8b_128k", "parallel.context=2"], 2, 3215, BEFORE),
    (ON_TWO_FULL, 2, 1557, BEFORE),
]


@pytest.mark.parametrize(("words", "gpus", "rate", "attention"), TIMED, ids=str)
def test_measured_times(words, gpus, rate, attention):
    config = composed(*words)
    seconds = sum(step_time.seconds(config, gpus, step_time.rates("h200") | attention).values())
    tokens = config.data.sequence_length * config.data.sequences_per_step / gpus
    assert tokens / seconds == pytest.approx(rate, rel=0.1)


def test_what_does_not_fit_is_told_with_what_would():
    config = composed("recipe=gpt_32k", "data.sequences_per_micro_batch=16", "data.sequences_per_step=16")
    choose = strategy_for(1)
    said = remedies.refusal(config, 1, choose, 134.1 * GIB)
    assert said is not None
    assert said.startswith(
        "146.3 GiB are needed on a GPU in the backward pass of layer 12, in its MLP, and 134.1 are free"
    )
    assert "138.5 saved for the backward pass, 6.8 working set of a block" in said
    for words in (
        "recompute=attention_saved",
        "recompute=full",
        "sequences_per_micro_batch=1",
        "sequence_length=29696",
    ):
        assert words in said
    assert remedies.refusal(config, 1, choose, 146.4 * GIB) is None


MUCH = ["recipe=llama3_8b_128k", "parallel.context=4", "parallel.recompute=none"]
LONG = ["recipe=llama3_8b_1m", "parallel.context=8", "data.sequence_length=1572864", "parallel.recompute=full"]


@pytest.mark.parametrize(
    ("words", "gpus", "free"),
    [
        (MUCH, 4, 40), (MUCH, 4, 134.1), ([*LONG, "parallel.recompute_less_layers=32"], 8, 134.1),
        ([*LONG, "parallel.recompute_less_layers=32"], 8, 50), (["recipe=gpt_32k", *LONG[2:3]], 1, 60),
    ],
    ids=str,
)  # fmt: skip
def test_each_remedy_fits(words, gpus, free):
    choose = strategy_for(gpus)
    before = composed(*words)
    found = remedies.remedies(before, gpus, choose, free * GIB)
    assert found
    for remedy in found:
        change, gib = re.fullmatch(r"(.*) \((.*) GiB\)", remedy).groups()
        changed = composed(*words, *change.split(" with "))
        needed = plan.memory(changed, gpus, choose(changed)).total / GIB
        assert needed == pytest.approx(float(gib), abs=0.06)
        assert needed <= free
        assert changed.data.sequence_length <= before.data.sequence_length


def test_the_longest_sequence():
    config, choose = composed("recipe=llama3_8b_1m", "parallel.context=8"), strategy_for(8)

    def needed(length: int) -> float:
        changed = replace(config, data=replace(config.data, sequence_length=length))
        return plan.memory(changed, 8, choose(changed)).total

    length = remedies.longest(config, 8, choose, 134.1 * GIB)
    assert length % 8192 == 0
    assert needed(length) <= 134.1 * GIB < needed(length + 8192)
    assert remedies.longest(config, 8, choose, GIB) == 0


def test_the_longest_sequence_beyond_a_change_of_strategy():
    """From gather to the ring memory falls: what does not fit with one may with the other, at more tokens."""
    config = composed(*OLD_GPT_128K, "parallel.context=8", "parallel.recompute=full", "model.kv_heads=12")
    choose = strategy_for(8)

    def needed(length: int) -> float:
        changed = replace(config, data=replace(config.data, sequence_length=length))
        return plan.memory(changed, 8, choose(changed)).total

    step = 8192
    before = max(n for n in range(step, 1 << 20, step) if choose(replace(
        config, data=replace(config.data, sequence_length=n))).strategy == Strategy.gather)  # fmt: skip
    assert needed(before) > needed(before + step)
    limit = (needed(before) + needed(before + step)) / 2
    assert remedies.longest(config, 8, choose, limit) >= before + step


def test_lengths_are_those_that_train_takes():
    config = composed("recipe=gpt_32k", "parallel.context=2", "parallel.tensor=3")
    assert remedies.longest(config, 6, strategy_for(6), 20 * GIB) % 12 == 0
    learned = composed("recipe=gpt_32k", "model=gpt2_124m", "data.sequence_length=1024")
    assert remedies.longest(learned, 1, strategy_for(1), 130 * GIB) == 1024


@pytest.mark.parametrize("window", [0, 1024, 6144, 8191, 16384])
def test_attention_of_a_window_is_counted_as_a_run_counts_it(window):
    config = composed("recipe=llama3_8b_128k", "data.sequence_length=8192", "model.layers=4", f"model.window={window}")
    pairs = attention_pairs(config.model, torch.arange(8192).unsqueeze(0))
    attention, _ = step_time.flops(config)
    exact = 4.0 * config.model.heads * config.model.head_dim * pairs * config.data.sequences_per_step
    assert attention == pytest.approx(exact, rel=1e-3)


def test_heads_that_are_padded_cost_what_they_are_padded_to():
    config = composed("recipe=gpt_32k")
    narrow = replace(config, model=replace(config.model, heads=8, kv_heads=8, head_dim=96))
    assert plan.inside_attention(narrow, 1) - plan.inside_attention(config, 1) == pytest.approx(
        65536 * (4 * (8 * 128 - 6 * 128) + 8 * (8 - 6))
    )
    rates = step_time.rates("h200")
    attention = [step_time.seconds(c, 1, rates)["attention"] for c in (config, narrow)]
    assert attention[1] / attention[0] == pytest.approx(8 * 128 / (6 * 128))


def test_ulysses_groups():
    assert ulysses_groups(32, 8, 8, 4) == 4
    assert ulysses_groups(40, 8, 8, 4) == 1
    assert ulysses_groups(48, 4, 8, 4) == 3


def test_strategies_differ_by_what_they_exchange():
    """Of keys and values of 1M tokens on eight, 4 hidden states: the ring holds a few shards, gather all of them."""
    config = composed("recipe=llama3_8b_1m", "parallel.context=8")

    def exchanged(strategy: Strategy, ulysses_size: int = 1) -> float:
        return plan.memory(config, 8, Choice(strategy, ulysses_size)).terms["exchange of keys"] / GIB

    assert exchanged(Strategy.ring) == 4.0
    assert exchanged(Strategy.gather) == pytest.approx(1 + 8 + 3.5)
    assert 5 < exchanged(Strategy.ulysses, 8) < 8
    assert exchanged(Strategy.ulysses, 8) < exchanged(Strategy.ulysses_ring, 4) < 11


def test_what_is_foreseen():
    assert plan.is_foreseen("hopper", "triton")
    assert plan.is_foreseen("auto", "auto")
    assert not plan.is_foreseen("triton, in sequences of one document sdpa", "triton")
    assert not plan.is_foreseen("hopper", "reference")
    config = composed("recipe=gpt_32k")
    assert step_time.is_timed(config)
    config.precision.compute = ComputeDtype.float32
    assert not step_time.is_timed(config)


def test_rates_say_where_they_come_from():
    for file in Path(step_time.RATES).glob("*.json"):
        found = step_time.rates(file.stem)
        assert step_time.rates_of_device(found["gpu"]) == found
        assert "torch 2." in found["provenance"]
        assert set(found["assumed"]) <= set(found)
        assert sum(step_time.seconds(composed("recipe=gpt_32k"), 1, found).values()) > 0  # has all that it takes
    with pytest.raises(KeyError, match="gpu=b200: no rates of it; there are h200"):
        step_time.rates("b200")
    assert step_time.rates_of_device("NVIDIA B200") is None


def test_attention_is_saved_in_as_many_layers_as_fit():
    config = composed("recipe=llama3_8b_1m", "parallel.context=8", "data.sequence_length=1572864")
    choose = strategy_for(8)

    def needed(layers: int) -> float:
        parallel = replace(config.parallel, recompute=Recompute.full, recompute_less_layers=layers)
        changed = replace(config, parallel=parallel)
        return plan.memory(changed, 8, choose(changed)).total

    layers = remedies.most_recomputing_less(config, Recompute.full, 8, choose, 134.1 * GIB)
    assert layers == 12
    assert needed(layers) <= 0.9 * 134.1 * GIB < needed(layers + 1)
    assert needed(0) == plan.memory(remedies.with_recompute(config, Recompute.full), 8, choose(config)).total
    saved = remedies.with_recompute(config, Recompute.attention_saved)
    assert needed(32) == plan.memory(saved, 8, choose(config)).total
    assert remedies.most_recomputing_less(config, Recompute.full, 8, choose, 90 * GIB) == -1
    [words] = [r for r in remedies.remedies(config, 8, choose, 134.1 * GIB) if "layers" in r]
    assert words == "parallel.recompute=full with parallel.recompute_less_layers=12 (119.7 GiB)"


ON_ONE = ["recipe=llama3_8b_256k_1gpu"]


def test_tiles_and_host_memory_are_a_remedy():
    """What they say fits, and no layer less would."""
    config, choose = composed("recipe=llama3_8b_1m", "parallel.context=2"), strategy_for(2)
    for of_host, said in (  # GiB a rank
        (math.inf, "parallel.tile=16384 parallel.offload=27"),
        (160, "parallel.recompute=full parallel.tile=16384 parallel.offload=23"),
        (120, "parallel.recompute=full parallel.tile=16384 parallel.head_groups=8 parallel.offload=16"),
        (
            90,
            "parallel.recompute=full parallel.tile=16384 parallel.head_groups=2 parallel.offload=20 "
            "checkpoint.asynchronous=false",
        ),
    ):
        found = remedies.tiled(config, 2, choose, 134.1 * GIB, of_host * GIB)
        assert found is not None
        assert " ".join(remedies.words(config, found)) == said
        assert plan.memory(found, 2, choose(found)).total <= 134.1 * GIB
        less = replace(found, parallel=replace(found.parallel, offload=found.parallel.offload - 1))
        assert plan.memory(less, 2, choose(less)).total > 134.1 * GIB
    terms = plan.host_memory(found, 2)
    assert sum(terms.values()) == terms["activations"] == 20 * 4 * GIB  # inputs of 512k tokens
    assert remedies.tiled(config, 2, choose, 134.1 * GIB, 60 * GIB) is None
    assert remedies.tiled(replace(config, parallel=replace(config.parallel, tensor=2)), 2, choose, math.inf) is None
    assert any("parallel.offload=27" in r for r in remedies.remedies(config, 2, choose, 134.1 * GIB))


def test_as_many_layers_as_it_takes(monkeypatch):
    names = {"attention": "hopper", "fused_ops": "triton"}
    monkeypatch.setattr("longctx.run.implementations", lambda *_: names)
    choose = strategy_for(1)
    config = composed(*ON_ONE, "parallel.offload=-1")

    def chosen(gib: float) -> int:
        return remedies.with_layers_chosen(config, 1, choose, gib * GIB).parallel.offload

    assert [chosen(gib) for gib in (200, 126, 20)] == [0, 13, 31]
    assert remedies.with_layers_chosen(composed(*ON_ONE), 1, choose, 0).parallel.offload == 13
    runtime = SimpleNamespace(
        device=torch.device("cuda"), device_bytes=128 * GIB, world_size=1, least=lambda mine: min(mine, 140 * GIB),
        free_device_bytes=lambda: 127 * GIB,
    )  # fmt: skip
    assert choose_layers(config, runtime, choose).parallel.offload == chosen(0.97 * 128 - 1.5) > 13
    runtime.free_device_bytes = lambda: 110 * GIB  # another process is there
    assert choose_layers(config, runtime, choose).parallel.offload == chosen(110)
    names["attention"] = "sdpa"
    with pytest.raises(UserError, match=r"parallel.offload=-1 goes by a plan .*; give a number of layers"):
        choose_layers(config, runtime, choose)
    runtime.device = torch.device("cpu")
    assert choose_layers(config, runtime, choose).parallel.offload == 0


def test_as_many_layers_recompute_less_as_memory_has_room_for(monkeypatch):
    """Of Llama 3.1 8B at 128k on four H200s 25 of 32 keep everything, which leaves a tenth; one more would not."""
    monkeypatch.setattr("longctx.run.implementations", lambda *_: {"attention": "hopper", "fused_ops": "triton"})
    choose = strategy_for(4)
    config = composed("recipe=llama3_8b_128k", "parallel.context=4", "parallel.recompute_less_layers=-1")

    def chosen(gib: float) -> int:
        return remedies.with_layers_chosen(config, 4, choose, gib * GIB).parallel.recompute_less_layers

    assert [chosen(gib) for gib in (40, 60, 134.1, 200)] == [0, 2, 25, 32]
    for layers, fits in ((25, True), (26, False)):
        changed = remedies.with_recompute(config, Recompute.attention_saved, layers)
        assert (plan.memory(changed, 4, choose(changed)).total <= 0.9 * 134.1 * GIB) == fits
    runtime = SimpleNamespace(
        device=torch.device("cuda"), device_bytes=139.8 * GIB, world_size=4, least=lambda mine: min(mine, 60 * GIB),
        free_device_bytes=lambda: 139 * GIB,
    )  # fmt: skip
    assert choose_layers(config, runtime, choose).parallel.recompute_less_layers == 2
    runtime.device = torch.device("cpu")
    config = choose_layers(config, runtime, choose)
    assert config.parallel.recompute_less_layers == 32
    assert "attention_saved in 0 layers, none in the last 32" in kept_and_where(config)


@pytest.mark.parametrize(
    "words", [["recompute=none"], ["tile=8192"], ["offload=-1"], ["tile=8192", "offload=2"]], ids=" ".join
)
def test_where_no_layer_can_recompute_less_none_does(words, monkeypatch):
    """A recipe's -1 stands in the way of no other choice, nor of kernels whose memory is not known."""
    config = composed("recipe=finetune_qwen3_0_6b_32k", *(f"parallel.{word}" for word in words))
    check(config, 1)
    chosen = remedies.with_layers_chosen(config, 1, strategy_for(1), 134.1 * GIB)
    assert chosen.parallel.recompute_less_layers == 0
    monkeypatch.setattr("longctx.run.implementations", lambda *_: {"attention": "sdpa", "fused_ops": "triton"})
    runtime = SimpleNamespace(device=torch.device("cuda"))
    unknown = choose_layers(composed("recipe=finetune_qwen3_0_6b_32k"), runtime, strategy_for(1))
    assert unknown.parallel.recompute_less_layers == 0


def test_less_recompute_takes_less_time():
    rates = step_time.rates("h200")
    config = composed("recipe=llama3_8b_128k", "parallel.context=4")

    def seconds(policy: Recompute, layers: int = 0) -> float:
        return sum(step_time.seconds(remedies.with_recompute(config, policy, layers), 4, rates).values())

    for policy, lighter in ((Recompute.full, Recompute.attention_saved), (Recompute.attention_saved, Recompute.none)):
        assert seconds(policy, 32) == pytest.approx(seconds(lighter))
        assert seconds(policy, 16) == pytest.approx((seconds(policy) + seconds(lighter)) / 2)
        assert seconds(lighter) < 0.97 * seconds(policy)


def test_what_a_machine_cannot_hold_is_refused():
    """With what fits it and the GPU."""
    choose = strategy_for(1)

    def refused(config, gib: float, gpu: float = 134.1, ranks: int = 1) -> str | None:
        return remedies.host_refusal(config, ranks, ranks, gib * GIB, strategy_for(ranks), gpu * GIB)

    config = composed(*ON_ONE, "checkpoint.asynchronous=true")
    terms = plan.host_memory(config, 1)
    assert [round(size / GIB, 1) for size in terms.values()] == [52.4, 59.8, 89.7]
    at_the_end = replace(config, checkpoint=replace(config.checkpoint, every_steps=0))
    assert plan.host_memory(at_the_end, 1) == terms
    never = replace(config, checkpoint=replace(config.checkpoint, every_steps=0, at_end=False))
    assert plan.host_memory(never, 1)["copy for checkpoints"] == 0
    assert refused(config, 220) is None
    said = refused(config, 128)
    assert said is not None
    assert said.startswith(
        "202.0 GiB of host memory are needed on a machine, and 117.8 can be had: 52.4 for activations, 59.8 for "
        "optimizer, 89.7 for copy for checkpoints. Set checkpoint.asynchronous=false, or "
    )
    assert refused(composed(*ON_ONE), 128) is None
    smaller = refused(composed(*ON_ONE), 100)
    assert smaller is not None
    assert "Set parallel.recompute=full, or more GPUs" in smaller
    changed = composed(*ON_ONE, "parallel.recompute=full")
    assert plan.memory(changed, 1, choose(changed)).total < 134.1 * GIB
    assert refused(changed, 100) is None
    words = "parallel.recompute=full", "parallel.tile=4096", "parallel.offload_optimizer=true"
    small = refused(composed("recipe=gpt_32k", "optim=adamw", *words, "checkpoint.asynchronous=false"), 0.5)
    assert small is not None
    assert "Set parallel.offload_optimizer=false, or more GPUs" in small  # not recompute=none, which tiles refuse
    two = composed("recipe=llama3_8b_512k_2gpu", "parallel.context=2")
    assert refused(two, 180, ranks=2) is None  # 161 GiB of both ranks
    assert refused(two, 150, ranks=2) is not None


@pytest.mark.parametrize(
    ("words", "gpus", "gib"),
    [(ON_ONE, 1, 125.4), (["recipe=llama3_8b_512k_2gpu"], 2, 119.6), (["recipe=llama3_8b_1m_2gpu"], 2, 121.9)],
)
def test_recipes_fit(words, gpus, gib):
    config = composed(*words, f"parallel.context={gpus}")
    found = plan.memory(config, gpus, strategy_for(gpus)(config))
    assert found.total / GIB == pytest.approx(gib, abs=0.5)
    assert found.total <= remedies.usable(139.8 * GIB)


def test_more_recompute_needs_less():
    config = composed("recipe=gpt_128k", "parallel.context=4")
    needed = [plan.memory(remedies.with_recompute(config, policy), 4).total for policy in Recompute]
    assert needed == sorted(needed, reverse=True)


# at the start of a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> SimpleNamespace:
    """A runtime on one GPU with 18 GiB free, of which nothing is asked but that."""
    return SimpleNamespace(
        device=torch.device("cuda"), device_name="NVIDIA H200", world_size=1, ranks_of_a_machine=1,
        gather=lambda x: [x], free_device_bytes=lambda: 18 * GIB,
    )  # fmt: skip


def test_a_gpu_that_is_too_small_is_said_before_anything_is_made(gpu):
    config = composed("recipe=gpt_32k")
    with pytest.raises(
        UserError, match=r"19\.4 GiB are needed on a GPU in the losses, and 18\.0 are free: 17\.3 saved"
    ):
        check_memory(config, gpu, strategy_for(1), is_foreseen=True)
    check_memory(remedies.with_recompute(config, Recompute.attention_saved), gpu, strategy_for(1), is_foreseen=True)
    check_memory(config, gpu, strategy_for(1), is_foreseen=False)  # the state alone: 1 GB


def test_what_is_expected_is_said_and_logged(gpu):
    config = composed("recipe=gpt_32k")
    whole = SimpleNamespace(choice=WHOLE_SEQUENCES)
    facts = run_facts._expected(config, gpu, whole, True) | {"device_gib": 139.8}
    assert facts["predicted_gib"] == pytest.approx(19.42, abs=0.01)
    said = expected_memory(SimpleNamespace(facts=facts))
    assert said.startswith("memory: 19.4 of 139.8 GiB expected, in the losses: 17.3 saved for the backward pass, 1.3 ")
    assert said.endswith("; about 0.31 s a step with each sequence one document\n")
    slow = expected_memory(SimpleNamespace(facts=facts | {"predicted_s": 1099.0}))
    assert slow.endswith("; about 18 min a step with each sequence one document\n")
    gpu.device_name = "NVIDIA B200"  # never measured
    assert "predicted_s" not in run_facts._expected(config, gpu, whole, True)
    assert run_facts._expected(config, gpu, whole, False) == {}
    assert expected_memory(SimpleNamespace(facts={})) == ""
    assert kept_and_where(config) == ""
    assert kept_and_where(composed(*ON_ONE)) == (
        "to hold less: blocks run in tiles of 16384 tokens, what 13 of 32 layers keep is in host memory, the "
        "optimizer's moments are in host memory\n"
    )
