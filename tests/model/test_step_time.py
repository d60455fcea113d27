"""The seconds of a step that the planner expects, part by part; whole steps are in test_plan.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longctx import plan, step_time
from longctx.config import Recompute
from longctx.remedies import with_recompute
from runs import composed

H200 = step_time.rates("h200")
PRODUCTS = 1e12 * H200["product_tflops"] * H200["share_of_product_tflops"]  # FLOP/s


@pytest.mark.parametrize("per_micro_batch", [1, 2])
def test_attention_of_a_step_is_that_of_its_layers_and_micro_batches(per_micro_batch):
    words = f"data.sequences_per_micro_batch={per_micro_batch}", "data.sequences_per_step=4"
    config = composed("recipe=llama3_8b_128k", "parallel.context=4", "parallel.recompute=none", *words)
    of_a_layer = sum(step_time.attention_of_a_layer(config, 4, H200))
    layers = config.model.layers * plan.micro_batches_of(config, 4)
    assert step_time.seconds(config, 4, H200)["attention"] == pytest.approx(layers * of_a_layer)


def test_what_tiles_and_host_memory_cost():
    """Tiles: the projections and the sums of weights' gradients, float32; the optimizer: its moments over the bus."""
    config = composed("recipe=llama3_8b_256k_1gpu", "parallel.offload_optimizer=false")
    tiles, model = plan.tiles_of(config, 1), config.model
    assert (tiles, config.parallel.offload > 0) == (16, True)
    whole = replace(config, parallel=replace(config.parallel, tile=0, offload=0))
    more = {k: v - step_time.seconds(whole, 1, H200)[k] for k, v in step_time.seconds(config, 1, H200).items()}
    matrices, rest = plan.parameters(model)
    micro_batches = plan.micro_batches_of(config, 1)
    projections = model.layers * 4096 * 128 * (32 + 2 * 8)
    tokens = config.data.sequence_length * config.data.sequences_per_step
    assert more["products"] == pytest.approx(2 * projections * tokens / PRODUCTS)
    assert more["weights"] == pytest.approx(
        12 * matrices * micro_batches * (tiles - 1) / (1e12 * H200["memory_tb_per_s"])
    )
    moved = replace(config, parallel=replace(config.parallel, offload_optimizer=True))
    longer = step_time.seconds(moved, 1, H200)["weights"] - step_time.seconds(config, 1, H200)["weights"]
    assert longer == pytest.approx(8 * (matrices + rest) / (1e9 * H200["host_gb_per_s"]))


def test_parts_of_a_step_by_ranks_and_micro_batches():
    config = composed("recipe=llama3_8b_128k", "parallel.context=1", "parallel.shard=-1", "data.sequences_per_step=8")
    one, eight = (step_time.seconds(config, ranks, H200) for ranks in (1, 8))
    assert one["weights"] == pytest.approx(8 * eight["weights"])
    # again with full recompute: all but the MLP's last matrix of each layer
    model, tokens = config.model, 8 * config.data.sequence_length
    none, full = (
        step_time.seconds(with_recompute(config, policy), 1, H200)["products"]
        for policy in (Recompute.none, Recompute.full)
    )
    again = plan.parameters(model)[0] - model.layers * model.width * model.mlp_width
    assert full - none == pytest.approx(2 * again * tokens / PRODUCTS)
    small = "data.sequence_length=512", "data.sequences_per_step=8", "data.sequences_per_micro_batch=1"
    found = step_time.seconds(composed("recipe=gpt_32k", *small), 1, H200)
    assert sum(found.values()) == pytest.approx(8 * 12 * H200["launches_ms_a_layer"] / 1e3)


def test_heads_of_256_have_rates():
    config = composed("recipe=gpt_32k")
    for head_dim, is_timed in ((256, True), (264, False)):
        assert step_time.is_timed(replace(config, model=replace(config.model, head_dim=head_dim))) == is_timed
