"""The weights of a checkpoint as plain safetensors files, without optimizer and layout, for other programs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from longctx.checkpoint import CheckpointError, read_manifest
from longctx.config import Config, ModelConfig
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


def export_hugging_face(checkpoint: Path, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Writes the weights of `checkpoint` and `config.json` so that transformers' `from_pretrained` reads `folder`.

    Returns the files of weights. Raises as `export_weights`, and `PretrainedError` if transformers has no such model.
    """
    model, sequence_length = model_of(read_manifest(checkpoint))
    fields = to_config_json(model, sequence_length) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    files = export_weights(checkpoint, folder, dtype, stored_tensors(model))
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return files


def export_weights(
    checkpoint: Path, folder: Path, dtype: torch.dtype, stored: list[Stored] | None = None
) -> list[Path]:
    """Writes the weights of `checkpoint` into `folder`, under their own names or as `stored`; returns the files.

    Memory holds one file of some 5 GiB at a time. Raises `CheckpointError` if the checkpoint is none, or `folder`
    exists.
    """
    manifest = read_manifest(checkpoint)
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; remove it or give another folder")
    sizes = {
        name.removeprefix(PREFIX): [int(n) for n in kind.split("[")[1].rstrip("]").split(",") if n.strip()]
        for name, kind in manifest["tensors"].items()
        if name.startswith(PREFIX)
    }
    lots = _lots(stored or [Stored(name, (name,)) for name in sizes], sizes, dtype)
    folder.mkdir(parents=True)
    files, weight_map = [], {}
    for number, lot in enumerate(lots, 1):
        name = "model.safetensors" if len(lots) == 1 else f"model-{number:05d}-of-{len(lots):05d}.safetensors"
        save_file(_read(checkpoint, lot, sizes, dtype), folder / name, metadata={"format": "pt"})
        weight_map |= {tensor.name: name for tensor in lot}
        files.append(folder / name)
    if len(lots) > 1:
        total = sum(path.stat().st_size for path in files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def _lots(stored: list[Stored], sizes: dict[str, list[int]], dtype: torch.dtype) -> list[list[Stored]]:
    """Tensors for each file, in order, of at most `FILE_BYTES` unless one alone is larger."""
    lots: list[list[Stored]] = []
    left = 0
    for tensor in stored:
        size = sum(torch.Size(sizes[part]).numel() for part in tensor.parts) * dtype.itemsize
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
