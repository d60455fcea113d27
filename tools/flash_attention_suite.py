"""Runs flash-attention's own public tests against our functions: needs a GPU, einops and its source, version 2.8.

    git clone --depth 1 --branch v2.8.3 https://github.com/Dao-AILab/flash-attention
    python tools/flash_attention_suite.py flash-attention --sample 2000

The suite has some 200000 cases; `--sample` takes that many of them at random (seeded). Left out are those of a cache of
keys: `flash_attn_with_kvcache` and paged keys, which are for inference.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest

from longctx.kernels.compat import flash_attn

FUNCTIONS = (
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func",
)  # fmt: skip


class Sample:
    """Keeps a random sample of the cases that apply, and says how many of which test."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.random = size, random.Random(seed)

    def pytest_collection_modifyitems(self, config, items) -> None:
        applicable = [
            item for item in items if "kvcache" not in item.name and not item.callspec.params.get("paged_kv_block_size")
        ]
        kept = self.random.sample(applicable, min(self.size, len(applicable)))
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        print(f"\n{len(items)} cases, {len(applicable)} apply, running {len(kept)}:")
        for name, count in sorted(Counter(item.originalname for item in kept).items()):
            print(f"  {name}: {count}")
        items[:] = kept


def as_flash_attn(checkout: Path) -> None:
    """Puts modules in place under the names that the suite imports."""
    package, interface, layers, rotary = (
        ModuleType(name)
        for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.layers", "flash_attn.layers.rotary")
    )
    for name in FUNCTIONS:
        setattr(package, name, _with_scaled_probabilities(getattr(flash_attn, name)))
    vars(package)["flash_attn_with_kvcache"] = _for_inference
    vars(rotary)["apply_rotary_emb"] = _for_inference  # only the tests of the cache call it
    vars(interface)["_get_block_size_n"] = lambda *_: 2**31 - 1  # the softmax is scaled by its row's maximum
    spec = importlib.util.spec_from_file_location("flash_attn.bert_padding", checkout / "flash_attn/bert_padding.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{checkout}: no flash_attn/bert_padding.py, must be a checkout of flash-attention")
    padding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(padding)
    for module in (package, interface, layers, rotary, padding):
        sys.modules[module.__name__] = module


def _with_scaled_probabilities(function):
    """The suite normalises S_dmask itself and expects exp(score - row maximum), which is the softmax by its maximum."""

    def scaled(*args, **kwargs):
        result = function(*args, **kwargs)
        if not isinstance(result, tuple) or not result[2].numel():
            return result
        out, lse, probabilities = result
        top = probabilities.abs().amax(-1, keepdim=True)
        return out, lse, probabilities / top.masked_fill(top == 0, 1)

    return scaled


def _for_inference(*_args, **_kwargs):
    raise NotImplementedError("a cache of keys is for inference")


def main() -> None:
    about = f"{__doc__}\nOther arguments are pytest's."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of flash-attention")
    parser.add_argument("--sample", type=int, default=2000, help="number of cases (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    arguments, for_pytest = parser.parse_known_args()
    as_flash_attn(arguments.checkout)
    tests = arguments.checkout / "tests/test_flash_attn.py"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(arguments.checkout), "-c", "/dev/null"]
    plugin = Sample(arguments.sample, arguments.seed)
    sys.exit(pytest.main([str(tests), *options, *for_pytest], plugins=[plugin]))


if __name__ == "__main__":
    main()
