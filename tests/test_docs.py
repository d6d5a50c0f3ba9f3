"""Every Python block of the documentation runs, and every page the README links to exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

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


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    """Each figure is looked up in the JSON its command wrote, and must stand in the README's table as measured."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["runs"]
        for name in ("hippocampus_equal_time", "finetune_step", "mae_step")
    }
    figures = []
    for arm in ("umit_scratch", "umit_shared", "primus_s", "nnunet"):
        run = runs["hippocampus_equal_time"][f"full/fold0/20min/seed1/{arm}"]
        figures += [f"{run['iterations']} steps | {run['dice']['mean']:.3f} |", f"{run['dice']['cases']} cases"]
    step = runs["finetune_step"]["full/batch4/threads2"]["arms"]
    figures += [f"| {step[arm]['ratio']['cpu']['median']:.3f} x |" for arm in ("UMIT", "Primus-S")]
    masked = runs["mae_step"]["full/tokens512/threads2"]["arms"]
    names = ("UMIT, equal size", "UMIT, narrow decoder", "UMIT, narrow decoder, conv stem")
    figures += [f"| {masked[arm]['ratio']['cpu']['median']:.3f} x |" for arm in names]
    longer = runs["mae_step"]["full/tokens1400/threads2"]["arms"]["UMIT, equal size"]
    figures.append(f"1400 tokens | {longer['ratio']['cpu']['median']:.3f} x |")
    assert [figure for figure in figures if figure not in text] == []
