"""The house plan, enforced: imports point down, heavy imports stay where they belong, files stay readable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bigembed"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LADDER = ["errors", "init", "spec", "threads", "kernels", "storage", "vocab", "cache", "optim", "nn", "convert", "demo"]
LADDER += ["cli", "__main__"]
ONLY_USER = {
    "zarr": {"storage/zarr_format.py"},
    "mmap": {"storage/readers.py"},
    "fcntl": {"storage/lock.py"},
    "argparse": {f"cli/{name}.py" for name in ("main", "command", "values", "demo", "inspect", "convert", "words")},
    "triton": {"cache/triton_kernels.py"},
}
NO_TORCH = ("errors", "init", "spec", "threads", "kernels", "storage", "vocab", "convert", "cli")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 70
# Files that hold one idea but cannot be shorter, with the reason.
BANNED = re.compile(r"\b(todo|fixme|xxx|hack|shard(ed|s)?|utils|helpers?|manager)\b", re.IGNORECASE)


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _rung(name: str) -> int:
    return LADDER.index(name.split("/")[0].removesuffix(".py"))


def _imports(tree: ast.AST) -> "list[tuple[str, int]]":
    """(module, level) of every import that runs, so not those for the type checker alone."""
    found: list[tuple[str, int]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module}.{alias.name}", node.level) for alias in node.names]
        found += _imports(node)
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=_name)
def test_imports_point_down_and_are_absolute(path: Path) -> None:
    own = _rung(_name(path))
    for module, level in _imports(ast.parse(path.read_text())):
        assert level == 0, f"relative import of {module}"
        parts = module.split(".")
        if parts[0] == "bigembed" and len(parts) > 1 and parts[1] in LADDER:
            assert LADDER.index(parts[1]) <= own, f"{_name(path)} imports {module}, which is above it"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_heavy_modules_are_imported_only_where_they_belong(path: Path) -> None:
    roots = {module.split(".")[0] for module, _ in _imports(ast.parse(path.read_text()))}
    for module, users in ONLY_USER.items():
        assert module not in roots or _name(path) in users, f"{_name(path)} imports {module}"
    if _name(path).split("/")[0].removesuffix(".py") in NO_TORCH:
        body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        top = {m.split(".")[0] for m, _ in _imports(ast.Module(body, []))}
        assert "torch" not in top, f"{_name(path)} imports torch"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_and_functions_can_be_read_in_one_sitting(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES, f"{len(lines)} lines"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.body[0].lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_open_with_what_they_hold(path: Path) -> None:
    if path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text())), "no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_banned_words(path: Path) -> None:
    found = BANNED.search(path.read_text())
    assert found is None, f"{found.group()!r}"


def test_the_top_level_holds_what_it_should() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    named = {"pyproject.toml", "bigembed", "tests", "tools", "benchmarks", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= named


def test_a_table_and_the_command_line_do_without_torch() -> None:
    code = "import sys, bigembed, bigembed.cli.main; assert not {'torch', 'zarr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_everything_creates_nothing(tmp_path: Path) -> None:
    code = "import bigembed; bigembed.Embedding; bigembed.optim.Adam"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
