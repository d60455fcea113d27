"""What a run reads, opened and checked on every rank: the corpora of the configuration, or a synthetic stream."""

from __future__ import annotations

import shutil
from pathlib import Path

from longctx.config import Config, DataSource
from longctx.data import builtin
from longctx.data.chat import has_template, saved_files
from longctx.data.corpus import open_corpus
from longctx.data.loader import Copies, Probes, RecallStream, Source
from longctx.data.mixture import BLOCK, ChainedTokens, MixedTokens, Mixture, shares
from longctx.data.tokenizer import as_trained, check_same_ids, kept_tokenizer
from longctx.data.tokens import TokenFolder
from longctx.errors import DataError
from longctx.files import sha256
from longctx.runtime import Runtime

Validation = ChainedTokens | RecallStream


def open_tokens(config: Config, runtime: Runtime) -> Mixture | None:
    """The run's token files, checked, on every rank; None for synthetic data."""
    data = config.data
    if data.source == DataSource.recall:
        return None
    weights = data.mixture or {data.folder: 1.0}
    if data.source == DataSource.builtin:
        folder = builtin.folder(data.cache_folder, data.site_packages)
        runtime.run_on_all_ranks(lambda: builtin.build(folder, data.site_packages) if runtime.local_rank == 0 else None)
        weights = {str(folder): 1.0}
    folders = [Path(folder).expanduser() for folder in weights]
    vocab_size, rank, ranks = config.model.vocab_size, runtime.rank, runtime.world_size
    tokens = runtime.run_on_all_ranks(
        lambda: Mixture([open_corpus(f, vocab_size, data, rank, ranks) for f in folders], list(weights.values()))
    )
    if data.tokenizer:
        runtime.run_on_all_ranks(lambda: refuse_another_tokenizer(Path(data.tokenizer).expanduser(), tokens))
    seen_by_main = runtime.run_on_rank_0(tokens.fingerprint)

    def check_same() -> None:  # machines with other versions of Python or torch have other sources
        if tokens.fingerprint() != seen_by_main:
            raise DataError(
                f"{tokens}: tokens {tokens.fingerprint()}, rank 0 has {seen_by_main}; copy one to all machines"
            )

    runtime.run_on_all_ranks(check_same)
    for note in tokens.notes:
        runtime.say(note)
    return tokens


def refuse_another_tokenizer(file: Path, tokens: Mixture) -> None:
    """Raises `DataError` if all that is read was prepared by longctx, and with another tokenizer than `file`."""
    prepared = [corpus for corpus in tokens.corpora if isinstance(corpus, TokenFolder)]
    given = sha256(file) if file.is_file() else ""
    if len(prepared) == len(tokens.corpora) and any(c.manifest.tokenizer_sha256 != given for c in prepared):
        raise DataError(
            f"data.tokenizer={file}: is for files of Megatron and nanoGPT, which come without one; {tokens} was "
            "prepared with its own: leave it out"
        )


def check_tokenizers(config: Config, tokens: Mixture | None, runtime: Runtime) -> None:
    """Raises `UserError` if ids of the text mean something else to the weights that the run starts from.

    Collective. Nothing is checked where text or weights come without a tokenizer.
    """
    if tokens is None or tokens.tokenizer_file is None:
        return
    ours = tokens.tokenizer_file
    frame = [*(tokens.document_begin or []), tokens.end_of_document]
    files = [Path(config.model.init_from).expanduser() / "tokenizer.json"] if config.model.init_from else []
    if config.checkpoint.branches_from:
        files.append(kept_tokenizer(Path(config.checkpoint.branches_from)))
    for file in files:
        runtime.run_on_rank_0(lambda file=file: check_same_ids(ours, file, frame) if file.is_file() else None)


def keep_tokenizer(tokens: Mixture | None, folder: Path, runtime: Runtime, init_from: str = "") -> None:
    """Leaves the corpus's tokenizer in the run's folder, as documents were made with it, and the chat template of its
    conversations: for exports. On rank 0. Says so if the model of `init_from` has a template that these lack."""
    if tokens is None or tokens.tokenizer_file is None:
        return
    file = folder / "tokenizer.json"
    try:
        file.write_text(as_trained(tokens.tokenizer_file, tokens.document_begin), encoding="utf-8")
        of_chats = saved_files(tokens.chat_folder)
        if not of_chats and init_from and has_template(Path(init_from).expanduser()):
            runtime.say(
                f"{init_from} has a chat template, and the text no conversations, so an export will have none: copy it "
                "there, with the special tokens and the ends of generation_config.json"
            )
        for name, kept in of_chats.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(kept, folder / name)
    except OSError as error:
        runtime.say(f"{file}: not written, so exports have to name a tokenizer: {error.strerror}")


def training_source(config: Config, tokens: Mixture | None) -> Source:
    """The text, with `data.copies` of its sequences replaced; or the synthetic stream."""
    data, seed = config.data, config.seed
    if tokens is None:
        return RecallStream(data, seed)
    text = tokens.training(data, seed)
    if not data.copies:
        return text
    copies = Copies(data, tokens.tokenizer_vocab, seed + 3)  # others than `probes` asks for
    return MixedTokens([text, copies], shares([1 - data.copies, data.copies], BLOCK), seed)


def validation_source(config: Config, tokens: Mixture | None, runtime: Runtime) -> Validation | None:
    """Held-out sequences; None if `validation.sequences` is 0, or, said aloud, if there is too little text."""
    sequences = config.validation.sequences
    if not sequences:
        return None
    if tokens is None:
        return RecallStream(config.data, config.seed + 1, sequences)
    source, notes = tokens.validation(config.data, sequences)
    for note in notes:
        runtime.say(note)
    return source


def probes(config: Config, tokens: Mixture | None) -> Probes:
    """What asks the model over which distances it recalls: the stream it is trained on, or random copies."""
    if tokens is None:
        return RecallStream(config.data, config.seed + 2)
    return Copies(config.data, tokens.tokenizer_vocab, config.seed)
