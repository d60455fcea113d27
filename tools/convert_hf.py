"""Between longctx and Hugging Face: GPT-2, Llama, Qwen 2.5 and 3, Mistral, Ministral, SmolLM3.

usage: python tools/convert_hf.py config HF_FOLDER > configs/model/NAME.yaml
       python tools/convert_hf.py export runs/NAME/checkpoints/step_N --output FOLDER [--dtype bfloat16]

`config` prints the model of a folder as a preset; `train.py recipe=... model=NAME model.init_from=HF_FOLDER` then
starts with its weights. `export` writes a checkpoint's weights, config.json and the tokenizer of its corpus, so that
transformers' from_pretrained reads the model and AutoTokenizer gives the ids it was trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longctx.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    config = commands.add_parser("config", help="print a folder's model as a preset of configs/model")
    config.add_argument("folder", type=Path)
    export = commands.add_parser("export", help="write a checkpoint's weights for transformers")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    export.add_argument("--tokenizer", type=Path, help="a tokenizer.json in place of the one in the run's folder")
    export.add_argument(
        "--end-of-document", metavar="TOKEN", help="at which generation stops too; with --tokenizer: at which alone"
    )
    arguments = parser.parse_args()
    try:
        if arguments.command == "config":
            print_preset(arguments.folder)
        else:
            export_checkpoint(
                arguments.checkpoint, arguments.output, arguments.dtype, arguments.tokenizer, arguments.end_of_document
            )  # fmt: skip
    except UserError as error:
        sys.exit(f"convert_hf.py: {error}")


def print_preset(folder: Path) -> None:
    from longctx.hugging_face.convert import as_yaml
    from longctx.hugging_face.load import PretrainedWeights

    weights = PretrainedWeights(folder)
    rotary = weights.config.pop("rotary", {})
    lines = [f"{key}: {as_yaml(value)}" for key, value in weights.config.items()]
    inner = ", ".join(f"{key}: {as_yaml(value)}" for key, value in rotary.items())
    print("\n".join([*lines, *([f"rotary: {{{inner}}}"] if rotary else [])]))


def export_checkpoint(
    checkpoint: Path, folder: Path, dtype: str, tokenizer: Path | None, end_of_document: str | None
) -> None:
    import torch

    from longctx.hugging_face.export import export_hugging_face, reads_other_ids

    if tokenizer is not None and not tokenizer.is_file():
        raise UserError(f"--tokenizer {tokenizer}: no such file")
    files = export_hugging_face(checkpoint, folder, getattr(torch, dtype), tokenizer, end_of_document)
    size = sum(path.stat().st_size for path in files) / 2**30
    print(f"{folder}: {len(files)} files, {size:.3g} GiB; transformers.AutoModelForCausalLM.from_pretrained reads it")
    if not (folder / "tokenizer.json").exists():
        print("without a tokenizer: the run's corpus had none; give one with --tokenizer")
    elif reads_other_ids(folder):
        print(
            "AutoTokenizer gives other ids than the model was trained on, as transformers takes Qwen 2's own rules for "
            "it; load the tokenizer with transformers.PreTrainedTokenizerFast.from_pretrained"
        )


if __name__ == "__main__":
    main()
