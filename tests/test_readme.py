"""Every Python block of every README runs, in order, in a fresh folder; the commands given are those that CI runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT, *(ROOT / name for name in ("bigembed", "benchmarks", "tests", "tools"))]
READMES = sorted({path for folder in FOLDERS for path in [folder / "README.md", *folder.glob("*/README.md")]})
READMES = [path for path in READMES if path.exists() and not path.parent.name.startswith(".")]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_python_block_runs(readme: Path, tmp_path: Path) -> None:
    code = "\n".join(BLOCK.findall(readme.read_text()))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_and_named_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    local = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    named = re.findall(r"`((?:tests|benchmarks|bigembed|tools)/[\w./]+)", text)
    for target in [*local, *named]:
        assert (ROOT / target).exists(), f"README.md names {target}, which does not exist"
    for file, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text() or f"class {test}" in (ROOT / file).read_text(), test


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    command = re.search(r"<!-- the test command -->\n```bash\n(.+)\n```", (ROOT / "README.md").read_text())
    assert command is not None
    assert "pytest" in command.group(1)
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- the test command -->" in script
    assert shutil.which("bash")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_docstring_examples_run(tmp_path: Path) -> None:
    for path in sorted((ROOT / "bigembed").rglob("*.py")):
        if ">>> " in path.read_text():
            subprocess.run([sys.executable, "-m", "doctest", str(path)], check=True, cwd=tmp_path)
