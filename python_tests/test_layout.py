"""The rooms of the package: imports run only downwards, and no file or function grows beyond what one can survey."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cerberus_ext

PACKAGE = Path(cerberus_ext.__file__).parent
ROOMS = "cli serving vllm calibration evaluation training engine runtime drafting target io ops".split()  # noqa: SIM905
MAX_FILE, MAX_FUNCTION = 300, 60  # lines
FILES = {file.relative_to(PACKAGE): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = {".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in FILES}


def imported(file: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The modules of the package, from its root on, that a file imports, also for types, and where."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parent.parts[: len(file.parent.parts) - (node.level - 1)]
            module = ".".join((*folder, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES or not module else module, node.lineno
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.startswith("cerberus_ext") for name in names), f"{file}:{node.lineno}: not relative"


def test_imports_run_downwards() -> None:
    wrong = [
        f"{file}:{line} imports {module}"
        for file, tree in FILES.items()
        if len(file.parts) > 1
        for module, line in imported(file, tree)
        if (room := module.split(".")[0]) in ROOMS and ROOMS.index(room) < ROOMS.index(file.parts[0])
    ]
    assert wrong == []


def test_files_of_a_room_import_each_other_in_one_direction() -> None:
    """No circle, not even one for types."""
    graph = {
        ".".join(file.with_suffix("").parts).removesuffix(".__init__"): {module for module, _ in imported(file, tree)}
        for file, tree in FILES.items()
    }
    left = {name: modules & graph.keys() - {name} for name, modules in graph.items()}
    while free := {name for name, modules in left.items() if not modules & left.keys()}:
        left = {name: modules for name, modules in left.items() if name not in free}
    assert left == {}


def test_the_first_level_has_rooms_only() -> None:
    assert {file.parts[0] for file in FILES} == {"__init__.py", *ROOMS}


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without its docstring."""
    documented = ast.get_docstring(function) is not None and len(function.body) > 1
    text = function.body[0] if documented else None
    total = (function.end_lineno or 0) - function.lineno + 1
    return total - ((text.end_lineno or 0) - text.lineno + 1 if text is not None else 0)


def test_sizes() -> None:
    long = [str(file) for file in FILES if len((PACKAGE / file).read_text().splitlines()) > MAX_FILE]
    long += [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > MAX_FUNCTION
    ]
    assert long == []
