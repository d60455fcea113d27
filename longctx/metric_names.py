"""Every metric of a run: its name, unit, meaning, and over which ranks. `docs/metrics.md` is made from this table."""

from __future__ import annotations

from typing import NamedTuple

BY_OCTAVE = ("loss/pos/", "recall/")  # followed by 2^k, which stands for an octave


def octaves(row: dict[str, float], prefix: str) -> dict[int, float]:
    """The values of a validation by octave: of the names that begin with `prefix`."""
    return {int(key.removeprefix(prefix)): value for key, value in sorted(row.items()) if key.startswith(prefix)}


class Metric(NamedTuple):
    """One number of a line of `metrics.jsonl`."""

    unit: str
    meaning: str
    ranks: str  # over which it is taken
    summary: str | None = None  # what W&B keeps of its course beside the last value
    is_learning: bool = False  # drawn over tokens rather than over steps


ALL, MAIN, LARGEST, SAME = "all", "rank 0", "largest", "same on all"

METRICS: dict[str, Metric] = {
    "loss/train": Metric("nats a token", "mean over the valid targets of the step, if it has any", ALL, "min", True),
    "loss/val": Metric("nats a token", "mean over the targets of the held-out sequences", ALL, "min", True),
    "loss/val_bits_per_byte": Metric(
        "bits a byte", "loss/val over ln 2, by the bytes that the targets stand for", ALL, "min", True
    ),
    "loss/pos/<2^k>": Metric(
        "nats a token",
        "validation loss of targets with 2^k + 1 to 2^(k+1) tokens of their document before them; of 1: 1 and 2",
        ALL,
        None,
        True,
    ),
    "loss/last_octave_minus_1k": Metric(
        "nats a token",
        "loss/pos of the largest 2^k minus that of 1024; below 0, a long context helps",
        ALL,
        "min",
        True,
    ),
    "recall/<2^k>": Metric(
        "share", "tokens recalled that can be read off 2^k to 2^(k+1) - 1 tokens before them", ALL, None, True
    ),
    "optim/grad_norm": Metric("norm", "of the whole gradient, before clipping", ALL, "max", True),
    "optim/clipped": Metric("0 or 1", "whether the gradient was clipped to optim.clip_norm", SAME, "mean", True),
    "optim/lr": Metric("rate", "learning rate of the step, of AdamW", SAME, None, True),
    "optim/muon_lr": Metric("rate", "learning rate of the step, of Muon's matrices", SAME, None, True),
    "optim/skipped_steps": Metric("steps", "so far, whose loss or gradient was not finite", SAME, "max"),
    "perf/tokens_per_s": Metric("tokens/s", "tokens of the step over its seconds", ALL, "mean,max"),
    "perf/tokens_per_s_per_gpu": Metric("tokens/s", "the same over the number of ranks", ALL, "mean,max"),
    "perf/step_s": Metric("s", "from fetching the batch to the updated parameters", MAIN, "mean"),
    "perf/step_s_p95": Metric("s", "95th percentile of perf/step_s over the last 100 steps", MAIN),
    "perf/tflops_per_gpu": Metric(
        "TFLOP/s", "forward and backward, causal and within documents, over perf/step_s and ranks", ALL, "mean,max"
    ),
    "perf/mfu": Metric("share", "perf/tflops_per_gpu over the dense bfloat16 peak of the device", ALL, "mean,max"),
    "perf/mfu_palm": Metric(
        "share", "as others print it: 6 N + 12 layers x heads x head_dim x sequence FLOPs a token", ALL, "mean,max"
    ),
    "perf/slowest_over_fastest": Metric(
        "ratio",
        "forward and backward of the slowest rank, without time/*_exposed_s, over the fastest's",
        ALL,
        "mean,max",
    ),
    "perf/joules_per_token": Metric(
        "J a token",
        "power of rank 0's GPU, the driver's mean of a second, by perf/step_s and its share of the tokens",
        MAIN,
        "mean",
    ),
    "time/data_s": Metric("s", "until the batch was read", MAIN, "mean"),
    "time/forward_s": Metric("s", "in forward passes, what they wait for included", MAIN, "mean"),
    "time/backward_s": Metric("s", "in backward passes, what they wait for included", MAIN, "mean"),
    "time/optimizer_s": Metric("s", "gradient norm, clipping and update", MAIN, "mean"),
    "time/context_exposed_s": Metric("s", "waited for keys, values and gradients of other ranks", MAIN, "mean"),
    "time/fsdp_exposed_s": Metric(
        "s", "waited for FSDP's gathered parameters and sums of gradients, packing included", MAIN, "mean"
    ),
    "time/checkpoint_stall_s": Metric(
        "s", "that training has waited for checkpoints since the last line", MAIN, "mean"
    ),
    "time/validation_s": Metric("s", "of a validation", MAIN, "mean"),
    "time/predicted_s": Metric(
        "s", "what longctx/step_time.py expects of perf/step_s, with each sequence one document, on measured GPUs", MAIN
    ),
    "time/left_s": Metric(
        "s", "until the last step, by the mean of this start without its first 3, validations and saves included", MAIN
    ),
    "checkpoint/save_s": Metric("s", "of the last checkpoint, from the first byte written to its commit", MAIN, "mean"),
    "checkpoint/gib_per_s": Metric(
        "GiB/s", "bytes of the last checkpoint, of all ranks, over checkpoint/save_s", ALL, "mean"
    ),
    "mem/peak_alloc_gib": Metric(
        "GiB", "most that was allocated, mem/transport_gib included; on CPUs of the process", LARGEST, "max"
    ),
    "mem/predicted_gib": Metric(
        "GiB", "what longctx/plan.py expects of mem/peak_alloc_gib, on GPUs with the fused kernels", MAIN
    ),
    "mem/peak_reserved_gib": Metric("GiB", "most that torch's caching allocator has held", LARGEST, "max"),
    "mem/peak_of_device": Metric(
        "share", "mem/peak_reserved_gib and mem/transport_gib over the memory of the device", LARGEST, "max"
    ),
    "mem/transport_gib": Metric(
        "GiB", "buffers that other ranks read and write, beside the caching allocator", LARGEST, "max"
    ),
    "mem/alloc_retries": Metric(
        "times", "so far, that the allocator had to give memory back and try again", LARGEST, "max"
    ),
    "mem/host_gib": Metric("GiB", "most that a rank's process has held in host memory", LARGEST, "max"),
    "data/tokens": Metric("tokens", "read so far", ALL),
    "data/documents_per_sequence": Metric(
        "documents", "parts of documents in a sequence, mean over the step", ALL, "mean"
    ),
    "data/attention_imbalance": Metric(
        "ratio", "attention work of a rank over the mean of its context axis", LARGEST, "mean,max"
    ),
    "data/span": Metric("tokens", "keys that a query may see back, where data.curriculum limits them", SAME),
    "run/ettr": Metric(
        "share", "effective training time ratio: seconds of steps that counted over those since the first start", MAIN
    ),
    "run/device_s": Metric(
        "s", "seconds of steps, skipped ones too, times ranks: GPU-seconds, without validations and saves", MAIN
    ),
    "run/pflop": Metric("PFLOP", "of these steps, forward and backward, causal and within documents", ALL),
    "run/restarts": Metric("times", "that the run was started again", SAME, "max"),
    "run/lost_steps": Metric("steps", "that were taken again after a restart", SAME, "max"),
    "run/start_step": Metric("steps", "after which this start of the run began", SAME),
    "run/slowest_rank": Metric("rank", "the slowest in the matrix products of a validation", ALL),
    "run/slowest_over_median": Metric("ratio", "its time over that of the median rank", ALL, "max"),
}


def metric_of(name: str) -> Metric | None:
    """What is known of a name that a run logs; None: nothing."""
    for prefix in BY_OCTAVE:
        if name.startswith(prefix) and name.removeprefix(prefix).isdigit():
            return METRICS[f"{prefix}<2^k>"]
    return METRICS.get(name)


def table() -> str:
    """The table of `docs/metrics.md`."""
    rows = [f"| `{name}` | {m.unit} | {m.meaning} | {m.ranks} |" for name, m in METRICS.items()]
    return "\n".join(["| name | unit | meaning | ranks |", "|---|---|---|---|", *rows])
