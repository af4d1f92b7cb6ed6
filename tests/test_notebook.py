"""What analysis.ipynb promises: it runs, its theory is right, and its outputs belong to its code.

    python -m pytest -m notebook
"""
import hashlib
import json
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import run_cells

pytestmark = pytest.mark.notebook

def printed(cells):
    """All that the cells printed."""
    return "".join(output.get("text", "") for cell in cells if cell.cell_type == "code"
                   for output in cell.outputs if output.output_type == "stream")

def check_sections(notebook):
    """No cell has failed; sections 1 to 7 have drawn a figure and printed a check."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", (cell.id, output.evalue)
    for i in range(1, 8):
        cells = [cell for cell in notebook.cells if cell.id.startswith(f"s{i}-")]
        assert re.search(r": (ok|FAILED)$", printed(cells), re.M), f"section {i}: no check"
        assert any("image/png" in output.get("data", {}) for cell in cells
                   for output in cell.get("outputs", [])), f"section {i}: no figure"

def check_fresh(notebook):
    """The outputs come from one pass over exactly these cells, top to bottom."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    code = "\n".join(cell.source for cell in cells)
    digest = hashlib.sha256(code.encode("utf-8")).hexdigest()
    assert f"sha256 of the code cells {digest}" in printed(cells)

# ---------------------------------------------------------------- it runs
def test_every_cell_runs(monkeypatch, tmp_path):
    """The smoke preset executes from top to bottom in a fresh kernel, every section with its figure
    and its check, also where MPLBACKEND is set. Every run is trained, none is remembered."""
    monkeypatch.setenv("LRM_PRESET", "smoke")
    monkeypatch.setenv("LRM_HOME", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(run_cells.NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(run_cells.ROOT)}}).execute()
    check_sections(notebook)
    check_fresh(notebook)

def test_lengths():
    """At most 520 lines of code, and at most 75 before section 1."""
    cells = nbformat.read(run_cells.NOTEBOOK, 4).cells
    first = next(i for i, cell in enumerate(cells) if cell.id == "s1")
    for some, limit in ((cells, 520), (cells[:first], 75)):
        code = [line for cell in some if cell.cell_type == "code"
                for line in cell.source.splitlines()]
        assert len(code) <= limit and max(map(len, code)) <= 100

@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The names that the cells of sections 1 and 2 define, and a second set of section 2's jobs."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRM_PRESET", "smoke")
        patch.setenv("MPLBACKEND", "Agg")
        yield run_cells.run(lambda name: name in ("setup", "s1-noise", "s1-toy", "runs"))
    torch.set_num_threads(threads)

# ---------------------------------------------------------------- section 1
@pytest.mark.parametrize("name, tolerance", [("SGD, momentum .9", 0.03), ("AdamW", 0.03),
                                             ("Muon", 0.03)])
def test_equilibrium_in_pure_noise(cells, name, tolerance):
    """U and the correlations of the updates at one setting predict RMS(W) at another. Mutants:
    without correlations, or with those of the gradients' mean, the prediction misses by far."""
    _, U, rho = cells["walk"](name, 0.02, 0.2, 1200, lags=150)
    sizes = cells["walk"](name, 0.04, 0.4, 300)[0]
    measured = (sizes[150:] ** 2).mean() ** 0.5
    law = cells["law"]
    # measured: at most 0.012; without correlations 0.75, with too long ones 1.1
    assert law(0.04, 0.4, U, rho) == pytest.approx(measured, rel=tolerance)
    for mutant in (0 * rho, [0.99 ** k for k in range(1, 150)]):
        assert law(0.04, 0.4, U, torch.as_tensor(mutant).numpy()) != pytest.approx(
            measured, rel=4 * tolerance)

@pytest.mark.parametrize("learned", [False, True])
def test_theory_of_the_toy(cells, learned):
    """At S = 1 the simulated toy has the error of the closed form, to 10 %. Mutant: the theory of
    the other kind of multiplier."""
    simulated = cells["toy"](learned, 0, 2500)[1]
    assert cells["OCTAVES"][1] == 1
    # measured: 0.038 and 0.002; for the mutants 0.31 and 0.39
    assert cells["theory"](learned, 1) == pytest.approx(simulated, rel=0.1)
    assert cells["theory"](not learned, 1) != pytest.approx(simulated, rel=0.2)

def test_theory_solves_its_equations(cells):
    """Frozen: fixed point of mean and variance of W. Learned: E = 1 / (1 + x), k = x (1 + x)."""
    A, lam, rho, eta_lam = cells["A"], cells["LAM"], cells["RHO"].double(), cells["ETA_LAM"]
    for S in (0.3, 1.0, 5.0):
        eta, decay = eta_lam / lam * S, lam / S
        bias, variance = decay / (A + decay), eta / (2 * (A + decay))
        assert cells["theory"](False, S) == pytest.approx(
            (bias ** 2 + variance / rho ** 2).mean().item(), rel=1e-5)
    k = 2 * A ** 2 * rho ** 2 / eta_lam
    x = (1 / 4 + k).sqrt() - 1 / 2
    assert torch.allclose(x * (1 + x), k)
    assert cells["theory"](True, 1.0) == pytest.approx((1 / (1 + x)).mean().item(), rel=1e-5)

# ---------------------------------------------------------------- the machinery
def test_a_run_is_trained_once(cells, tmp_path, monkeypatch):
    """The same job is remembered; another setting, another variant or other code is trained."""
    monkeypatch.setitem(cells, "CACHE", tmp_path)
    jobs = {"a": dict(seed=1), "b": dict(seed=1, frozen={"mlp": 0.5}), "c": dict(seed=1, lr=0.001)}
    first = cells["runs"](jobs)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 3 and len({cells["loss"](h) for h in first.values()}) == 3
    assert cells["runs"](jobs) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    monkeypatch.setitem(cells, "CODE", "other")
    cells["runs"](jobs)
    assert len(list(tmp_path.iterdir())) == 6

def test_a_frozen_multiplier_is_the_norm_experiment(cells, tmp_path, monkeypatch):
    """A fixed multiplier s equals lr * s, weight decay / s and an initial W times s (section 3), up
    to AdamW's eps. Mutant: an initial W that is not scaled."""
    monkeypatch.setitem(cells, "CACHE", tmp_path)
    jobs = {"frozen": dict(frozen={"blocks": 2.0}),
            "scaled": dict(start={"blocks": 2.0}, norm_scale=2.0), "wrong": dict(norm_scale=2.0)}
    frozen, scaled, wrong = map(cells["loss"], cells["runs"](jobs).values())
    # measured: 7e-5, and 0.086 for the mutant
    assert frozen == pytest.approx(scaled, abs=2e-4) != pytest.approx(wrong, abs=2e-3)

# ---------------------------------------------------------------- as committed
@pytest.fixture(scope="module")
def committed():
    return nbformat.read(run_cells.NOTEBOOK, 4)

def test_committed_outputs(committed):
    """The committed notebook shows a full run: every section's figure and check, no error."""
    check_sections(committed)
    top = json.dumps(next(cell for cell in committed.cells if cell.id == "setup").outputs)
    assert re.search(r"preset (cpu|gpu); torch ", top)
    assert "core-minutes in all" in printed(committed.cells)
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
