"""Draw front.png, the picture of the front page, from 33 runs: 12 minutes on two CPU cores.

    python figures/front.py

Left: the norm of the hidden matrices from three initial scales, which lie 9 times apart. Right: the
final loss over S, for runs without multipliers and with one scalar for each hidden matrix. At S the
lr, the initial W and the law are S times as large, and the weight decay is divided by S. So without
multipliers S is the same as a constant multiplier on each hidden matrix.
"""
import csv
import itertools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from joblib import Parallel, delayed
from torch import nn

FIGURES = Path(__file__).resolve().parent
sys.path.insert(0, str(FIGURES.parent))

import train
from multipliers import law_rms, raw_weight

SEEDS = (0, 1, 2)
SCALES = (1 / 8, 1 / 2, 1, 2, 4)
STARTS = (1 / 3, 1, 3)
METHODS = ("none", "scalar")
COLORS = {"none": "black", "scalar": "tab:orange"}
# The preset tiny, with multipliers on the hidden matrices alone.
TINY = dict(device="cpu", placement="hidden", multiplier_lr=0.01)
COLUMNS = ("multipliers", "S", "seed", "val_loss", "W / law", "W_eff / W")


def fall_onto_the_law(start):
    """RMS(W) of the hidden matrices, median, every 20 steps, if the initial W is `start` times as
    large as usual. The lr stays constant."""
    torch.set_num_threads(1)
    config = train.Config(**TINY, multipliers="none", decay_fraction=0)
    run = train.Run(config)
    matrices = [raw_weight(module) for module in run.model.blocks.modules()
                if isinstance(module, nn.Linear)]
    for W in matrices:
        W.data *= start
    curve = []
    while run.step < config.steps:
        if run.step % 20 == 0:
            curve.append(np.median([train.rms(W) for W in matrices]))
        train.train_step(run)
    return curve


def train_at(multipliers, S, seed):
    """One row of front.csv. The norms are those before the lr falls, medians of hidden matrices."""
    torch.set_num_threads(1)
    config = train.Config(**TINY, multipliers=multipliers, norm_scale=S, seed=seed)
    result = train.train(config, quiet=True)
    steps, W = train.norm_curves(result, "W")
    _, W_eff = train.norm_curves(result, "W_eff")
    end = steps.index(config.steps * 8 // 10)
    ratio = np.median(W[end]) / train.law_of(config)
    learned = np.median(W_eff[end] / W[end])
    loss = result["log"][-1]["val_loss"]
    return dict(zip(COLUMNS, (multipliers, S, seed, loss, ratio, learned)))


def draw(curves, rows):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for start, curve in zip(STARTS, curves):
        left.semilogy(20 * np.arange(len(curve)), curve, label=f"initial W × {start:.2g}")
    left.axhline(law_rms(0.004, 0.3), color="black", ls="--", label="law: √(η/2λ)")
    left.set(xlabel="step", ylabel="RMS(W), hidden matrices")
    left.set_title("The optimizer chooses the norm")
    left.legend()

    for method in METHODS:
        means = []
        for S in SCALES:
            chosen = [row for row in rows if row["multipliers"] == method and row["S"] == S]
            losses = [row["val_loss"] for row in chosen]
            means.append(np.mean(losses))
            right.plot(np.full(len(losses), S), losses, "o", ms=3, color=COLORS[method])
            ratio = np.median([row["W / law"] for row in chosen])
            # Above the highest point, or below the lowest one.
            place = (S, max(losses)) if method == "none" else (S, min(losses))
            shift = (0, 5) if method == "none" else (0, -14)
            right.annotate(f"{ratio:.2f}", place, xytext=shift, textcoords="offset points",
                           ha="center", color=COLORS[method], fontsize=9)
        right.plot(SCALES, means, color=COLORS[method], label=method)
    right.set_xscale("log", base=2)
    right.set_xticks(SCALES, ["1/8", "1/2", "1", "2", "4"])
    right.set(xlabel="S: the norm that the optimizer asks for, relative",
              ylabel="validation loss (nats per token)", title="A learned scale corrects it")
    right.margins(y=0.15)
    right.legend(title="multipliers\n(numbers: RMS(W) / law)", loc="upper center", fontsize=9)
    figure.savefig(FIGURES / "front.png", dpi=110)


def main():
    curves = Parallel(-1)(delayed(fall_onto_the_law)(start) for start in STARTS)
    jobs = itertools.product(SEEDS, METHODS, SCALES)
    rows = Parallel(-1)(delayed(train_at)(method, S, seed) for seed, method, S in jobs)
    with open(FIGURES / "front.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(curves, rows)


if __name__ == "__main__":
    main()
