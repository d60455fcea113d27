"""The kernels as functions: the door for those who want them without the trainer::

    from longctx.ops import KeyIntervals, attention

    out, lse = attention(q, k, v, KeyIntervals.causal(q.shape[1]))

Each runs in plain torch on a CPU, and has its gradient (in reverse mode), torch.compile and torch.autocast. Of this
package it needs `longctx.kernels` alone, and of others torch, triton and numpy.
"""

from __future__ import annotations

from longctx.kernels.attention.block_mask import BlockMask
from longctx.kernels.attention.interface import attention, explain
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.kernels.compat.block_sparse import block_sparse_attention
from longctx.kernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from longctx.kernels.dense import FusedDense, FusedMLP, fused_dense, fused_mlp
from longctx.kernels.loss.cross_entropy import cross_entropy
from longctx.kernels.loss.linear_cross_entropy import linear_cross_entropy
from longctx.kernels.norm.layer_norm import LayerNorm, add_layer_norm, layer_norm
from longctx.kernels.norm.rms_norm import RMSNorm, add_rms_norm, rms_norm
from longctx.kernels.rotary import apply_rotary, apply_rotary_to_both
from longctx.kernels.softmax import softmax
from longctx.kernels.swiglu import swiglu

rotary = apply_rotary

__all__ = [
    "BlockMask", "FusedDense", "FusedMLP", "KeyIntervals", "LayerNorm", "RMSNorm", "add_layer_norm", "add_rms_norm",
    "apply_rotary", "apply_rotary_to_both", "attention", "block_sparse_attention", "cross_entropy", "explain",
    "flash_attn_func", "flash_attn_varlen_func", "fused_dense", "fused_mlp", "layer_norm", "linear_cross_entropy",
    "rms_norm", "rotary", "softmax", "swiglu",
]  # fmt: skip
