"""Text to token shards that `data=prepared data.folder=OUTPUT` trains on.

usage: python tools/prepare_data.py INPUT [INPUT ...] --output FOLDER [--tokenizer tokenizer.json]

INPUT is a file of JSON lines (one document a line), of parquet (one a row), both with the text in the field
--text-field, a text (one document), each also compressed as .zst, .gz, .bz2 or .lz4, or a folder of all of these.
Lines and rows may also hold conversations (`messages`, `tools`), or `prompt` and `completion`, as texts or messages: of
these only the answers are trained on (docs/finetune.md). Without --tokenizer, the 8192-token byte-level BPE of longctx,
which was trained on Python sources, is used. A preparation that was stopped goes on where it was when the same command
is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longctx.data.lengths import draw_lengths, length_table
from longctx.data.prepare import BUILTIN_TOKENIZER, prepare, preparing
from longctx.data.text import FilePiece, Input, cut_files, files_by_kind, find_files
from longctx.data.tokenizer import open_tokenizer
from longctx.data.tokens import NO_END, Manifest, TokenFolder
from longctx.errors import DataError, UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tokenizer", type=Path, default=BUILTIN_TOKENIZER, help="a tokenizer.json of Hugging Face")
    parser.add_argument("--validation-fraction", type=float, default=0.01, help="share of documents held out")
    parser.add_argument("--text-field", default="text", help="of .jsonl lines and .parquet rows")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: cores")
    parser.add_argument(
        "--end-of-document", metavar="TOKEN", help="token that closes a text or completion; default: a usual one"
    )
    parser.add_argument(
        "--add-special-tokens", action=argparse.BooleanOptionalAction, default=True,
        help="put what the tokenizer's template puts around a text (a begin-of-text token) around each document",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE",
        help="jinja template of conversations; default: the one beside the tokenizer (needs transformers)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out, and count, what is not UTF-8, not JSON, damaged, or would be refused",
    )
    arguments = parser.parse_args()
    if not 0 <= arguments.validation_fraction < 1:
        parser.error(f"--validation-fraction {arguments.validation_fraction} is outside 0 to 1")
    if not arguments.tokenizer.is_file():
        parser.error(f"--tokenizer {arguments.tokenizer}: no such file")
    if arguments.chat_template and not arguments.chat_template.is_file():
        parser.error(f"--chat-template {arguments.chat_template}: no such file")
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} is less than 1")
    for path in arguments.input:
        if arguments.output.resolve().is_relative_to(path.resolve()):
            parser.error(f"--output {arguments.output} is inside the input {path}; give a folder beside it")
    source = ", ".join(str(path) for path in arguments.input)
    try:
        found = find_files(arguments.input)
        if not found.files:
            left_out = "".join(f"\n  {name}: {why}" for name, why in found.left_out)
            raise DataError(f"{source}: no files to read{left_out and '; left out:'}{left_out}")
        pieces = cut_files(found.files, arguments.text_field, arguments.skip_unreadable)
        manifest = prepare(
            pieces, arguments.output, arguments.tokenizer, arguments.validation_fraction, source=source,
            workers=arguments.workers, end_of_document=arguments.end_of_document,
            add_special_tokens=arguments.add_special_tokens, chat_template=arguments.chat_template,
            skip_unreadable=arguments.skip_unreadable,
        )  # fmt: skip
    except UserError as error:
        work = preparing(arguments.output)
        kept = f"\nwhat is done is kept in {work}: the same command goes on with it" if work.exists() else ""
        sys.exit(f"prepare_data.py: {error}{kept}")
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]  names of files may be of any bytes
    print(input_table(pieces, found, manifest))
    for split, shards in manifest.splits.items():
        tokens, documents_, size = (sum(getattr(s, f) for s in shards) for f in ("tokens", "documents", "text_bytes"))
        print(f"{split}: {documents_} documents, {tokens} tokens, {size / max(tokens, 1):.2f} bytes a token")
    if arguments.validation_fraction and not manifest.splits["validation"]:
        print("no document was held out, so a run has no validation: give a larger --validation-fraction, such as 0.1")
    for line in answers_lines(manifest, arguments.tokenizer):
        print(line)
    split = TokenFolder(arguments.output, manifest.vocab_size).splits["train"]
    print(length_table(split))
    try:
        print(f"as a picture: {draw_lengths(split, arguments.output / 'lengths.svg')}")
    except OSError as error:  # the tokens are whole without it
        print(f"{arguments.output / 'lengths.svg'}: not written: {error}")
    print(f"train on it: train.py recipe=... data=prepared data.folder={arguments.output}")


def answers_lines(manifest: Manifest, tokenizer_file: Path) -> list[str]:
    """With what the answers of conversations end, at which an exported model stops."""
    tokenizer = open_tokenizer(tokenizer_file)
    ends = [f"{tokenizer.id_to_token(int(i))} ({n:,})" for i, n in manifest.answers.items() if i != NO_END]
    lines = [f"answers end with {', '.join(ends)}"] if ends else []
    if without := manifest.answers.get(NO_END):
        lines.append(
            f"{without:,} answers end with no special token, so a model does not learn from them to stop: the chat "
            "template has to end a turn with one, inside of what is trained on"
        )
    return lines


def input_table(pieces: list[FilePiece], found: Input, manifest: Manifest) -> str:
    """How many files of which kind were read, what was left out, and why."""
    lines = [f"{'files':>8}  {'MB':>10}  read as"]
    lines += [f"{n:8,}  {size / 1e6:10,.1f}  {kind}" for kind, (n, size) in files_by_kind(pieces).items()]
    for why in dict.fromkeys(why for _, why in found.left_out):
        names = [name for name, reason in found.left_out if reason == why]
        lines.append(f"left out, {why}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    if manifest.skipped:
        lines.append(f"left out, unreadable: {manifest.skipped:,} files, lines or rows, such as")
        lines += [f"  {example}" for example in manifest.skipped_examples[:5]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
