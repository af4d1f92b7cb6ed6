"""What README.md says about the files is true: lengths, line numbers, words.

    python -m pytest -m readme
"""
import base64
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.readme

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# the most lines that each file may have, so that all of them are read in an hour
BUDGET = {"multipliers.py": 260, "model.py": 215, "muon.py": 135, "train.py": 680, "kernel.py": 260}

def lines(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()

@pytest.mark.parametrize("name", BUDGET)
def test_lengths(name):
    """The table of files gives the number of lines, which is within the budget, none over 100
    characters."""
    assert f"| [{name}]({name}) | {len(lines(name))} |" in README
    assert len(lines(name)) <= BUDGET[name] and max(map(len, lines(name))) <= 100

def test_links_to_functions():
    """A link `name` -> file.py#L123 leads to the line that defines the name."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 8
    for name, file, number in links:
        assert re.match(rf"\s*(def|class) {name}\b", lines(file)[int(number) - 1]), (name, file)

def test_links_to_files():
    """Every other relative link leads to a file or a folder of the repository."""
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets and all((ROOT / target).exists() for target in targets)

def test_figures():
    """Every picture in figures/ is an output of the committed notebook."""
    notebook = (ROOT / "analysis.ipynb").read_text(encoding="utf-8").replace("\\n", "")
    for path in (ROOT / "figures").glob("*.png"):
        assert base64.b64encode(path.read_bytes()).decode() in notebook, path.name

def test_words():
    """README.md is read in five minutes: at most 1100 words."""
    assert len(README.split()) <= 1100
