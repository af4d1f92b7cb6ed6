"""Tests of train.py, in the order of train.py: one property each, stated in the docstring.

Everything happens in a temporary folder, without network and GPU, with a model of one small block
and a text of 11 kB. "The same" means bit for bit. A tolerance is derived beside it from
u = 6e-8, the largest relative error of one operation in float32. A mutant is train.py with one
small slip: a check passes with the right code, and fails with the mutant.
"""
import json
import math
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pytest import approx, raises
from torch import nn
from torch.multiprocessing import start_processes

import train
from conftest import TEXT, StopAfter, assert_mutant_fails, files, write
from model import GPT, BadInput
from multipliers import attach_multipliers, multipliers_of, raw_weight
from train import Config, Corpus, Run, encode, get_tokenizer, load, main, open_folder, parse

pytestmark = pytest.mark.train
TINY = dict(data="text.txt", multipliers="vector", device="cpu", n_layer=1, n_head=1, n_embd=8,
            block_size=16, batch_size=4, steps=8, lr=3e-3, embedding_lr=3e-3, multiplier_lr=0.1,
            warmup_steps=1, decay_fraction=0.25, eval_interval=4, eval_windows=6, log_interval=2)


@pytest.fixture(autouse=True)
def workshop(tmp_path, monkeypatch, signals):
    """Each test has a new current folder with a text, and no network."""
    def unreachable(name):
        raise ConnectionError("no network")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(train.tiktoken, "get_encoding", unreachable)
    write(tmp_path, {"text.txt": TEXT})


def config(**changes):
    return Config(**(TINY | changes))


def flags(**changes):
    """The same settings as the words of a command."""
    words = []
    for name, value in (TINY | changes).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def run(stop=None, **changes):
    return train.train(config(**changes), stop, quiet=True)


def contents(out):
    """What the checkpoint in a folder holds, apart from the settings, each as a hash."""
    _, saved = load(out)
    del saved["config"]
    # A float as text in JSON is exact.
    return {key: hash(json.dumps(saved[key], default=torch.Tensor.tolist)) for key in saved}


def losses(run, count=5):
    """The training losses of the next steps."""
    return [train.train_step(run)["loss"].item() for _ in range(count)]


def refused(words, match, capsys):
    """This command prints one sentence, returns 2, and changes no file."""
    before = files()
    capsys.readouterr()
    assert main(words) == 2
    assert re.fullmatch(f"error: .*{match}.*\n", capsys.readouterr().err)
    assert files() == before


# ---------------------------------------------------------------- settings
DEFAULTS = dict(
    vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=64, multipliers="scalar",
    placement="all", final_gain="vector", block_gains="vector", preset="auto", data="stdlib",
    tokenizer="bytes", device="auto", seed=0, out="", optimizer="adamw", steps=2000,
    batch_size=4, accumulate=1, lr=0.004, weight_decay=0.3, embedding_lr=0.06,
    multiplier_lr=0.004, multiplier_weight_decay=0.002, norm_scale=1.0, head_norm_scale=1.0,
    grad_clip=1.0, clip_multipliers=False, warmup_steps=50, decay_fraction=0.2,
    scale_kernel=False, compile=False, eval_interval=250, eval_windows=512, log_interval=10,
    resume="", sample="", prompt="")
PRESETS = {
    "tiny": {},
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8, steps=1500,
                  weight_decay=0.1, warmup_steps=100, eval_windows=256),
    "gpu": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=32, steps=1200,
                weight_decay=0.1, warmup_steps=100, eval_windows=256),
    "gpt2": dict(tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024,
                 batch_size=32, accumulate=16, steps=4000, optimizer="muon", warmup_steps=100,
                 decay_fraction=0.7, eval_windows=10240, compile=True)}


def test_the_settings_are_those_of_the_measurements():
    """Nobody changes a default or a preset by accident. All presets are valid; a step of gpt2 has
    524,288 tokens."""
    assert asdict(Config()) == DEFAULTS
    assert train.PRESETS == PRESETS
    for preset in PRESETS.values():
        c = Config(**preset)
        c.check()
    assert c.batch_size * c.accumulate * c.block_size == 524_288


def test_the_environment_decides_the_folder_of_runs_and_the_process(monkeypatch):
    """LRM_HOME is the folder of runs/. torchrun says which of how many processes this is."""
    for name, value in {"LRM_HOME": "home", "RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    names = runpy.run_path(train.__file__)
    assert [names[key] for key in ("RUNS", "RANK", "WORLD")] == [Path("home/runs"), 3, 8]


# ---------------------------------------------------------------- which parameter is trained how
MEMBERS = {
    "attn": ["blocks.0.attn.q.parametrizations.weight.original",
             "blocks.0.attn.k.parametrizations.weight.original",
             "blocks.0.attn.v.parametrizations.weight.original",
             "blocks.0.attn.out.parametrizations.weight.original"],
    "mlp": ["blocks.0.mlp.gate.parametrizations.weight.original",
            "blocks.0.mlp.up.parametrizations.weight.original",
            "blocks.0.mlp.down.parametrizations.weight.original"],
    "head": ["head.weight"],
    "embedding": ["embedding.parametrizations.weight.original"],
    "gain": ["blocks.0.attn_norm.gain", "blocks.0.mlp_norm.gain", "final_norm.gain"],
    "multiplier": ["embedding.parametrizations.weight.0.scalar",
                   "blocks.0.attn.q.parametrizations.weight.0.scalar",
                   "blocks.0.attn.k.parametrizations.weight.0.scalar",
                   "blocks.0.attn.v.parametrizations.weight.0.scalar",
                   "blocks.0.attn.out.parametrizations.weight.0.scalar",
                   "blocks.0.mlp.gate.parametrizations.weight.0.scalar",
                   "blocks.0.mlp.up.parametrizations.weight.0.scalar",
                   "blocks.0.mlp.down.parametrizations.weight.0.scalar"]}


def test_every_parameter_is_in_exactly_one_group(monkeypatch):
    """A list of all names in all groups. Mutant: a multiplier is among the matrices."""
    right = train.parameter_groups

    def check():
        model = GPT(config(multipliers="scalar"))
        names = {p: name for name, p in model.named_parameters()}
        found = {}
        for group in train.parameter_groups(model, config()):
            found[group["kind"]] = [names[p] for p in group["params"]]
        assert found == MEMBERS

    def mutant(model, c):
        groups = right(model, c)
        groups[0]["params"].append(groups[-1]["params"].pop())
        return groups
    assert_mutant_fails(check, monkeypatch, train, "parameter_groups", mutant, "attn")


# kind: optimizer, lr in the first step, weight decay, and does it count in the clip norm?
TRAINED = {
    "attn": ("Muon", 0.006, 0.025, True), "mlp": ("Muon", 0.006, 0.025, True),
    "head": ("AdamW", 0.00075, 0.2, True), "embedding": ("AdamW", 0.25, 0, True),
    "gain": ("AdamW", 0.0015, 0, True), "multiplier": ("AdamW", 0.05, 0.002, False)}


@pytest.mark.parametrize("changes, trained", [
    ({}, {}), ({"placement": "mlp"}, {"attn": ("Muon", 0.0015, 0.1, True)}),
    ({"clip_multipliers": True}, {"multiplier": ("AdamW", 0.05, 0.002, True)}),
    ({"optimizer": "adamw"}, {"attn": ("AdamW", 0.006, 0.025, True),
                              "mlp": ("AdamW", 0.006, 0.025, True)})])
def test_every_kind_of_parameter_is_trained_in_its_own_way(changes, trained):
    """Muon trains block matrices alone; matrices but the embedding have decay; S is for the
    matrices that it names; multipliers are outside of the clip norm. Each group has the factor 1/2
    of its own peak lr in the first step."""
    settings = dict(optimizer="muon", embedding_lr=0.5, norm_scale=4.0, head_norm_scale=0.5,
                    weight_decay=0.1)
    made = Run(config(**settings | changes))
    losses(made, 1)
    found = {}
    for optimizer in made.optimizers:
        for group in optimizer.param_groups:
            numbers = [group[key] for key in ("lr", "weight_decay", "clip")]
            found[group["kind"]] = (type(optimizer).__name__, *numbers)
    # 4 and 1/2 are powers of 2: products with them are exact.
    assert found == TRAINED | trained
    assert made.optimizers[0].defaults["betas"] == (0.9, 0.95)


def test_vectors_beside_scalars_are_slower():
    """With "both", the rows and columns have a quarter of the lr of the scalars, also later on."""
    both = config(multipliers="both", multiplier_lr=0.02)
    groups = train.parameter_groups(GPT(both), both)
    multipliers = [group for group in groups if group["kind"] == "multiplier"]
    assert [group["lr"] for group in multipliers] == [0.02, 0.005]
    assert [group["initial_lr"] for group in multipliers] == [0.02, 0.005]
    for group, ndim in zip(multipliers, (0, 1)):
        assert {p.ndim for p in group["params"]} == {ndim}


@pytest.mark.parametrize("limit, after", [(10.0, [3, 4]), (1.0, [0.6, 0.8]), (0.0, [3, 4])])
def test_clipping_counts_and_scales_all_but_the_multipliers(limit, after, monkeypatch):
    """Gradients 3 and 4 have the norm 5, with a multiplier's 12 it is 13. Norm 5 is scaled to 1,
    but not to 10, and 0 is no limit. Mutant: multipliers count."""
    right = train.clip_gradients

    def check():
        matrix = nn.Parameter(torch.zeros(2))
        multiplier = nn.Parameter(torch.zeros(1))
        matrix.grad = torch.tensor([3.0, 4.0])
        multiplier.grad = torch.tensor([12.0])
        groups = [dict(params=[matrix], clip=True), dict(params=[multiplier], clip=False)]
        assert train.clip_gradients(groups, limit) == (5, 13)
        # PyTorch adds 1e-6 to the norm of 5: 2e-7 of it.
        assert matrix.grad.tolist() == approx(after, rel=1e-6)
        assert multiplier.grad == 12

    def mutant(groups, limit):
        return right([group | {"clip": True} for group in groups], limit)
    assert_mutant_fails(check, monkeypatch, train, "clip_gradients", mutant, "13")


def test_schedule_rises_stays_and_falls():
    """The factor rises in equal steps to 1, stays there, and falls in equal steps towards 0."""
    factors = [train.schedule(step, 12, 3, 0.33) for step in range(12)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert train.schedule(0, 10, 0, 0.0) == train.schedule(9, 10, 0, 0.0) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("scale, S, placement, kinds", [
    ("norm_scale", 4.0, "all", ("attn", "mlp")), ("norm_scale", 0.5, "mlp", ("mlp",)),
    ("head_norm_scale", 4.0, "all", ("head",))])
def test_a_norm_scale_is_a_frozen_multiplier(optimizer, scale, S, placement, kinds, monkeypatch):
    """norm_scale=S trains the same W_eff as a frozen scalar multiplier S with the usual lr, decay
    and initial W. Mutant: W starts without the factor S."""
    changes = dict(multipliers="none", optimizer=optimizer, placement=placement, grad_clip=0.0)
    right = train.parameter_groups

    def with_frozen_multipliers(c, seed):
        model = GPT(c, seed)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and train.kind_of(name) in kinds:
                attach_multipliers(layer, scalar=True)
                multipliers_of(layer)["scalar"].requires_grad_(False).fill_(S)
        return model

    def check():
        scaled = Run(config(**changes, **{scale: S}))
        with monkeypatch.context() as patch:
            patch.setattr(train, "GPT", with_frozen_multipliers)
            frozen = Run(config(**changes))
        # W's gradient has the factor S here. Adam adds eps to the size of the gradient, so eps
        # gets this factor, too. A product with a power of 2 is exact: no rounding differs.
        for group in frozen.groups:
            if group["kind"] in kinds:
                group["eps"] *= S
        assert losses(scaled) == losses(frozen)

    def mutant(model, c):
        return [group | {"S": 1.0} for group in right(model, c)]
    assert_mutant_fails(check, monkeypatch, train, "parameter_groups", mutant)


# ---------------------------------------------------------------- measuring and the loop
def test_the_val_loss_is_the_mean_over_all_tokens():
    """This holds though the last batch is smaller: 4 and 2 windows."""
    made = Run(config(eval_windows=6))
    (x, y), = made.corpus.val_batches(6, 6)
    _, loss = made.model(x, y)
    # The means are rounded sums of up to 96 numbers: 96 u at most.
    assert train.evaluate(made) == approx(loss.item(), rel=96 * 6e-8)


def test_compile_and_scale_kernel_change_the_model(monkeypatch):
    """--compile compiles the model. With --scale-kernel the model computes W_eff by kernel.py."""
    called = []
    monkeypatch.setattr(GPT, "compile", lambda model: called.append("compile"))
    monkeypatch.setattr(train, "use_kernel", lambda model: called.append("kernel"))
    Run(config())
    Run(config(compile=True))
    Run(config(scale_kernel=True))
    assert called == ["compile", "kernel"]


def test_the_seed_decides_everything():
    """The same seed gives the same run; another seed gives other weights and other batches."""
    run(out="a", seed=3)
    run(out="b", seed=3)
    run(out="c", seed=4)
    a, b, c = map(contents, "abc")
    assert a == b
    assert a["norms"] != c["norms"] and a["batches"] != c["batches"]


def test_multipliers_change_neither_the_start_nor_the_batches():
    """All kinds start as the same function and see the same batches."""
    found = set()
    for kind in ("none", "scalar", "vector", "both"):
        run(out=kind, multipliers=kind, log_interval=1)
        first = load(kind)[1]["log"][0]
        found.add((first["loss"], contents(kind)["batches"]))
    assert len(found) == 1


def test_evaluating_more_often_changes_nothing(monkeypatch):
    """The intervals change no training batch and no weight. Mutant: an evaluation draws from the
    generator of the training batches."""
    right = train.evaluate

    def check():
        run(out="often", eval_interval=1, log_interval=1)
        run(out="seldom", eval_interval=8)
        often = contents("often")
        assert often == contents("seldom") | {"log": often["log"], "norms": often["norms"]}

    def mutant(made):
        made.corpus.train_batch(1, made.generator)
        return right(made)
    assert_mutant_fails(check, monkeypatch, train, "evaluate", mutant, "batches")


def test_accumulation_equals_a_larger_batch():
    """3 passes of 2 windows have the loss and the gradient of one pass of 6, up to rounding."""
    whole = Run(config(batch_size=6, grad_clip=0.0))
    parts = Run(config(batch_size=2, accumulate=3, grad_clip=0.0))
    gradients = []
    for made in (whole, parts):
        # Without optimizers the gradients stay where they are.
        made.optimizers = []
        losses(made, 1)
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
    # Some 20 operations lead to a gradient, and each sums up to 96 tokens. Errors of random signs
    # add up to sqrt(20 * 96) u = 3e-6.
    assert (gradients[0] - gradients[1]).norm() < 3e-6 * gradients[0].norm()


def test_a_row_says_what_happened():
    """There is a row every log_interval steps and at evaluations, and no other. Norms begin at step
    0. A row has the loss and the gradient norms of its own step."""
    result = run(eval_interval=3)
    every = run(eval_interval=3, log_interval=1)["log"]
    assert result["log"] == [every[i] for i in (1, 2, 3, 5, 7)]
    assert {row["step"] for row in result["norms"]} == {0, 2, 3, 4, 6, 8}
    assert [row["step"] for row in every if "val_loss" in row] == [3, 6, 8]
    assert [row["loss"] for row in every] == losses(Run(config()), 8)
    assert every[0]["grad_norm"] < every[0]["grad_norm_with_multipliers"]


def test_norms_are_those_of_matrices_and_gains():
    """W, W_eff and the multipliers of each matrix, the gain of each RMSNorm, and nothing else."""
    model = GPT(config(block_gains="frozen", final_gain="scalar"))
    raw_weight(model.embedding).data.fill_(0.5)
    for name, number in (("row", 2.0), ("column", -4.0)):
        multipliers_of(model.embedding)[name].data.fill_(number)
    rows = train.norm_rows(model, 7)
    assert rows[0] == dict(step=7, name="embedding", W=0.5, W_eff=4.0, row=2.0, column=4.0)
    assert rows[-2] == dict(step=7, name="final_norm", gain=1.0)
    assert list(rows[-1]) == ["step", "name", "W", "W_eff"]
    # the embedding, seven matrices of a block, the final gain and the head
    assert len(rows) == 10


@pytest.mark.parametrize("key, stop", [("loss", 9), ("grad_norm", 1), ("val_loss", 9)])
def test_nan_ends_the_run_and_spares_the_checkpoint(key, stop, monkeypatch):
    """A NaN in the loss, the gradient or the val loss ends the run, also if the run is to be
    stopped in a step without a row of the log. The old checkpoint remains."""
    right = train.train_step

    def spoil(made):
        return right(made) | {key: math.nan}
    run(StopAfter(3), out="run")
    before = files()
    if key == "val_loss":
        monkeypatch.setattr(train, "evaluate", lambda made: math.nan)
    else:
        monkeypatch.setattr(train, "train_step", spoil)
    with raises(BadInput, match="not finite at step 4"):
        run(StopAfter(stop), out="run", resume="run", log_interval=100 if stop == 1 else 4)
    assert files() == before


# ---------------------------------------------------------------- checkpoints
def forget_batches(made):
    made.generator.manual_seed(0)


def forget_states(made):
    made.optimizers[-1].state.clear()


@pytest.mark.parametrize("changes, slip, match", [
    (dict(optimizer="muon"), forget_batches, "batches"),
    (dict(optimizer="muon", accumulate=2, multipliers="scalar"), forget_states, "model"),
    ({}, forget_states, "model")])
def test_resuming_equals_not_stopping(changes, slip, match, monkeypatch):
    """A run that is stopped in step 3 saves without an evaluation and without an extra row. When
    resumed, it ends like a run without a stop. Mutants: the generator of the batches, or the state
    of an optimizer, is forgotten."""
    right = train.restore

    def check():
        stopped = run(StopAfter(3), out="halves", **changes)
        assert [row["step"] for row in stopped["log"]] == [2]
        run(out="halves", resume="halves", **changes)
        run(out="whole", **changes)
        assert contents("halves") == contents("whole")

    def mutant(made):
        right(made)
        slip(made)
    assert_mutant_fails(check, monkeypatch, train, "restore", mutant, match)


def test_a_stop_skips_an_evaluation_but_the_last():
    """A cluster may not wait. Of a stop in an evaluation's step, only the val loss is missing."""
    assert "val_loss" not in run(StopAfter(4))["log"][-1]
    assert run(StopAfter(8)) == run()


def test_a_resumed_run_has_the_new_settings():
    """lr, decay and number of steps of a resumed run are those asked for now."""
    run(StopAfter(3), out="run")
    made = Run(config(resume="run/checkpoint.pt", lr=1e-3, weight_decay=0.0, steps=12))
    train.restore(made)
    losses(made, 1)
    matrices = made.optimizers[0].param_groups[0]
    assert (made.step, matrices["lr"], matrices["weight_decay"]) == (4, 1e-3, 0)


class Foreign:
    """An object whose pickle makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_foreign_checkpoint_runs_no_code(monkeypatch):
    """A checkpoint is data: it cannot call functions. Mutant: torch.load without weights_only."""
    right = torch.load

    def check():
        with suppress(BadInput):
            load("foreign.pt")
        assert not os.path.exists("ran")

    def mutant(file, **_):
        return right(file, weights_only=False)
    torch.save(Foreign(), "foreign.pt")
    assert_mutant_fails(check, monkeypatch, torch, "load", mutant, "ran")


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_is_one_sentence():
    """Whatever a file named checkpoint.pt holds, train.py calls it damaged."""
    run(StopAfter(3), out="run")
    path = Path("run/checkpoint.pt")
    contents = [b"", b"hello world", path.read_bytes()[:5000]]
    # 0x80 2 begins a pickle. What follows can cause an error of any class.
    noise = random.Random(0)
    contents += [b"\x80\x02" + noise.randbytes(200) for _ in range(100)]
    for content in contents:
        path.write_bytes(content)
        with raises(BadInput, match="checkpoint.pt is damaged"):
            load("run")


@pytest.mark.parametrize("place, name, error", [
    (Path, "read_bytes", OSError("Input/output error")), (torch, "load", MemoryError("too big"))])
def test_a_bad_disk_or_full_memory_is_not_called_damage(place, name, error, monkeypatch):
    """An error while the file is read says what it is: the checkpoint may be fine."""
    def fail(*_, **__):
        raise error
    run(StopAfter(3), out="run")
    monkeypatch.setattr(place, name, fail)
    with raises(type(error), match="^(Input|too big)"):
        load("run")


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_a_file_is_the_old_or_the_new_one(error, monkeypatch):
    """Whatever happens while a file is written, the old one stays whole, and no litter. Mutant: the
    file itself is written."""
    def fail(file):
        file.write(b"half")
        raise error("stop")

    def check():
        write(".", {"file": "old"})
        before = files()
        with raises((OSError, KeyboardInterrupt), match="stop"):
            train.write_atomically(Path("file"), fail)
        assert files() == before

    def mutant(path, write):
        path.write_bytes(b"half")
        raise OSError("stop")
    assert_mutant_fails(check, monkeypatch, train, "write_atomically", mutant, "half")


def test_a_file_is_on_the_disk_before_it_has_its_name(monkeypatch):
    """After a power cut there must be no empty file with the new name."""
    sizes = []

    def fsync(descriptor):
        assert not os.path.exists("file")
        sizes.append(os.fstat(descriptor).st_size)
    monkeypatch.setattr(os, "fsync", fsync)
    train.write_atomically(Path("file"), lambda file: file.write(b"12345"))
    assert sizes == [5] and os.path.getsize("file") == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a full disk")
def test_a_full_disk_keeps_the_old_checkpoint():
    """torch.save hides the reason in a RuntimeError; the sentence still names it."""
    run(StopAfter(3), out="run")
    before = files()
    os.symlink("/dev/full", "run/.partial-checkpoint.pt")
    with raises(OSError, match="No space left on device"):
        run(out="run", resume="run")
    assert files() == before


# ---------------------------------------------------------------- what a run shows
def test_a_run_leaves_its_files_and_says_how_it_ended(capsys):
    """A run's folder holds the checkpoint, two tables and the picture, no more. The output names
    the text and each group, and ends with a sample, the norms and the final loss."""
    assert main(flags(out="run", prompt="The ")) == 0
    assert sorted(os.listdir("run")) == ["checkpoint.pt", "log.csv", "norms.csv", "run.png"]
    assert Path("run/run.png").read_bytes().startswith(b"\x89PNG")
    log = Path("run/log.csv").read_text(encoding="utf-8")
    last = load("run")[1]["log"][-1]
    assert log.count("\n") == 5 and f"8,{last['loss']},{last['val_loss']},0.0015," in log
    shown = capsys.readouterr().out
    for pattern in ("text: .*text.txt, tokens: bytes\ntrain: 9,925 tokens, shards: 1\n",
                    "attn +4 +256 +adamw +0.003 +0.3 +True\n", "multiplier .* False\n",
                    "step +4: val loss", "a sample:\n-+\nThe ", "not there yet: hidden",
                    f"final: val loss {last['val_loss']:.4f} nats per token\n$"):
        assert re.search(pattern, shown), pattern


# Before the lr falls in step 8000, the MLP's matrices have RMS(W) = 0.2. All other norms are far
# off, as those of attention always are.
NORMS = [dict(step=0, name="embedding", W=1.0, W_eff=9.0),
         dict(step=0, name="blocks.0.attn.q", W=9.0, W_eff=9.0),
         dict(step=0, name="blocks.0.attn.k", W=9.0, W_eff=9.0),
         dict(step=0, name="blocks.0.mlp.up", W=0.8, W_eff=0.8),
         dict(step=0, name="blocks.0.mlp.down", W=0.8, W_eff=0.8),
         dict(step=8000, name="embedding", W=1.0, W_eff=9.0),
         dict(step=8000, name="blocks.0.attn.q", W=9.0, W_eff=9.0),
         dict(step=8000, name="blocks.0.attn.k", W=9.0, W_eff=9.0),
         dict(step=8000, name="blocks.0.mlp.up", W=0.2, W_eff=0.3),
         dict(step=8000, name="blocks.0.mlp.down", W=0.2, W_eff=0.5),
         dict(step=10_000, name="embedding", W=1.0, W_eff=9.0),
         dict(step=10_000, name="blocks.0.attn.q", W=9.0, W_eff=9.0),
         dict(step=10_000, name="blocks.0.attn.k", W=9.0, W_eff=9.0),
         dict(step=10_000, name="blocks.0.mlp.up", W=0.1, W_eff=0.2),
         dict(step=10_000, name="blocks.0.mlp.down", W=0.1, W_eff=0.4)]
LOG = [dict(step=5000, loss=4.0, val_loss=1.5), dict(step=9000, loss=3.0),
       dict(step=10_000, loss=2.0, val_loss=2.1)]


def by_hand(**changes):
    """A result without a run."""
    settings = dict(steps=10_000, lr=0.004, weight_decay=0.1, placement="mlp", preset="tiny")
    c = Config(**settings | changes)
    return dict(config=asdict(c), step=10_000, log=LOG, norms=NORMS)


@pytest.mark.parametrize("changes, words", [
    ({}, "there: hidden RMS(W) 0.200, law 0.141; lr * decay * 8000 steps = 3.2"),
    ({"placement": "all"}, "not there yet: hidden RMS(W) 4.600, law 0.141"),
    ({"norm_scale": 2.0}, "there: hidden RMS(W) 0.200, law 0.283"),
    ({"norm_scale": 0.9}, "not there yet: hidden RMS(W) 0.200, law 0.127"),
    ({"norm_scale": 2.2}, "not there yet: hidden RMS(W) 0.200, law 0.311"),
    ({"lr": 1.2e-3, "weight_decay": 0.03}, "not there yet: hidden RMS(W) 0.200, law 0.141"),
    ({"weight_decay": 0.0}, "not there yet: hidden RMS(W) 0.200, law inf")])
def test_the_verdict_about_the_law(changes, words):
    """"there" if lr * decay * steps > 1, and if the median norm of the hidden matrices, before the
    lr falls, is within a factor of 1.5 of S sqrt(lr / 2 decay). With placement mlp the MLPs alone
    are compared."""
    assert train.verdict(by_hand(**changes)).startswith(words)


def test_the_picture_shows_losses_norms_and_the_law(monkeypatch):
    """Left the loss and the val loss, right the medians of W_eff and W, and the law with S."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    train.draw(by_hand(norm_scale=2.0), None)
    left, right = figures[0].axes
    lines = [*left.lines, *right.lines]
    curves = {line.get_label().split()[0]: list(line.get_ydata()) for line in lines}
    # The law: 2 sqrt(0.004 / 0.2) = 0.2828
    assert curves == {"loss": [4, 3, 2], "val_loss": [1.5, 2.1], "W_eff": approx([0.8, 0.4, 0.3]),
                      "W": [0.8, 0.2, 0.1], "law:": approx([0.28284271, 0.28284271])}
    assert left.lines[1].get_xdata().tolist() == [5000, 10_000]


@pytest.mark.parametrize("kind, words", [
    ("none", ""), ("scalar", "learned RMS(W_eff) / RMS(W): 2.00 to 4.00\n")])
def test_the_last_lines_of_a_run(kind, words, monkeypatch, capsys):
    """They give the scales that were learned, if any, and a lower val loss. Without a vocabulary
    there is no sample. A run that was stopped says how to go on."""
    def fail(*_):
        raise BadInput("no network")
    monkeypatch.setattr(train, "sample", fail)
    monkeypatch.setattr(train, "write_atomically", lambda path, write: None)
    c = config(out="run", multipliers=kind, steps=10_000)
    train.show(by_hand(), c)
    shown = capsys.readouterr().out
    end = "the val loss was lower once: 1.5000\nfinal: val loss 2.1000 nats per token\n"
    assert "(no sample: no network)\n" in shown and shown.endswith(f"3.2\n{words}{end}")
    train.show(by_hand() | {"step": 7}, c)
    words = "stopped after step 7 of 10000 and saved; to go on: python train.py --resume run\n"
    assert capsys.readouterr().out == words


def test_a_sample_is_by_the_merged_model(monkeypatch, capsys):
    """--sample continues --prompt with the merged model and --seed, without tokens beyond the
    vocabulary."""
    def generate(model, tokens, count, generator):
        assert not hasattr(model.embedding, "parametrizations")
        assert (tokens[0, 0], count, generator.initial_seed()) == (256, 300, 5)
        return torch.cat((tokens, torch.tensor([[33, 50303, 63]])), dim=1)
    run(StopAfter(3), out="run")
    monkeypatch.setattr(GPT, "generate", generate)
    assert main(["--sample", "run", "--prompt", "class é", "--seed", "5"]) == 0
    assert capsys.readouterr().out == "class é!?\n"


def test_a_reader_that_has_gone_does_not_end_the_run(monkeypatch):
    """If nobody reads the output any more (`| head`), printing does nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    train.say("one")
    train.say("two")
    with raises(BrokenPipeError):
        stream.close()


# ---------------------------------------------------------------- text to tokens to batches
def test_a_byte_is_a_token():
    """The tokens are the bytes of each text, with 256 before it, even if a text spells it out."""
    odd = "🤖 e\u0301 \u202e\t\n <|endoftext|>" + "".join(map(chr, range(0, 55296, 97)))
    tokenizer = get_tokenizer("bytes")
    tokens = encode([odd, "", "b"], tokenizer).tolist()
    assert tokens == [256, *odd.encode("utf-8"), 256, 256, 98]
    assert tokenizer.decode(tokens[:-3]) == "<|endoftext|>" + odd


def documents(data):
    """The documents that a text has for training, and those for validation."""
    tokenizer = get_tokenizer("bytes")
    parts = train.read_documents(data, tokenizer)
    texts = [tokenizer.decode(parts[part][0].tolist()) for part in ("train", "val")]
    return [text.split("<|endoftext|>")[1:] for text in texts]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with names")
def test_only_readable_text_is_read(capsys):
    """UTF-8 text is read, without its byte order mark and carriage returns. Other files are left
    out and counted; hidden files and folders of runs are not looked at. A pipe does not hang."""
    write("mixed", {"good.txt": "\ufeffone\r\ntwo\rthree four", "latin.txt": b"\xe9t\xe9",
                    "sub/null.txt": "a\0b", "late.txt": "a" * 5000 + "\0", ".git/a": "no",
                    ".hidden": "no", "sub/run/checkpoint.pt": "no", "sub/run/log.csv": "no"})
    os.mkfifo("mixed/pipe")
    # If somebody waits for the pipe, this ends pytest.
    signal.alarm(60)
    assert documents("mixed") == [["one\ntwo\nthree fo"], ["ur"]]
    signal.alarm(0)
    assert "4 files, late.txt, latin.txt, pipe, sub/null.txt\n" in capsys.readouterr().out


def test_a_film_is_not_read_whole():
    """The first bytes tell it from a text: of 10 MB, less than 1 MB is in memory."""
    write(".", {"film": b""})
    os.truncate("film", 10_000_000)
    tracemalloc.start()
    assert train.read_text(Path("film")) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_closed_folder_is_named(monkeypatch):
    """A folder that may not be read is an error, and not a folder without files."""
    def closed(path):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(os, "listdir", closed)
    with raises(PermissionError, match="closed"):
        train.read_documents("closed", None)


def test_the_split():
    """Of few files the last tenth of each is for validation. Of 100 or more about a tenth of the
    files is, and new files move no other one."""
    write("few", {"a": "0123456789", "b": "abcdefghijklmnopqrst"})
    assert documents("few") == [["012345678", "abcdefghijklmnopqr"], ["9", "st"]]
    write("many", {f"{i}.txt": f"{i}" for i in range(100)})
    old = documents("many")
    write("many", {f"{i}.txt": f"{i}" for i in range(100, 200)})
    new = documents("many")
    for part in (0, 1):
        assert set(old[part]) < set(new[part])
    # 200 draws with a chance of 1/10: the mean 20, plus or minus 3 standard deviations of 4.2
    assert len(new[0]) + len(new[1]) == 200 and 8 < len(new[1]) < 32


def test_the_standard_library_without_what_some_pythons_lack(monkeypatch):
    """Its .py files, without tests, tables and packages that were installed."""
    write("lib", dict.fromkeys((
        "c.txt", "test/d.py", "json/tests/e.py", "site-packages/f.py", "encodings/g.py",
        "_sysconfigdata_x.py", "config-3.11/h.py", ".i.py"), "no"))
    write("lib", {"os.py": "0123456789", "json/b.py": "abcdefghij"})
    monkeypatch.setattr(os, "__file__", os.path.abspath("lib/os.py"))
    assert documents("stdlib") == [["abcdefghi", "012345678"], ["j", "9"]]


def write_shard(name, tokens):
    """A shard as llm.c makes it: 256 int32, then the tokens, uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(tokens))
    write(".", {name: header.tobytes() + np.array(tokens, "<u2").tobytes()})


def shards(*lengths):
    """A corpus of shards: the first is for validation; shard i holds 1000 i, 1000 i + 1, ..."""
    for i, length in enumerate(lengths):
        name = f"web/train_{i}.bin" if i else "web/val.bin"
        write_shard(name, 1000 * i + np.arange(length))
    return Corpus("web", 8)


def test_the_part_of_a_shard_is_a_word_of_its_name():
    """val, valid, validation, dev and test, in any case, are for validation. Parts of longer words
    say nothing. The tokens of a shard stay on the disk until they are used."""
    names = ("val", "web_VAL_1", "my-valid-2", "Validation", "dev.1", "test3", "interval_1",
             "valley", "web_0001", "latest", "device")
    for i, name in enumerate(names):
        write_shard(f"web/{name}.bin", [i] * 9)
    parts = Corpus("web", 8).parts
    assert {int(tokens[0]) for tokens in parts["val"]} == {0, 1, 2, 3, 4, 5}
    assert len(parts["train"]) == 5
    assert isinstance(parts["val"][0], np.memmap)


def test_windows_are_slices_of_one_shard(monkeypatch):
    """Windows 0, 1, ... are all the slices of all the shards, none across a border; targets are one
    token later. Mutant: only the first shard."""
    corpus = shards(40, 20, 9, 33)

    def check():
        x, y = corpus.batch("train", range(corpus.counts["train"]))
        assert x[:, 0].tolist() == [*range(1000, 1012), 2000, *range(3000, 3025)]
        assert (x == x[:, :1] + torch.arange(8)).all() and (y == x + 1).all()

    def mutant(corpus, part, number):
        return corpus.parts[part][0][number % 12:][:9]
    assert_mutant_fails(check, monkeypatch, Corpus, "window", mutant, "2000")


@pytest.mark.parametrize("batch_size, count, first", [
    (1, 4, [0, 33, 66, 99]), (3, 4, [0, 33, 66, 99]),
    (3, 99, [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96])])
def test_validation_windows_are_always_the_same(batch_size, count, first):
    """Every evaluation sees the same windows, evenly spaced over the whole part, whatever the
    batch size. The windows do not overlap: of a short part there are fewer."""
    corpus = shards(108, 20)
    for _ in range(2):
        x = torch.cat([x for x, _ in corpus.val_batches(batch_size, count)])
        assert x[:, 0].tolist() == first


def test_shards_are_trained_on_with_gpt2s_tokens(capsys):
    """They need no vocabulary. The last token is 50303, a rounded number. The first lines say what
    is for training."""
    shards(100, 2000, 30)
    write_shard("web/last.bin", [50303] * 70)
    made = Run(config(data="web"))
    assert (made.config.tokenizer, made.model.config.vocab_size) == ("gpt2", 50304)
    made.corpus.batch("train", [0])
    train.introduce(made)
    words = "train: 2,100 tokens, shards: 3\nval: 100 tokens, shards: 1\n"
    assert "web, tokens: gpt2\n" + words in capsys.readouterr().out


# ---------------------------------------------------------------- several processes
# A forked process has loaded PyTorch already, which saves seconds. A GPU and macOS forbid forking.
FORK = sys.platform == "linux" and not torch.cuda.is_available()


def one_of_two(rank, port, stopping, words):
    """What torchrun starts. The process with the rank `stopping` is told to stop in step 5."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    train.RANK = rank
    train.WORLD = 2
    train.stop_at_signals = lambda: StopAfter(5 if rank == stopping else 99)
    assert main(words) == 0


@pytest.mark.parametrize("optimizer, stopping", [("adamw", 0), ("muon", 1)])
def test_two_processes_are_one_with_the_same_step(optimizer, stopping, capfd):
    """Losses and gradients are those of one process, to rounding. If one process has to stop, both
    stop. Only rank 0 prints and saves."""
    changes = dict(data=os.path.abspath("text.txt"), optimizer=optimizer, batch_size=2,
                   accumulate=4, log_interval=1, eval_interval=1)
    run(StopAfter(5), out="one", **changes)
    words = flags(out=os.path.abspath("two"), **changes)
    # A port that nobody uses
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    start_processes(one_of_two, (port, stopping, words), nprocs=2,
                    start_method="fork" if FORK else "spawn")
    shown = capfd.readouterr().out
    assert shown.count("in clip norm") == shown.count("stopped after step 5 of 8") == 1

    one, two = load("one")[1], load("two")[1]
    # Gradients differ by 3e-6, as above. Adam divides each number by its own size. So where a
    # gradient is smaller than this, its update differs wholly: a share of 3e-6 of the numbers, or
    # 2e-3 of the norm. 5 updates of 0.003 on weights of 0.2 leave 2e-4 at most, and a loss or a
    # norm differs about as much as the weights. Other windows change the norms by 1e-2.
    for mine, others in zip(two["log"], one["log"], strict=True):
        assert mine == approx(others, rel=2e-4)


# ---------------------------------------------------------------- the command line
def test_every_setting_is_a_flag_with_help(capsys):
    """--help names LRM_HOME and all of Config but vocab_size, which the tokenizer decides."""
    with raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    named = re.findall("--([a-z-]+[a-z])", shown)
    missing = {field.name for field in fields(Config)} - {word.replace("-", "_") for word in named}
    assert missing == {"vocab_size"} and "LRM_HOME" in shown


def test_a_flag_beats_the_preset_and_the_resumed_run():
    """auto is tiny on a CPU. A resumed run has the settings of its checkpoint, and its folder;
    --resume names the folder or the file."""
    wanted = config(compile=True, preset="tiny", data=os.path.abspath("text.txt"))
    assert parse(flags() + ["--compile"]) == wanted
    small = parse(["--device", "cpu", "--preset", "small", "--n-layer", "9"])
    assert small == Config(**PRESETS["small"] | dict(preset="small", device="cpu", n_layer=9))
    run(StopAfter(3), out="run", seed=7)
    for name in ("run", "run/checkpoint.pt"):
        resumed = parse(["--resume", name, "--lr", "1"])
        assert (resumed.seed, resumed.lr, resumed.n_embd) == (7, 1, 8)
        assert open_folder(resumed) == Path("run")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """The shell leaves ~ alone in --out=~/run; train.py does not."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home"
    assert parse(["--data", "~/a"]).data == str(home / "a")
    assert open_folder(config(out="~/a/b")) == home / "a/b"
    # --resume and --sample
    assert train.checkpoint_file("~/a") == home / "a/checkpoint.pt"


def test_the_folder_of_a_run():
    """The default name says what the run is; a second run gets -2, a third -3. --out may be an
    empty folder."""
    names = []
    for _ in range(3):
        folder = open_folder(config(seed=5))
        write(folder, {"checkpoint.pt": ""})
        names.append(folder.name)
        assert open_folder(config(out="new/er")) == Path("new/er")
    assert names == ["vector-adamw-s5", "vector-adamw-s5-2", "vector-adamw-s5-3"]


@pytest.mark.parametrize("given, match", [
    ("--out new --steps 0", "steps is out of range: 0"), ("--out new --lr nan", "lr is out of"),
    ("--out new --lr inf", "lr is out of"), ("--out new --weight-decay -1", "weight_decay is out"),
    ("--out new --decay-fraction 1.5", "decay_fraction is at most 1"),
    ("--out new --n-embd 31", "n_embd"), ("--out new --seed -1", "seed is out of range"),
    ("--out new --seed 99999999999999999999", "seed is out of range"),
    ("--sample run --seed 99999999999999999999", "seed is out of range"),
    ("--out new --device abacus", "device abacus"), ("--out new --device meta", "device meta"),
    ("--out new --data nowhere.txt", "nowhere.txt"),
    ("--out new --data blank.txt", "holds no UTF-8 text"),
    ("--out new --data latin.txt", "holds no UTF-8 text"),
    ("--out new --data empty", "holds no UTF-8 text"),
    ("--out new --data short.txt", "too short: its val part"),
    ("--out new --data words.bin", "not a token shard"),
    ("--out new --data cut.bin", "is cut short"), ("--out new --data big", "holds token 50304"),
    ("--out new --data val.bin", "no shards for train"),
    ("--out new --data train.bin", "no shards for val"),
    ("--out new --tokenizer gpt2", "could not be downloaded"),
    ("--out run", "run is not empty"), ("--out text.txt/run", "text.txt"),
    ("--resume nowhere", "nowhere"), ("--resume empty", "checkpoint.pt"),
    ("--resume run --preset small", "--preset"), ("--resume run --steps 1", "complete at step 1"),
    ("--resume run --seed 1", "seed 0"), ("--resume run --optimizer muon", "optimizer adamw"),
    ("--resume run --n-embd 32", "n_embd 8"), ("--resume run --data other.txt", "another text"),
    ("--resume run --multipliers none", "multipliers vector"), ("--sample nowhere", "nowhere"),
    ("--resume locked", "another process is training in locked")])
def test_bad_input_gets_one_sentence(given, match, capsys):
    """The exit code is 2, there is no traceback, and nothing is left behind."""
    write(".", {"blank.txt": " \n", "short.txt": "one two " * 9, "latin.txt": b"\xe9" * 99,
                "other.txt": TEXT + ".", "words.bin": TEXT})
    for name in ("cut.bin", "val.bin", "train.bin", "big/val.bin"):
        write_shard(name, range(99))
    write_shard("big/train.bin", [50304] * 99)
    os.truncate("cut.bin", 1024 + 2 * 98)
    os.mkdir("empty")
    run(StopAfter(1), out="run")
    write("locked", {"checkpoint.pt": Path("run/checkpoint.pt").read_bytes()})
    with filelock.FileLock("locked/.lock"):
        refused((flags() if given.startswith("--out") else []) + given.split(), match, capsys)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory.\nTried 20 MiB.\nmore"), MemoryError("9 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_missing_memory_is_one_sentence(error, monkeypatch, capsys):
    """The sentence says which settings need less memory. Of a long message it has two lines."""
    def fail(*_):
        raise error
    monkeypatch.setattr(train, "train_step", fail)
    refused(flags(out="new"), r"out of memory \(.*[.BPd]\); half the --batch-size .*", capsys)


def test_a_fault_of_the_program_shows_its_traceback(monkeypatch):
    """An error that the user cannot mend is not turned into a sentence. No folder is left."""
    def fail(*_):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(train, "train_step", fail)
    with raises(RuntimeError, match="shapes do not match"):
        main(flags(out="new"))
    assert not os.path.exists("new")


def test_signals_ask_for_a_stop(signals, monkeypatch, capfd):
    """Ctrl-C, or a signal of a cluster, asks for a stop and says so once. More signals within a
    second change nothing; later only Ctrl-C ends the run, with 130. What is ignored stays so."""
    now = [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[-1]))
    for number in signals:
        stop = train.stop_at_signals()
        for again in (number, *signals):
            signal.raise_signal(again)
            assert stop.is_set()
        assert capfd.readouterr().err.count("saving after this step") == 1
        now.append(now[-1] + 1.5)
        signal.raise_signal(signal.SIGTERM)
        with raises(SystemExit, match="130"):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = train.stop_at_signals()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.is_set()


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGTERM to one process")
def test_a_terminated_command_saves_and_can_be_resumed(tmp_path, monkeypatch):
    """SIGTERM, twice, ends a real command with code 0 and a checkpoint, though its stdout and its
    stderr are closed. It goes on in another folder: it knows the full path of its text."""
    words = flags(out="run", steps=2000, eval_interval=1)
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, train.__file__]
    child = subprocess.Popen(command + words, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not os.path.exists("run/checkpoint.pt"):
        assert child.poll() is None
        time.sleep(0.1)
    child.terminate()
    child.terminate()
    assert child.wait(60) == 0
    monkeypatch.chdir("/")
    step = load(tmp_path / "run")[1]["step"]
    resumed = parse(["--resume", str(tmp_path / "run"), "--steps", str(step + 1)])
    assert train.train(resumed, quiet=True)["step"] == step + 1
