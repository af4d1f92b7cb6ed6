"""Train the runs behind the laboratory of analysis.ipynb. Their numbers are in runs.csv.

    python -m figures.runs         # train what runs.csv lacks; delete it to train everything

A run is `train.Config` with a few changes, a method (below) and a seed. Its row in runs.csv has all
of them, and what the figures need. Runs of one seed have the same batches and the same initial W.
"""
import csv
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import nn
from tqdm import tqdm

import train
from multipliers import Multipliers, attach_multipliers, multipliers_of, raw_weight

TABLE = Path(__file__).with_name("runs.csv")

# Two blocks of width 64. Multipliers are on the hidden matrices, those inside the blocks, and have
# the paper's lr of 0.01. On a GPU all runs train there, several at once.
BASE = train.Config(placement="hidden", multiplier_lr=0.01)
# Half as many steps, and twice the decay: lr * decay * steps stays 2.4.
SHORT = dict(steps=1000, weight_decay=0.6)

# ---------------------------------------------------------------- methods
# What a method changes in the configuration. `change` does the rest.
PLAIN = dict(multipliers="none")
METHODS = {
    "none": PLAIN,
    "scalar": dict(multipliers="scalar"),
    "vector": dict(multipliers="vector"),
    "both": dict(multipliers="both"),
    # Also on the embedding. Scalars with the lr of the matrices are the default of train.py.
    "scalar everywhere": dict(multipliers="scalar", placement="all", multiplier_lr=0.004),
    "vector everywhere": dict(multipliers="vector", placement="all"),
    "vector, clipped": dict(multipliers="vector", clip_multipliers=True),
    "exp(a)": PLAIN,
    "scalar on the embedding": PLAIN,
    "decayed embedding": PLAIN,
    "muP: lr": PLAIN,
    # Is it learning, or a better constant?
    "mean scales": PLAIN,
    "mean scales: W0 alone": PLAIN,
    "mean scales: lr, decay alone": PLAIN,
    "scalars from the mean": dict(multipliers="scalar"),
    "scalars from the mean, lr / 4": dict(multipliers="scalar", multiplier_lr=0.0025),
    "q, k * 0.8": PLAIN}


class ExpScalar(Multipliers):
    """W_eff = exp(a) W: the logarithm a of a scalar is learned, from 0 on."""

    def reset_parameters(self):
        nn.init.zeros_(self.scalar)

    def forward(self, W):
        return self.scalar.exp() * W


def hidden_layers(model):
    """The linear layers inside the blocks: q, k, v, out, gate, up, down of each block."""
    return [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]


@torch.no_grad()
def change(run, method, scales):
    """Make the method out of an ordinary run. A fork adds its own here.

    scales: one number for each hidden matrix, the mean of what scalars learned with other seeds."""
    model, config = run.model, run.config
    layers = hidden_layers(model)
    if method == "exp(a)":
        for layer in layers:
            parametrization = ExpScalar(layer.weight, scalar=True)
            nn.utils.parametrize.register_parametrization(layer, "weight", parametrization)
    elif method == "scalar on the embedding":
        attach_multipliers(model.embedding, scalar=True)
    elif method == "q, k * 0.8":
        for block in model.blocks:
            block.attn.q.weight *= 0.8
            block.attn.k.weight *= 0.8
    elif method == "mean scales: W0 alone":
        for layer, scale in zip(layers, scales):
            layer.weight *= scale
    elif method.startswith("mean scales"):
        # A constant multiplier is the same as a larger initial W, lr * scale and decay / scale.
        for layer, scale in zip(layers, scales):
            if method == "mean scales: lr, decay alone":
                layer.weight /= scale
            attach_multipliers(layer, scalar=True)
            multipliers_of(layer)["scalar"].fill_(scale)
    elif method.startswith("scalars from the mean"):
        for layer, scale in zip(layers, scales):
            multipliers_of(layer)["scalar"].fill_(scale)

    # The new parameters are in the groups now, and the optimizers start anew.
    run.groups = train.parameter_groups(model, config)
    for group in list(run.groups):
        if method.startswith("mean scales") and group["kind"] == "multiplier":
            # Constants, not parameters
            run.groups.remove(group)
        if method == "decayed embedding" and group["kind"] == "embedding":
            # lr * decay is that of the matrices.
            group["weight_decay"] = config.weight_decay * config.lr / config.embedding_lr
        if method == "muP: lr" and group["kind"] in ("attn", "mlp", "head"):
            group["initial_lr"] *= 64 / config.n_embd
    run.optimizers = train.make_optimizers(run.groups)


# ---------------------------------------------------------------- one run, one row
SETTINGS = ("optimizer", "steps", "lr", "weight_decay", "embedding_lr", "multiplier_lr",
            "multiplier_weight_decay", "norm_scale", "head_norm_scale", "final_gain",
            "block_gains", "placement", "n_embd", "n_layer", "batch_size")
MEASURED = ("val_loss", "W", "scale", "gain", "logits", "residual", "row_spread", "windows",
            "device", "seconds")
COLUMNS = ("name", "method", "seed") + SETTINGS + MEASURED
TEXTS = ("name", "method", "optimizer", "final_gain", "block_gains", "placement", "device")


def matrix_rows(run):
    """Rows of norm_rows: of the embedding, of the hidden matrices, of the head, in this order."""
    return [row for row in train.norm_rows(run.model, run.step) if "W" in row]


@torch.no_grad()
def activations(run):
    """RMS of the logits and of the residual stream before the head, on validation windows."""
    seen = []
    hook = run.model.final_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, _ = next(run.corpus.val_batches(64, 64))
    logits, _ = run.model(x.to(run.device))
    hook.remove()
    return train.rms(logits), train.rms(seen[0])


@torch.no_grad()
def row_spread(model):
    """Standard deviation over mean of the norms of the rows of W_eff, mean over matrices."""
    norms = [layer.weight.norm(dim=1) for layer in hidden_layers(model)]
    return np.mean([(norm.std() / norm.mean()).item() for norm in norms])


def train_job(job, scales=None):
    """Train one run and return its row."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    method = job["method"]
    settings = {key: value for key, value in job.items() if key not in ("name", "method")}
    config = replace(BASE, **METHODS[method] | settings)
    run = train.Run(config)
    change(run, method, scales)
    # Norms are measured before the lr falls: they fall with it.
    plateau = round(config.steps * (1 - config.decay_fraction))
    while run.step < config.steps:
        if run.step == plateau:
            W = [row["W"] for row in matrix_rows(run)]
        train.train_step(run)
    row = job | {key: getattr(config, key) for key in SETTINGS}
    row["val_loss"] = train.evaluate(run)
    row["W"] = W
    row["scale"] = [norms["W_eff"] / norms["W"] for norms in matrix_rows(run)]
    gain = run.model.final_norm.gain
    row["gain"] = 1.0 if gain is None else train.rms(gain)
    row["logits"], row["residual"] = activations(run)
    row["row_spread"] = row_spread(run.model)
    # Another Python has another standard library, and so another text.
    row["windows"] = run.corpus.counts["train"]
    row["device"] = run.device.type
    row["seconds"] = time.perf_counter() - began
    return row


# ---------------------------------------------------------------- all runs
def cross(method, seeds, **settings):
    """One job for each seed. Its name has the settings that differ from BASE."""
    words = [method]
    for key, value in sorted(settings.items()):
        if value != getattr(BASE, key):
            words.append(f"{key} {value}" if isinstance(value, str) else f"{key} {value:g}")
    jobs = []
    for seed in seeds:
        name = ", ".join([*words, f"seed {seed}"])
        jobs.append(dict(name=name, method=method, seed=seed, **settings))
    return jobs


WIDTHS = {64: dict(n_embd=64), 128: dict(n_embd=128, n_head=4), 256: dict(n_embd=256, n_head=8)}
# Seeds, fixed before the first run
SIX = range(700, 706)
TUNING = (720, 721)
FRESH = range(730, 738)
THREE = range(740, 743)
SOURCES = range(750, 753)
SCEPTIC = range(760, 772)


def decay_jobs():
    """Where it pays: the gain over lr * decay * steps, 0.2 to 12."""
    jobs = []
    for decay in (0.025, 0.1, 0.3, 1.0, 1.5):
        for method in ("none", "scalar", "vector"):
            jobs += cross(method, SIX, weight_decay=decay)
    for S in (1.5, 2.0, 3.0):
        jobs += cross("none", SIX, weight_decay=1.0, norm_scale=S)
    for method in ("both", "exp(a)"):
        jobs += cross(method, SIX, weight_decay=1.0)
    return jobs + cross("both", SIX, weight_decay=0.1)


def embedding_jobs():
    """How far the embedding walks, and what its lr does to the gain."""
    jobs = []
    for lr in (0.02, 0.06, 0.2):
        settings = dict(weight_decay=0.1, embedding_lr=lr)
        jobs += cross("none", SIX[:4], **settings) + cross("scalar everywhere", SIX[:4], **settings)
        jobs += cross("none", SIX[:2], steps=500, **settings)
        jobs += cross("none", SIX[:1], steps=4000, **settings)
    for steps in (500, 2000, 4000):
        jobs += cross("decayed embedding", SIX[:1], weight_decay=0.1, steps=steps)
    return jobs


def grid_jobs():
    """lr times weight decay, without multipliers: the baseline."""
    jobs = []
    for lr in (0.002, 0.004, 0.008):
        for decay in (0.01, 0.03, 0.1, 0.3):
            jobs += cross("none", TUNING, lr=lr, weight_decay=decay)
        for decay in (0.03, 0.1, 0.3):
            jobs += cross("none", TUNING[:1], optimizer="muon", lr=lr, weight_decay=decay)
    return jobs


def tuning_jobs():
    """The settings from which each method takes its own best, at each width."""
    jobs = []
    for decay in (0.03, 0.1):
        jobs += cross("scalar", TUNING, lr=0.004, weight_decay=decay)
    for rate in (0.003, 0.03):
        jobs += cross("scalar", TUNING, lr=0.004, weight_decay=0.1, multiplier_lr=rate)
        jobs += cross("scalar", TUNING, **WIDTHS[128], lr=0.002, weight_decay=0.05,
                      multiplier_lr=rate)
    for method in ("none", "scalar"):
        for lr, decay in ((0.001, 0.05), (0.002, 0.05), (0.004, 0.05), (0.002, 0.015),
                          (0.002, 0.5)):
            jobs += cross(method, TUNING, **WIDTHS[128], lr=lr, weight_decay=decay)
        jobs += cross(method, TUNING, **WIDTHS[128], lr=0.002, weight_decay=0.05,
                      embedding_lr=0.03)
        for lr in (0.0007, 0.001, 0.0014):
            jobs += cross(method, TUNING[:1], **WIDTHS[256], lr=lr, weight_decay=0.05)
    return jobs


def part_jobs():
    """The norm forced away: which multiplier does the work, and why vectors lag."""
    jobs = []
    for S in (1 / 8, 4.0):
        for method in ("none", "scalar", "vector", "both", "scalar on the embedding"):
            jobs += cross(method, THREE, **SHORT, norm_scale=S)
    for method in ("none", "scalar", "vector"):
        jobs += cross(method, THREE, **SHORT, norm_scale=4.0, **WIDTHS[128])
        jobs += cross(method, THREE, **SHORT, norm_scale=4.0, batch_size=16)
    return jobs


def width_jobs():
    """One lr and decay for all widths, and muP's lr beside it."""
    jobs = []
    for width in (64, 256):
        for method in ("none", "scalar", "muP: lr"):
            # At width 64 muP changes nothing.
            if width > 64 or method != "muP: lr":
                jobs += cross(method, THREE, **SHORT, **WIDTHS[width])
    return jobs


def source_jobs():
    return cross("scalar", SOURCES, steps=1000, weight_decay=0.1)


def sceptic_jobs():
    """Is it learning, or a better constant? The scales are the means of the seeds SOURCES."""
    jobs = []
    for method in ("none", "scalar", "mean scales", "mean scales: W0 alone",
                   "mean scales: lr, decay alone", "scalars from the mean",
                   "scalars from the mean, lr / 4", "q, k * 0.8"):
        jobs += cross(method, SCEPTIC, steps=1000, weight_decay=0.1)
    return jobs


def paper_jobs():
    """The MLP experiment (App. B), clipping (4.3), scale diversity (3.1), drift (4.1)."""
    jobs = []
    for method in ("none", "scalar"):
        for S in (0.25, 0.5, 1.0, 2.0, 4.0):
            mlp = SHORT | dict(placement="mlp", block_gains="frozen", norm_scale=S)
            jobs += cross(method, THREE, **mlp)
            if S in (0.25, 1.0, 4.0):
                jobs += cross(method, THREE[:2], **mlp, optimizer="muon")
    for method in ("none", "vector", "vector, clipped"):
        jobs += cross(method, SCEPTIC[:6], steps=1000, weight_decay=0.1)
    for method in ("none", "scalar", "vector"):
        jobs += cross(method, THREE[:2], **SHORT, n_layer=4)
    for decay in (0.0, 0.002):
        jobs += cross("vector everywhere", THREE[:2], steps=4000, weight_decay=0.1,
                      multiplier_weight_decay=decay)
    return jobs


def best_settings(rows, method, width):
    """Of the runs with the TUNING seeds: lr, decay, embedding and multiplier lr of the lowest mean
    loss."""
    keys = ("lr", "weight_decay", "embedding_lr", "multiplier_lr")
    losses = {}
    for row in rows:
        tuning = row["seed"] in TUNING and row["optimizer"] == "adamw"
        if tuning and row["method"] == method and row["n_embd"] == width:
            losses.setdefault(tuple(row[key] for key in keys), []).append(row["val_loss"])
    best = min(losses, key=lambda point: np.mean(losses[point]))
    return dict(zip(keys, best))


def fresh_jobs(rows):
    """Each method at its own best, with seeds that the tuning has not seen."""
    jobs = []
    for width in WIDTHS:
        for method in ("none", "scalar"):
            jobs += cross(method, FRESH, **WIDTHS[width], **best_settings(rows, method, width))
    return jobs


def mean_scales(rows):
    """For each hidden matrix the mean of the scales that scalars learned with the seeds SOURCES."""
    learned = [row["scale"] for row in rows if row["seed"] in SOURCES]
    if not learned:
        return None
    return np.mean(learned, axis=0)[1:-1].tolist()


# ---------------------------------------------------------------- the table
def read_table():
    """The rows of runs.csv, with numbers where numbers stand. "W" and "scale" are lists: of the
    embedding, of the hidden matrices (q, k, v, out, gate, up, down of each block), of the head."""
    if not TABLE.exists():
        return []
    with open(TABLE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in COLUMNS:
            if key in ("W", "scale"):
                row[key] = [float(number) for number in row[key].split()]
            elif key not in TEXTS:
                row[key] = float(row[key])
    return rows


def text(value):
    """A cell of runs.csv."""
    if isinstance(value, list):
        return " ".join(f"{number:.4g}" for number in value)
    return f"{value:.9g}" if isinstance(value, float) else value


def write_table(rows):
    cells = []
    for row in sorted(rows, key=lambda row: row["name"]):
        cells.append({key: text(row[key]) for key in COLUMNS})
    train.write_table(TABLE, COLUMNS, cells)


def train_missing(jobs, rows):
    """Train the jobs that have no row yet, one on each core, and save each row as it comes."""
    done = {row["name"] for row in rows}
    missing = {job["name"]: job for job in jobs if job["name"] not in done}
    scales = mean_scales(rows)
    parallel = Parallel(-1, return_as="generator_unordered")
    results = parallel(delayed(train_job)(job, scales) for job in missing.values())
    for row in tqdm(results, total=len(missing), unit="run"):
        rows.append(row)
        write_table(rows)
    return rows


def all_jobs():
    """All runs but those that need the results of others."""
    return (decay_jobs() + embedding_jobs() + grid_jobs() + tuning_jobs() + part_jobs()
            + width_jobs() + source_jobs() + paper_jobs())


def later_jobs(rows):
    return sceptic_jobs() + fresh_jobs(rows)


def main():
    rows = train_missing(all_jobs(), read_table())
    rows = train_missing(later_jobs(rows), rows)
    minutes = sum(row["seconds"] for row in rows) / 60
    print(f"{len(rows)} runs, {minutes:.0f} core-minutes")


if __name__ == "__main__":
    main()
