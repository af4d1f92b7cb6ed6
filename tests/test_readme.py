"""What README.md says about the files is true: links, functions, commands, words.

    python -m pytest -m readme
"""
import importlib
import re
import shlex
from pathlib import Path

import pytest

import run_cells
import train

pytestmark = pytest.mark.readme

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "figures/README.md").read_text(encoding="utf-8")


def test_links_to_functions():
    """A link `name` -> file.py leads to a file that defines the name."""
    links = re.findall(r"\[`(\w+)`\]\((\w+)\.py\)", README)
    assert len(links) >= 7
    for name, module in links:
        assert hasattr(importlib.import_module(module), name), f"{module}.py has no {name}"


def test_links_to_files():
    """Every other relative link leads to a file or a folder of the repository."""
    for text, folder in ((README, ROOT), (FIGURES, ROOT / "figures")):
        targets = re.findall(r"\]\((?!http|#)([^)#]+)", text)
        assert targets
        for target in targets:
            assert (folder / target).exists(), target


@pytest.mark.parametrize("text", [README, FIGURES], ids=["README.md", "figures/README.md"])
def test_commands_of_train(text):
    """Every `python train.py` and torchrun command has flags that train.py knows, and values that
    it takes. Folders and files need not exist."""
    commands = re.findall(r"(?:python|nproc_per_node=8) train\.py([^\n#|`]*)", text)
    assert len(commands) >= 4
    for command in commands:
        command = re.sub(r"\$\w+", "1", command.rstrip("\\ "))
        command = command.replace("--multipliers 1", "").replace("--resume", "--data")
        train.parse(shlex.split(command) + ["--device", "cpu"])


def intervals(text):
    """All "mean ± half" in a text."""
    found = re.findall(r"([-−+]?\d+\.\d+) ± (\d+\.\d+)", text)
    return [(float(mean.replace("−", "-")), float(half)) for mean, half in found]


def is_rounded(a, b):
    """Are all numbers of two pairs the same, if the third decimal is rounded?"""
    return max(abs(x - y) for x, y in zip(a, b)) < 0.00051


def check_intervals(text, known):
    for pair in intervals(text):
        assert any(is_rounded(pair, other) for other in known), f"{pair} was not measured"


def test_intervals_are_those_of_the_notebook():
    """Each "a ± b" of the pages comes from the committed outputs of the notebook, or from a table
    of single runs in figures/README.md."""
    printed = intervals(run_cells.printed())
    notebook, tables = FIGURES.split("## The default run")
    assert len(intervals(notebook)) > 10
    check_intervals(notebook, printed)
    check_intervals(README, printed + intervals(tables))


def test_words():
    """README.md is read in five minutes: at most 1000 words."""
    assert len(README.split()) <= 1000
