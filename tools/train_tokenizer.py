"""Trains the byte-level BPE that longctx ships for `data=builtin`, on the sources that are not held out.

usage: python tools/train_tokenizer.py [--vocab-size 8192] [--output longctx/data/builtin_tokenizer.json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: with the longctx that is beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from longctx.data.builtin import HELD_OUT, packages, read_package
from longctx.data.prepare import BUILTIN_TOKENIZER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=BUILTIN_TOKENIZER)
    arguments = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    training = {name: files for name, files in packages().items() if name not in HELD_OUT}
    texts = (text for name, files in training.items() for text in read_package(name, files))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(arguments.output), pretty=False)
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} ids, {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
