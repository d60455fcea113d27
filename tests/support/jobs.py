"""Runs one after the other in the processes of one torchrun: `jobs.py WORDS / WORDS / ...`, each as for train.py.

One that is refused is told by rank 0, as `refused NAME: why`, and the next one begins.
"""

from __future__ import annotations

import os
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from longctx import runtime
from longctx.errors import UserError
from runs import composed, train


def main() -> None:
    jobs = [list(words) for is_end, words in groupby(sys.argv[1:], lambda word: word == "/") if not is_end]
    for words in jobs:
        config = composed(*words)
        try:
            train(config)
        except UserError as error:
            if os.environ["RANK"] == "0":
                print(f"refused {config.name}: {error}", flush=True)
    runtime.stop()


if __name__ == "__main__":
    main()
