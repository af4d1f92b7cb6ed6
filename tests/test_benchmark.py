"""Tests of benchmark.py: every row can be measured, and what it compares is comparable. No test
looks at how long something takes."""
import numpy as np
import pytest
import torch

import benchmark
import train


@pytest.fixture
def config(tmp_path):
    """The preset tiny, with random text."""
    return benchmark.make_config("tiny", "cpu", tmp_path)


@pytest.mark.parametrize("part", ["step", "optimizer", "loop", "corpus"])
def test_every_row_is_measured(config, part, capsys):
    """Each round gives one time for each row, and the table shows each row."""
    rows = benchmark.PARTS[part](config)
    seconds = benchmark.measure(rows, rounds=2)
    benchmark.show(seconds)
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(rows, lines, strict=True):
        assert line.startswith(name)
        assert (seconds[name] > 0).all()


def test_the_bare_step_is_the_step_of_train_py(config):
    """On the same batch both give the same weights, bit for bit, also with two forward passes."""
    config.warmup_steps = 0
    config.accumulate = 2
    bare = train.Run(config)
    full = train.Run(config)
    benchmark.bare_step(bare)()
    train.train_step(full)
    for ours, theirs in zip(bare.model.parameters(), full.model.parameters()):
        assert torch.equal(ours, theirs)


def test_the_interval_holds_the_median():
    """Of 400 series, the interval holds the true ratio in about 95 %; a drift of both cancels."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        drift = rng.lognormal(0, 0.5, 20)
        noise = rng.lognormal(0, 0.1, 20)
        _, low, high = benchmark.compare(1.02 * drift * noise, drift)
        held += low <= 1.02 <= high
    # The ranks of 20 numbers give 93 to 96 %. The standard deviation of 400 trials is 1.1 %.
    assert 0.90 < held / 400 < 0.99
