"""What analysis.ipynb promises: every cell runs, and its functions compute what their names say.

The cells run once, with tiny models. The tests then call the functions that the cells have defined.

    python -m pytest tests/test_notebook.py
"""
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

import run_cells
from figures import runs

pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def notebook():
    """All cells run. The names that they define, as a dict."""
    # No window opens, whatever MPLBACKEND says.
    plt.switch_backend("agg")
    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.setenv("LRM_PRESET", "smoke")
        # joblib trains in this process. New processes would import torch again.
        patch.setenv("LOKY_MAX_CPU_COUNT", "1")
        yield run_cells.run()
    plt.close("all")


def test_every_cell_runs(notebook):
    """No cell fails, and each of the twelve sections draws."""
    assert len(plt.get_fignums()) >= 12


def test_committed_outputs():
    """The committed notebook was executed from top to bottom, no cell failed, and it was no smoke
    test: the lesson took minutes."""
    cells = json.loads(run_cells.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error", cell["id"]
    minutes = re.search(r"the lesson took ([\d.]+) minutes", run_cells.printed())
    assert float(minutes[1]) > 1


# ---------------------------------------------------------------- statistics
def test_interval(notebook):
    """Student's t for 3 numbers is 4.303, and the standard deviation of 1, 2, 3 is 1."""
    found = notebook["interval"]([1.0, 2.0, 3.0])
    assert found == pytest.approx((2, 4.303 / math.sqrt(3)))


def test_p_value(notebook):
    """For 2 and 3 numbers Student's distribution has a closed form."""
    # 1 and 3: t = 2 with one degree of freedom, p = 1 - 2 atan(t) / pi.
    # The sum over 100,000 angles is off by at most one of them, 1e-5.
    found = notebook["p_value"](np.array([1.0, 3.0]))
    assert found == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=2e-5)
    # 1, 2, 3: t = 2 sqrt(3) with two degrees of freedom, p = 1 - t / sqrt(2 + t^2).
    found = notebook["p_value"](np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx(1 - math.sqrt(12 / 14), abs=2e-5)


def test_holm(notebook, monkeypatch, capsys):
    """The smallest of three p must be below 0.05 / 3, the next below 0.05 / 2. After the first that
    is not, none survives, even one below 0.05."""
    for ps, stars in (((0.01, 0.02, 0.04), 3), ((0.01, 0.03, 0.04), 1), ((0.02, 0.02, 0.02), 0),
                      ((0.04, 0.03, 0.016), 1)):
        # The differences tell which p is meant.
        family = {str(i): np.array([p, p + 1.0]) for i, p in enumerate(ps)}
        monkeypatch.setitem(notebook["report"].__globals__, "p_value", lambda sample: sample[0])
        notebook["report"](family)
        assert capsys.readouterr().out.count("*") == stars, ps


# ---------------------------------------------------------------- the lesson
def test_theory_of_the_toy(notebook):
    """At S = 1 the mean errors are those that the formulas of the text give by hand."""
    # x = 0.4. Half of the rows have rho = 0.1 and k = 0.4, the others rho = 0.8 and k = 25.6.
    assert notebook["theory"](False, 1.0) == pytest.approx((0.7959 + 0.5147) / 2, abs=1e-4)
    assert notebook["theory"](True, 1.0) == pytest.approx((0.7656 + 0.1791) / 2, abs=1e-4)


def test_rows_are_paired(notebook):
    """A gain is the loss of a method minus that of "none", seed by seed."""
    table = notebook["TABLE"]
    for seed, loss in ((1, 4.0), (2, 6.0)):
        for method, change in (("none", 0.0), ("scalar", -0.5 * seed)):
            job, = runs.cross(method, [seed], steps=7)
            table[job["name"]] = job | dict(val_loss=loss + change)
    assert notebook["gain"]("scalar", (1, 2), steps=7).tolist() == [-0.5, -1.0]
