"""Runs a script in this process, which has imported torch already: a process of its own takes seconds to do so."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock


def run_script(script: Path, *words: str, folder: Path | None = None) -> CompletedProcess[str]:
    """What `python SCRIPT WORDS`, started in `folder` if it is given, prints, and its exit code.

    An exception that is no SystemExit is not caught.
    """
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    where = contextlib.nullcontext() if folder is None else contextlib.chdir(folder)
    code = 0
    with (
        where,
        mock.patch.object(sys, "argv", [str(script), *words]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    printed, said = (stream.buffer.getvalue().decode() for stream in (out, errors))
    return CompletedProcess([str(script), *words], code, printed, said)


def output_of(script: Path, *words: str, folder: Path | None = None) -> str:
    """What a script prints, which is to end well."""
    done = run_script(script, *words, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout
