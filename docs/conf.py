"""How `make docs` turns these pages and the docstrings into HTML: Sphinx with MyST; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import longctx
from longctx.command_line import help_of_keys
from longctx.config import Config

HERE = Path(__file__).parent

project, author, release = "longctx", "the longctx authors", longctx.__version__
copyright = "2026, the longctx authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "contents"
html_theme, html_title = "furo", f"longctx {release}"
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the checkout; tests/test_documentation.py follows them
autodoc_default_options = {"members": True, "imported-members": True}
autodoc_member_order, autodoc_typehints = "bysource", "description"
exclude_patterns = ["build"]

(HERE / "build").mkdir(exist_ok=True)
(HERE / "build" / "keys.txt").write_text(help_of_keys(Config()))  # as `--help` prints them
