"""Cross entropy and linear cross entropy: the Triton kernels and the chunks against float64."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.kernels.compat.liger import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
from longctx.kernels.loss import linear_cross_entropy as module
from longctx.kernels.loss import triton_cross_entropy
from longctx.kernels.loss.cross_entropy import cross_entropy, gradient_of, statistics_of
from longctx.kernels.loss.linear_cross_entropy import cast_in_place, linear_cross_entropy
from longctx.kernels.loss.options import PLAIN
from precision import DEVICE, DTYPES, assert_precise, random
from thorough import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IMPLEMENTATIONS = ["triton", "reference"]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 3.0, "ignore_index": 2},
}


def targets_of(rows: int, classes: int, ignore_index: int = -100) -> torch.Tensor:
    """Random, the last class and some ignored among them."""
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    targets[::3] = ignore_index
    targets[1::5] = classes - 1
    return targets.to(DEVICE)


def by_torch(logits, targets, reduction="mean", ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """torch's own functions, in float32 or float64."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    losses = F.cross_entropy(x, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    valid = targets != ignore_index
    losses = losses + z_loss * torch.logsumexp(x, -1) ** 2 * valid
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / valid.sum().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy(name, reduction, inplace, dtype):
    """9000 classes are read in two parts."""
    options, targets = OPTIONS[name], targets_of(7, 9000, OPTIONS[name].get("ignore_index", -100))

    def mine(logits):
        own = logits * 1  # over which the gradient may be written
        return cross_entropy(own, targets, reduction=reduction, inplace=inplace, implementation="triton", **options)

    plain = lambda x: by_torch(x, targets, reduction, **options)  # noqa: E731
    assert_precise(mine, plain, [3 * random(7, 9000, dtype=dtype)], ulps=2)


@settings(max_examples=examples(20), deadline=None)
@given(
    rows=st.integers(0, 5), classes=st.integers(20, 200), skip=st.integers(0, 3), name=st.sampled_from(list(OPTIONS)),
    reduction=st.sampled_from(["none", "sum", "mean"]),
)  # fmt: skip
def test_any_shape_and_strides(rows, classes, skip, name, reduction):
    logits = random(rows, 2, classes + skip)[:, :, skip:]
    targets = targets_of(2 * rows, classes, OPTIONS[name].get("ignore_index", -100)).clamp(max=classes - 1)
    by_row = targets.view(rows, 2)

    def plain(x):
        losses = by_torch(x.reshape(-1, classes), targets, reduction, **OPTIONS[name])
        return losses.view(rows, 2) if reduction == "none" else losses

    def mine(x):
        return cross_entropy(x, by_row, reduction=reduction, implementation="triton", **OPTIONS[name])

    assert_precise(mine, plain, [logits], ulps=3)


@pytest.mark.parametrize("layout", ["column", "every other", "expanded"])
def test_strided_targets(layout):
    """Targets that are no contiguous row, of losses made with and without a gradient, and of linear ones."""
    many = targets_of(24, 40).clamp(min=0).view(6, 4)
    targets = {"column": many[:, 0], "every other": many.flatten()[:12:2], "expanded": many[0, 0].expand(6)}[layout]
    logits, hidden, weight = random(6, 40), random(6, 8), random(40, 8)
    for reduction in ("none", "mean"):
        call = {"reduction": reduction, "implementation": "triton"}
        assert_precise(lambda x: cross_entropy(x, targets, **call), lambda x: by_torch(x, targets, reduction), [logits])  # noqa: B023
        assert_precise(
            lambda h, w: linear_cross_entropy(h, w, targets, **call),  # noqa: B023
            lambda h, w: by_torch(h @ w.T, targets, reduction),  # noqa: B023
            [hidden, weight],
            ulps=3,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_targets_ignored(reduction, implementation):
    """Loss 0 and gradient 0, of infinite logits too."""
    targets = torch.full((3,), -100, device=DEVICE)
    logits = random(3, 40)
    logits[1] = torch.inf
    logits, hidden, weight = (x.requires_grad_() for x in (logits, random(3, 8), random(40, 8)))
    call = {"reduction": reduction, "implementation": implementation}
    for loss, inputs in (
        (cross_entropy(logits, targets, **call), (logits,)),
        (linear_cross_entropy(hidden, weight, targets, **call), (hidden, weight)),
    ):
        assert torch.equal(loss, torch.zeros_like(loss))
        for gradient in torch.autograd.grad(loss.sum(), inputs):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_masked_classes_and_large_logits():
    """Classes of logit -inf have probability 0; the maximum is subtracted, so 200 does not overflow."""
    logits = random(4, 50) + 200
    logits[:, 10:20] = -torch.inf
    targets = torch.tensor([0, 5, 30, 49], device=DEVICE)
    assert_precise(
        lambda x: cross_entropy(x, targets, implementation="triton"), lambda x: by_torch(x, targets), [logits], ulps=64
    )  # the log-sum-exp of 200 is rounded to 2^-17, and the probabilities with it


def test_targets_outside_the_vocabulary():
    """The block functions give NaN, for the loss and the whole gradient of that token; a CPU looks before it runs."""
    targets = torch.tensor([1, 40, -1, -100], device=DEVICE)
    for implementation in IMPLEMENTATIONS:
        out = torch.empty(4, 40, device=DEVICE)
        options = module.LossOptions()
        losses, _ = module.losses_of(random(4, 40), targets, options, implementation, torch.ones(4, device=DEVICE), out)
        assert losses.isnan().tolist() == [False, True, True, False]
        assert out.isnan().all(1).tolist() == [False, True, True, False]
        assert not out[[0, 3]].isnan().any()


@pytest.mark.interpreter
def test_refusals():
    logits, targets, hidden, weight = random(4, 40), torch.tensor([1, 40, 0, -100]), random(4, 8), random(40, 8)
    fine = targets.clamp(max=39)
    for call, message in (
        (lambda: cross_entropy(logits, targets), "target 40 is out of bounds: must be 0 to 39, or ignore_index=-100"),
        (lambda: linear_cross_entropy(hidden, weight, targets), "target 40 is out of bounds"),
        (lambda: cross_entropy(logits, fine[:3]), r"targets \(3,\): must be \(4,\), one a row of logits"),
        (lambda: cross_entropy(logits, fine.int()), r"targets torch.int32: must be torch.int64"),
        (lambda: cross_entropy(logits, fine, reduction="max"), "reduction='max': must be none, sum or mean"),
        (lambda: cross_entropy(logits, fine, label_smoothing=2.0), "label_smoothing=2.0: must be 0 to 1"),
        (lambda: cross_entropy(logits.T, targets_of(40, 4), inplace=True), "the logits must be contiguous"),
        (lambda: linear_cross_entropy(hidden, weight[:, :7], fine), r"its last dim must be the width of weight, 7"),
        (lambda: linear_cross_entropy(hidden, weight.double(), fine), "must have one dtype"),
        (lambda: linear_cross_entropy(hidden, weight.to("meta"), fine), "weight on meta: must be on one device"),
        (lambda: linear_cross_entropy(hidden.long(), weight.long(), fine), "hidden torch.int64: must be floating"),
        (lambda: cross_entropy(logits, fine, softcap=torch.inf), "softcap=inf: must be finite and above 0"),
        (lambda: linear_cross_entropy(hidden, weight, fine, bias=weight[:, 0][:3]), r"bias \(3,\): must be \(40,\)"),
        (lambda: linear_cross_entropy(hidden, weight, fine, token_weight=torch.ones(())), "goes with reduction='sum'"),
        (lambda: cross_entropy(logits.bfloat16(), fine, implementation="triton"), "interpreter computes bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_second_backward_pass_is_refused():
    """The first one has scaled the gradient in place."""
    targets = targets_of(4, 40)
    for loss in (
        cross_entropy(random(4, 40).requires_grad_(), targets),
        linear_cross_entropy(random(4, 8).requires_grad_(), random(40, 8), targets),
    ):
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second backward pass through this loss"):
            loss.backward()


def test_a_second_derivative_is_refused():
    logits, targets = random(4, 40).requires_grad_(), targets_of(4, 40)
    for inplace in (False, True):
        loss = cross_entropy(logits * 1, targets, inplace=inplace)
        with pytest.raises(RuntimeError, match="has no second derivative; use torch's loss"):
            torch.autograd.grad(loss, logits, create_graph=True)
    losses = cross_entropy(logits * 1, targets, reduction="none", inplace=True)
    with pytest.raises(RuntimeError, match="has no second derivative; use torch's loss"):
        torch.autograd.grad(losses.sum(), logits, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_without_classes(dtype):
    """What it adds to the statistics of all and to the gradient, in the dtype of sums."""
    logits, targets = torch.empty(4, 0, dtype=dtype), targets_of(4, 40).cpu()
    found = statistics_of(logits, targets, PLAIN, 40, "reference")
    assert (found.dtype, found[0].tolist()) == (dtype, [-math.inf] * 4)
    lse, weight = torch.zeros(4, dtype=dtype), torch.ones((), dtype=dtype)
    gradient = torch.empty_like(logits)
    gradient_of(logits, targets, lse, weight, PLAIN, 40, 40, "reference", gradient)
    assert gradient.shape == (4, 0)


def test_scaling_in_the_kernel():
    x = random(3, 5000)
    scaled = x.clone()
    triton_cross_entropy.scale(scaled, torch.tensor(0.5, device=DEVICE))
    assert torch.equal(scaled, x / 2)
    triton_cross_entropy.scale(scaled, torch.tensor(1.0, device=DEVICE))
    assert torch.equal(scaled, x / 2)
    padded = torch.stack((x, x))
    triton_cross_entropy.scale(padded.transpose(0, 1)[:-1], torch.tensor(0.5, device=DEVICE))
    assert torch.equal(padded[:, :-1], torch.stack((x, x))[:, :-1] / 2)
    assert torch.equal(padded[:, -1], torch.stack((x, x))[:, -1])


# linear ---------------------------------------------------------------------------------------------------------------


def plain_linear(hidden, weight, bias, targets, reduction, options):
    return by_torch(F.linear(hidden, weight, bias), targets, reduction, **options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_cross_entropy(name, reduction, with_bias, dtype):
    """In chunks of 4 of 10 tokens; the interpreter's kernels in float32 and float16, the reference in bfloat16."""
    options = OPTIONS[name]
    targets = targets_of(10, 50, options.get("ignore_index", -100))
    implementation = "reference" if dtype == torch.bfloat16 and DEVICE == "cpu" else "triton"

    def mine(hidden, weight, bias):
        call = {"reduction": reduction, "implementation": implementation, **options}
        return linear_cross_entropy(hidden, weight, targets, bias=bias, **call)

    inputs = [random(10, 24, dtype=dtype), random(50, 24, dtype=dtype), random(50, dtype=dtype) if with_bias else None]
    with mock.patch.object(module, "tokens_of_a_chunk", return_value=4):
        assert_precise(mine, lambda *t: plain_linear(*t, targets, reduction, options), inputs, ulps=3)


def test_a_weight_for_all_tokens():
    """Known early, as 1 / tokens of the whole batch: the same as a factor afterwards."""
    hidden, weight, targets = random(2, 9, 16), random(40, 16), targets_of(18, 40).view(2, 9)
    factor = torch.tensor(1 / 64, device=DEVICE)

    def early(h, w):
        return linear_cross_entropy(h, w, targets, reduction="sum", token_weight=factor)

    def late(h, w):
        return linear_cross_entropy(h, w, targets, reduction="sum") * factor.to(h.dtype)

    assert_precise(early, late, [hidden, weight])


def test_autocast():
    """The product is in the dtype of autocast, as torch's linear layers are; gradients have that of the parameters."""
    hidden, weight, targets = random(4, 8).requires_grad_(), random(40, 8).requires_grad_(), targets_of(4, 40)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(loss, rounded)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):  # which leaves float64 alone
        assert linear_cross_entropy(hidden.double(), weight.double(), targets).dtype == torch.float64


def test_smoothed_gradients_are_exact_in_float64():
    """Whatever the default dtype is."""
    logits, targets = random(4, 40).double().requires_grad_(), targets_of(4, 40)
    torch.set_default_dtype(torch.bfloat16)
    try:
        mine = torch.autograd.grad(cross_entropy(logits, targets, label_smoothing=0.1), logits)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    true = torch.autograd.grad(F.cross_entropy(logits, targets, label_smoothing=0.1), logits)[0]
    torch.testing.assert_close(mine, true, rtol=0, atol=1e-15)


def test_modules_of_liger():
    """A square weight, which could be taken for what it is multiplied with."""
    hidden, weight, bias, targets = random(8, 8), random(8, 8, seed=1), random(8), targets_of(8, 8)
    logits = hidden @ weight.T + bias
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(LigerCrossEntropyLoss(label_smoothing=0.1)(logits, targets), expected)
    fused = LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1)
    torch.testing.assert_close(fused(weight, hidden, targets, bias), expected)
    squares = logits.logsumexp(-1)[targets != -100].square().mean()
    with_squares = LigerCrossEntropyLoss(lse_square_scale=0.5, label_smoothing=0.1)(logits, targets)
    torch.testing.assert_close(with_squares, expected + 0.5 * squares)
    for arguments in ({"weight": bias}, {"return_z_loss": True}):
        with pytest.raises(ValueError, match="weights of classes and return_z_loss: not supported here"):
            LigerCrossEntropyLoss(**arguments)
    with pytest.raises(ValueError, match="label_smoothing=2.0: must be 0 to 1; reduction='avg': must be none, sum or"):
        LigerCrossEntropyLoss(reduction="avg", label_smoothing=2.0)
    assert LigerCrossEntropyLoss(reduction="sum").reduction == "sum"
    with pytest.raises(ValueError, match="weights of classes"):
        LigerFusedLinearCrossEntropyLoss(ce_weight=bias)


def test_the_weights_gradient_is_summed_in_float32():
    """Of 512 chunks whose shares are all alike, a sum in bfloat16 would stop growing at 256 of them."""
    hidden = torch.ones(512, 8, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    with mock.patch.object(module, "tokens_of_a_chunk", return_value=1):
        linear_cross_entropy(hidden, weight, targets, reduction="sum").backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [-256.0, 256.0]


@pytest.mark.parametrize("elements", [0, 1, 255, 256, 257, 1000, 100001])
def test_narrowing_in_place(elements):
    x = random(elements)
    expected = x.to(torch.bfloat16)
    address = x.data_ptr()
    narrow = cast_in_place(x, torch.bfloat16)
    assert torch.equal(narrow, expected)
    assert not elements or narrow.data_ptr() == address
    assert cast_in_place(expected, torch.bfloat16) is expected


class LiveBytes(TorchDispatchMode):
    """The most bytes that live at once beside the inputs."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.now, self.most, self.tensors_of = 0, 0, Counter()
        for x in inputs:
            self.tensors_of[self.storage(x)] = 1

    @staticmethod
    def storage(x: torch.Tensor) -> tuple[int, int]:
        return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.count(self.storage(x), 1)
                weakref.finalize(x, self.count, self.storage(x), -1)
        return result

    def count(self, storage: tuple[int, int], change: int) -> None:
        before = self.tensors_of[storage]
        self.tensors_of[storage] += change
        self.now += storage[1] * (change if min(before, before + change) == 0 else 0)
        self.most = max(self.most, self.now)


def test_memory_of_logits_that_are_never_held():
    """llama3_8b's loss of 131072 tokens: under 3.5 GiB beyond hidden states and weights. Here 1/32 of each size."""
    tokens, width, classes, chunk = (n // 32 for n in (131072, 4096, 128256, 2048))
    big = torch.empty(131072, 4096, dtype=torch.bfloat16, device="meta")
    assert module.tokens_of_a_chunk(big, 128256) == 32 * chunk
    hidden, weight = (torch.ones(n, width, dtype=torch.bfloat16, device=DEVICE) for n in (tokens, classes))
    targets, losses = torch.zeros(tokens, dtype=torch.int64, device=DEVICE), torch.zeros(chunk, device=DEVICE)
    one = torch.ones((), device=DEVICE)

    def of_a_chunk(logits, *_others):  # the kernel writes the gradient over the logits
        return losses, None

    with (
        mock.patch.object(module, "losses_of", of_a_chunk),
        mock.patch.object(module, "_add_product"),  # on a GPU a single call of cuBLAS
        mock.patch.object(module, "tokens_of_a_chunk", return_value=chunk),
        LiveBytes(hidden, weight) as live,
    ):
        _, gradients = module.in_chunks(hidden, weight, None, targets, module.LossOptions(), "triton", one)
        results = module.finished(gradients, hidden)
    assert results[1].dtype == torch.bfloat16
    assert 3.4 < live.most / 2**20 < 3.5


def test_memory_of_a_backward_pass():
    """One gradient, and nothing else of the logits' size; over the logits, nothing at all."""
    targets = targets_of(64, 2000)
    for inplace, most in ((False, 1.1), (True, 0.1)):
        logits = random(64, 2000).requires_grad_()
        own = logits * 1
        with LiveBytes(logits, own) as live:
            torch.autograd.grad(cross_entropy(own, targets, inplace=inplace, implementation="triton"), own)
        assert live.most < most * logits.nbytes


def test_small_gradients_of_float16_wait_for_the_loss_scale():
    logits = torch.full((64, 32), -14.0, device=DEVICE)
    logits[:, 0] = 0
    gradients = []
    for dtype in (torch.float16, torch.float32):
        x = logits.to(dtype).requires_grad_()
        (cross_entropy(x, torch.zeros(64, dtype=torch.int64, device=DEVICE)) * 65536.0).backward()
        gradients.append(x.grad.float())
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=0)
