"""Runs Liger-Kernel's own public tests against our ops: needs its source, version 0.8, and transformers.

    git clone --depth 1 --branch v0.8.2 https://github.com/linkedin/Liger-Kernel
    python tools/liger_suite.py Liger-Kernel

Of test_rms_norm, test_layer_norm, test_cross_entropy, test_fused_linear_cross_entropy, test_rope and test_swiglu, left
out are the cases of what our ops do not have: weights a class, weights by the token's probability, accuracies and
predictions beside the loss, mixtures of experts; and those of Liger's own insides: its kernels' launches, tiles and
DTensor wrappers.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.kernels.loss.cross_entropy import cross_entropy
from longctx.kernels.loss.linear_cross_entropy import linear_cross_entropy
from longctx.kernels.norm.layer_norm import layer_norm
from longctx.kernels.norm.rms_norm import rms_norm
from longctx.kernels.rotary import apply_rotary_to_both
from longctx.kernels.swiglu import swiglu

FILES = ("rms_norm", "layer_norm", "cross_entropy", "fused_linear_cross_entropy", "rope", "swiglu")
NOT_OURS = (
    "with_weight", "token_scaling", "token_accuracy", "predicted_tokens", "structured_output", "mixtral",  # not had
    "float32_internal", "blackwell", "dtensor",  # Liger's insides
)  # fmt: skip
IMPLEMENTATION = "triton" if torch.cuda.is_available() else "reference"


# our ops with Liger's arguments ---------------------------------------------------------------------------------------


def _rms_norm(X, W, eps=1e-6, offset=0.0, *_casting_mode_in_place_row_mode, **_same_by_name) -> Tensor:  # noqa: N803
    return rms_norm(X, W, eps, weight_offset=offset, implementation=IMPLEMENTATION)


def _layer_norm(X, W, B, eps) -> Tensor:  # noqa: N803
    return layer_norm(X, W, B, eps, implementation=IMPLEMENTATION)


def _options(ignore_index, lse_square_scale, label_smoothing, reduction, softcap) -> dict:
    return {
        "ignore_index": ignore_index, "z_loss": lse_square_scale, "label_smoothing": label_smoothing,
        "reduction": reduction, "softcap": softcap, "implementation": IMPLEMENTATION,
    }  # fmt: skip


def _z_loss(logits, targets, options) -> Tensor:
    """The share of z_loss in the loss, for the log: our ops return their sum."""
    x = logits.detach().float()
    x = options["softcap"] * torch.tanh(x / options["softcap"]) if options["softcap"] else x
    valid = targets != options["ignore_index"]
    losses = torch.where(valid, options["z_loss"] * torch.logsumexp(x, -1) ** 2, 0)
    if options["reduction"] == "none":
        return losses
    return losses.sum() / (valid.sum() if options["reduction"] == "mean" else 1)


def _in_bounds(targets, ignore_index, n_classes) -> None:
    """Liger looks at every call; our ops on a CPU alone."""
    valid = targets[targets != ignore_index]
    assert not valid.numel() or 0 <= int(valid.min()) <= int(valid.max()) < n_classes, "out of bounds"


def _cross_entropy(
    input, target, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
    softcap=None, return_z_loss=False, *_others,
):  # fmt: skip
    assert weight is None
    _in_bounds(target, ignore_index, input.shape[-1])
    options = _options(ignore_index, lse_square_scale, label_smoothing, reduction, softcap)
    loss = cross_entropy(input, target, **options).to(input.dtype)
    return loss, _z_loss(input, target, options).to(input.dtype) if return_z_loss else None, None, None


def _cross_entropy_by_name(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, **options):
    ordered = ("lse_square_scale", "label_smoothing", "reduction", "softcap", "return_z_loss")
    defaults = {"lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean", "softcap": None}
    values = [(defaults | options).get(name, False) for name in ordered]
    return _output(*_cross_entropy(input, target, weight, ignore_index, *values))


def _linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, *_others, **_others_by_name,
):  # fmt: skip
    assert ce_weight is None
    options = _options(ignore_index, lse_square_scale, label_smoothing, reduction, softcap)
    loss = linear_cross_entropy(input, weight, target, bias=bias, **options)
    z_loss = _z_loss(F.linear(input, weight, bias), target, options).to(input.dtype) if return_z_loss else None
    return loss, z_loss, None, None


def _output(loss, z_loss, *_others):
    return loss if z_loss is None else SimpleNamespace(loss=loss, z_loss=z_loss)


def _rope(q, k, cos, sin, *_position_ids) -> tuple[Tensor, Tensor]:
    """Liger's q and k are (batch, heads, sequence, head_dim), its angles are there twice, one after the other."""
    pairs = q.shape[-1] // 2
    cos, sin = (x.view(-1, *x.shape[-2:])[..., :pairs] for x in (cos, sin))
    turned = apply_rotary_to_both(q.transpose(1, 2), k.transpose(1, 2), cos, sin, implementation=IMPLEMENTATION)
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def _silu_mul(a, b, gate_multiplier=1.0, down_multiplier=1.0) -> Tensor:
    a = a if gate_multiplier == 1 else a * gate_multiplier
    out = swiglu(a, b, implementation=IMPLEMENTATION)
    return out if down_multiplier == 1 else out * down_multiplier


class _RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6, offset=0.0, elementwise_affine=True, **_mode) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None

    def forward(self, x):
        return _rms_norm(x, self.weight, self.eps, self.offset)


class _LayerNorm(nn.LayerNorm):
    def forward(self, input):
        return _layer_norm(input, self.weight, self.bias, self.eps)


class _Loss(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options


class _CrossEntropyLoss(_Loss):
    def forward(self, logits, target):
        return _cross_entropy_by_name(logits, target, **self.options)


class _LinearCrossEntropyLoss(_Loss):
    def forward(self, weight, hidden, target, bias=None):
        return _output(*_linear_cross_entropy(hidden, weight, target, bias, **self.options))


class _SwiGLUMLP(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.multipliers = getattr(config, "mlp_multipliers", (1.0, 1.0))

    def forward(self, x):
        gate, down = self.multipliers
        return self.down_proj(_silu_mul(self.gate_proj(x), self.up_proj(x), gate)) * down


class _PackedSwiGLUMLP(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_up_proj(x), implementation=IMPLEMENTATION))


# under Liger's names --------------------------------------------------------------------------------------------------


def _function(function) -> SimpleNamespace:
    """As an autograd function, which is called by `apply`."""
    return SimpleNamespace(apply=function)


def _by_version(_version, before, after, before_kwargs=None, after_kwargs=None):
    return after(**after_kwargs or {})


def as_liger_kernel() -> None:
    """Puts modules in place under the names that the suite imports."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modules = {
        "": {},
        "utils": {
            "infer_device": lambda: device, "is_npu_available": lambda: False, "infer_comm_backend": lambda: "nccl",
            "transformers_version_dispatch": _by_version,
        },
        "ops": {
            "LigerRMSNormFunction": _function(_rms_norm), "LigerLayerNormFunction": _function(_layer_norm),
            "LigerCrossEntropyFunction": _function(_cross_entropy), "LigerRopeFunction": _function(_rope),
            "LigerFusedLinearCrossEntropyFunction": _function(_linear_cross_entropy),
            "LigerSiLUMulFunction": _function(_silu_mul),
        },
        "ops.cross_entropy": {"liger_cross_entropy_kernel": None},
        "ops.utils": {"is_hip": lambda: torch.version.hip is not None},
        "ops.swiglu": {},
        "transformers": {},
        "transformers.functional": {
            "CrossEntropyOutput": SimpleNamespace, "liger_rms_norm": _rms_norm, "liger_layer_norm": _layer_norm,
            "liger_cross_entropy": _cross_entropy_by_name, "liger_rope": _rope,
            "liger_fused_linear_cross_entropy": lambda **call: _output(*_linear_cross_entropy(**call)),
            "liger_swiglu": _silu_mul,
        },
        "transformers.rms_norm": {"LigerRMSNorm": _RMSNorm},
        "transformers.layer_norm": {"LigerLayerNorm": _LayerNorm},
        "transformers.cross_entropy": {"LigerCrossEntropyLoss": _CrossEntropyLoss},
        "transformers.fused_linear_cross_entropy": {"LigerFusedLinearCrossEntropyLoss": _LinearCrossEntropyLoss},
        "transformers.rope": {"liger_rotary_pos_emb": _rope},
        "transformers.swiglu": {
            "LigerSwiGLUMLP": _SwiGLUMLP, "LigerPhi3SwiGLUMLP": _PackedSwiGLUMLP, "LigerFalconH1SwiGLUMLP": _SwiGLUMLP,
            "LigerBlockSparseTop2MLP": None, "LigerExperts": None,
        },
    }  # fmt: skip
    for name, contents in modules.items():
        module = ModuleType(f"liger_kernel.{name}".rstrip("."))
        vars(module).update(contents)
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


class Applicable:
    """Keeps the cases that apply, and says how many of which test."""

    def pytest_configure(self, config) -> None:
        config.addinivalue_line("markers", "flaky(reruns): Liger's own")

    def pytest_collection_modifyitems(self, config, items) -> None:
        def applies(item) -> bool:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            has_weight = parameters.get("has_ce_weight") or parameters.get("ce_weight")
            return not has_weight and not any(word in item.name for word in NOT_OURS)

        kept = [item for item in items if applies(item)]
        config.hook.pytest_deselected(items=[item for item in items if not applies(item)])
        print(f"\n{len(items)} cases, {len(kept)} apply ({IMPLEMENTATION}):")
        for (file, name), count in sorted(Counter((i.path.name, i.originalname) for i in kept).items()):
            print(f"  {file} {name}: {count}")
        items[:] = kept


def main() -> None:
    about = f"{__doc__}\nOther arguments are pytest's."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of Liger-Kernel")
    arguments, for_pytest = parser.parse_known_args()
    as_liger_kernel()
    sys.path.insert(0, str(arguments.checkout.resolve()))  # before the standard library's `test`
    tests = [str(arguments.checkout / f"test/transformers/test_{name}.py") for name in FILES]
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(arguments.checkout), "-c", "/dev/null"]
    sys.exit(pytest.main([*tests, *options, *for_pytest], plugins=[Applicable()]))


if __name__ == "__main__":
    main()
