"""Text to token shards that `data=prepared data.folder=OUTPUT` trains on.

usage: python tools/prepare_data.py INPUT [INPUT ...] --output FOLDER [--tokenizer tokenizer.json]

INPUT is a text file (one document), a .jsonl file (one document a line; also .jsonl.zst, .gz, .bz2, .lz4) or a
.parquet file (one document a row), both with the text in the field --text-field, or a folder of all of these. Without
--tokenizer, the 8192-token byte-level BPE of longctx, which was trained on Python sources, is used. A preparation that
was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from longctx.config import UserError
from longctx.data.lengths import draw_lengths, length_table
from longctx.data.prepare import BUILTIN_TOKENIZER, prepare
from longctx.data.text import find_pieces
from longctx.data.tokens import TokenFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tokenizer", type=Path, default=BUILTIN_TOKENIZER, help="a tokenizer.json of Hugging Face")
    parser.add_argument("--validation-fraction", type=float, default=0.01, help="share of documents held out")
    parser.add_argument("--text-field", default="text", help="of .jsonl lines and .parquet rows")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: cores")
    arguments = parser.parse_args()
    if not 0 <= arguments.validation_fraction < 1:
        parser.error(f"--validation-fraction {arguments.validation_fraction} is outside 0 to 1")
    if not arguments.tokenizer.is_file():
        parser.error(f"--tokenizer {arguments.tokenizer}: no such file")
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} is less than 1")
    for path in arguments.input:
        if arguments.output.absolute().is_relative_to(path.absolute()):
            parser.error(f"--output {arguments.output} is inside the input {path}; give a folder beside it")
    source = ", ".join(str(path) for path in arguments.input)
    try:
        pieces = find_pieces(arguments.input, arguments.text_field)
        manifest = prepare(
            pieces, arguments.output, arguments.tokenizer, arguments.validation_fraction, source=source,
            workers=arguments.workers,
        )  # fmt: skip
    except UserError as error:
        sys.exit(f"prepare_data.py: {error}")
    for split, shards in manifest.splits.items():
        tokens, documents_, size = (sum(getattr(s, f) for s in shards) for f in ("tokens", "documents", "text_bytes"))
        print(f"{split}: {documents_} documents, {tokens} tokens, {size / max(tokens, 1):.2f} bytes a token")
    split = TokenFolder(arguments.output, manifest.vocab_size).splits["train"]
    print(length_table(split))
    print(f"as a picture: {draw_lengths(split, arguments.output / 'lengths.svg')}")
    print(f"train on it: train.py recipe=... data=prepared data.folder={arguments.output}")


if __name__ == "__main__":
    main()
