"""Real text without a download: the Python sources installed on this machine.

The standard library and torch, with `data.site_packages` all other packages installed beside it too; a package a
document (cut at 3M tokens), each file under a line with its path. Some packages are held out for validation, the same
ones either way. The text differs between machines, so the tokens are kept under a fingerprint of the files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sysconfig
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longctx.data.prepare import BUILTIN_TOKENIZER, prepare
from longctx.data.text import MIB, Document
from longctx.data.tokens import FORMAT
from longctx.errors import DataError
from longctx.files import sha256

MAX_DOCUMENT_TOKENS = 3_000_000
HELD_OUT = {
    "python/asyncio", "python/email", "python/http", "python/logging", "python/xml",
    "torch/distributions", "torch/fx", "torch/jit", "torch/optim",
}  # fmt: skip


def packages(site_packages: bool = False) -> dict[str, list[Path]]:
    """Package name -> its source files, sorted: `python/asyncio`, `torch/nn`; single modules: `python`, `torch`."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        roots["torch"] = Path(torch.origin).parent
        if site_packages:
            installed = sorted(path for path in roots["torch"].parent.iterdir() if path.is_dir())
            roots = {path.name: path for path in installed} | roots
    grouped: dict[str, list[Path]] = {}
    for root_name, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if "site-packages" in parts or "dist-packages" in parts or not path.is_file():
                continue
            package = f"{root_name}/{parts[0]}" if len(parts) > 1 else root_name
            grouped.setdefault(package, []).append(path)
    return grouped


def read_package(name: str, files: list[Path]) -> Iterator[str]:
    """The text of each file under a comment with its path; files that are not UTF-8 are left out."""
    root, _, package = name.partition("/")
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        above = [i for i, part in enumerate(path.parts[:-1]) if part == package]  # the venv's path may have one too
        inside = path.parts[above[-1] :] if above else path.parts[-1:]
        yield f"# {root}: {'/'.join(inside)}\n{text}\n"


@dataclass(frozen=True)
class Packages:
    """A piece of the input: some packages, a document each."""

    names: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for files in self.files for path in files)

    @property
    def identity(self) -> str:
        return repr(self.names)

    def documents(self) -> Iterator[Document]:
        """The packages as documents, the held-out ones marked."""
        for name, files in zip(self.names, self.files, strict=True):
            yield Document(name, read_package(name, list(files)), name in HELD_OUT)


def pieces(site_packages: bool = False, limit: int = 4 * MIB) -> list[Packages]:
    """All packages, in order, in pieces of some `limit` bytes."""
    found, open_packages = [], {}
    for name, files in packages(site_packages).items():
        open_packages[name] = tuple(files)
        piece = Packages(tuple(open_packages), tuple(open_packages.values()))
        if piece.size >= limit:
            found.append(piece)
            open_packages = {}
    return [*found, Packages(tuple(open_packages), tuple(open_packages.values()))] if open_packages else found


def fingerprint(site_packages: bool = False) -> str:
    """Changes with the format, the tokenizer, the files and their sizes."""
    names = [(name, [(p.name, p.stat().st_size) for p in files]) for name, files in packages(site_packages).items()]
    return hashlib.sha256(repr((FORMAT, sha256(BUILTIN_TOKENIZER), sorted(HELD_OUT), names)).encode()).hexdigest()[:12]


def folder(cache_folder: str, site_packages: bool = False) -> Path:
    """Where this machine's tokens are kept."""
    return Path(cache_folder).expanduser() / f"builtin-{fingerprint(site_packages)}"


def build(target: Path, site_packages: bool = False) -> None:
    """Tokenizes the sources into `target` (`folder(...)`), unless it is there: some ten seconds a 60 MB."""
    if target.exists():
        return
    print(f"tokenizing the Python sources of this machine into {target}, once", flush=True)
    others = " and all installed packages" if site_packages else ""
    source = f"Python sources of the standard library and torch{others}"
    work = target.with_name(f"{target.name}.preparing-{uuid.uuid4().hex[:8]}")
    try:
        prepare(pieces(site_packages), target, max_document_tokens=MAX_DOCUMENT_TOKENS, source=source, work=work)
    except (DataError, OSError) as error:
        if not target.exists():  # else another machine was faster, on a disk that both see
            raise DataError(f"{error}; data.cache_folder=FOLDER keeps them elsewhere") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
