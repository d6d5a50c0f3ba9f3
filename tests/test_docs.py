"""Every Python block of the documentation runs, and every page the README links to exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str) -> None:
    exec(compile(block, "documentation", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_readme_holds_exactly_two_set_up_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("pip install")]
    assert commands == ['pip install ".[demo]" && umit demo', 'pip install ".[test]" && pytest']


def test_tables_of_figures_are_those_of_the_results() -> None:
    assert report.outdated() == [], "run python -m benchmarks.report"


def test_a_page_that_differs_from_the_results_is_found(tmp_path: Path) -> None:
    for page in report.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        text = (ROOT / page).read_text(encoding="utf-8")
        changed = re.sub(r"\| \d\.\d{3}( x)? \|", "| 9.999 |", text, count=1) if page == "README.md" else text
        (tmp_path / page).write_text(changed, encoding="utf-8")
    assert report.outdated(tmp_path) == ["README.md"]


def test_results_name_their_command_and_no_path_of_the_machine() -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert json.loads(text)["command"] == f"python -m benchmarks.{file.stem} --full"
        assert not re.search(r'["=]/\w+/', text), f"{file.name} holds an absolute path"
