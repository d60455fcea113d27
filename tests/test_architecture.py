"""The folders, the links, and who may import whom: design decisions that memory does not hold."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    p
    for folder in ("longctx", "kernels", "tools")
    for p in (ROOT / folder).rglob("*.py")
    if not {ROOT / "longctx" / "kernels", ROOT / "longctx" / "tools"} & set(p.parents)  # links
]

# layer (a folder or a file of longctx) -> the other layers that it may import
MAY_IMPORT: dict[str, set[str]] = {
    # the foundation: the standard library, and what is named here
    "errors": set(), "console": set(), "machine": set(), "batch": set(), "config": set(), "step_counters": set(),
    "files": set(), "trace": set(), "local_part": set(), "metric_names": set(), "metrics_file": set(), "summary": set(),
    "page": set(), "power": set(), "step_clock": set(), "host_memory": set(),
    "config_checks": {"config", "errors"},
    "suggest": {"config"},
    "plan": {"config", "kernels", "strategy"},
    "step_time": {"config", "plan"},
    "remedies": {"config", "plan", "strategy"},
    "strategy": {"config"},
    "schedule": {"config"},
    "run_info": {"config"},
    "stopping": {"console"},
    "watchdog": {"machine", "stopping"},
    "slurm": {"errors"},
    "command_line": {"config", "errors", "machine", "schedule"},
    "resume": {"config", "errors", "schedule"},
    "runtime": {"config", "console", "errors", "files", "machine", "plan", "remedies", "stopping", "strategy"},
    "run_folder": {"console", "errors", "runtime"},
    "straggler": {"machine", "runtime"},
    # ops, which know nothing of all that
    "kernels": set(),
    "ops": {"kernels"},
    # the model, and what spreads it over ranks from outside
    "model": {"config", "errors", "kernels", "plan"},
    "parallel": {
        "batch", "config", "errors", "host_memory", "kernels", "local_part", "machine", "model", "plan", "strategy",
    },
    # what is read and written
    "data": {"batch", "config", "errors", "files"},
    "sources": {"config", "data", "errors", "files", "runtime"},
    "muon": {"local_part"},
    "offloaded_adamw": {"host_memory", "local_part", "plan"},
    "optim": {"config", "muon", "offloaded_adamw", "schedule"},
    "checkpoint_room": {"errors", "files"},
    "checkpoint": {"checkpoint_room", "errors", "files", "host_memory", "local_part", "runtime"},
    "hugging_face": {"checkpoint", "config", "data", "errors", "files", "local_part", "model", "runtime"},
    "run_facts": {"config", "data", "machine", "model", "parallel", "plan", "runtime", "step_time"},
    "run_record": {"files", "resume", "run_info"},
    "wandb_log": {"config", "errors", "files", "metric_names", "metrics_file", "run_info", "summary"},
    "metrics": {"console", "files", "metrics_file", "run_info", "run_record", "summary", "wandb_log"},
    "report": {"metric_names", "metrics_file", "page", "run_record", "step_time", "summary"},
    # the run
    "evaluate": {"config", "data", "errors", "metric_names", "parallel", "runtime"},
    "validation": {"config", "data", "evaluate", "parallel", "runtime", "sources", "stopping", "straggler"},
    "throughput": {
        "batch", "config", "data", "model", "parallel", "power", "runtime", "step_counters", "step_time", "straggler",
        "summary",
    },
    "saving": {
        "checkpoint", "config", "data", "errors", "model", "optim", "parallel", "plan", "resume", "run_info",
        "run_record", "runtime", "schedule",
    },
    "trainer": {
        "batch", "config", "data", "errors", "hugging_face", "metrics", "metrics_file", "model", "optim", "parallel",
        "run_folder", "run_facts", "run_info", "runtime", "saving", "sources", "step_clock", "step_counters",
        "stopping", "throughput", "trace", "validation",
    },
    "train": {"command_line", "config", "errors", "metrics_file", "run", "run_info", "runtime", "slurm", "suggest"},
    "run": {
        "command_line", "config", "config_checks", "errors", "evaluate", "metrics_file", "model", "parallel", "plan",
        "remedies", "report", "run_info", "runtime", "step_time", "stopping", "strategy", "trainer", "watchdog",
    },
}  # fmt: skip
STANDARD_LIBRARY_ALONE = (
    "config",
    "config_checks",
    "suggest",
    "errors",
    "console",
    "machine",
    "run_info",
    "command_line",
    "plan",
    "step_time",
    "remedies",
    "strategy",
)
ONLY_IN = {
    "wandb": ("wandb_log",), "matplotlib": ("page", "data"), "pyarrow": ("data",), "tqdm": ("metrics", "data"),
    "omegaconf": ("resume", "hugging_face", "train"), "hydra": ("train",),
}  # fmt: skip
NOWHERE = ("train", "tools", "tests", "kernels", "pickle")  # `kernels` loads every module twice


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "longctx":
            found |= {f"longctx.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found


def layer_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").parts
    return name[1] if name[0] == "longctx" else name[0]


@pytest.mark.xdist_group("ranks, parallel")
def test_tests_of_a_group_stay_on_one_worker(request):
    """pytest 9.2.0 hid the groups from pytest-xdist 3.8.0, and the suite took half as long again."""
    assert request.node.nodeid.endswith("@ranks, parallel") == ("PYTEST_XDIST_WORKER" in os.environ)


def test_links():
    assert (ROOT / "longctx" / "kernels").readlink() == Path("../kernels")
    assert (ROOT / "longctx" / "configs").readlink() == Path("../configs")
    assert (ROOT / "longctx" / "tools").readlink() == Path("../tools")
    assert (ROOT / "configs" / "recipe").readlink() == Path("../recipes")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_layer_is_known():
    layers = {layer_of(path) for path in SOURCES} - {"tools", "__init__"}
    assert layers == set(MAY_IMPORT)


def test_imports_run_one_way():
    """No layer can be reached from itself."""
    done: list[str] = []

    def visit(layer: str, above: tuple[str, ...]) -> None:
        assert layer not in above, f"{' -> '.join((*above, layer))}"
        for lower in MAY_IMPORT[layer] if layer not in done else ():
            visit(lower, (*above, layer))
        done.append(layer)

    for layer in MAY_IMPORT:
        visit(layer, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    name, layer = str(path.relative_to(ROOT)), layer_of(path)
    for module in imports(path):
        package, _, rest = module.partition(".")
        assert package not in NOWHERE, f"{name} imports {module}"
        if package == "longctx" and layer in MAY_IMPORT:
            other = rest.split(".")[0]
            assert other == layer or other in MAY_IMPORT[layer], f"{name} imports {module}"
        elif package in ONLY_IN and layer != "tools":
            assert layer in ONLY_IN[package], f"{name} imports {module}"
        elif layer in STANDARD_LIBRARY_ALONE:
            assert package in sys.stdlib_module_names, f"{name} imports {module}"
        assert layer not in ("kernels", "model") or not module.startswith("torch.distributed"), (
            f"{name} imports {module}"
        )


def test_nothing_that_executes_what_it_reads():
    for path in SOURCES:
        text = path.read_text()
        for word in ("torch.load", "import pickle", "instantiate(", "allow_pickle=True", "eval("):
            assert word not in text.replace(".eval(", ""), f"{path}: {word}"


def test_files_stay_readable():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 600, path


def test_every_kernel_has_a_name_of_its_own():
    """It is the kernel's name in profiles, whose tables group by it: it says the op, the pass and what it runs on."""
    names = []
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or not any("jit" in ast.dump(d) for d in node.decorator_list):
                continue
            if f"{node.name}[" in text or f"launchable({node.name})" in text:  # rather than called by another
                names.append(node.name)
    assert len(names) == len(set(names)) >= 17
    assert all(name.endswith(("_triton", "_hopper")) and not name.startswith("_") for name in names), names
