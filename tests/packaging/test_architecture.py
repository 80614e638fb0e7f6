"""The walls between the rooms, read from the sources: who imports whom, and how long they are."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "kvpack": ROOT / "kvpack",
    "kvpack.kernels": ROOT / "kernels",
    "kvpack.transport": ROOT / "transport",
    "kvpack.profiling": ROOT / "profiling",
}
MAX_LINES = 500

# A room is a set of modules or packages; a wall says which rooms of ours a room may import. A
# module in no room belongs to the endpoint, which puts the others together and has no wall.
ROOMS = {
    "errors": {"kvpack.errors"},
    "plan": {
        "kvpack.blocks",
        "kvpack.columns",
        "kvpack.dims",
        "kvpack.election",
        "kvpack.fragments",
        "kvpack.lanes",
        "kvpack.layout",
        "kvpack.overlap",
        "kvpack.plan",
        "kvpack.shards",
        "kvpack.verification",
        "kvpack.wire",
    },
    "explanation": {
        "kvpack.declaration",
        "kvpack.explanation",
        "kvpack.parallel",
        "kvpack.shapes",
        "kvpack.topology",
    },
    "protocol": {"kvpack.protocol"},
    "kernels": {"kvpack.kernels"},
    "transport": {"kvpack.transport"},
    "profiling": {"kvpack.profiling"},
    "staging": {"kvpack.staging"},
}
WALLS: dict[str, set[str]] = {
    "errors": set(),
    "plan": {"errors"},
    "explanation": {"errors", "plan"},
    "protocol": {"errors", "plan"},
    "kernels": {"errors", "plan"},
    "transport": {"errors"},
    "profiling": set(),
    "staging": {"errors"},
}
PURE = ("errors", "plan", "explanation", "protocol")
PURE_MAY_IMPORT = {"numpy", "msgspec"}
CLOCKS = {"time", "datetime"}
HEAVY = ("torch", "triton", "nixl", "zmq", "nvtx")


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    for_types: bool


def module_files() -> dict[str, Path]:
    files = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join((package, *parts))] = file
    return files


def imports_of(module: str, source: str, known: set[str]) -> Iterator[Import]:
    """Yield every import in `source`, also inside functions, resolved to modules of ours."""
    tree = ast.parse(source)
    typed = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, id(node) in typed)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(module, inner if inner in known else base, id(node) in typed)


def all_imports() -> list[Import]:
    files = module_files()
    return [
        found
        for module, file in files.items()
        for found in imports_of(module, file.read_text(encoding="utf-8"), set(files))
    ]


def room_of(module: str) -> str | None:
    for room, members in ROOMS.items():
        if any(module == member or module.startswith(member + ".") for member in members):
            return room
    return None


def is_ours(module: str) -> bool:
    return module == "kvpack" or module.startswith("kvpack.")


def breaches(imports: list[Import]) -> list[str]:
    """Return what each import that crosses a wall is, in words."""
    found = []
    for edge in imports:
        room = room_of(edge.importer)
        if room is None:
            continue
        if is_ours(edge.imported):
            target = room_of(edge.imported)
            if target != room and target not in WALLS[room]:
                found.append(f"{edge.importer} ({room}) imports {edge.imported}")
        elif room in PURE:
            name = edge.imported.partition(".")[0]
            if edge.for_types:
                continue
            if name in CLOCKS or name not in PURE_MAY_IMPORT | sys.stdlib_module_names:
                found.append(f"{edge.importer} ({room}) imports {edge.imported}")
    return found


def cycle(imports: list[Import]) -> list[str]:
    """Return one import cycle of our modules, empty if there is none."""
    graph: dict[str, set[str]] = {}
    for edge in imports:
        if is_ours(edge.imported) and not edge.for_types:
            graph.setdefault(edge.importer, set()).add(edge.imported)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph.get(module, ())):
            if found := visit(imported, [*path, module]):
                return found
        done.add(module)
        return []

    for module in sorted(graph):
        if found := visit(module, []):
            return found
    return []


def test_every_room_is_inhabited():
    rooms = {room_of(module) for module in module_files()}
    assert rooms >= set(ROOMS)


def test_no_import_crosses_a_wall():
    assert breaches(all_imports()) == []


def test_no_import_cycle():
    assert " -> ".join(cycle(all_imports())) == ""


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("kvpack.layout", "import torch"),
        ("kvpack.plan", "def f():\n    from time import perf_counter"),
        ("kvpack.protocol.messages", "from kvpack.staging import Staging"),
        ("kvpack.kernels.copy", "from kvpack.endpoint import Endpoint"),
        ("kvpack.transport.base", "from kvpack.layout import CacheLayout"),
        ("kvpack.profiling.ranges", "from kvpack import errors"),
    ],
)
def test_a_wall_that_is_crossed_is_noticed(importer: str, line: str):
    assert breaches(list(imports_of(importer, line, {"kvpack.errors", "kvpack.endpoint"})))


def test_imports_for_types_alone_cross_no_wall_of_the_pure_rooms():
    source = "if TYPE_CHECKING:\n    import torch"
    assert breaches(list(imports_of("kvpack.layout", source, set()))) == []


def test_a_cycle_is_noticed_through_functions_and_packages():
    known = {"kvpack.a", "kvpack.b", "kvpack.b.c"}
    edges = [
        *imports_of("kvpack.a", "from kvpack.b import c", known),
        *imports_of("kvpack.b.c", "def f():\n    from kvpack.a import x", known),
    ]
    assert cycle(edges) == ["kvpack.a", "kvpack.b.c", "kvpack.a"]


def test_pure_modules_import_without_torch_triton_nixl_or_zmq():
    pure = [m for m in module_files() if room_of(m) in PURE]
    assert {"kvpack.layout", "kvpack.plan", "kvpack.protocol"} <= set(pure)
    program = (
        "import importlib, sys\n"
        f"for name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {pure!r}: importlib.import_module(name)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, cwd=os.path.dirname(__file__)
    )


def test_no_module_is_too_long():
    long = {
        module: lines
        for module, file in module_files().items()
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}


# Written in pieces, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.\-/])/(?:"
    + "|".join(("work", "farm", "opt", "root", "tmp/bash_jobs"))
    + r")(?:/|\b(?![\w\-]))"
)


def repository_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [
        path
        for name in listed.stdout.decode().split("\0")
        if name and (path := ROOT / name).is_file()
    ]


def test_no_path_of_one_machine_is_in_the_repository():
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_the_machine_path_pattern_finds_paths_and_spares_words():
    folders = ["/".join(("", part)) for part in ("work", "opt", "root")]
    for folder in folders:
        for line in (folder, f"cd {folder}/x", f'"{folder}"', f"file://{folder}"[7:]):
            assert MACHINE_PATH.search(line), line
    for line in ("a/work", "network/opt-in", "/workers", "/optional", "/proc/self", "no work"):
        assert not MACHINE_PATH.search(line), line
