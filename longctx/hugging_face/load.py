"""Weights of Hugging Face's safetensors files into the shards of a model, each rank reading its own part alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from longctx.config import ModelConfig, RotaryScaling
from longctx.hugging_face.convert import IGNORED, PretrainedError, Stored, differences, from_config_json, stored_tensors
from longctx.local_part import index_of, local_part
from longctx.runtime import Runtime

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight")
DTYPES = ("F64", "F32", "F16", "BF16")
ROWS = 4096  # of a matrix, compared at a time
OF_IDS = ("embedding.weight", "head.weight")  # our parameters with a row an id
PREFIXES = ("", "transformer.", "model.")  # that a file made from the bare model leaves out


def start_from_pretrained(model: nn.Module, config: ModelConfig, runtime: Runtime) -> int:
    """Fills `model` with the weights of `model.init_from`; every rank reads its own part of the files. Collective.

    Returns the tokens of the context that the weights were made for; 0: their `config.json` does not say it.

    Raises `UserError` on all ranks if the files cannot be read on one, or are those of a model of another shape.
    """
    folder = Path(config.init_from).expanduser()
    weights = runtime.run_on_all_ranks(lambda: PretrainedWeights(folder))
    rotary = runtime.run_on_all_ranks(lambda: weights.check(config))
    runtime.run_on_all_ranks(lambda: weights.load(model, config))
    other = f"; its rotary positions had {' '.join(rotary)}" if rotary else ""
    if more := config.vocab_size - weights.config["vocab_size"]:
        other += f"; the rows of {more} more ids (model.vocab_size={config.vocab_size}) begin as the mean of the others"
    runtime.say(f"started with the weights of {folder}{other}")
    return weights.context


class PretrainedWeights:
    """A folder with `config.json` and safetensors files, opened."""

    def __init__(self, folder: Path) -> None:
        """Raises `PretrainedError` naming the file and what is wrong."""
        self.folder = folder
        fields = _read_json(folder / "config.json", "name a folder that transformers' save_pretrained has written")
        self.context = int(fields.get("max_position_embeddings") or fields.get("n_positions") or 0)
        self.config: dict[str, Any] = from_config_json(fields, str(folder / "config.json"))
        self.files: dict[str, Path] = {}  # of each tensor
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  it is no dict
                        self._check_dtype(path, name, file.get_slice(name).get_dtype())
                        self.files[name] = path
            except (OSError, SafetensorError) as error:
                raise PretrainedError(f"{path}: no whole safetensors file ({error}); download it again") from None
        self._find_whether_tied(fields)

    def _check_dtype(self, path: Path, name: str, dtype: str) -> None:
        if dtype not in DTYPES and not name.endswith(IGNORED):
            raise PretrainedError(
                f"{path}: {name} is {dtype}, which are numbers only together with scales (quantized weights); take the "
                "bfloat16 weights of the model"
            )

    def _find_whether_tied(self, fields: dict[str, Any]) -> None:
        """The files decide: an output matrix of its own is not dropped, and one that is not there is the embedding."""
        head = next((name for name in self.files if name.endswith(HEAD)), None)
        embedding = next((name for name in self.files if name.endswith(EMBEDDINGS)), None)
        if head is None and fields.get("tie_word_embeddings") is None:
            self.config["tied_embeddings"] = True
        elif head and embedding and self.config["tied_embeddings"] and not self._are_equal(head, embedding):
            if fields["model_type"] == "gpt2":
                raise PretrainedError(
                    f"{self.folder}: {head} is not {embedding}, and GPT-2 has one matrix for both; these weights are "
                    "of another model"
                )
            self.config["tied_embeddings"] = False

    def _are_equal(self, one: str, other: str) -> bool:
        """Compares two matrices some rows at a time."""
        with safe_open(self.files[one], framework="pt") as a, safe_open(self.files[other], framework="pt") as b:
            first, second = a.get_slice(one), b.get_slice(other)
            if first.get_shape() != second.get_shape():
                return False
            return all(
                torch.equal(first[i : i + ROWS], second[i : i + ROWS]) for i in range(0, first.get_shape()[0], ROWS)
            )

    def _paths(self) -> list[Path]:
        if (self.folder / SINGLE).exists():  # first, as in transformers, which leaves an index of before beside it
            return [self.folder / SINGLE]
        if not (self.folder / INDEX).exists():
            raise PretrainedError(
                f"{self.folder}: neither {SINGLE} nor {INDEX} in it; other formats execute code when they are read "
                "and are not supported: save the model with safe_serialization=True"
            )
        where = self.folder / INDEX
        weight_map = _read_json(where, "").get("weight_map")
        if not isinstance(weight_map, dict):
            raise PretrainedError(f"{where}: has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise PretrainedError(f"{where}: {name!r} is no file of this folder, and is not opened")
            if not (self.folder / name).exists():
                raise PretrainedError(f"{self.folder / name}: missing; {INDEX} names it")
        return [self.folder / name for name in names]

    def check(self, config: ModelConfig) -> list[str]:
        """What of the rotary positions differs from the run's `config`, for the user to see.

        Raises `PretrainedError` if the weights do not fit the model, with the overrides that make it fit.
        """
        wrong, rotary = differences(config, self.config)
        if wrong:
            why = ""
            if config.tied_embeddings and not self.config["tied_embeddings"]:
                why = f" ({HEAD} is not the embedding)"
            raise PretrainedError(f"{self.folder} is another model than this run's; set {' '.join(wrong)}{why}")
        self.names(config)
        first, before = config.rotary.original_length, self.config.get("rotary", {}).get("scaling")
        is_by_context = config.rotary.scaling in (RotaryScaling.dynamic, RotaryScaling.yarn, RotaryScaling.llama3)
        if is_by_context and before == RotaryScaling.none and self.context not in (0, first):
            rotary.append(f"and a context of {self.context} tokens, where model.rotary.original_length={first}")
        return rotary

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Name in the files of every tensor of `stored_tensors`. Raises `PretrainedError` on missing or other ones."""
        wanted = [stored.name for stored in stored_tensors(config)]
        spellings = [{name: name.removeprefix(prefix) for name in wanted} for prefix in PREFIXES]
        names = max(spellings, key=lambda names: len(self.files.keys() & names.values()))
        missing = [name for name in names.values() if name not in self.files]
        if missing:
            raise PretrainedError(f"{self.folder}: no tensor {missing[0]} ({len(missing)} are missing)")
        tied = {"lm_head.weight"} if config.tied_embeddings else set()  # some files repeat the embedding
        other = sorted(n for n in set(self.files) - set(names.values()) - tied if not n.endswith(IGNORED))
        if other:
            raise PretrainedError(
                f"{self.folder}: tensor {other[0]} has no place in this model ({len(other)} have none)"
            )
        return names

    @torch.no_grad()
    def load(self, model: nn.Module, config: ModelConfig) -> None:
        """Fills the parameters of `model`, whole or sharded ones.

        Ids that the files do not have begin with the mean of the rows that are there.
        """
        parameters = dict(model.named_parameters())
        names = self.names(config)
        for stored in stored_tensors(config):
            path, first_row = self.files[names[stored.name]], 0
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(names[stored.name])
                shape = part.get_shape()[::-1] if stored.is_transposed else part.get_shape()
                self._check_shape(stored, names[stored.name], shape, parameters)
                for name in stored.parts:
                    _fill(parameters[name], part, first_row, stored.is_transposed)
                    first_row += parameters[name].shape[0]
                if stored.parts[0] in OF_IDS and first_row > shape[0]:
                    _fill_more_rows(parameters[stored.parts[0]], part)

    def _check_shape(self, stored: Stored, name: str, shape: list[int], parameters: dict[str, nn.Parameter]) -> None:
        rows = sum(parameters[part].shape[0] for part in stored.parts)
        if stored.parts[0] in OF_IDS:
            rows = min(rows, self.config["vocab_size"])
        expected = [rows, *parameters[stored.parts[0]].shape[1:]]
        if list(shape) != expected:
            raise PretrainedError(f"{self.files[name]}: {name} has the shape {list(shape)}, the model's is {expected}")


def _fill(parameter: nn.Parameter, part: Any, first_row: int, is_transposed: bool) -> None:
    """Copies this rank's part out of a tensor in a file, in which the parameter begins at `first_row`.

    What the file does not reach to stays as it is.
    """
    local, index = _local(parameter)
    rows = part.get_shape()[-1 if is_transposed else 0]
    begin, end = (min(row + first_row, rows) for row in (index[0].start, index[0].stop))
    if begin == end or not local.numel():
        return
    index[0] = slice(begin, end)
    values = part[tuple(reversed(index)) if is_transposed else tuple(index)]
    local[: end - begin].copy_(values.t() if is_transposed else values)


def _fill_more_rows(parameter: nn.Parameter, part: Any) -> None:
    """The mean of a matrix in a file for each row of this rank's part that lies behind its end."""
    local, (rows, columns) = _local(parameter)
    there = part.get_shape()[0]
    if rows.stop <= there or not local.numel():
        return
    total = sum(part[first : first + ROWS, columns].double().sum(dim=0) for first in range(0, there, ROWS))
    local[max(0, there - rows.start) :] = (total / there).to(local)


def _local(parameter: nn.Parameter) -> tuple[torch.Tensor, list[slice]]:
    """This rank's part of a parameter, and where in it that lies."""
    if isinstance(parameter, DTensor):
        return parameter.to_local(), list(index_of(local_part(parameter)))
    return parameter.data, [slice(0, size) for size in parameter.shape]


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PretrainedError(f"{path}: no such file; {hint}") from None
    except ValueError as error:
        raise PretrainedError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise PretrainedError(f"{path}: holds no object")
    return fields
