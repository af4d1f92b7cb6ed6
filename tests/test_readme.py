"""What README.md says about the files is true: links, functions, commands, words.

    python -m pytest -m readme
"""
import csv
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

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


def test_the_numbers_of_the_picture():
    """The table of the front picture in figures/README.md has the means of front.csv."""
    with open(ROOT / "figures/front.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    for method in ("none", "scalar"):
        for S in {row["S"] for row in rows}:
            chosen = [row for row in rows if row["multipliers"] == method and row["S"] == S]
            mean = np.mean([float(row["val_loss"]) for row in chosen])
            assert f"{mean:.3f}" in FIGURES, f"{method}, S = {S}"


def test_words():
    """README.md is read in five minutes: at most 1000 words."""
    assert len(README.split()) <= 1000
