"""What analysis.ipynb promises: it runs, its theory is right, and its outputs belong to its code.

    python -m pytest -m notebook
"""
import hashlib
import json
import math
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import run_cells

pytestmark = pytest.mark.notebook

SECTIONS = [f"s{i}" for i in range(1, 11)]
# Errors measured in the smoke preset: 0.9, 1.0, 2.1, 2.2 and 0.8 %
TOLERANCE = {"SGD": 0.02, "SGD, momentum .9": 0.02, "AdamW": 0.03, "Lion": 0.05, "Muon": 0.03}


def printed(cells):
    """All that the cells printed."""
    return "".join(output.get("text", "") for cell in cells if cell.cell_type == "code"
                   for output in cell.outputs if output.output_type == "stream")


def check_sections(notebook):
    """Every section has run without an error, drawn a figure and printed a check."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", (cell.id, output.evalue)
    for section in SECTIONS:
        cells = [cell for cell in notebook.cells if cell.id.startswith(section + "-")]
        assert re.search(r": (ok|FAILED)$", printed(cells), re.M), f"{section} printed no check"
        assert any("image/png" in output.get("data", {}) for cell in cells
                   for output in cell.get("outputs", [])), f"{section} drew nothing"


def check_fresh(notebook):
    """The outputs come from one pass over exactly these cells, top to bottom."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    code = "\n".join(cell.source for cell in cells)
    assert f"sha256 of the code cells {hashlib.sha256(code.encode()).hexdigest()}" in printed(cells)


# ------------------------------------------------------------------------------- it runs


def test_every_cell_runs(monkeypatch):
    """The smoke preset executes from top to bottom in a fresh kernel, every section with its figure
    and its check."""
    monkeypatch.setenv("LRM_PRESET", "smoke")
    notebook = nbformat.read(run_cells.NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(run_cells.ROOT)}}).execute()
    check_sections(notebook)
    check_fresh(notebook)


# ------------------------------------------------------------------------------- section 1


@pytest.fixture(scope="module")
def section1():
    """The notebook's own cells up to the end of section 1's computation, as a namespace."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRM_PRESET", "smoke")
        patch.setenv("MPLBACKEND", "Agg")
        yield run_cells.run(lambda name: name in ("setup", "helpers", "s1-run"))
    torch.set_num_threads(threads)


def worst_error(section1, name, theory=None):
    """Largest relative error of one optimizer's theory over the grid."""
    rows = [row for row in section1["section1"] if row["optimizer"] == name]
    assert len(rows) >= 2
    return max(abs(row["measured"] / (theory or section1["theory"][name])(row["eta"], row["lam"])
                   - 1) for row in rows)


@pytest.mark.parametrize("name", TOLERANCE)
def test_equilibrium_in_pure_noise(section1, name):
    """RMS(W) under pure noise is what the sum over the updates' autocorrelation says."""
    assert worst_error(section1, name) < TOLERANCE[name]


@pytest.mark.parametrize("name, wrong", [
    ("SGD, momentum .9", lambda law, eta, lam: law(eta, lam, 0.19 ** -0.5, lambda k: 0 * k)),
    ("AdamW", lambda law, eta, lam: law(eta, lam, 1, lambda k: 0.9 ** k)),
    ("Lion", lambda law, eta, lam: law(eta, lam, 1, lambda k: 0.99 ** k)),
    ("Muon", lambda law, eta, lam: law(eta, lam, 0.175, lambda k: 0.84 * 0.95 ** k))])
def test_wrong_theory_is_caught(section1, name, wrong):
    """Without momentum's sum, without AdamW's U, with the mean's own autocorrelation in place of
    the sign's or of Muon's updates', the theory misses the measurement by twice the tolerance."""
    mutant = worst_error(section1, name, lambda eta, lam: wrong(section1["law"], eta, lam))
    assert mutant > 2 * TOLERANCE[name]


def test_mean_under_muon(section1):
    """The Nesterov mean's autocorrelation is 0.84 * 0.95^k, as derived in section 1."""
    mu, generator = 0.95, torch.Generator().manual_seed(0)
    g = torch.randn(4000, 2000, generator=generator)
    mean, means = torch.zeros(2000), []
    for row in g:
        mean = mean.lerp(row, 1 - mu)
        means.append(row.lerp(mean, mu))
    x = torch.stack(means[200:])
    for k in (1, 5, 20):
        measured = ((x[k:] * x[:-k]).mean() / x.square().mean()).item()
        assert measured == pytest.approx(0.84 * mu ** k, abs=0.005)   # measured: 0.001


def test_muon_scales_and_relaxes(section1):
    """Muon's constant depends on eta * lambda alone, and after 2.4 relaxation times a start far
    from the equilibrium is as far from it as e^-2.4 of the difference of squares."""
    ends = {start: sizes[-1] / section1["theory"][start[0]](0.02, 0.2)
            for start, sizes in section1["starts"].items()}
    steps = len(next(iter(section1["starts"].values())))
    left = math.exp(-steps * 2 * 0.02 * 0.2)
    for (name, far), end in ends.items():
        if name == "Lion":                     # its own mean remembers 100 steps, a third of these
            continue
        assert end == pytest.approx(math.sqrt(1 + left * (far ** 2 - 1)), rel=0.05), (name, far)
    a, b = (section1["walk"]("Muon", eta, 0.008 / eta, 600)[-200:] for eta in (0.01, 0.04))
    ratio = section1["rms"](b) / section1["rms"](a) / 4         # RMS ~ sqrt(eta / lambda) ~ eta
    assert ratio == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------------------- as committed


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(run_cells.NOTEBOOK, 4)


def test_committed_outputs(committed):
    """The committed notebook shows a full run: every section's figure and check, no error."""
    check_sections(committed)
    top = json.dumps(next(cell for cell in committed.cells if cell.id == "setup").outputs)
    assert re.search(r"preset (cpu|gpu); torch .* minutes in all", top)
    assert run_cells.NOTEBOOK.stat().st_size < 3e6


def test_committed_outputs_are_not_older_than_their_cells(committed):
    """The outputs belong to these sources; after an edit of any cell the check fails."""
    check_fresh(committed)
    for cell in committed.cells:
        if cell.cell_type == "code":
            cell.source, source = cell.source + " ", cell.source
            with pytest.raises(AssertionError):
                check_fresh(committed)
            cell.source = source
