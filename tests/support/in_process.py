"""Runs a script in this process, which has imported torch already."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from unittest import mock


def output_of(script: Path, *words: str, folder: Path | None = None) -> str:
    """What a script prints that is started with these words, in `folder` if it is given.

    Raises RuntimeError if it exits with another code than 0.
    """
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    where = contextlib.nullcontext() if folder is None else contextlib.chdir(folder)
    with where, mock.patch.object(sys, "argv", [str(script), *words]), contextlib.redirect_stdout(out):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{script.name}: {end.code}") from None
    out.flush()
    return out.buffer.getvalue().decode()
