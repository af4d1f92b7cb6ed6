"""What figures/runs.py promises: each job is what its name says, and runs.csv is what they give.

    python -m pytest tests/test_runs.py
"""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from conftest import assert_mutant_fails
from figures import runs
from multipliers import multipliers_of, raw_weight

pytestmark = pytest.mark.notebook


# ---------------------------------------------------------------- the table
def test_names_of_jobs():
    """A name has the method, the settings that differ from BASE in one order, and the seed."""
    job, = runs.cross("none", [3], steps=1000, lr=0.004, embedding_lr=0.2)
    assert job["name"] == "none, embedding_lr 0.2, steps 1000, seed 3"
    other, = runs.cross("none", [3], embedding_lr=0.2, steps=1000)
    assert other["name"] == job["name"]


def test_the_table_is_complete():
    """runs.csv has a row for every job, and no other row."""
    rows = runs.read_table()
    jobs = runs.all_jobs() + runs.later_jobs(rows)
    assert {row["name"] for row in rows} == {job["name"] for job in jobs}


def test_the_table_survives_reading_and_writing(tmp_path, monkeypatch):
    """Rows that are read and written again stay the same, to the last digit."""
    before = runs.TABLE.read_text(encoding="utf-8")
    rows = runs.read_table()
    monkeypatch.setattr(runs, "TABLE", tmp_path / "runs.csv")
    runs.write_table(rows)
    assert runs.TABLE.read_text(encoding="utf-8") == before


def check_a_row(name):
    """Train again. Scales are compared to one part in a hundred: they are rounded to 4 digits."""
    job, = (job for job in runs.all_jobs() if job["name"] == name)
    row, = (row for row in runs.read_table() if row["name"] == name)
    found = runs.train_job(job | dict(device="cpu"))
    assert found["val_loss"] == pytest.approx(row["val_loss"], abs=TOLERANCE), "another loss"
    assert found["scale"] == pytest.approx(row["scale"], rel=0.01), "other multipliers"


# Where S = 1/8 training is calm: with PyTorch's code for CPUs with AVX-512, with AVX2, and without,
# these losses are at most 5e-6 apart, since rounding errors do not grow. (Where the lr is at its
# limit they do: up to 0.008 after 500 steps.) Another seed moves the loss by 0.02.
TOLERANCE = 0.001
CALM = "norm_scale 0.125, steps 1000, weight_decay 0.6, seed 740"


@pytest.fixture(scope="module")
def same_text():
    """Another version of Python has another standard library, and so other losses."""
    windows = train.Corpus("stdlib", 64).counts["train"]
    if windows != runs.read_table()[0]["windows"]:
        pytest.skip("the standard library is not the one that runs.csv was trained on")


def test_a_row_trained_again(same_text):
    """The code still gives the numbers of runs.csv."""
    check_a_row(f"both, {CALM}")


def test_a_change_of_the_optimizer_is_seen(same_text, monkeypatch):
    """The same for another row. With another beta2 its loss does not come out."""
    def mutant(groups):
        return [torch.optim.AdamW(groups, betas=(0.9, 0.999))]
    assert_mutant_fails(lambda: check_a_row(f"none, {CALM}"), monkeypatch, train,
                        "make_optimizers", mutant, "another loss")


# ---------------------------------------------------------------- methods
def changed(method, scales=None, **settings):
    """An ordinary run of a small model, and the same run after `change`."""
    small = dict(data=train.__file__, n_layer=1, n_embd=32, n_head=1)
    config = replace(runs.BASE, **small | runs.METHODS[method] | settings)
    run = train.Run(config)
    runs.change(run, method, scales)
    return train.Run(config), run


def groups_of(run):
    return {group["kind"]: group for group in run.groups}


SCALES = [0.5, 1.5, 0.7, 1.1, 0.9, 1.2, 0.8]


@pytest.mark.parametrize("method, W_scale, W_eff_scale", [
    ("mean scales", 1, "s"), ("mean scales: W0 alone", "s", "s"),
    ("mean scales: lr, decay alone", "1 / s", 1), ("scalars from the mean", 1, "s")])
def test_mean_scales(method, W_scale, W_eff_scale):
    """W and W_eff of each method are the initial W times 1, s or 1 / s."""
    before, run = changed(method, SCALES)
    layers = zip(runs.hidden_layers(before.model), runs.hidden_layers(run.model), SCALES)
    for old, new, s in layers:
        factors = {1: 1.0, "s": s, "1 / s": 1 / s}
        W = old.weight.detach()
        # A product and a quotient: two roundings of float32.
        assert torch.allclose(raw_weight(new), W * factors[W_scale], rtol=2e-7)
        assert torch.allclose(new.weight, W * factors[W_eff_scale], rtol=2e-7)


def scalars_of(run):
    layers = runs.hidden_layers(run.model)
    return [multipliers_of(layer)["scalar"].item() for layer in layers]


def test_constants_are_not_trained():
    """Mean scales are constants; scalars that start at them are not."""
    _, constant = changed("mean scales", SCALES)
    _, learned = changed("scalars from the mean", SCALES)
    assert "multiplier" not in groups_of(constant)
    for run in (constant, learned):
        for _ in range(2):
            train.train_step(run)
    assert scalars_of(constant) == pytest.approx(SCALES, rel=1e-6)
    assert not np.isclose(scalars_of(learned), SCALES, rtol=1e-6).any()


def test_groups_of_changed_runs():
    """The lr and the decay of the methods that change them."""
    _, decayed = changed("decayed embedding")
    embedding = groups_of(decayed)["embedding"]
    assert embedding["weight_decay"] * embedding["lr"] == pytest.approx(0.3 * 0.004)
    before, wide = changed("muP: lr", n_embd=128)
    for kind in ("attn", "mlp", "head"):
        assert groups_of(wide)[kind]["initial_lr"] == groups_of(before)[kind]["initial_lr"] / 2
    assert groups_of(wide)["gain"]["initial_lr"] == 0.004


def test_exp_scalar():
    """exp(a) starts at 1, and multiplies W."""
    before, run = changed("exp(a)")
    for old, new in zip(runs.hidden_layers(before.model), runs.hidden_layers(run.model)):
        assert torch.equal(new.weight, old.weight)
        a = multipliers_of(new)["scalar"]
        torch.nn.init.constant_(a, math.log(2))
        # exp and log round once each.
        assert torch.allclose(new.weight, 2 * old.weight, rtol=3e-7)
