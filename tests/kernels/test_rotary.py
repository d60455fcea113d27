"""Rotary embedding: the Triton kernel against float64, and against turning complex numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels import rotary
from longctx.kernels.rotary import apply_rotary, apply_rotary_to_both
from precision import DEVICE, DTYPES, assert_precise, random
from thorough import examples


def angles(batch: int, sequence: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = 3 * random(batch, sequence, pairs, seed=7)
    return angle.cos(), angle.sin()


def complex_rotary(x, cos, sin, interleaved):
    """Pairs as complex numbers, turned by multiplication."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].double(), x[..., 2 * pairs :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    result = torch.complex(a, b) * torch.complex(cos.double(), sin.double()).unsqueeze(2)
    parts = (result.real, result.imag)
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 5], ids=["all dims", "10 of 16"])
def test_both_in_one_launch(pairs, interleaved, dtype):
    cos, sin = angles(2, 37, pairs)
    inputs = random(2, 37, 6, 16, dtype=dtype), random(2, 37, 2, 16, dtype=dtype)
    assert_precise(
        lambda q, k: apply_rotary_to_both(q, k, cos, sin, interleaved=interleaved, implementation="triton"),
        lambda q, k: tuple(complex_rotary(x, cos, sin, interleaved) for x in (q, k)),
        inputs,
    )


def test_reference_turns_complex_numbers():
    cos, sin = angles(1, 9, 6)
    x = random(2, 9, 3, 16)
    for interleaved in (False, True):
        torch.testing.assert_close(
            rotary.rotary_reference(x, cos, sin, interleaved=interleaved), complex_rotary(x, cos, sin, interleaved)
        )


@settings(max_examples=examples(20), deadline=None)
@given(
    batch=st.integers(1, 3), sequence=st.integers(0, 20), heads=st.integers(1, 40), head_dim=st.integers(2, 70),
    shared=st.booleans(), interleaved=st.booleans(), transposed=st.booleans(),
)  # fmt: skip
def test_any_shape_and_strides(batch, sequence, heads, head_dim, shared, interleaved, transposed):
    cos, sin = angles(1 if shared else batch, sequence, head_dim // 2)
    shape = (batch, heads, sequence, head_dim) if transposed else (batch, sequence, heads, head_dim)
    x = random(*shape).transpose(1, 2) if transposed else random(*shape)
    assert_precise(
        lambda x: apply_rotary(x, cos, sin, interleaved=interleaved, implementation="triton"),
        lambda x: complex_rotary(x, cos, sin, interleaved),
        [x],
    )


def test_positions_with_gaps_and_outside():
    """A view of every other position; and what points outside the table is NaN."""
    cos, sin = angles(1, 16, 8)
    q, many = random(1, 8, 4, 16), torch.arange(16, device=DEVICE).unsqueeze(0)
    turned = apply_rotary(q, cos[0], sin[0], positions=many[:, ::2], implementation="triton")
    torch.testing.assert_close(turned, rotary.rotary_reference(q, cos[0], sin[0], many[:, ::2]), rtol=0, atol=1e-6)
    for implementation in ("triton", "reference"):
        outside = apply_rotary(q, cos[0, :4], sin[0, :4], positions=many[:, ::2] - 2, implementation=implementation)
        assert outside.isnan().flatten(2).all(-1).tolist() == [[True, False, False] + [True] * 5]


def test_heads_far_apart():
    """Heads 2^26 elements apart: the offsets of 33 of them pass 2^31. The memory between is never touched."""
    storage = torch.empty(33 * 2**26, device=DEVICE, dtype=torch.float16)
    q = storage.as_strided((1, 3, 33, 64), (0, 64, 2**26, 1))
    q.copy_(random(1, 3, 33, 64, dtype=torch.float16))
    cos, sin = angles(1, 3, 32)
    torch.testing.assert_close(apply_rotary(q, cos, sin, implementation="triton"), rotary.rotary_reference(q, cos, sin))


def test_positions_of_a_shard():
    """Tokens 12 to 15 and 0 to 3 of 16, by a table and their positions, are as they are in the whole."""
    cos, sin = angles(1, 16, 8)
    q, k = random(1, 16, 4, 16), random(1, 16, 2, 16)
    held = torch.tensor([12, 13, 14, 15, 0, 1, 2, 3], device=DEVICE)
    whole = apply_rotary_to_both(q, k, cos, sin, implementation="triton")
    for implementation, dtype in (("triton", held.dtype), ("reference", held.dtype), ("reference", torch.uint8)):
        part = apply_rotary_to_both(
            q[:, held],
            k[:, held],
            cos[0],
            sin[0],
            positions=held.to(dtype).unsqueeze(0),
            implementation=implementation,
        )
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b[:, held], rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("pairs", [8, 5])
def test_in_place(pairs, implementation):
    cos, sin = angles(2, 7, pairs)
    packed = random(2, 7, 8, 16)

    def mine(packed):
        qkv = packed * 1
        q, k = apply_rotary_to_both(
            qkv[:, :, :4], qkv[:, :, 4:6], cos, sin, inplace=True, implementation=implementation
        )
        return q, k

    def plain(packed):
        return tuple(complex_rotary(x, cos, sin, False) for x in (packed[:, :, :4], packed[:, :, 4:6]))

    assert_precise(mine, plain, [packed])
    if implementation == "triton":
        qkv = packed * 1
        q, _ = apply_rotary_to_both(qkv[:, :, :4], qkv[:, :, 4:6], cos, sin, inplace=True, implementation="triton")
        assert q.data_ptr() == qkv.data_ptr()
        torch.testing.assert_close(qkv[:, :, :4], plain(packed)[0], rtol=0, atol=1e-6)
        assert torch.equal(qkv[:, :, 6:], packed[:, :, 6:])
        whole = random(2, 7, 4, 16)
        assert_precise(
            lambda x: apply_rotary(x * 1, cos, sin, inplace=True, implementation="triton"),
            lambda x: complex_rotary(x, cos, sin, False),
            [whole],
        )


def test_refusals():
    q, (cos, sin), (cos2, sin2) = torch.ones(2, 6, 4, 16), angles(1, 6, 8), angles(1, 6, 2)
    for call, message in (
        (lambda: apply_rotary(q[0], cos, sin), r"q \(6, 4, 16\) .*: must be \(batch, sequence, heads, head_dim\)"),
        (lambda: apply_rotary(q, cos[:, :5], sin[:, :5]), r"cos \(1, 5, 8\): must be \(2 or 1, 6, rotary_dim / 2\)"),
        (lambda: apply_rotary(q[..., :10], cos, sin), "its last dim must be 1 to head_dim / 2 = 5"),
        (lambda: apply_rotary(q, cos, sin[..., :4]), "must be alike"),
        (lambda: apply_rotary(q, cos.clone().requires_grad_(), sin), "cos and sin get no gradient here"),
        (lambda: apply_rotary_to_both(q, q[:, :3], cos, sin), r"k \(2, 3, 4, 16\) .*: must be \(2, 6, '\*', 16\)"),
        (lambda: apply_rotary(q, cos, sin, positions=torch.zeros(2, 6, dtype=torch.int64)), "must be a table"),
        (lambda: apply_rotary(q, cos[0], sin[0], positions=torch.ones(2, 6, dtype=torch.bool)), "must be integers"),
        (lambda: apply_rotary(q.transpose(2, 3), cos2, sin2, inplace=True), "stride 1, not"),
        (
            lambda: apply_rotary(q[:, :, :1].expand(2, 6, 4, 16), cos, sin, inplace=True),
            "q: expanded, so its heads are",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
