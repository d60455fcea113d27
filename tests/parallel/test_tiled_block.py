"""Tiled blocks and activation offload: the bits, what is run, what is held, and what happens to steps that are left.

Their gradients in all layouts are in test_layouts.py.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from longctx.batch import Batch
from longctx.config import AttentionImplementation, FusedImplementation, ModelConfig, Recompute
from longctx.host_memory import host_tensor
from longctx.kernels.attention import interface
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.model.transformer import Transformer, build
from longctx.parallel.offload import ActivationOffload
from longctx.parallel.tiled_block import TiledBlock
from precision import DEVICE
from small_models import BATCH, DOCUMENTS, GPT2, GQA, LENGTH, QWEN, WINDOW, make_inputs

FOUR = dataclasses.replace(GQA, layers=4)


def made(model: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    """The whole model; in float64, which GPUs have no kernels for, on the reference."""
    if dtype == torch.float64:
        attention, fused_ops = AttentionImplementation.reference, FusedImplementation.reference
        model = dataclasses.replace(model, attention=attention, fused_ops=fused_ops)
    return build(model, seed=0, device=DEVICE).to(dtype)


def tiled(
    model: ModelConfig, tile: int, recompute: Recompute, layers: int = 0, dtype=torch.float64, head_groups: int = 1
) -> Transformer:
    """Four layers, the first `layers` of which are offloaded."""
    changed = made(model, dtype)
    offload = ActivationOffload(layers, torch.device(DEVICE)) if layers else None
    for number, block in enumerate(changed.blocks):
        block.run = TiledBlock(block, number, tile, recompute, offload, head_groups)
    return changed


def step(model: Transformer, inputs: Batch | None = None) -> list[torch.Tensor]:
    """The loss and the gradients of a step."""
    inputs = Batch(*(x.to(DEVICE) for x in inputs or make_inputs(DOCUMENTS)))
    mask = KeyIntervals.documents(inputs.document_start)
    loss = model(inputs.tokens, inputs.positions, mask, inputs.targets).sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *gradients]


def offload_of(model: Transformer) -> ActivationOffload:
    return model.blocks[0].run.offload


@pytest.mark.parametrize("model", [QWEN, GPT2], ids=["qwen3", "gpt2"])
@pytest.mark.parametrize("recompute", [Recompute.attention_saved, Recompute.full])
@pytest.mark.parametrize("tile", [0, 50, 1000])
def test_gradients_are_those_of_the_whole_block(model, recompute, tile):
    """In float64; 50 tokens do not divide the 256, and cross sequences."""
    plain, changed = made(model), tiled(model, tile, recompute)
    for mine, true in zip(step(changed), step(plain), strict=True):
        assert float((mine - true).norm()) <= 1e-12 * float(true.norm()) + 1e-15


@pytest.mark.parametrize("model", [QWEN, GPT2, WINDOW], ids=["qwen3", "gpt2", "windows"])
@pytest.mark.parametrize("recompute", [Recompute.attention_saved, Recompute.full])
def test_groups_of_heads_give_the_gradients_of_the_whole_block(model, recompute):
    """In float64, with norms of heads, biases and windows; two sequences, tiles that cross them."""
    plain, changed = made(model), tiled(model, 50, recompute, head_groups=2)
    with mock.patch.object(interface, "attention_forward", wraps=interface.attention_forward) as forward:
        found = step(changed)
    again = 2 if recompute == Recompute.full else 1
    assert [call.args[0].shape[2] for call in forward.call_args_list] == [model.heads // 2] * 2 * model.layers * again
    for mine, true in zip(found, step(plain), strict=True):
        assert float((mine - true).norm()) <= 1e-12 * float(true.norm()) + 1e-15


@pytest.mark.parametrize("recompute", [Recompute.attention_saved, Recompute.full])
@pytest.mark.parametrize(("layers", "groups"), [(1, 1), (2, 2), (3, 1)])
def test_offload_gives_the_same_bits(recompute, layers, groups):
    kept, offloaded = (tiled(FOUR, 64, recompute, n, torch.float32, groups) for n in (0, layers))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(kept), step(offloaded), strict=True))
        offload = offload_of(offloaded)
        assert not offload.kept
    sizes = [sum(place.nbytes for place in offload.places[layer]) for layer in range(layers)]
    hidden, lse = BATCH * LENGTH * GQA.width * 4, BATCH * LENGTH * GQA.heads * 4
    assert sizes == [2 * hidden + lse if recompute == Recompute.attention_saved else hidden] * layers


@pytest.mark.parametrize(("recompute", "forwards"), [(Recompute.attention_saved, 4), (Recompute.full, 8)])
def test_how_often_attention_runs(recompute, forwards):
    model = tiled(FOUR, 64, recompute, 2)
    with mock.patch.object(interface, "attention_forward", wraps=interface.attention_forward) as forward:
        step(model)
    assert forward.call_count == forwards


def test_groups_of_heads_give_the_same_bits():
    one, two = (tiled(FOUR, 64, Recompute.full, dtype=torch.float32, head_groups=n) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(step(one), step(two), strict=True))


def test_steps_that_are_left_leave_nothing():
    """A forward pass without its backward pass, a shorter batch, and a pass without gradients in between."""
    model = tiled(FOUR, 64, Recompute.attention_saved, 3)
    expected = step(model)
    inputs = Batch(*(x.to(DEVICE) for x in make_inputs(DOCUMENTS)))
    mask = KeyIntervals.documents(inputs.document_start)
    model(inputs.tokens, inputs.positions, mask, inputs.targets)
    with torch.no_grad():
        losses = model(inputs.tokens, inputs.positions, mask, inputs.targets)
    assert torch.equal(losses.sum(), expected[0])
    places = {layer: [place.data_ptr() for place in places] for layer, places in offload_of(model).places.items()}
    step(model, Batch(*(x[:1] for x in make_inputs(DOCUMENTS))))
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))
    assert {n: [place.data_ptr() for place in found] for n, found in offload_of(model).places.items()} == places


def test_a_backward_pass_after_another_forward_pass_is_refused():
    """Its activations were written over: it would have silently wrong gradients."""
    model = tiled(FOUR, 64, Recompute.full, 2)
    inputs = Batch(*(x.to(DEVICE) for x in make_inputs(DOCUMENTS)))
    mask = KeyIntervals.documents(inputs.document_start)
    first, _ = (model(inputs.tokens, inputs.positions, mask, inputs.targets).sum() for _ in range(2))
    with pytest.raises(RuntimeError, match=r"layer 1: what it keeps was written over by a later forward pass"):
        first.backward()


def test_gradients_of_weights_are_summed_in_float32():
    """In bfloat16, over 32 tiles: as near to float64 as those of the whole block. Sums in bfloat16 are not."""
    model = dataclasses.replace(GQA, width=64, head_dim=16, layers=1)
    truth = step(made(model))
    whole = step(made(model, torch.bfloat16))
    tiles = step(tiled(model, 8, Recompute.full, dtype=torch.bfloat16))
    for mine, theirs, true in zip(tiles[1:], whole[1:], truth[1:], strict=True):
        errors = [float((x.double() - true).norm()) for x in (mine, theirs)]
        assert errors[0] <= 1.1 * errors[1]


def test_host_tensors_have_their_size_and_are_zero():
    for shape in ((3, 5), (1,), (0, 4)):
        made = host_tensor(shape, torch.float32, torch.device(DEVICE))
        assert made.shape == torch.Size(shape)
        assert made.device.type == "cpu"
        assert float(made.abs().sum()) == 0
        assert made.untyped_storage().nbytes() == max(1, made.numel() * 4)
        assert made.is_pinned() == (DEVICE == "cuda")


@pytest.mark.gpu(1, gib=130)
@pytest.mark.parametrize(
    ("recompute", "tile", "layers", "head_groups"),
    [(None, 0, 0, 1), (Recompute.attention_saved, 0, 1, 1), (Recompute.full, 16384, 2, 4)],
)
def test_more_than_a_million_tokens(recompute, tile, layers, head_groups):
    """Hidden states of more than 2^31 elements: losses in four documents have the gradients of these alone.

    They are the first, the last, and those before and after element 2^31 of a hidden state.
    """
    document, count, chosen = 4096, 269, [0, 255, 256, 268]
    config = dataclasses.replace(
        QWEN, layers=2, width=2048, heads=16, kv_heads=8, head_dim=128, mlp_width=2560, vocab_size=1024
    )
    tokens = torch.randint(1024, (count, document), generator=torch.Generator().manual_seed(3))

    def of(documents: list[int]) -> Batch:
        """One sequence of these documents, with losses in the chosen ones."""
        shape = 1, len(documents) * document
        places = torch.arange(document).expand(len(documents), -1)
        starts = (torch.arange(len(documents)) * document).unsqueeze(1).expand(-1, document)
        targets = tokens[documents].roll(-1, 1)
        targets[:, -1] = -100
        targets[[n not in chosen for n in documents]] = -100
        return Batch(*(x.reshape(shape) for x in (tokens[documents], targets, places, starts)))

    alone = step(made(config, torch.bfloat16), of(chosen))
    model = (
        tiled(config, tile, recompute, layers, torch.bfloat16, head_groups)
        if recompute
        else made(config, torch.bfloat16)
    )
    for index, (mine, true) in enumerate(zip(step(model, of(list(range(count)))), alone, strict=True)):
        assert float((mine.float() - true.float()).norm() / true.float().norm()) <= 0.01, index


def test_a_backward_pass_after_a_whole_later_step_is_refused_too():
    """Of one layer, which each forward pass writes anew."""
    model = tiled(FOUR, 64, Recompute.full, 1)
    inputs = Batch(*(x.to(DEVICE) for x in make_inputs(DOCUMENTS)))
    mask = KeyIntervals.documents(inputs.document_start)
    first, second = (model(inputs.tokens, inputs.positions, mask, inputs.targets).sum() for _ in range(2))
    second.backward()
    assert not offload_of(model).kept
    with pytest.raises(RuntimeError, match="layer 0: what it keeps was written over by a later forward pass"):
        first.backward()


def test_copies_are_waited_for_and_begun_a_layer_ahead():
    """In the order that a GPU needs: on a CPU copies are there at once, whatever is waited for."""
    done, offload = [], ActivationOffload(2, torch.device("cpu"))

    def copy(way):
        def begin(source, target, after=None):
            target.copy_(source)
            event = f"{way} {int(source[0])}"
            done.append(event if after is None else f"{event} after {after}")
            return event

        return begin

    def wait(event):
        done.append(f"wait {event}")

    offload.copies = SimpleNamespace(to_host=copy("down"), to_device=copy("up"), wait=wait)
    kept = [offload.put(layer, [torch.full((3,), float(layer))]) for layer in (0, 1)]
    offload.settle()
    assert done == ["down 0", "wait down 0", "down 1", "wait down 1"]
    done.clear()
    offload.get(kept[1])
    assert done == ["up 1 after down 1", "wait up 1", "up 0 after down 0"]
