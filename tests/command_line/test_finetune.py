"""docs/finetune.md as it is written, with a small random model in place of Qwen 3."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from longctx.data.prepare import BUILTIN_TOKENIZER
from longctx.metrics_file import read_metrics
from runs import ROOT

PAGE = (ROOT / "docs" / "finetune.md").read_text()
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


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
    return [shlex.split(line) for kind, block in blocks if not kind for line in block.strip().splitlines()]


def run(words: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a user stands: the tools, a model, and the page's conversations, many times."""
    for name in ("tools", "examples", "train.py", "recipes", "configs", "longctx", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6))
    model.save_pretrained(tmp_path / "Qwen3-0.6B")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.save_pretrained(str(tmp_path / "Qwen3-0.6B"))
    lines = re.search(r"```json\n(.*?)```", PAGE, re.S)
    assert lines is not None
    (tmp_path / "chats.jsonl").write_text(lines[1] * 40)
    return tmp_path


def test_the_page_runs_as_written(folder):
    prepare, train, export = commands()
    assert prepare[0] == export[0] == ".venv/bin/python"
    said = run([sys.executable, *prepare[1:], "--validation-fraction", "0.2"], folder)
    assert "documents" in said
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", *train[1:], *OVERRIDES]
    train[train.index("gpu")] = "2"
    said = run(train, folder)
    assert "--- sample ---\n<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n" in said
    rows = read_metrics(folder / "runs" / "chat" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss/train" in row] == [1, 2, 3, 4]
    run([sys.executable, *export[1:]], folder)
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
