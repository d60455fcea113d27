"""The weights of a checkpoint as plain safetensors files, without optimizer and layout, for other programs."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from longctx.checkpoint import CheckpointError, read_manifest, verify_files
from longctx.config import Config, ModelConfig
from longctx.data.prepare import find_end_of_document
from longctx.model.hugging_face import Stored, stored_tensors, to_config_json

FILE_BYTES = 5 << 30
PREFIX = "model."  # of the weights' names in a checkpoint


def model_of(manifest: dict[str, Any]) -> tuple[ModelConfig, int]:
    """The model a checkpoint was made with, and its sequence length in tokens."""
    written = OmegaConf.create(manifest["facts"]["configuration"])
    whole = OmegaConf.merge(OmegaConf.structured(Config), {"model": written.model, "data": written.data})
    config = OmegaConf.to_object(whole)
    assert isinstance(config, Config)
    return config.model, config.data.sequence_length


def export_hugging_face(
    checkpoint: Path, folder: Path, dtype: torch.dtype, tokenizer_file: Path | None = None
) -> list[Path]:
    """Writes the weights of `checkpoint` and `config.json` so that transformers' `from_pretrained` reads `folder`.

    With a tokenizer, it lies beside them and its end-of-document token ends what is generated.

    Returns the files of weights. Raises as `export_weights`, and `PretrainedError` if transformers has no such model.
    """
    model, sequence_length = model_of(read_manifest(checkpoint))
    fields = to_config_json(model, sequence_length) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    beside = {}
    if tokenizer_file is not None:
        fields["eos_token_id"] = find_end_of_document(Tokenizer.from_file(str(tokenizer_file)), tokenizer_file)
        beside["tokenizer.json"] = tokenizer_file.read_text()
    beside["config.json"] = json.dumps(fields, indent=2) + "\n"
    return export_weights(checkpoint, folder, dtype, stored_tensors(model), beside)


def export_weights(
    checkpoint: Path, folder: Path, dtype: torch.dtype, stored: list[Stored] | None = None,
    beside: dict[str, str] | None = None,
) -> list[Path]:  # fmt: skip
    """Writes the weights of `checkpoint` into `folder`, under their own names or as `stored`; returns the files.

    `beside`: other files, by name.

    Memory holds what goes into one file, some 5 GiB in float32, and its copies. Raises `CheckpointError` if a byte of
    the checkpoint is not as written, or `folder` exists, which appears only when it is whole.
    """
    manifest = verify_files(checkpoint)
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; remove it or give another folder")
    sizes = {
        name.removeprefix(PREFIX): [int(n) for n in kind.split("[")[1].rstrip("]").split(",") if n.strip()]
        for name, kind in manifest["tensors"].items()
        if name.startswith(PREFIX)
    }
    lots = _lots(stored or [Stored(name, (name,)) for name in sizes], sizes)
    work = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    work.mkdir(parents=True)
    try:
        names = _write(checkpoint, work, lots, sizes, dtype)
        for name, content in (beside or {}).items():
            (work / name).write_text(content)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [folder / name for name in names]


def _write(
    checkpoint: Path, folder: Path, lots: list[list[Stored]], sizes: dict[str, list[int]], dtype: torch.dtype
) -> list[str]:
    """A file each lot, and an index if there are several; returns the files' names."""
    names, weight_map = [], {}
    for number, lot in enumerate(lots, 1):
        name = "model.safetensors" if len(lots) == 1 else f"model-{number:05d}-of-{len(lots):05d}.safetensors"
        save_file(_read(checkpoint, lot, sizes, dtype), folder / name, metadata={"format": "pt"})
        weight_map |= {tensor.name: name for tensor in lot}
        names.append(name)
    if len(lots) > 1:
        total = sum((folder / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names


def _lots(stored: list[Stored], sizes: dict[str, list[int]]) -> list[list[Stored]]:
    """Tensors for each file, in order, of at most `FILE_BYTES` in float32 unless one alone is larger."""
    lots: list[list[Stored]] = []
    left = 0
    for tensor in stored:
        size = sum(torch.Size(sizes[part]).numel() for part in tensor.parts) * 4
        if not lots or size > left:
            lots.append([])
            left = FILE_BYTES
        lots[-1].append(tensor)
        left -= size
    return lots


def _read(checkpoint: Path, lot: list[Stored], sizes: dict[str, list[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    parts = {f"{PREFIX}{part}": torch.empty(sizes[part]) for tensor in lot for part in tensor.parts}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as meant: one process reads it all
        dcp.load(parts, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    found = {}
    for tensor in lot:
        value = torch.cat([parts[f"{PREFIX}{part}"] for part in tensor.parts])
        found[tensor.name] = (value.t() if tensor.is_transposed else value).to(dtype).contiguous()
    return found
