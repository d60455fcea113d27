"""The weights of a checkpoint as plain safetensors files, without optimizer and layout, for other programs."""

from __future__ import annotations

import json
import math
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from longctx.checkpoint import (
    HEAD,
    HEAD_BEFORE,
    CheckpointError,
    name_in,
    read_manifest,
    shape_of,
    verify_files,
    write_safetensors,
)
from longctx.config import Config, ModelConfig
from longctx.data.chat import TOKENIZER_CONFIG, saved_files
from longctx.data.tokenizer import (
    as_trained,
    document_begin,
    find_end_of_document,
    kept_tokenizer,
    open_tokenizer,
    vocab_size,
)
from longctx.files import disk_problem
from longctx.hugging_face.convert import PretrainedError, Stored, stored_tensors, to_config_json

FILE_BYTES = 5 << 30
PROBES = (
    "def f(x):\n    return x[10:256]\n",
    " It's 1234.5 km, caf\u00e9 cafe\u0301, \u5b57 \U0001f600\t",
)  # texts that tokenizers cut apart
PREFIX = "model."  # of the weights' names in a checkpoint


def model_of(manifest: dict[str, Any]) -> tuple[ModelConfig, int]:
    """The model a checkpoint was made with, and its sequence length in tokens."""
    written = OmegaConf.create(manifest["facts"]["configuration"])
    whole = OmegaConf.merge(OmegaConf.structured(Config), {"model": written.model, "data": written.data})
    config = OmegaConf.to_object(whole)
    assert isinstance(config, Config)
    return config.model, config.data.sequence_length


def export_hugging_face(
    checkpoint: Path, folder: Path, dtype: torch.dtype, tokenizer_file: Path | None = None,
    end_of_document: str | None = None,
) -> list[Path]:  # fmt: skip
    """Writes the weights of `checkpoint` and `config.json` so that transformers' `from_pretrained` reads `folder`.

    The tokenizer lies beside them, so that a text gets the ids it was trained on: `tokenizer_file`, or the one that the
    run has kept in its folder; with the chat template of the run's conversations, and the special tokens that it
    writes. What is generated ends at the token `end_of_document` of it, at those that the run's answers and documents
    end with, or, where neither is known, at a usual one.

    Returns the files of weights. Raises as `export_weights`, and `PretrainedError` if transformers has no such model,
    or the tokenizer is that of another.
    """
    manifest = read_manifest(checkpoint)
    model, sequence_length = model_of(manifest)
    fields = to_config_json(model, max(sequence_length, manifest["facts"].get("context", 0)))
    context = fields.get("max_position_embeddings") or fields["n_positions"]
    fields |= {"torch_dtype": str(dtype).removeprefix("torch.")}
    kept = kept_tokenizer(checkpoint)
    beside = {}
    if tokenizer_file is not None or kept.exists():
        facts = manifest["facts"]
        ends = facts.get("ends") or [end for end in [facts.get("end_of_document")] if end is not None]
        if tokenizer_file is not None and (end_of_document or not kept.exists()):
            ends = []  # of another tokenizer, or none that the run knew
        beside = {name: file.read_text(encoding="utf-8") for name, file in saved_files(kept.parent).items()}
        names, files = _tokenizer_files(
            tokenizer_file or kept, ends, end_of_document, json.loads(beside.get(TOKENIZER_CONFIG, "{}")), context,
            model.vocab_size,
        )  # fmt: skip
        fields |= names
        beside |= files
    beside["config.json"] = _json(fields)
    return export_weights(checkpoint, folder, dtype, stored_tensors(model), beside)


def _tokenizer_files(
    file: Path, ends: list[int], end_token: str | None, written: dict[str, Any], context: int, vocabulary: int
) -> tuple[dict[str, int], dict[str, str]]:
    """What `config.json` says of the tokenizer, and the files that transformers reads it from, by name.

    `ends`: ids at which what is generated ends, beside that of `end_token`; `written`: the special tokens of the run's
    conversations, by what transformers calls them. Raises `PretrainedError` if the tokenizer has ids that a model of
    `vocabulary` ids has not.
    """
    tokenizer = open_tokenizer(file)
    if vocab_size(tokenizer) > vocabulary:
        raise PretrainedError(
            f"{file}: its ids go to {vocab_size(tokenizer) - 1}, the model has {vocabulary}; give one whose ids "
            "the model has, as the text was prepared with"
        )
    if end_token or not ends:
        ends = list(dict.fromkeys([find_end_of_document(tokenizer, file, end_token), *ends]))
    known = {name: tokenizer.token_to_id(token) for name, token in written.items() if name.endswith("_token")}
    ids = {f"{name}_id": number for name, number in known.items() if number is not None}
    if begin := document_begin(tokenizer, file):
        ids.setdefault("bos_token_id", begin[0])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # as tokenizer.json says it, whatever the model is
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if '"add_prefix_space":true' in tokenizer.to_str():  # which transformers before 5 would switch off
        config["add_prefix_space"] = True
    names = {"eos_token_id": ends[0]} | ids  # a template may write another than answers end with
    config |= {name.removesuffix("_id"): tokenizer.id_to_token(number) for name, number in names.items()}
    ids = {name: ids[name] for name in ("bos_token_id", "pad_token_id") if name in ids} | {"eos_token_id": ends[0]}
    return ids, {
        "tokenizer.json": as_trained(file, None),
        TOKENIZER_CONFIG: _json(config),
        "generation_config.json": _json(ids | {"eos_token_id": ends if len(ends) > 1 else ends[0]}),
    }


def reads_other_ids(folder: Path) -> bool:
    """Whether transformers' AutoTokenizer gives other ids than `tokenizer.json` in an exported folder.

    For models of the kind of Qwen 2 it takes the rules of their tokenizer in place of those in the file. False where
    transformers is not there to ask.
    """
    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] != "qwen2":
        return False
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        return False
    written, read = (cls.from_pretrained(str(folder)) for cls in (PreTrainedTokenizerFast, AutoTokenizer))
    return len(read) != len(written) or any(read(text)["input_ids"] != written(text)["input_ids"] for text in PROBES)


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def export_weights(
    checkpoint: Path, folder: Path, dtype: torch.dtype, stored: list[Stored] | None = None,
    beside: dict[str, str] | None = None,
) -> list[Path]:  # fmt: skip
    """Writes the weights of `checkpoint` into `folder`, under their own names or as `stored`; returns the files.

    `beside`: other files, by name.

    Memory holds what goes into one file, some 5 GiB in float32, and its copies. Raises `CheckpointError` if a byte of
    the checkpoint is not as written, `folder` exists, which appears only when it is whole, or the disk takes it not.
    """
    manifest = verify_files(checkpoint)
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; remove it or give another folder")
    saved = manifest["tensors"]
    names = [name.removeprefix(PREFIX).replace(HEAD_BEFORE, HEAD) for name in saved if name.startswith(PREFIX)]
    lots = _lots(stored or [Stored(name, (name,)) for name in names], saved)
    work = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        work.mkdir(parents=True)
        files = _write(checkpoint, work, lots, saved, dtype)
        for name, content in (beside or {}).items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(content, encoding="utf-8")
        work.rename(folder)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)  # what is free is told without it
        needed = dtype.itemsize * sum(_numbers_in(tensor, saved) for lot in lots for tensor in lot)
        raise CheckpointError(disk_problem(error, folder, needed)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [folder / name for name in files]


def _write(
    checkpoint: Path, folder: Path, lots: list[list[Stored]], saved: dict[str, str], dtype: torch.dtype
) -> list[str]:
    """A file each lot, and an index if there are several; returns the files' names."""
    names, weight_map = [], {}
    for number, lot in enumerate(lots, 1):
        name = "model.safetensors" if len(lots) == 1 else f"model-{number:05d}-of-{len(lots):05d}.safetensors"
        write_safetensors(folder / name, _read(checkpoint, lot, saved, dtype), {"format": "pt"})
        weight_map |= {tensor.name: name for tensor in lot}
        names.append(name)
    if len(lots) > 1:
        total = sum((folder / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names


def _lots(stored: list[Stored], saved: dict[str, str]) -> list[list[Stored]]:
    """Tensors for each file, in order, of at most `FILE_BYTES` in float32 unless one alone is larger."""
    lots: list[list[Stored]] = []
    left = 0
    for tensor in stored:
        size = 4 * _numbers_in(tensor, saved)
        if not lots or size > left:
            lots.append([])
            left = FILE_BYTES
        lots[-1].append(tensor)
        left -= size
    return lots


def _numbers_in(tensor: Stored, saved: dict[str, str]) -> int:
    return sum(math.prod(shape_of(saved[_saved_name(part, saved)])) for part in tensor.parts)


def _saved_name(part: str, saved: dict[str, str]) -> str:
    return name_in(saved, f"{PREFIX}{part}")


def _read(checkpoint: Path, lot: list[Stored], saved: dict[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    names = [_saved_name(part, saved) for tensor in lot for part in tensor.parts]
    parts = {name: torch.empty(shape_of(saved[name])) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as meant: one process reads it all
        dcp.load(parts, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    found = {}
    for tensor in lot:
        value = torch.cat([parts[_saved_name(part, saved)] for part in tensor.parts])
        found[tensor.name] = (value.t() if tensor.is_transposed else value).to(dtype).contiguous()
    return found
