"""Every Python example in README.md and docs/ runs as it stands, with the kernel and on plain PyTorch; every
link between pages leads somewhere; pictures and comparisons are what they say they are."""

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.scripts import run_script

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def libraries_are_there(code: str) -> bool:
    """Whether what an example imports is installed: some show tilewise behind a library that it can do
    without."""
    return all(find_spec(library) for library in re.findall(r"^(?:import|from) (\w+)", code, re.M))


EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
    if libraries_are_there(code)
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path):
    path, log = tmp_path / "example.py", tmp_path / "log"
    path.write_text(code)
    assert run_script(path, log) == 0, log.read_text()


def test_examples_run_on_plain_pytorch(tmp_path):
    path = tmp_path / "examples.py"
    path.write_text("\n\n".join(example.values[0] for example in EXAMPLES))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"""(?:\]\(|src="|srcset=")([^)#"\s]+)""", page.read_text())
    missing = [link for link in targets if ":" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def test_pictures_are_what_their_script_draws():
    script = ROOT / "docs" / "pictures" / "walk.py"
    made = runpy.run_path(str(script))
    for name in made["COLORS"]:
        drawn = (script.parent / name).read_text(encoding="utf-8")
        assert made["picture"](name) == drawn, f"{name} is out of date; run: python docs/pictures/walk.py"


# ---- The README


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_every_claim_of_the_comparison_has_its_evidence():
    """A cell says no, or that nothing was found, or links to what shows it: a page or a test here, or the
    rival's own documentation."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Beside the others")[1].split("\n## ")[0]
    addresses = dict(re.findall(r"^\[([\w-]+)\]: (https://\S+)$", text, re.M))
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 15 and all(len(row) == 5 for row in rows)
    used = set()
    for claim, ours, *theirs in rows:
        assert "](" in ours or ours.strip() in ("no", "not yet"), (claim, ours)
        for cell in theirs:
            found = re.findall(r"\]\[([\w-]+)\]", cell)
            assert found or cell.strip() == "–", f"{claim.strip()}: {cell.strip()!r} has no source"
            used.update(found)
    assert used == addresses.keys()
