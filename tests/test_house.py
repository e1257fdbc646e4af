"""The shape of the package: no circle of imports, a place for every module, no long file without a reason."""

from __future__ import annotations

import ast
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "million_cli"
MOST_LINES = 400
REASON = "Long because "
FILES = [p for folder in ("million_cli", "scripts", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_at_start(path: Path) -> set[str]:
    """Modules of the package that a module imports while it is being imported."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue  # runs later
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue  # never runs
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= set(MODULES) else {node.module, *names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        todo += ast.iter_child_nodes(node)
    return found & set(MODULES)


def test_no_circle_of_imports():
    graph = {name: imports_at_start(path) - {name, "million_cli"} for name, path in MODULES.items()}
    assert len(graph) > 100
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def contract() -> list[set[str]]:
    """The layers of the import contract, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract for contract in contracts if contract["type"] == "layers")
    assert layers["exhaustive"]
    return [{name.strip() for name in layer.split("|")} for layer in layers["layers"]]


def test_contributing_draws_the_contract():
    (chain,) = re.findall(r"```\n(cli ->.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    drawn = [set(re.findall(r"\w+", layer)) for layer in chain.split("->")]
    assert drawn == [layer for layer in contract() if layer != {"__main__"}]


def test_the_contract_names_every_module():
    named = [name for layer in contract() for name in layer]
    found = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert sorted(named) == sorted(found - {"__init__"})


def test_lint_enforces_the_contract():
    makefile = (ROOT / "Makefile").read_text()
    assert "lint-imports" in makefile.partition("\nlint:")[2].partition("\n\n")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_long_file_gives_its_reason(path):
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > MOST_LINES:
        docstring = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
        assert REASON in docstring, f"{lines} lines, and no sentence '{REASON}...' in the first docstring"
