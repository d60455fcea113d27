"""The Hopper attention kernels on a GPU of that kind: the checks of the portable ones, and more tiles.

Which calls go to them is tested everywhere. Memory that nobody has written is NaN.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_checks import LARGE_MASKS, check
from longctx.kernels import addressing, hardware
from longctx.kernels.attention import (
    hopper,
    hopper_backward,
    hopper_gluon,
    hopper_scheduler,
    passes,
    tiles,
    triton_backward,
)
from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.hopper_forward import forward_on_hopper
from longctx.kernels.attention.interface import attention
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options, Saved
from precision import DEVICE, random, relative_error
from thorough import examples

DTYPES = [torch.bfloat16, torch.float16]
on_hopper = pytest.mark.hopper
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", LARGE_MASKS)
def test_large_masks(name, head_dim):
    check(LARGE_MASKS[name], torch.bfloat16, head_dim=head_dim, implementation="hopper")


@on_hopper
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 8), (6, 2, 24), (4, 1, 40), (1, 1, 72), (8, 1, 128), (2, 1, 200)]
)
def test_heads(heads, kv_heads, head_dim):
    check(LARGE_MASKS["causal, more keys"], torch.bfloat16, heads, kv_heads, head_dim, implementation="hopper")


@on_hopper
@pytest.mark.parametrize(
    "option", [{"scale": 0.4}, {"sink": torch.tensor([-1.0, 0.0, 2.0, 5.0]).to(DEVICE)}, {"deterministic": True}]
)
def test_options(option):
    check(LARGE_MASKS["documents"], torch.bfloat16, implementation="hopper", **option)


@pytest.mark.parametrize(
    ("length", "dtype", "implementation", "most"),
    [(700, torch.float32, "auto", 2e-6), pytest.param(1 << 20, torch.bfloat16, "hopper", 6e-3, marks=on_hopper)],
)
def test_a_million_tokens(length, dtype, implementation, most):
    """Some rows and some keys, the last too, against float64: a whole reference would not fit.

    The gradients of a key come of all rows after it, whose `out` and `lse` are taken as they are.
    """
    q, k, v, dout = (random(length, heads, 128, dtype=dtype, seed=seed) for seed, heads in enumerate((2, 1, 1, 2)))
    inputs = [x[None].requires_grad_() for x in (q, k, v)]
    out, lse = attention(*inputs, KeyIntervals.causal(length), implementation=implementation)
    dq, dk, dv = (x[0] for x in torch.autograd.grad(out, inputs, dout[None]))
    out, lse = out[0].detach(), lse[0].detach().double()
    q, k, v, dout, scale = q.double(), k[:, 0].double(), v[:, 0].double(), dout.double(), 128**-0.5
    errors = []
    for place in (1, 127, 128, length // 3, length - 129, length - 1):
        seen = slice(place + 1)
        scores = scale * q[place] @ k[seen].T  # (heads, keys)
        weights = scores.softmax(1)
        of_weights = dout[place] @ v[seen].T
        of_scores = weights * (of_weights - (weights * of_weights).sum(1, keepdim=True))
        errors += [
            relative_error(out[place], weights @ v[seen]), relative_error(lse[:, place], scores.logsumexp(1)),
            relative_error(dq[place], scale * of_scores @ k[seen]),
        ]  # fmt: skip
        weights = (scale * q[place:] @ k[place] - lse.T[place:]).exp()  # (rows, heads)
        of_rows = (dout[place:] * out[place:].double()).sum(2)
        of_scores = weights * (dout[place:] @ v[place] - of_rows)
        errors += [
            relative_error(dv[place, 0], torch.einsum("rh,rhd->d", weights, dout[place:])),
            relative_error(dk[place, 0], scale * torch.einsum("rh,rhd->d", of_scores, q[place:])),
        ]
    assert max(errors) < most, errors


@on_hopper
@settings(max_examples=examples(200), deadline=None)
@given(st.data())
def test_any_intervals_shapes_and_strides(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    n_queries, n_keys = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 700))
    batch, kv_heads = (data.draw(st.integers(1, 2)) for _ in range(2))
    group, head_dim = data.draw(st.sampled_from([1, 2, 3, 8])), data.draw(st.sampled_from([16, 64, 104, 128, 192]))
    rows = data.draw(st.sampled_from([1, batch]))
    start, end = (torch.randint(0, n_keys + 1, (rows, n_queries)).sort(-1).values for _ in range(2))
    if data.draw(st.booleans()):  # intervals longer than by chance
        start = (start - n_keys // 2).clamp(min=0)
    mask = KeyIntervals.intervals(start, end, n_keys).to(DEVICE)

    def strided(n, heads):
        order = data.draw(st.permutations([0, 1, 2]))
        pad = data.draw(st.sampled_from([0, 8, 3]))  # the last: a stride that the TMA unit does not take
        shape = [(batch, n, heads)[i] for i in order]
        x = torch.randn(*shape, head_dim + pad, device=DEVICE, dtype=torch.bfloat16)[..., :head_dim]
        return x.permute(*(order.index(i) for i in range(3)), 3)

    inputs = strided(n_queries, kv_heads * group), strided(n_keys, kv_heads), strided(n_keys, kv_heads)
    check(
        mask, torch.bfloat16, inputs=inputs, implementation="hopper", may_cancel=True,
        deterministic=data.draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["full", "documents"])
@pytest.mark.parametrize(
    ("implementation", "dtype", "most"),
    [
        ("reference", torch.float32, 1e-5),
        pytest.param("hopper", torch.bfloat16, 1e-2, marks=on_hopper),
        pytest.param("hopper", torch.float16, 2e-3, marks=on_hopper),
    ],
)
def test_maxima_that_rise(head_dim, name, implementation, dtype, most):
    """By 2^8.5, 2^7.5 or little from one key to the next far one, eight rows each: sums keep part of the weight."""
    n, options = 640, Options(head_dim**-0.5)
    mask = KeyIntervals.full(n, n)
    if name == "documents":  # rows from the second one on see nothing of the first tile
        mask = KeyIntervals.documents(torch.tensor([[0] * 200 + [200] * 440])).to(DEVICE)
    mask = mask.with_bounds(DEVICE)
    rise = torch.tensor([8.5, 7.5, 0.5], device=DEVICE).repeat_interleave(8).repeat(n)[:n]
    q, k = torch.zeros(1, n, 2, head_dim, device=DEVICE), torch.zeros(1, n, 1, head_dim, device=DEVICE)
    q[..., 0] = (rise * math.log(2) / options.scale)[:, None]
    for level, key in enumerate((150, 330, 470, 610), 1):
        k[:, key, :, 0] = level
    v = 1 + torch.randn(1, n, 1, head_dim, device=DEVICE)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    true, true_lse = attention(q.double(), k.double(), v.double(), mask, implementation="reference")
    out, lse = attention(q, k, v, mask, implementation=implementation)
    parts = torch.arange(n, device=DEVICE).split([384, 256])
    masks = [mask.keys(part) for part in parts]
    whole_by_parts = passes.PartialForward(q, options, implementation)
    for part, part_mask, of_part in zip(parts, masks, tiles.merge_flags(masks, tiles.MERGED_ROWS), strict=True):
        whole_by_parts.add(k[:, part], v[:, part], part_mask, of_part)
    for found, found_lse in ((out, lse), whole_by_parts.results()):
        error = (found.double() - true).norm(dim=3) / true.norm(dim=3)
        assert error.max() < most
        torch.testing.assert_close(found_lse.double(), true_lse, rtol=0, atol=1e-4)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_are_written_with_the_last_part_they_see(head_dim):
    """Of three parts of the keys, one, two or all; some rows see nothing at all."""
    n, options = 1536, Options(0.25)
    start = torch.tensor([[0] * 300 + [300] * 600 + [900] * 636, [0] * 128 + [128] * 1408], device=DEVICE)
    end = torch.arange(1, n + 1, device=DEVICE).repeat(2, 1)
    end[0, :130], start[0, -200:] = 0, n
    mask = KeyIntervals.intervals(start, end, n)
    q = torch.randn(2, n, 4, head_dim, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(2, n, 2, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    whole, whole_lse = forward_on_hopper(q, k, v, mask, options)
    parts = torch.arange(n, device=DEVICE).split([256, 512, 768])
    masks = [mask.keys(part) for part in parts]
    whole_by_parts = passes.PartialForward(q, options, "hopper")
    flags = tiles.merge_flags(masks, tiles.MERGED_ROWS)
    for part, part_mask, of_part in zip(parts, masks, flags, strict=True):
        whole_by_parts.add(k[:, part], v[:, part], part_mask, of_part)
    out, lse = whole_by_parts.results()
    assert relative_error(out, whole.double()) < 4e-3
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-5)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_keys_are_written_to_their_homes(head_dim, deterministic):
    """As between the GPUs of a context axis: tiles of keys far from each other, in an order of their own."""
    mask, n = KeyIntervals.causal(896), 896
    q, k, v, dout = (torch.randn(1, n, heads, head_dim, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2, 2, 4))
    options = Options(head_dim**-0.5, deterministic=deterministic)
    out, lse = forward_on_hopper(q, k, v, mask, options)
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=DEVICE) for x in (q, k, v)]
    hopper_backward.backward_on_hopper(dout, None, Saved(q, k, v, out, lse), mask, options, tuple(sums))

    inbox = torch.full((1, 2 * n, 2, 2, head_dim), torch.nan, dtype=torch.float32, device=DEVICE)
    tile = 2 * hopper_backward.KEYS.value
    homes = [1280, 0, 512, 256, 1536, 1024, 768]  # the first row of each tile of keys
    addresses = [inbox.data_ptr() + row * inbox.stride(1) * inbox.element_size() for row in homes]
    targets = hopper_backward.GradientTargets(torch.tensor(addresses, device=DEVICE), inbox)
    by_homes = passes.PartialBackward(dout, None, q, out, lse, options, "hopper")
    by_homes.add(k, v, mask, targets)
    written = torch.cat([inbox[:, row : row + tile] for row in homes], 1).unbind(2)
    for mine, whole in zip((by_homes.dq(), *written), sums, strict=True):
        assert relative_error(mine, whole.double()) < 3e-3
    assert inbox.isnan().sum() == inbox.numel() // 2  # nothing else is written


@on_hopper
@pytest.mark.parametrize("mask", [KeyIntervals.full(300, 520), KeyIntervals.causal(300), KeyIntervals.causal(1)])
@pytest.mark.parametrize("head_dim", [136, 192, 256])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_large_heads_without_a_gradient_of_lse(mask, head_dim, kv_heads):
    """As from `torch.nn.functional`, down to one key."""
    q, dout = (torch.randn(2, mask.n_queries, 4, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, mask.n_keys, kv_heads, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def gradients(implementation, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, _ = attention(*inputs, mask, implementation=implementation)
        return torch.autograd.grad(out, inputs, dout.to(out.dtype))

    truth = gradients("reference", *(x.double() for x in (q, k, v)))
    for mine, true in zip(gradients("hopper", q, k, v), truth, strict=True):
        assert float((mine.double() - true).norm()) < 8e-3 * float(true.norm()) + 1e-2  # one key: gradients of 0


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_errors_do_not_move(head_dim):
    """An error that moves from run to run is a race."""
    mask = KeyIntervals.causal(2176)
    q, k, v, dout = (
        torch.randn(1, 2176, heads, head_dim, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2, 2, 4)
    )
    options = Options(head_dim**-0.5)
    exact = [x.double() for x in (q, k, v)]
    true_out, true_lse = passes.attention_forward(*exact, mask, options, "reference")
    truth = passes.attention_backward(
        dout.double(), None, Saved(*exact, true_out, true_lse), mask, options, "reference"
    )
    out, lse = forward_on_hopper(q, k, v, mask, options)
    errors = []
    for _ in range(50):
        gradients = hopper_backward.backward_on_hopper(dout, None, Saved(q, k, v, out, lse), mask, options)
        errors.append([relative_error(mine, true) for mine, true in zip(gradients, truth, strict=True)])
    spread = torch.tensor(errors, dtype=torch.float64)
    assert float(spread.max()) < 5e-3
    assert float((spread.max(0).values - spread.min(0).values).max()) < 1e-5


# what surrounds the kernels, on any machine ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_q", "width", "head_dim"), [(64, 128, 128), (64, 128, 96), (128, 64, 64), (64, 256, 256), (64, 256, 200)]
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_dq_is_gathered_from_the_registers_of_threads(block_q, width, head_dim, accumulate):
    """A warpgroup's product is 64 x 64, and its threads write four numbers each, then the next four, ...

    Thread t has rows t // 32 * 16 + t % 32 // 4 (+ 8) of it, and columns 8 j + t % 4 * 2 (+ 1).
    """
    n_queries, heads, n_tiles = 2 * block_q - 5, 2, 2
    whole = torch.randn(1, n_tiles * block_q, heads, width, device=DEVICE)
    n_parts = block_q * width // 4096
    parts = torch.empty(1, heads, n_tiles, n_parts, 8, 128, 4, device=DEVICE)
    four, thread, register = (torch.arange(n).view(shape) for n, shape in ((8, (8, 1, 1)), (128, (128, 1)), (4, (4,))))
    row = (thread // 32 * 16 + thread % 32 // 4 + register // 2 * 8).expand(8, 128, 4)
    column = four * 8 + thread % 4 * 2 + register % 2
    for tile in range(n_tiles):
        for part in range(n_parts):
            rows = row + tile * block_q + (part * 64 if block_q == 128 else 0)
            columns = column + (part * 64 if block_q == 64 else 0)
            parts[0, :, tile, part] = whole[0, rows.to(DEVICE), :, columns.to(DEVICE)].permute(3, 0, 1, 2)
    dq = torch.full((1, n_queries, heads, head_dim), 2.0, device=DEVICE)
    hopper_backward.attention_backward_dq_hopper[(n_tiles, heads, 1)](
        parts, dq, *dq.stride()[:3], n_queries, head_dim, n_tiles, 0.5, ACCUMULATE=accumulate, BLOCK_Q=block_q,
        BLOCK_D=width,
    )  # fmt: skip
    assert torch.equal(dq, 0.5 * whole[:, :n_queries, :, :head_dim] + (2.0 if accumulate else 0.0))


def test_statistics_of_rows():
    """lse in base 2, inf where a row has no keys or does not exist; rowsum(dout * out) - dlse, 0 there."""
    dout, out = (torch.randn(1, 5, 2, 16, device=DEVICE) for _ in range(2))
    lse, dlse = (torch.randn(1, 2, 5, device=DEVICE) for _ in range(2))
    lse[0, 0, 0], dlse[0, 0, 0] = -torch.inf, torch.nan  # as logaddexp's gradient is there
    exponent, delta = triton_backward.statistics(dout, out, dlse, lse, 8)
    assert exponent.shape == delta.shape == (1, 2, 8)
    assert torch.equal(exponent[..., 5:], torch.full((1, 2, 3), torch.inf, device=DEVICE))
    assert exponent[0, 0, 0] == torch.inf
    torch.testing.assert_close(exponent[0, 1, :5], lse[0, 1] / math.log(2))
    expected = (dout * out).sum(-1).transpose(1, 2) - dlse
    torch.testing.assert_close(delta[..., :5], expected.masked_fill(lse == -torch.inf, 0))
    assert torch.equal(delta[..., 5:], torch.zeros(1, 2, 3, device=DEVICE))


PTX = {  # what these instructions compute of 32-bit integers
    "sub": lambda a, b: (a - b) % 2**32, "max": max, "min": min, "shr": lambda a, b: a >> b, "and": lambda a, b: a & b,
    "mad": lambda a, b, c: a * b + c, "shl": lambda a, b: a << b if b < 32 else 0, "not": lambda a: ~a % 2**32,
    "setp": lambda a, b: a != b, "selp": lambda a, b, is_first: a if is_first else b,
}  # fmt: skip


def computed(ptx: str, values: dict[str, float]) -> dict[str, float]:
    """What straight PTX leaves in its registers: those of `values`, by name, and others."""
    values = dict(values)
    for line in re.sub(r"\.reg [^;]*;", "", ptx.strip().strip("{}")).split(";"):
        name, _, operands = line.strip().partition(" ")
        target, *sources = operands.split(", ")
        numbers = [-math.inf if x == "0fFF800000" else values[x] if x in values else int(x) for x in sources if name]
        if ".s32" in name:
            numbers = [(x + 2**31) % 2**32 - 2**31 for x in numbers]
        values |= {target: PTX[name.split(".")[0]](*(numbers))} if name else {}
    return values


@pytest.mark.parametrize("n_keys", [64, 128])
@settings(max_examples=100)
@given(
    lane=st.integers(0, 3),
    first=st.sampled_from([0, 1024]),
    bounds=st.lists(st.integers(-10, 140) | st.sampled_from([-1024, 2**30]), min_size=4, max_size=4),
)
def test_scores_are_hidden_as_the_mask_says(n_keys, lane, first, bounds):
    """The instructions for a thread, which has pairs of columns of two rows, 8 apart, as WGMMA lays them out."""
    n, bounds = n_keys // 2, [max(0, first + bound) for bound in bounds]
    rows = bounds[:2], bounds[2:]
    place = [(i // 2 % 2, first + 2 * lane + i // 4 * 8 + i % 2) for i in range(n)]
    operands = [
        *(float(i) for i in range(n)),
        *(key for _, key in place),
        *(rows[row][0] for row, _ in place),
        *(rows[row][1] for row, _ in place),
    ]
    found = computed(hopper_gluon._hiding(n), {f"${n + i}": x for i, x in enumerate(operands)})
    seen = [rows[row][0] <= key < rows[row][1] for row, key in place]
    assert [found[f"${i}"] for i in range(n)] == [i if seen[i] else -math.inf for i in range(n)]


def items(found: torch.Tensor, blocks: int, together: int) -> list[tuple[int, int]]:
    """Head and block, among `blocks` of all sequences, of items that are numbered section by section."""
    section, rest = found // (blocks * together), found % (blocks * together)
    return list(zip((section * together + rest % together).tolist(), (rest // together).tolist(), strict=True))


def test_order_of_items():
    mask = KeyIntervals.documents(torch.tensor([[0] * 8 + [8] * 24])).to(DEVICE)
    # blocks of 8 rows see 1, 1, 2 and 3 tiles of 8 keys
    order = [3, 7, 2, 6, 0, 1, 4, 5]  # of two sequences
    assert items(tiles.forward_items(mask, 1, 8, 8, 1, 1), 4, 1) == [(0, block) for block in (3, 2, 0, 1)]
    assert items(tiles.forward_items(mask, 2, 8, 8, 4, 2), 8, 2) == [
        (first + head, block) for first in (0, 2) for block in order for head in (0, 1)
    ]
    start, end = tiles.padded_bounds(mask, 20)
    assert start.shape == end.shape == (1, 40)
    assert start[0, 32:].tolist() == end[0, 32:].tolist() == [0] * 8


def test_order_of_items_backward():
    mask = KeyIntervals.documents(torch.tensor([[0] * 8 + [8] * 24])).to(DEVICE)
    # blocks of 8 keys are seen by 1, 3, 2 and 1 tiles of rows, so that a head is the longest one for two programs
    position, longest = [0, 1, 2, 3], [1, 2, 0, 3]
    of = [(head, block) for head in (0, 1) for block in position] + [(2, block) for block in longest]
    assert items(tiles.backward_items(mask, 1, 8, 8, 3, 1, 2, False, False), 4, 1) == of
    # for four programs two heads are
    of = [(0, block) for block in position] + [(head, block) for block in longest for head in (1, 2)]
    assert items(tiles.backward_items(mask, 1, 8, 8, 3, 1, 4, False, False), 4, 1) == of
    of = [(0, block) for block in position] + [(head, block) for block in position for head in (1, 2)]
    assert items(tiles.backward_items(mask, 1, 8, 8, 3, 1, 4, True, False), 4, 1) == of
    # where two are taken at a time anyway, these; not for two programs, and for a hundred all
    of = [(head, block) for block in position for head in (0, 1)] + [(h, block) for block in longest for h in (2, 3)]
    assert items(tiles.backward_items(mask, 1, 8, 8, 4, 2, 3, False, False), 4, 2) == of
    of = [(first + head, block) for first in (0, 2) for block in position for head in (0, 1)]
    assert items(tiles.backward_items(mask, 1, 8, 8, 4, 2, 2, False, False), 4, 2) == of
    of = [(head, block) for block in longest for head in range(4)]
    assert items(tiles.backward_items(mask, 1, 8, 8, 4, 2, 100, False, False), 4, 2) == of
    # whose blocks become shorter, two heads are not taken together, three are
    causal = KeyIntervals.causal(32).with_bounds(DEVICE)
    of = [(head, block) for head in (0, 1, 2) for block in position]
    assert items(tiles.backward_items(causal, 1, 8, 8, 3, 1, 6, False, False), 4, 1) == of
    of = [(head, block) for block in position for head in (0, 1, 2)]
    assert items(tiles.backward_items(causal, 1, 8, 8, 3, 1, 7, False, False), 4, 1) == of
    # of two sequences, in turns from the last blocks on: head after head
    of = [(head, 4 * sequence + block) for head in (0, 1) for block in (3, 2, 1, 0) for sequence in (0, 1)]
    assert items(tiles.backward_items(mask, 2, 8, 8, 2, 1, 4, True, True), 8, 1) == of
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    nothing = KeyIntervals.intervals(zeros, zeros, 16).to(DEVICE)
    assert len(tiles.backward_items(nothing, 1, 8, 8, 2, 1, 4, False, False)) == 4
    assert len(tiles.backward_items(nothing.keys(torch.arange(0, device=DEVICE)), 1, 8, 8, 2, 1, 4, False, False)) == 0


class Pointer(NamedTuple):
    """A place in a tensor, as kernels have it."""

    tensor: torch.Tensor
    place: int = 0

    def __add__(self, n: int) -> Pointer:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Pointer(self.tensor, self.place + n)


def test_items_are_read_as_they_are_numbered():
    """What a kernel makes of a number, with its loads taken from the tensors."""
    start = torch.tensor([[0] * 8 + [8] * 24, [0] * 32])
    mask = KeyIntervals.documents(start).to(DEVICE)
    numbers, bounds = tiles.backward_items(mask, 2, 8, 8, 4, 2, 2, False, False), tiles.row_tiles(mask, 8, 8)
    read = hopper_scheduler.item_of.fn
    with mock.patch.object(hopper_scheduler.gl, "load", lambda of: int(of.tensor.flatten()[of.place])):
        found = [
            read(place, Pointer(numbers), Pointer(bounds), bounds.stride(0), 8, 2, 4) for place in range(len(numbers))
        ]
    assert [(head, pair) for pair, head, _ in found] == items(numbers, 8, 2)
    assert sorted((head, pair) for pair, head, _ in found) == [(head, pair) for head in range(4) for pair in range(8)]
    assert all(visit == tuple(bounds[pair // 4, pair % 4].tolist()) for pair, _, visit in found)


def test_blocks_of_keys_that_are_seen_up_to_the_same_rows():
    documents = KeyIntervals.documents(torch.tensor([[0] * 8 + [8] * 24])).to(DEVICE)
    assert tiles.shares_last_rows(documents, 1, 8, 8).tolist() == [0, 1, 1, 1]
    assert tiles.shares_last_rows(documents, 2, 8, 8).tolist() == [0, 1, 1, 1] * 2
    window = KeyIntervals.causal(64).window(16, DEVICE)  # those 24 rows from the end see no further than the end
    assert tiles.shares_last_rows(window, 1, 8, 8).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert tiles.shares_last_rows(KeyIntervals.full(20, 24).with_bounds(DEVICE), 1, 8, 8).tolist() == [1, 1, 1]
    assert tiles.shares_last_rows(KeyIntervals.causal(8).with_bounds(DEVICE), 1, 8, 8).tolist() == [0]


def test_heads_together_fit_the_cache_and_divide():
    assert hopper_scheduler.heads_together(8, 16 << 20) == 2
    assert hopper_scheduler.heads_together(6, 10 << 20) == 3
    assert hopper_scheduler.heads_together(8, 100 << 20) == 1
    assert hopper_scheduler.heads_together(8, 1 << 20) == 8


def test_what_the_tma_unit_cannot_address_is_copied():
    x = torch.zeros(2, 16, 4, 64, dtype=torch.bfloat16)
    assert addressing.addressable(x) is x
    transposed = x.transpose(1, 2)
    assert addressing.addressable(transposed) is transposed
    flat = torch.zeros(2 * 16 * 4 * 72, dtype=torch.bfloat16)
    for odd in (
        flat[1 : 1 + x.numel()].view(x.shape),  # begins between 16 bytes
        flat[: 2 * 16 * 4 * 68].view(2, 16, 4, 68)[..., :64],  # strides between them
        x[:, :, :1].expand(2, 16, 4, 64),  # one head for all
    ):
        copy = addressing.addressable(odd)
        assert copy.is_contiguous()
        assert copy.shape == odd.shape


# the choice -----------------------------------------------------------------------------------------------------------


def test_calls_beyond_the_kernels():
    mask = KeyIntervals.causal(16)

    def reason(dtype=torch.bfloat16, head_dim=64, mask=mask, architecture="sm_90", **options):
        q = torch.empty(1, 16, 2, head_dim, dtype=dtype, device="meta")
        with (
            mock.patch.object(hardware, "architecture", return_value=architecture),
            mock.patch.object(hopper, "_is_on_gpu", return_value=True),
        ):
            return hopper.unsupported(q, mask, Options(1.0, **options))

    assert reason() is None
    assert reason(deterministic=True) is None
    assert reason(architecture="sm_80") == "the Hopper kernels need a GPU of compute capability 9.0"
    assert reason(torch.float32) == "the Hopper kernels take float16 and bfloat16, not torch.float32"
    assert reason(head_dim=100) == "the Hopper kernels take head dims that are multiples of 8, not 100"
    assert reason(softcap=2.0) == "the Hopper kernels know no softcap"
    assert reason(dropout=0.1, seed=torch.zeros(1, dtype=torch.int64)) == "the Hopper kernels know no dropout"
    assert reason(alibi_slopes=torch.zeros(2)) == "the Hopper kernels know no alibi_slopes"
    blocks = BlockMask(torch.ones(1, 1, 1, dtype=torch.bool), 16, 16, mask)
    assert reason(mask=blocks) == "the Hopper kernels know no kept blocks"
    q = torch.zeros(1, 16, 2, 64)
    with pytest.raises(ValueError, match="'hopper' cannot serve this call: the Hopper kernels need a GPU"):
        attention(q, q, q, mask, implementation="hopper")
