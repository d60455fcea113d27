"""Shapes, initial values, rotary scalings and the count of FLOPs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.config import ModelConfig, RotaryConfig, RotaryScaling, layer_windows
from longctx.kernels.attention import reference
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options
from longctx.model.rotary import attention_factor, cos_sin, frequencies
from longctx.model.transformer import Transformer, build, palm_flops, training_flops
from longctx.plan import matmul_parameters
from runs import composed

# of the published models; gpt_124m by hand: 50304 * 768 + 12 * (4 * 768^2 + 3 * 768 * 2048 + 2 * 768) + 768
# and gpt_91m: 8192 * 768 + 12 * (4 * 768^2 + 3 * 768 * 2048 + 2 * 768 + 2 * 128) + 768
PARAMETERS = {
    "gpt_91m": 91_248_384,
    "gpt_124m": 123_587_328,
    "gpt2_124m": 124_439_808,
    "llama3_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_size(preset):
    config = composed("recipe=gpt_32k", f"model={preset}").model
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[preset]


def test_initial_values_depend_on_seed_and_name_alone():
    small, deep = build(ModelConfig(layers=2), seed=1), build(ModelConfig(layers=3), seed=1)
    other = build(ModelConfig(layers=2), seed=2)
    name = "blocks.1.attention.query.weight"
    assert torch.equal(small.get_parameter(name), deep.get_parameter(name))
    assert not torch.equal(small.get_parameter(name), other.get_parameter(name))
    assert abs(float(small.get_parameter(name).detach().std()) - 0.02) < 5e-4
    assert abs(float(small.get_parameter("blocks.0.mlp.down.weight").detach().std()) - 0.02 / 2) < 3e-4
    assert torch.equal(small.final_norm.weight, torch.ones(128))


def test_windows_by_layer():
    config = ModelConfig(layers=6, window=8, full_attention_every=3)
    assert layer_windows(config) == [8, 8, 0, 8, 8, 0]
    assert layer_windows(ModelConfig(layers=2, window=8)) == [8, 8]
    assert layer_windows(ModelConfig(layers=2)) == [0, 0]


def test_a_window_hides_what_is_farther():
    config = ModelConfig(layers=1, window=4, vocab_size=50)
    model = build(config, seed=0)
    tokens = torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 50
    positions = torch.arange(16).unsqueeze(0)
    before, after = (model(t, positions, KeyIntervals.causal(16)) for t in (tokens, changed))
    assert (before != after).any(-1)[0].nonzero().flatten().tolist() == [3, 4, 5, 6]


# rotary --------------------------------------------------------------------------------------------------------------


def test_rotary_scalings():
    plain = frequencies(RotaryConfig(theta=500000.0), 128)
    assert plain[0] == 1
    torch.testing.assert_close(plain[63], torch.tensor(500000.0 ** (-126 / 128), dtype=torch.float64))
    linear = frequencies(RotaryConfig(theta=500000.0, scaling=RotaryScaling.linear, factor=8.0), 128)
    torch.testing.assert_close(linear, plain / 8)

    llama = RotaryConfig(theta=500000.0, scaling=RotaryScaling.llama3, factor=8.0, original_length=8192)
    scaled = frequencies(llama, 128)
    wavelength = 2 * math.pi / plain
    torch.testing.assert_close(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()

    ntk = frequencies(RotaryConfig(scaling=RotaryScaling.ntk, factor=4.0), 64)
    torch.testing.assert_close(ntk[0], torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(ntk[31], frequencies(RotaryConfig(), 64)[31] / 4)

    yarn = RotaryConfig(scaling=RotaryScaling.yarn, factor=4.0, original_length=4096)
    scaled, plain = frequencies(yarn, 128), frequencies(RotaryConfig(), 128)
    torch.testing.assert_close(scaled[:20], plain[:20])
    torch.testing.assert_close(scaled[46:], plain[46:] / 4)
    assert attention_factor(yarn) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(llama) == 1


def test_rotary_far_out():
    """Position 1M: the angle is right to float32's last digits, which float32 angles are not."""
    position = torch.tensor([[999_999]])
    cos, _ = cos_sin(position, RotaryConfig(theta=500000.0), 128, torch.float32)
    exact = math.cos(999_999 * 500000.0 ** (-2 / 128))
    assert abs(float(cos[0, 0, 1]) - exact) < 1e-7
    float32 = torch.tensor(999_999.0) * torch.tensor(500000.0 ** (-2 / 128), dtype=torch.float32)
    assert abs(float(float32.cos()) - exact) > 1e-3


# work ----------------------------------------------------------------------------------------------------------------

SMALL = ModelConfig(vocab_size=100, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=48)


def test_flops_by_hand():
    per_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert matmul_parameters(SMALL) == 2 * per_layer + 32 * 100
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])  # documents of 4 and 6 tokens
    pairs = (4 * 5 + 6 * 7) // 2
    expected = 6 * matmul_parameters(SMALL) * 10 + 12 * 4 * 8 * 2 * pairs
    assert training_flops(SMALL, positions) == expected
    windowed = dataclasses.replace(SMALL, window=3)
    pairs = (1 + 2 + 3 + 3) + (1 + 2 + 3 + 3 + 3 + 3)
    assert training_flops(windowed, positions) == 6 * matmul_parameters(SMALL) * 10 + 12 * 4 * 8 * 2 * pairs
    assert palm_flops(SMALL, 10, 5) == 10 * (6 * matmul_parameters(SMALL) + 12 * 2 * 4 * 8 * 5)


def test_flops_against_torch():
    """Matrix products as torch counts them; of attention, twice the forward's again backward, and half is masked."""
    length = 64
    config = dataclasses.replace(SMALL, layers=3, kv_heads=4)
    model = build(config, seed=0)
    tokens = torch.randint(100, (1, length))
    positions = torch.arange(length).unsqueeze(0)
    with FlopCounterMode(display=False) as products:  # it does not look into custom ops: all but attention and loss
        model(tokens, positions, KeyIntervals.full(length, length), tokens).sum().backward()
    in_loss = 6 * length * config.width * config.vocab_size
    assert products.get_total_flops() + in_loss == 6 * matmul_parameters(config) * length

    q = torch.randn(1, length, config.heads, config.head_dim)
    with FlopCounterMode(display=False) as attention:
        reference.attention_forward(q, q, q, KeyIntervals.causal(length), Options(1.0))
    whole_square = 3 * config.layers * attention.get_total_flops()
    ours = training_flops(config, positions) - 6 * matmul_parameters(config) * length
    assert ours == whole_square * (length + 1) / (2 * length)
