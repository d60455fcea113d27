"""The commands of docs/finetune.md and docs/extend_context.md, with a small random model in place of Qwen 3."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from longctx.data.prepare import BUILTIN_TOKENIZER
from longctx.metrics_file import read_metrics
from runs import ROOT, run_as_typed

FINETUNE, EXTEND = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("finetune", "extend_context"))
SMALL = {
    "vocab_size": 8320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128,
}  # fmt: skip
OVERRIDES = [
    "model.vocab_size=8320", "model.layers=2", "model.width=64", "model.heads=4", "model.kv_heads=2",
    "model.head_dim=16", "model.mlp_width=128", "data.sequence_length=128", "data.sequences_per_step=4",
    "optim.steps=4", "precision.compute=float32", "parallel.compile=false", "logging.wandb=disabled",
    "validation.sample_tokens=4",
]  # fmt: skip


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.S | re.M)
    return [shlex.split(line) for kind, block in blocks if not kind for line in block.strip().splitlines()]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a user stands: a chat template, and a model."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6))
    model.save_pretrained(tmp_path / "Qwen3-0.6B")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.save_pretrained(str(tmp_path / "Qwen3-0.6B"))
    return tmp_path


def test_fine_tuning(folder):
    lines = re.search(r"```json\n(.*?)```", FINETUNE, re.S)
    assert lines is not None
    (folder / "chats.jsonl").write_text(lines[1] * 40)
    prepare, training, export = commands(FINETUNE)
    assert "documents" in run_as_typed(prepare, "--validation-fraction", "0.2", folder=folder)
    said = run_as_typed(training, *OVERRIDES, folder=folder)
    assert "--- sample ---\n<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n" in said
    rows = read_metrics(folder / "runs" / "chat" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss/train" in row] == [1, 2, 3, 4]
    run_as_typed(export, folder=folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat-out")
    model = AutoModelForCausalLM.from_pretrained(folder / "chat-out", dtype=torch.float32)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert tokenizer.decode(asked["input_ids"][0]) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert model(**asked).logits.isfinite().all()
    facts = json.loads((folder / "chats" / "manifest.json").read_text())
    assert facts["splits"]["train"][0]["trained_sha256"]


def test_extending_the_context(folder):
    """From 32 tokens to 128; what it says is of the real model."""
    for name, files in (("long", ("longctx", "kernels")), ("short", ("tools",))):
        (folder / "texts" / name).mkdir(parents=True)
        for number, source in enumerate(sorted(path for f in files for path in (ROOT / f).glob("*.py"))):
            (folder / "texts" / name / f"{number}.txt").write_text(source.read_text())
    *prepare, plan, as_it_is, yarn_alone, extended, compare, export = commands(EXTEND)
    for words in prepare:
        run_as_typed(words, "--validation-fraction", "0.2", folder=folder)
    assert "torchrun --nproc-per-node 1" in run_as_typed(plan, folder=folder)
    small = "model.rotary.original_length=32", "data.curriculum={0: 32, 0.25: 0}", "validation.sequences=2"
    for words in (as_it_is, yarn_alone, extended):
        steps = [word for word in words if word.startswith("optim.steps")]
        run_as_typed(words, *OVERRIDES, *small, *steps, folder=folder)
    losses = {}
    for name in ("as-it-is", "yarn-alone", "extended"):
        rows = read_metrics(folder / "runs" / name / "metrics.jsonl")
        losses[name] = next(row for row in reversed(rows) if "loss/val" in row)
    assert losses["as-it-is"]["loss/val"] != losses["yarn-alone"]["loss/val"]  # the weights are the same
    assert losses["extended"]["loss/val"] != losses["yarn-alone"]["loss/val"]
    for found in losses.values():
        assert "loss/pos/64" in found
        assert any(key.startswith("recall/") for key in found)
    assert "yarn" in run_as_typed(compare, folder=folder)
    run_as_typed(export, folder=folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "extended-out", dtype=torch.float32)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.rope_parameters["original_max_position_embeddings"] == 32
    assert model(torch.arange(100)[None]).logits.isfinite().all()
