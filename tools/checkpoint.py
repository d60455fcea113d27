"""Looks at checkpoints, without a GPU and without the run.

usage: python tools/checkpoint.py list runs/NAME
       python tools/checkpoint.py verify runs/NAME            (or one checkpoints/step_N)
       python tools/checkpoint.py export runs/NAME/checkpoints/step_N --output FOLDER [--dtype bfloat16]

`verify` reads every byte and compares it with the manifest; it exits with 1 and names the file if one is another.
`export` writes the weights alone, under longctx's names; `tools/convert_hf.py export` does so for transformers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longctx.checkpoint import BEST_BY, MANIFEST, CheckpointError, list_checkpoints, read_manifest, verify_files
from longctx.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("list", "steps, sizes and layouts"), ("verify", "compare every byte with the manifests")):
        command = commands.add_parser(name, help=what)
        command.add_argument("path", type=Path, help="a run's folder, its checkpoints, or one step_N")
    export = commands.add_parser("export", help="write the weights alone as safetensors")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    try:
        if arguments.command == "export":
            export_checkpoint(arguments.checkpoint, arguments.output, arguments.dtype)
        elif not show(find(arguments.path), is_verified=arguments.command == "verify"):
            sys.exit(1)
    except UserError as error:
        sys.exit(f"checkpoint.py: {error}")


def find(path: Path) -> list[Path]:
    """The checkpoints of a run's folder, of its folder of checkpoints, or the one at `path`."""
    is_named_so = path.name.startswith("step_") or path.name in ("latest", "best")
    if (path / MANIFEST).exists() or (is_named_so and not (path / "checkpoints").is_dir()):
        return [path]
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoints in it; name a run's folder or a step_N")
    return found


def show(paths: list[Path], is_verified: bool) -> bool:
    """A line each; returns whether all are good."""
    is_good = True
    for path in paths:
        try:
            manifest = verify_files(path) if is_verified else read_manifest(path)
        except CheckpointError as error:
            print(f"{path.name}: REFUSED: {error}")
            is_good = False
            continue
        facts, size = manifest["facts"], sum(file["bytes"] for file in manifest["files"].values())
        ranks = facts.get("layout", {}).get("world_size")  # of what no run has written: None
        loss = f", validation loss {facts[BEST_BY]:.4f}" if BEST_BY in facts else ""
        print(
            f"{path.name}: {size / 2**30:.3g} GiB in {len(manifest['files'])} files, {facts.get('consumed')} sequences "
            f"read, written by {ranks} ranks{loss}{', every byte as written' if is_verified else ''}"
        )
    return is_good


def export_checkpoint(checkpoint: Path, folder: Path, dtype: str) -> None:
    import torch

    from longctx.hugging_face.export import export_weights

    written = export_weights(checkpoint, folder, getattr(torch, dtype))
    print(f"{folder}: {len(written)} files, {sum(path.stat().st_size for path in written) / 2**30:.3g} GiB")


if __name__ == "__main__":
    main()
