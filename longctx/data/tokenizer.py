"""Tokenizers, opened in one way everywhere: what is trained on is what the text says, whole and as text."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from longctx.errors import DataError

# names of the token that closes a document, the first that a tokenizer has is taken
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>", "<｜end▁of▁sentence｜>")  # noqa: RUF001


def open_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, for documents. Raises `DataError` if the file is none.

    Files that transformers has saved may cut or pad every text (`truncation`, `padding`): both are turned off. A
    special token that a text spells (`<|endoftext|>` in an article about GPT-2) is tokenized as the text it is.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exceptions
        raise DataError(f"{file}: no tokenizer.json that the tokenizers library reads ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_texts(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens and their ids, without the one for unknown characters, which any text may need."""
    unknown = (getattr(tokenizer.model, "unk_token", None), "<unk>", "[UNK]")
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special and token.content not in unknown}


def encode_spelled(tokenizer: Tokenizer, text: str, specials: list[str]) -> list[int]:
    """Ids of a text in which special tokens are spelled, where the tokenizer's model knows them as words of its own.

    `encode_special_tokens` is of no help there (Unigram, WordLevel), so the text is cut inside each of them.
    """
    pattern = re.compile("|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True)))
    cuts = [0, *(found.start() + 1 for found in pattern.finditer(text)), len(text)]
    parts = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
    return [i for encoding in tokenizer.encode_batch(parts, add_special_tokens=False) for i in encoding.ids]


@dataclass(frozen=True)
class DocumentFrame:
    """Ids around the text of each document."""

    begin: tuple[int, ...]
    end: tuple[int, ...]  # the last one is the end-of-document token


def document_frame(
    tokenizer: Tokenizer, where: Path, end_of_document: str | None = None, add_special_tokens: bool = True
) -> DocumentFrame:
    """What the tokenizer's own template puts before and after a text (Llama 3: its begin-of-text), then the end.

    `end_of_document` names the token that closes a document (None: the first of the usual ones); it is not repeated
    where the template ends with it. Without `add_special_tokens` the template is left out. Raises `DataError`.
    """
    last = find_end_of_document(tokenizer, where, end_of_document)
    begin, end = _template(tokenizer, where) if add_special_tokens else ((), ())
    return DocumentFrame(begin, end if end[-1:] == (last,) else (*end, last))


def _template(tokenizer: Tokenizer, where: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer's own template puts before and after a text."""
    text, framed = (tokenizer.encode("a", add_special_tokens=is_framed).ids for is_framed in (False, True))
    for at in range(len(framed) - len(text) + 1):
        if framed[at : at + len(text)] == text:
            return tuple(framed[:at]), tuple(framed[at + len(text) :])
    raise DataError(f"{where}: its template changes the text itself; prepare without it (--no-add-special-tokens)")


def find_end_of_document(
    tokenizer: Tokenizer, where: Path, token: str | None = None, option: str = "--end-of-document"
) -> int:
    """The id that closes a document: of `token`, or of the usual names for it.

    Raises `DataError` if there is none; `option` is where its user can name one.
    """
    for name in (token,) if token else END_OF_DOCUMENT:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    if token:
        raise DataError(f"{where}: has no token {token!r}; name one of its own as the end of a document")
    raise DataError(
        f"{where}: has no end-of-document token of the usual names ({', '.join(END_OF_DOCUMENT)}); give its own with "
        f"{option}"
    )


def kept_tokenizer(checkpoint: Path) -> Path:
    """The tokenizer.json that the run of a checkpoint (<run>/checkpoints/<step>) keeps in its folder, if it has one."""
    return checkpoint.resolve().parent.parent / "tokenizer.json"


def check_same_ids(file: Path, of_weights: Path, frame: list[int]) -> None:
    """Raises `DataError` if an id is one token in `file`, a corpus's tokenizer.json, and another in that of a model.

    Either may have tokens that the other lacks, and of added ones, which a text need not have, only those of `frame`
    are compared: the ids around documents.
    """
    ours, theirs = open_tokenizer(file), open_tokenizer(of_weights)
    for token_id in sorted({*ours.get_vocab(with_added_tokens=False).values(), *frame}):
        here, there = ours.id_to_token(token_id), theirs.id_to_token(token_id)
        if here != there and None not in (here, there):
            raise DataError(
                f"{file}: id {token_id} is {here!r}, and {there!r} in {of_weights}, the tokenizer of the weights to "
                f"start from: prepare the text with it (tools/prepare_data.py TEXTS --tokenizer {of_weights} --output "
                "FOLDER, then data=prepared data.folder=FOLDER). If the weights are to learn another vocabulary, move "
                "that file away"
            )


def vocab_size(tokenizer: Tokenizer) -> int:
    """Ids from 0 to the largest one, those between that no token has included."""
    return max(tokenizer.get_vocab().values()) + 1


def count_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text each id stands for: uint16, (vocabulary,).

    In byte-level tokenizers each character of a token stands for one byte. Added tokens (runs of spaces, say) stand for
    their own text, unless they are special: those are no text.
    """
    is_byte_level = "ByteLevel" in tokenizer.to_str()
    lengths = np.zeros(vocab_size(tokenizer), dtype="<u2")
    for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        if is_byte_level:
            lengths[token_id] = len(token)
        else:  # SentencePiece: a mark for the space, <0x0A> for a single byte
            lengths[token_id] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        lengths[token_id] = 0 if added.special else len(added.content.encode())
    return lengths


def document_begin(tokenizer: Tokenizer, where: Path) -> tuple[int, ...] | None:
    """Ids that the tokenizer's template puts before a text; None: it does something else."""
    try:
        return _template(tokenizer, where)[0]
    except DataError:
        return None


def as_trained(file: Path, begin: list[int] | None) -> str:
    """`tokenizer.json` for other programs, so that a text gets the ids it was trained on.

    Nothing is cut or padded, and the template is gone if documents do not begin with it. `begin`: the ids that
    documents begin with; None: not known, the template stays.
    """
    tokenizer = open_tokenizer(file)
    fields = json.loads(tokenizer.to_str())
    if begin is not None and document_begin(tokenizer, file) != tuple(begin):
        fields["post_processor"] = None
    return json.dumps(fields, ensure_ascii=False)
