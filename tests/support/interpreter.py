"""Triton's interpreter, faster: importing this replaces the language's functions once a launch.

The interpreter (triton 3.6, 3.7) replaces them anew in each call that a kernel makes of another function, for which it
looks through all members of the language: two fifths of the time that the suite's interpreted kernels took. It puts
the old ones back at the end of a launch alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_replace_language: Any = interpreter._patch_lang
_EVERY_MODULE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # in place of those that a kernel names


class _OneScope:
    """What was replaced for the launch that runs, if one does."""

    def __init__(self) -> None:
        self.replaced: Any = None

    def of(self, _kernel: object) -> _OneScope:
        if self.replaced is None:
            self.replaced = _replace_language(_EVERY_MODULE)
        return self

    def restore(self) -> None:
        """At the end of the launch."""
        replaced, self.replaced = self.replaced, None
        replaced.restore()


interpreter._patch_lang = _OneScope().of
