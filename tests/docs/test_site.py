"""`make docs` builds the site without a warning, and would not if a link, an anchor or the navigation were wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import ROOT

pytest.importorskip("mkdocs", reason="needs the extra `docs`")
pytest.importorskip("material", reason="needs the extra `docs`")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """The Makefile's command on the copy in a folder."""
    command = re.search(r"^docs: .*\n\t(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert command
    words = command[1].replace("$(BIN)/mkdocs", f"{sys.executable} -m mkdocs")
    return subprocess.run(["bash", "-c", words], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of what the site is made of."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def test_the_site_is_built_without_warnings(site: Path) -> None:
    result = build(site)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    page = (site / "build/site/training.html").read_text(encoding="utf-8")
    assert "<code>Et*3|t*4|t*3L</code>" in page
    assert "<table>" in page


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("[there](nowhere.md)", "contains a link 'nowhere.md'"),
        ("[there](training.md#nowhere)", "does not contain an anchor '#nowhere'"),
        ("![there](images/nowhere.png)", "contains a link 'images/nowhere.png'"),
    ],
)
def test_what_leads_nowhere_ends_it(site: Path, line: str, warning: str) -> None:
    with (site / "docs/index.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    result = build(site)
    assert result.returncode == 1
    assert warning in result.stderr


def test_a_page_outside_of_the_navigation_ends_it(site: Path) -> None:
    (site / "docs/more.md").write_text("# More\n")
    result = build(site)
    assert result.returncode == 1
    assert "more.md" in result.stderr
