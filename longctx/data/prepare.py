"""Text to token shards: what `tools/prepare_data.py` runs, and `data=builtin` at its first start.

Each piece of the input becomes a shard of its own, by one of several processes. What is done is kept beside the target
in `<folder>.preparing` until all of it is, so that a preparation which was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from longctx.data.chat import Chat, ChatError, ChatTokenizer, Completion, chat_tokenizer, files_of_chats
from longctx.data.text import MIB, Document, Piece, Skipped
from longctx.data.tokenizer import (
    count_bytes,
    document_frame,
    encode_spelled,
    open_tokenizer,
    special_texts,
    vocab_size,
)
from longctx.data.tokens import SPLITS, Manifest, Shard, ShardWriter
from longctx.errors import DataError
from longctx.files import disk_problem, read_manifest, sha256, sync, write_manifest

BUILTIN_TOKENIZER = Path(__file__).parent / "builtin_tokenizer.json"
PIECE_FORMAT = "longctx-piece-3"
BYTES_A_TOKEN = 3  # of text, roughly: for what a full disk would need
EXAMPLES = 20  # of what was skipped, that are kept


@dataclass(frozen=True)
class Recipe:
    """What makes tokens of a text, beside the text."""

    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    document_begin: tuple[int, ...]
    document_end: tuple[int, ...]
    validation_fraction: float
    max_document_tokens: int | None
    chat_template_file: str = ""  # of conversations; empty: what lies beside the tokenizer
    chat_template_sha256: str = ""  # with that of the tokenizer's special tokens
    skip_unreadable: bool = False

    @property
    def dtype(self) -> str:
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"


def prepare(
    pieces: Sequence[Piece],
    folder: Path,
    tokenizer_file: Path = BUILTIN_TOKENIZER,
    validation_fraction: float = 0.01,
    max_document_tokens: int | None = None,
    source: str = "",
    workers: int = 1,
    work: Path | None = None,
    end_of_document: str | None = None,
    add_special_tokens: bool = True,
    chat_template: Path | None = None,
    skip_unreadable: bool = False,
) -> Manifest:
    """Tokenizes `pieces` into `folder`, which appears only when it is whole.

    A document goes to the validation split if the hash of its name falls into `validation_fraction`. One longer than
    `max_document_tokens` is cut into several. The result does not depend on `workers`, the number of processes: one is
    this process, with a thread a core. `work` holds what is done until then, and is gone on with if it is there
    already. `end_of_document` and `add_special_tokens`: as of `document_frame`; `chat_template`: as of `ChatTokenizer`.
    Of conversations, and of prompts with completions, only the answers are trained on; they are never cut. Those that
    the template does not take are left out if `skip_unreadable`. Raises `DataError` naming what cannot be read, if
    nothing is left to train on, if the disk is full, or if `folder` exists.
    """
    if os.path.lexists(folder):
        raise DataError(f"{folder}: exists already; remove it or give another folder")
    tokenizer = open_tokenizer(tokenizer_file)
    frame = document_frame(tokenizer, tokenizer_file, end_of_document, add_special_tokens)
    recipe = Recipe(
        os.path.abspath(tokenizer_file),  # not where a link leads, which is a blob in a cache of downloads
        sha256(tokenizer_file),
        vocab_size(tokenizer),
        frame.begin,
        frame.end,
        validation_fraction,
        max_document_tokens,
        "" if chat_template is None else os.path.abspath(chat_template),
        "".join(sha256(file) for file in files_of_chats(tokenizer_file, chat_template)),
        skip_unreadable,
    )
    work = work or preparing(folder)
    try:
        return _prepare(pieces, folder, tokenizer_file, recipe, count_bytes(tokenizer), source, workers, work)
    except OSError as error:
        tokens = sum(piece.size for piece in pieces) / BYTES_A_TOKEN
        needed = int(tokens * np.dtype(recipe.dtype).itemsize)
        raise DataError(disk_problem(error, work, needed)) from None


def preparing(folder: Path) -> Path:
    """Where what is done is kept until all of it is."""
    folder = folder if folder.name else folder.absolute()
    return folder.with_name(f"{folder.name}.preparing")


def _prepare(
    pieces: Sequence[Piece], folder: Path, tokenizer_file: Path, recipe: Recipe, token_lengths: np.ndarray, source: str,
    workers: int, work: Path,
) -> Manifest:  # fmt: skip
    if work.exists() and any(work.iterdir()) and not (work / "lock").exists():
        raise DataError(f"{work}: holds what no preparation has written; rename it, or give another --output")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{work}: another process is at work there; wait for it, or give another folder") from None
        by_piece = _tokenize_all(pieces, work, recipe, workers)
        shards = {split: [Shard(**s) for piece in by_piece for s in piece["shards"][split]] for split in SPLITS}
        if not shards["train"]:
            shutil.rmtree(work)
            raise DataError(f"{source or 'the input'}: no text to train on; {_why_nothing(by_piece, shards)}")
        answers = sum((Counter(piece["answers"]) for piece in by_piece), Counter[str]())
        shutil.copyfile(tokenizer_file, work / "tokenizer.json")
        token_bytes = work / "token_bytes.bin"
        token_lengths.tofile(token_bytes)
        manifest = Manifest(
            recipe.dtype, recipe.vocab_size, list(recipe.document_begin), list(recipe.document_end),
            recipe.tokenizer_sha256, sha256(token_bytes), shards, source, sum(piece["skipped"] for piece in by_piece),
            [example for piece in by_piece for example in piece["skipped_examples"]][:EXAMPLES],
            _chat_prompt(recipe) if answers else [], dict(answers.most_common()),
        )  # fmt: skip
        if manifest.answers:
            _chats(recipe).save(work)
        manifest.write(work)
        sync(work)
        work.rename(folder)
        # only now, as a failure until here leaves what the same command goes on with; the corpus is whole without
        with contextlib.suppress(OSError):
            for leftover in (*(_record(folder, number) for number in range(len(pieces))), folder / "lock"):
                leftover.unlink()
            sync(folder.parent)
    return manifest


def _why_nothing(by_piece: list[dict[str, Any]], shards: dict[str, list[Shard]]) -> str:
    """Why nothing is left to train on."""
    if held_out := sum(shard.documents for shard in shards["validation"]):
        return f"all {held_out} documents were held out; lower the validation fraction or split them into more"
    if skipped := sum(piece["skipped"] for piece in by_piece):
        example = next(example for piece in by_piece for example in piece["skipped_examples"])
        return f"{skipped} documents were left out, such as {example}"
    return "every document is empty"


def _chat_prompt(recipe: Recipe) -> list[str]:
    """For samples; empty if the template takes no lone question."""
    try:
        return list(_chats(recipe).prompt())
    except (ChatError, DataError):
        return []


def _tokenize_all(pieces: Sequence[Piece], work: Path, recipe: Recipe, workers: int) -> list[dict[str, Any]]:
    """The record of each piece; those that an earlier call has finished are taken as they are."""
    done = {number: record for number, piece in enumerate(pieces) if (record := _finished(work, number, piece, recipe))}
    kept = {name for d in done.values() for split in SPLITS for s in d["shards"][split] for name in Shard(**s).sizes(1)}
    kept |= {_record(work, number).name for number in done} | {"lock"}
    for path in work.iterdir():  # begun, or made of other input
        if path.name not in kept:
            path.unlink()
    bar = tqdm(
        total=sum(piece.size for piece in pieces), initial=sum(pieces[number].size for number in done),
        desc=f"tokenizing into {work}", unit="B", unit_scale=True, unit_divisor=1024, disable=None,
    )  # fmt: skip
    left = [number for number in range(len(pieces)) if number not in done]
    with bar:
        if workers == 1:
            for number in left:
                done[number] = _tokenize(number, pieces[number], work, recipe)
                bar.update(pieces[number].size)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(workers, max(len(left), 1)), context, _begin_worker) as pool:
                futures = {pool.submit(_tokenize, number, pieces[number], work, recipe): number for number in left}
                try:
                    for future in as_completed(futures):
                        done[futures[future]] = future.result()
                        bar.update(pieces[futures[future]].size)
                except BrokenProcessPool:
                    raise DataError(
                        f"{work}: the system has ended a process, most likely for want of memory; give fewer "
                        "--workers. What is done is kept: the same command goes on with it"
                    ) from None
                finally:
                    pool.shutdown(cancel_futures=True)
    return [done[number] for number in range(len(pieces))]


def _begin_worker() -> None:
    """One thread each; and none outlives the process that has started it, even if that was killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _record(work: Path, number: int) -> Path:
    """What says that a piece is finished."""
    return work / f"piece_{number:05d}.json"


def _identity(piece: Piece, recipe: Recipe) -> str:
    facts = {key: value for key, value in asdict(recipe).items() if not key.endswith("_file")}
    return hashlib.sha256(json.dumps([piece.identity, facts]).encode()).hexdigest()


def _finished(work: Path, number: int, piece: Piece, recipe: Recipe) -> dict[str, Any] | None:
    try:
        record = read_manifest(_record(work, number), PIECE_FORMAT)
    except (FileNotFoundError, ValueError):
        return None
    shards = record["shards"]
    width = np.dtype(recipe.dtype).itemsize
    sizes = {k: v for split in SPLITS for shard in shards[split] for k, v in Shard(**shard).sizes(width).items()}
    is_whole = all((work / name).is_file() and (work / name).stat().st_size == size for name, size in sizes.items())
    return record if is_whole and record["identity"] == _identity(piece, recipe) else None


def _tokenize(number: int, piece: Piece, work: Path, recipe: Recipe) -> dict[str, Any]:
    """Writes the shards of one piece, and then the record that it is finished."""
    tokenizer = _tokenizer(recipe.tokenizer_file)
    writers = {split: ShardWriter(work, f"{split}_{number:05d}", recipe.dtype) for split in SPLITS}
    frame = len(recipe.document_begin) + len(recipe.document_end)
    skipped = 0
    examples: list[str] = []
    answers: Counter[int] = Counter()  # as of `Manifest`

    def leave_out(document: Document | Skipped, why: object) -> None:
        nonlocal skipped
        skipped += 1
        if len(examples) < EXAMPLES:  # to find a place takes reading
            examples.append(f"{document.place}: {why}")

    for document in piece.documents():
        if isinstance(document, Skipped):
            leave_out(document, document.why)
            continue
        try:
            ids, is_trained, text_bytes = _encode_document(tokenizer, document, recipe)
        except ChatError as error:
            if not recipe.skip_unreadable:
                raise DataError(
                    f"{document.place}: {error}; or leave out what cannot be read with --skip-unreadable"
                ) from None
            leave_out(document, error)
            continue
        if not len(ids):
            continue
        is_validation = document.is_validation
        if is_validation is None:
            is_validation = _fraction_of_name(document.name) < recipe.validation_fraction
        writer = writers["validation" if is_validation else "train"]
        if is_trained is not None:
            if is_trained.any():
                writer.add(ids, text_bytes, is_trained)
                if isinstance(document.answers, Chat):
                    answers += _chats(recipe).ends_of_answers(ids, is_trained)
            else:
                leave_out(document, "no turn of the assistant, so nothing to train on")
            continue
        limit = max(1, recipe.max_document_tokens - frame) if recipe.max_document_tokens else len(ids)
        for first in range(0, len(ids), limit):
            part = ids[first : first + limit]
            share = round(text_bytes * len(part) / len(ids))
            writer.add(np.concatenate([recipe.document_begin, part, recipe.document_end]), share)
    shards = {split: [shard.fields() for shard in writer.finish()] for split, writer in writers.items()}
    fields = {"format": PIECE_FORMAT, "identity": _identity(piece, recipe), "shards": shards}
    fields |= {"skipped": skipped, "skipped_examples": examples, "answers": {str(i): n for i, n in answers.items()}}
    write_manifest(_record(work, number), fields)
    return fields


@cache
def _tokenizer(file: str) -> Tokenizer:
    return open_tokenizer(Path(file))


@cache
def _tokenizer_of_completions(file: str) -> Tokenizer:
    """Special tokens that a text spells are read as such, as those of conversations."""
    tokenizer = open_tokenizer(Path(file))
    tokenizer.encode_special_tokens = False
    return tokenizer


def _chats(recipe: Recipe) -> ChatTokenizer:
    return chat_tokenizer(recipe.tokenizer_file, recipe.chat_template_file or None)


def _encode_document(
    tokenizer: Tokenizer, document: Document, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray | None, int]:  # fmt: skip
    """Ids, which of them are trained on (None: it is a text, all are, and its frame is missing yet), bytes of the text.

    Raises `ChatError`.
    """
    match document.answers:
        case None:
            ids, text_bytes = _encode(tokenizer, document.pieces)
            return ids, None, text_bytes
        case Chat() as chat:
            ids, is_trained = _chats(recipe).encode(chat)
            if len(ids) and ids.max() >= recipe.vocab_size:
                raise DataError(
                    f"{recipe.tokenizer_file}: has {recipe.vocab_size} tokens, and conversations have token "
                    f"{ids.max()}, which only tokenizer_config.json adds: save the tokenizer with it (save_pretrained)"
                )
            return ids, is_trained, sum(len(str(message.get("content", "")).encode()) for message in chat.messages)
        case Completion(prompt, text):
            # encoded in one, as some tokenizers put a space before each text; what differs from the prompt alone is new
            encode = _tokenizer_of_completions(recipe.tokenizer_file).encode
            before, whole = (encode(part, add_special_tokens=False).ids for part in (prompt, prompt + text))
            given = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
            begin, end = list(recipe.document_begin), list(recipe.document_end)
            begin = [] if whole[: len(begin)] == begin else begin  # as where a chat template has written it
            end = [] if whole[-len(end) :] == end else end
            ids = np.array([*begin, *whole, *end], dtype=np.int64)
            is_trained = np.arange(len(ids)) >= len(begin) + given
            return ids, is_trained & bool(text), len((prompt + text).encode())


def _encode(tokenizer: Tokenizer, pieces: Iterable[str]) -> tuple[np.ndarray, int]:
    """Ids of the pieces in order, none of them special, and the bytes of their text."""
    specials = special_texts(tokenizer)
    numbers = list(specials.values())
    ids: list[np.ndarray] = []
    text_bytes = 0
    for batch in _batched(pieces):
        text_bytes += sum(len(piece.encode()) for piece in batch)
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            found = np.array(encoding.ids, dtype=np.uint32)  # of a long text there are many
            if np.isin(found, numbers).any():
                found = np.array(encode_spelled(tokenizer, piece, list(specials)), dtype=np.uint32)
            ids.append(found)
    return (np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32)), text_bytes


def _batched(pieces: Iterable[str], size: int = 4 * MIB) -> Iterator[list[str]]:
    """Pieces in lists of some `size` characters."""
    batch: list[str] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fraction_of_name(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
