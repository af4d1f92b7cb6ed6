"""What analysis.ipynb promises: every cell runs, and its functions compute what their names say.

The cells run once, with the smoke preset. The tests then call the functions that the cells have
defined, with numbers that are easy to check.

    python -m pytest tests/test_notebook.py
"""
import json
import math

import matplotlib.pyplot as plt
import pytest

import run_cells
import train
from model import GPT

pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """All cells run, in an empty folder of runs. The names that they define, as a dict."""
    # No window opens, whatever MPLBACKEND says.
    plt.switch_backend("agg")
    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.setenv("LRM_PRESET", "smoke")
        # joblib trains in this process. New processes would import torch again.
        patch.setenv("LOKY_MAX_CPU_COUNT", "1")
        patch.setattr(train, "RUNS", tmp_path_factory.mktemp("runs"))
        yield run_cells.run()
    plt.close("all")


def test_every_cell_runs(notebook):
    """The cells draw 12 figures, and leave train.py as it was."""
    assert len(plt.get_fignums()) == 12
    assert train.GPT is GPT


def test_committed_outputs():
    """The committed notebook shows no error."""
    cells = json.loads(run_cells.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", cell["id"]


def test_interval(notebook):
    """Student's t for 3 numbers is 4.303, and the standard deviation of 1, 2, 3 is 1."""
    found = notebook["interval"]([1.0, 2.0, 3.0])
    assert found == pytest.approx((2, 4.303 / math.sqrt(3)))


def test_expected_best(notebook):
    """The k-th number is the mean of the smallest loss, over all choices of k trials."""
    # The best of two of these three trials is 1, 1 or 2.
    found = notebook["expected_best"]([3.0, 1.0, 2.0])
    assert found == pytest.approx([2, 4 / 3, 1])


def test_a_gain_is_negative_where_the_method_is_better(notebook):
    """It is the last loss of the method minus the last loss of the baseline."""
    table = {("scalar", 7): {"log": [{"val_loss": 9.0}, {"val_loss": 2.0}]},
             ("none", 7): {"log": [{"val_loss": 1.0}, {"val_loss": 2.5}]}}
    assert notebook["gain"](table, ("scalar",), ("none",), [7]) == [-0.5]


def test_theory_of_the_toy(notebook):
    """At S = 1 the mean errors are those that the formulas of the text give by hand."""
    # x = 0.4. Half of the rows have rho = 0.1 and k = 0.4, the others rho = 0.8 and k = 25.6.
    assert notebook["theory"](False, 1.0) == pytest.approx((0.7959 + 0.5147) / 2, abs=1e-4)
    assert notebook["theory"](True, 1.0) == pytest.approx((0.7656 + 0.1791) / 2, abs=1e-4)


def test_a_run_is_trained_once(notebook):
    """The same job is remembered; another seed is trained."""
    counts = []
    for seed in (8, 8, 9):
        notebook["runs"]({"job": dict(seed=seed)})
        counts.append(len(list(notebook["CACHE"].iterdir())))
    assert counts[1] == counts[0]
    assert counts[2] == counts[0] + 1


def test_variants_of_a_model(notebook):
    """`without` removes the multipliers that it names, and `frozen` fixes the scalars."""
    norms, why = notebook["norms"], notebook["why"]
    rows = why["row alone", 200]
    assert len(norms(rows, "row", "")) == 8
    assert norms(rows, "column", "") == {}
    scalars = norms(why["scalars only on q, k", 200], "scalar", "")
    assert set(scalars) == {"blocks.0.attn.q", "blocks.0.attn.k"}
    learned = norms(why["scalar", 200], "scalar", "", 4)
    frozen = why["learned scales, frozen", 200]
    # The RMS of one number is a square and a root: two roundings of float32.
    assert norms(frozen, "scalar", "", 0) == pytest.approx(learned, rel=2e-7)
    assert norms(frozen, "scalar", "", 4) == norms(frozen, "scalar", "", 0)


def test_recipes_for_width(notebook):
    """At twice the base width muP halves the lr. Only "lr, wd" scales decay and initial W."""
    jobs = {name: notebook["recipe"](name, 128) for name in notebook["RECIPES"]}
    found = {}
    for name, history in notebook["runs"](jobs).items():
        config = train.Config(**history["config"])
        group = train.parameter_groups(GPT(config), config)[0]
        W = notebook["norms"](history, last=0)["blocks.0.attn.q"]
        found[name] = [group["lr"], group["weight_decay"], W]
    # W is 128^-1/2, up to the spread of 128^2 random numbers: 4 deviations of 0.55 % are 2.2 %.
    base = [0.004, 0.5, 128 ** -0.5]
    assert found["none"] == found["scalar"] == pytest.approx(base, rel=0.022)
    assert found["muP: lr"] == pytest.approx([0.002, 0.5, found["none"][2]])
    assert found["muP: lr, wd"] == pytest.approx([0.002, 1.0, found["none"][2] / 2])
