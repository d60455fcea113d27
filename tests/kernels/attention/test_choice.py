"""Which implementation serves a call of attention."""

from __future__ import annotations

import pytest
import torch

from longctx.kernels.attention import choice, torch_sdpa
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.attention.options import Options


def test_the_order_on_gpus(monkeypatch):
    """Triton's kernels before torch's up to heads of 128; cuDNN, where it serves, before both."""
    mask = KeyIntervals.documents(torch.zeros(1, 8, dtype=torch.int64))
    for head_dim, is_cudnn, second in ((128, False, "triton"), (136, False, "sdpa"), (128, True, "sdpa")):
        monkeypatch.setattr(torch_sdpa, "uses_cudnn", lambda *_, is_cudnn=is_cudnn: is_cudnn)
        q = torch.empty(1, 8, 2, head_dim, dtype=torch.bfloat16, device="meta")
        assert choice.by_speed(q, mask)[:2] == ("hopper", second)


def test_float64_on_a_gpu_is_not_served_by_the_whole_matrix():
    q = torch.empty(1, 8, 2, 64, dtype=torch.float64, device="meta")
    with pytest.raises(ValueError, match="no kernel there takes it"):
        choice.choose_implementation("auto", q, KeyIntervals.causal(8), Options(1.0))
    assert choice.choose_implementation("reference", q, KeyIntervals.causal(8), Options(1.0)) == "reference"


def test_a_cpu_has_no_grid():
    q = torch.empty(65536, 1, 1, 8)
    assert choice.choose_implementation("auto", q, KeyIntervals.causal(1), Options(8**-0.5)) == "sdpa"
