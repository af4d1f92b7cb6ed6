"""Tests of train.py, in the order of train.py: one property each, stated in the docstring.

Everything happens in a temporary folder, without network and GPU, with a model of one small block
and ten files of the standard library. "The same" and "equal" mean bit for bit. A tolerance stands
beside the error that was measured with torch 2.13 on a CPU. A mutant is train.py with one small
slip: a check has to pass with the right code, and then to fail with the mutant.
"""
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import rustbpe
import torch

import train
from conftest import (StopAfter, assert_mutant_fails, assert_same, distance, listen, snapshot,
                      write)
from model import GPT
from multipliers import is_multiplier, small_step_rms
from train import Config, Corpus, main

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("signals")]
# Ten files are enough for a split by file: the names put calendar, copy and glob into validation.
SOURCES = "argparse ast calendar cmd codecs copy csv glob heapq textwrap".split()
TINY = dict(data="text", multipliers="vector", vocab_size=512, device="cpu", n_layer=1, n_head=2,
            n_embd=32, block_size=32, batch_size=4, steps=8, lr=3e-3, embedding_lr=3e-3,
            multiplier_lr=0.1, warmup_steps=2, eval_interval=4, eval_windows=6, log_interval=2)
# the factor of the schedule in the 8 steps
FACTORS = [train.schedule(step, 8, 2, 0.2) for step in range(8)]
CPU = torch.device("cpu")
CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Config).items()}

@pytest.fixture(scope="module", autouse=True)
def workshop(tmp_path_factory):
    """The current folder of these tests. Prepared texts and runs go there; there is no network."""
    def unreachable(name):
        raise ConnectionError("no network")
    root, library = tmp_path_factory.mktemp("train"), Path(os.__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(train, "DATA", root / "data")
        patch.setattr(train, "RUNS", root / "runs")
        patch.setattr(train.tiktoken, "get_encoding", unreachable)
        write("text", {f"{name}.py": (library / f"{name}.py").read_bytes() for name in SOURCES})
        yield

def config(**changes):
    return Config(**(TINY | changes))

def flags(**changes):
    return [word for name, value in (TINY | changes).items()
            for word in ("--" + name.replace("_", "-"), str(value))]

def shards(folder, *counts, first=0):
    """Shards without a tokenizer: shard 0 for validation; shard i has first + 1000 i, ..."""
    Path(folder).mkdir(exist_ok=True)
    for i, count in enumerate(counts):
        train.write_shard(Path(folder, f"web_{'train' if i else 'val'}_{i:06}.bin"),
                          first + 1000 * i + np.arange(count))
    return str(folder)

def run(stop=None, **changes):
    return train.train(config(**changes), stop, quiet=True)

def watch(train_function, *arguments, **keywords):
    """A call of train(), with what train() keeps to itself: the model, and of each step the batch,
    the lr of each group, both norms and all gradients (after clipping)."""
    seen = SimpleNamespace(batches=[], lrs=[], clipped=[])
    with pytest.MonkeyPatch.context() as patch:
        listen(patch, train, "parameter_groups", lambda _, model, c: vars(seen).update(model=model))
        listen(patch, train, "make_optimizers", lambda made, *_: made[0].register_step_pre_hook(
            lambda *_: seen.lrs.append({g["kind"]: g["lr"] for o in made for g in o.param_groups})))
        listen(patch, train, "clip_gradients", lambda norms, groups, _: seen.clipped.append(
            (norms, torch.cat([p.grad.flatten() for g in groups for p in g["params"]]))))
        listen(patch, Corpus, "train_batch", lambda batch, *_: seen.batches.append(batch))
        seen.result = train_function(*arguments, **keywords)
    seen.weights, seen.log = seen.model.state_dict(), seen.result["log"]
    seen.losses = [row["loss"] for row in seen.log]
    return seen

observe = functools.partial(watch, run)

# ---------------------------------------------------------------- which parameter is trained how
def check_groups():
    names = ("multipliers", "placement", "final_gain", "block_gains", "optimizer")
    for values in itertools.product(*map(CHOICES.get, names)):
        c = config(**dict(zip(names, values)), n_embd=8)
        model = GPT(c)
        groups = train.parameter_groups(model, c)
        name_of = {p: name for name, p in model.named_parameters()}
        listed = [(name_of[p], g) for g in groups for p in g["params"]]
        assert sorted(name for name, _ in listed) == sorted(name_of.values())
        for name, g in listed:
            multiplier, in_block = is_multiplier(name), name.startswith("blocks")
            decayed = name.endswith(".weight") and not name.startswith("embedding")
            assert g["clip"] != multiplier
            assert g["lr"] == (c.multiplier_lr if multiplier else
                               c.embedding_lr if name == "embedding.weight" else c.lr)
            assert g["weight_decay"] == (c.multiplier_weight_decay if multiplier else
                                         c.weight_decay if decayed else 0)
            assert g["optimizer"] == (c.optimizer if decayed and in_block else "adamw")
        optimizers = train.make_optimizers(groups, CPU)
        assert optimizers[0].defaults["betas"] == (0.9, 0.95)
        given = [name_of[p] for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(given) == sorted(name_of.values())
        assert [type(o).__name__ for o in optimizers][1:] == ["Muon"] * (c.optimizer == "muon")

@pytest.mark.parametrize("slip", [
    lambda groups, g, c: groups[0]["params"].append(g["params"].pop()),
    lambda groups, g, c: groups[0]["params"].append(g["params"][0]),
    lambda groups, g, c: g.update(weight_decay=c.weight_decay)])
def test_every_parameter_is_in_exactly_one_group(slip, monkeypatch):
    """In all 108 combinations of options each parameter is trained once: with Muon block matrices
    alone, with decay matrices but the embedding, and multipliers outside of the clip norm. Mutants:
    a multiplier among the matrices, in two groups, with the decay of a matrix."""
    def mutant(model, c, right=train.parameter_groups):
        groups = right(model, c)
        if groups[-1]["kind"] == "multiplier":
            slip(groups, groups[-1], c)
        return groups
    assert_mutant_fails(check_groups, monkeypatch, train, "parameter_groups", mutant)

def test_schedule_rises_stays_and_falls():
    """The factor rises in equal steps to 1, stays there, and falls in equal steps towards 0."""
    want = [0.1 * i for i in range(1, 10)] + [1.0] * 71 + [1 - i / 20 for i in range(20)]
    assert [train.schedule(step, 100, 9, 0.2) for step in range(100)] == pytest.approx(want)
    assert [train.schedule(step, 10, 0, 0.0) for step in range(10)] == [1.0] * 10

def test_every_group_keeps_its_own_lr(monkeypatch):
    """In each step each group has its own peak lr times the factor. Mutant: one lr for all."""
    def check():
        seen = observe(optimizer="muon", head_norm_scale=4.0, norm_scale=0.5, embedding_lr=0.5)
        for kind, peak in {"attn": 1.5e-3, "mlp": 1.5e-3, "head": 1.2e-2, "embedding": 0.5,
                           "gain": 3e-3, "multiplier": 0.1}.items():
            assert [lrs[kind] for lrs in seen.lrs] == pytest.approx([peak * f for f in FACTORS])
    assert_mutant_fails(check, monkeypatch, train, "parameter_groups",
                        lambda model, c, right=train.parameter_groups: [
                            g | {"initial_lr": c.lr} for g in right(model, c)])

# ---------------------------------------------------------------- measuring and the loop
def test_bits_per_byte_are_nats_per_token_in_other_units(monkeypatch):
    """evaluate() gives the mean of -log p over all windows, and the same divided by ln 2 and by
    the bytes per token of the targets. END has no bytes. Mutant: END has 13 bytes."""
    def check():
        corpus = Corpus("many", 32, 300)
        c = config(eval_windows=50, vocab_size=corpus.vocab_size)
        model, tokenizer = GPT(c), train.load_tokenizer(corpus.lines)
        x, y = map(torch.cat, zip(*corpus.val_batches(7, 50)))
        with torch.no_grad():
            logits = model(x)[0].double()
        nats = -logits.log_softmax(-1).gather(-1, y[..., None]).mean().item()
        spoken = [token for token in y.flatten().tolist() if token != tokenizer.eot_token]
        bytes_per_token = len(tokenizer.decode_bytes(spoken)) / y.numel()
        assert train.evaluate(model, corpus, c, CPU) == pytest.approx(         # measured: 2e-8
            {"val_loss": nats, "val_bits": nats / math.log(2) / bytes_per_token}, rel=1e-6)
    def mutant(self, *arguments, right=Corpus.__init__):
        right(self, *arguments)
        self.token_bytes[-1] = len(train.END)
    write("many", {f"{i}.txt": f"document {i} " * 5 for i in range(99)})
    assert_mutant_fails(check, monkeypatch, Corpus, "__init__", mutant)

def test_devices_processes_and_precision(monkeypatch):
    """auto is a GPU if there is one. Of several processes each takes a GPU and an equal part of the
    batch. Matrix products are in bfloat16 on GPUs of capability 8.0 or more alone."""
    assert train.pick_device("cpu") == CPU
    monkeypatch.setattr(torch, "ones", lambda n, device: SimpleNamespace(
        device=device, item=lambda: 1.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert train.pick_device("auto") == "cuda"
    monkeypatch.setattr(train, "WORLD", 8)
    monkeypatch.setattr(train, "RANK", 5)
    assert [*map(train.pick_device, ("auto", "cuda", "cuda:3"))] == ["cuda:1", "cuda:1", "cuda:3"]
    with pytest.raises(ValueError, match="multiple of 8"):
        train.train(config(batch_size=4, accumulate=3))
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: enabled)
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert train.autocast(torch.device("cuda")) == (capability >= (8, 0))
    assert not train.autocast(CPU)

def test_the_seed_decides_everything():
    """The same seed gives the same run; another seed gives other weights and other batches. none,
    scalar and vector see the same batches, and start as the same function of them."""
    first, second, other = observe(seed=3), observe(seed=3), observe(seed=4)
    assert_same([first.result, first.weights], [second.result, second.weights])
    assert not torch.equal(first.batches[0][0], other.batches[0][0])
    assert first.result["norms"][0]["W"] != other.result["norms"][0]["W"]
    plain, *others = (observe(multipliers=kind, log_interval=1) for kind in CHOICES["multipliers"])
    for other in others:
        assert_same(other.batches, plain.batches)
        assert other.losses[0] == plain.losses[0] and other.losses[2] != plain.losses[2]

def test_evaluating_more_often_changes_nothing(monkeypatch):
    """The intervals change no training batch, no weight and no final loss. Mutant: an evaluation
    draws from the generator of the training batches."""
    def check():
        often, seldom = observe(eval_interval=1, log_interval=1), observe(eval_interval=8)
        assert_same([often.batches, often.weights], [seldom.batches, seldom.weights])
        assert_same(often.log[-1], seldom.log[-1])
    used, right = [], Corpus.train_batch
    listen(monkeypatch, Corpus, "train_batch", lambda batch, *arguments: used.append(arguments))
    assert_mutant_fails(check, monkeypatch, Corpus, "val_batches", lambda *_: [right(*used[-1])])

def test_accumulation_equals_a_larger_batch():
    """3 passes of 2 windows have the windows, gradient and loss of one pass of 6, to rounding."""
    parts, whole = (observe(batch_size=6 // n, accumulate=n, steps=1, grad_clip=0) for n in (3, 1))
    assert_same(parts.batches, whole.batches)
    assert distance(parts.clipped[0][1], whole.clipped[0][1]) < 3e-6           # measured: 2e-7
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)               # measured: 1.5e-7

def test_a_row_says_what_happened(monkeypatch):
    """There is a row every log_interval steps and at evaluations: the loss of the step's batch, the
    lr, both gradient norms, the speed without the time of evaluations. Norms begin at step 0."""
    now = [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: sum(now)))
    listen(monkeypatch, Corpus, "train_batch", lambda *_: now.append(0.5))
    listen(monkeypatch, train, "evaluate", lambda *_: now.append(100.0))
    seen, every = observe(eval_interval=3), observe(eval_interval=3, log_interval=1)
    assert [row["step"] for row in seen.log] == [2, 3, 4, 6, 8]
    assert sorted({row["step"] for row in seen.result["norms"]}) == [0, 2, 3, 4, 6, 8]
    for row in seen.log:
        i = row["step"] - 1
        assert_same(row, every.log[i])
        assert ("val_loss" in row) == (row["step"] in (3, 6, 8)) and row["lr"] == 3e-3 * FACTORS[i]
        assert (row["grad_norm"], row["grad_norm_with_multipliers"]) == seen.clipped[i][0]
        # 4 windows of 32 tokens in half a second
        assert row["tokens_per_second"] == 256
    loss = GPT(config(vocab_size=seen.model.config.vocab_size))(*every.batches[0])[1].item()
    assert every.losses[0] == pytest.approx(loss, rel=1e-6)                    # measured: 0

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_infinite_gradient_stops_the_run_and_spares_the_checkpoint(value, monkeypatch, tmp_path):
    """A gradient of NaN or infinity in step 6 ends the run; the checkpoint of step 4 remains."""
    def spoil_step_6(groups, max_norm, right=train.clip_gradients, steps=itertools.count(1)):
        if next(steps) == 6:
            groups[0]["params"][0].grad[0, 0] = value
        return right(groups, max_norm)
    monkeypatch.setattr(train, "clip_gradients", spoil_step_6)
    with pytest.raises(ValueError, match="not finite at step 6"):
        run(out=str(tmp_path / "run"))
    saved = train.load(tmp_path / "run")[1]
    assert saved["step"] == 4 and all(p.isfinite().all() for p in saved["model"].values())

def test_compile_and_scale_kernel_change_the_model(monkeypatch):
    """--compile compiles the model; with --scale-kernel the model computes W_eff by kernel.py."""
    called = []
    monkeypatch.setattr(GPT, "compile", lambda model: called.append("compile"))
    monkeypatch.setattr(train, "use_kernel", lambda model: called.append("kernel"))
    run(steps=1), run(steps=1, compile=True), run(steps=1, scale_kernel=True)
    assert called == ["compile", "kernel"]

# ---------------------------------------------------------------- checkpoints and resume
def check_resume(folder, stop=3, **changes):
    whole, halves = str(folder / "whole"), str(folder / "halves")
    run(out=whole, **changes)
    stopped = run(StopAfter(stop), out=halves, **changes)
    assert stopped["step"] == train.load(halves)[1]["step"] == stop
    assert stop > 3 or [row["step"] for row in stopped["log"]] == [2]
    if stop < 8:
        run(out=halves, resume=halves, **changes)
    a, b = train.load(whole)[1], train.load(halves)[1]
    shutil.rmtree(whole), shutil.rmtree(halves)
    assert " ".join(a) == "config step log norms model optimizers batches tokenizer text"
    assert_same(a, b)

@pytest.mark.parametrize("changes, slip", [
    ({"optimizer": "muon"}, lambda optimizers, generator, state: generator.set_state(state)),
    ({"multipliers": "scalar", "batch_size": 2, "accumulate": 3},
     lambda optimizers, *_: [o.state.clear() for o in optimizers])])
def test_resuming_equals_not_stopping(changes, slip, monkeypatch, tmp_path):
    """A run that is stopped in step 3 saves without an evaluation or an extra row. Resumed, it ends
    in the checkpoint of a run without a stop: weights, optimizers, generator and history. Mutants:
    the generator of the batches, or the states of the optimizers, are forgotten."""
    def mutant(config, corpus, model, optimizers, generator, right=train.restore):
        state = generator.get_state()
        restored = right(config, corpus, model, optimizers, generator)
        slip(optimizers, generator, state)
        return restored
    assert_mutant_fails(lambda: check_resume(tmp_path, **changes), monkeypatch, train, "restore",
                        mutant)

@pytest.mark.parametrize("stop", [4, 8])
def test_a_stop_loses_no_row(stop, tmp_path, monkeypatch):
    """A stop in a step with an evaluation skips this evaluation: the cluster may not wait. Only the
    two losses of this row are missing later. A stop in the last step changes nothing."""
    listen(monkeypatch, train, "load", lambda loaded, _: stop == 4 and [
        row.pop(key, None) for row in loaded[1]["log"] if row["step"] == 4
        for key in ("val_loss", "val_bits")])
    check_resume(tmp_path, stop)
    assert stop == 8 or "val_loss" not in run(StopAfter(4))["log"][-1]

def test_a_resumed_run_uses_the_new_lr_and_decay():
    """lr and decay of a resumed run are those asked for. A run without a folder writes nothing."""
    run(StopAfter(3), out="slower")
    before = snapshot(".")
    seen, kept = (observe(resume="slower", lr=1e-3, multiplier_lr=0.02, weight_decay=decay)
                  for decay in (0.0, 0.1))
    for kind, lr in (("attn", 1e-3), ("multiplier", 0.02)):
        assert [lrs[kind] for lrs in seen.lrs] == pytest.approx([lr * f for f in FACTORS[3:]])
    assert not torch.equal(kept.weights["head.weight"], seen.weights["head.weight"])
    run(StopAfter(3))
    assert snapshot(".") == before

def test_a_failed_save_keeps_the_old_checkpoint(monkeypatch, tmp_path):
    """A crash in the middle of writing leaves the previous checkpoint whole, and no litter."""
    def disk_full(*_):
        raise OSError("No space left on device")
    run(StopAfter(3), out=str(tmp_path))
    before = snapshot(tmp_path)
    listen(monkeypatch, torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        run(out=str(tmp_path), resume=str(tmp_path))
    assert snapshot(tmp_path) == before

def test_a_damaged_checkpoint_is_one_sentence(tmp_path, capsys):
    """Whatever a file named checkpoint.pt holds, --sample and --resume refuse the file."""
    path, _ = tmp_path / "checkpoint.pt", run(StopAfter(3), out=str(tmp_path))
    whole, saved = path.read_bytes(), train.load(tmp_path)[1]
    for content in (b"", b"hello world", whole[:len(whole) // 2], {"model": {}},
                    dict.fromkeys(saved, 1), saved | {"model": {}},
                    saved | {"config": saved["config"] | {"n_embd": 64}}):
        path.write_bytes(content) if type(content) is bytes else torch.save(content, path)
        for command in ("--sample", "--resume"):
            refused([command, str(tmp_path)], f"{path} is damaged", capsys)

def test_a_run_resumes_on_its_own_text_alone():
    """Another text, of bytes or of tokens, is refused. The same text elsewhere is accepted."""
    texts = [write(f"book{i}/text", {"a.txt": f"a {i % 2} " * 999}) for i in range(3)]
    pages = [shards(f"pages{i}", 400, 400, first=i % 2) for i in range(3)]
    for own, other, moved in (texts, pages):
        small = dict(vocab_size=257, n_embd=8, n_head=1)
        out = run(StopAfter(3), data=own, out=own + "-run", **small)["config"]["out"]
        with pytest.raises(ValueError, match="another text"):
            run(data=other, resume=out, **small)
        assert run(data=moved, resume=out, **small)["step"] == 8

# ---------------------------------------------------------------- what a run shows
@functools.cache
def finished():
    """A run from the command line, in the folder "finished"."""
    assert main(flags(out="finished", prompt="def ")) == 0

def test_a_run_leaves_its_files_and_says_how_it_ended(capsys):
    """A run's folder holds the checkpoint, two tables, the settings and the picture, no more. The
    output names the text and each group, and ends with a sample, the norms and the final loss."""
    finished()
    shown, saved = capsys.readouterr().out, train.load("finished")[1]
    assert sorted(path.name for path in Path("finished").iterdir()) == [
        "best.pt", "checkpoint.pt", "config.json", "log.csv", "norms.csv", "run.png"]
    settings = json.loads(Path("finished/config.json").read_text(encoding="utf-8"))
    assert settings == saved["config"] == asdict(config(prompt="def "))
    for name in ("log", "norms"):
        head, *lines = Path(f"finished/{name}.csv").read_text(encoding="utf-8").splitlines()
        rows = [[str(row.get(key, "")) for key in head.split(",")] for row in saved[name]]
        assert rows == [line.split(",") for line in lines]
    last = saved["log"][-1]
    for pattern in ("text: text, 10 files", "attn +4 +4,096 +adamw +0.003 +0.1 +yes\n",
                    "multiplier +16 .* no\n", "step +4: val loss", "a sample:\n-+\ndef ",
                    r"hidden RMS\(W\)", f"final: val loss {last['val_loss']:.4f} nats/token, "
                    f"{last['val_bits']:.4f} bits/byte\n$"):
        assert re.search(pattern, shown)

def test_overfitting_is_said_and_the_best_model_is_kept(monkeypatch, capsys):
    """A run that reads its text more than twice says how often. best.pt is the checkpoint of the
    lowest validation loss, and can be sampled; the last lines say where it is."""
    losses = iter((3.0, 1.0, 2.0, 2.5))
    right, short = train.evaluate, write("short", {"a.txt": "all the words of a short text " * 40})
    monkeypatch.setattr(train, "evaluate", lambda *a: right(*a) | {"val_loss": next(losses)})
    assert main(flags(data=short, vocab_size=257, eval_interval=2, out="twice")) == 0
    # 8 steps of 4 windows of 32 tokens; 1080 bytes and an end, in which 1049 windows begin
    assert 8 * 4 * 32 / (1080 + 1 - 32) < 2 and "times" not in capsys.readouterr().out
    assert [train.load(run)[1]["step"] for run in ("twice", "twice/best.pt")] == [8, 4]
    losses = iter((1.0, 2.0) * 2)
    assert main(flags(data=short, vocab_size=257, steps=20, out="thrice", eval_interval=10)) == 0
    shown = capsys.readouterr().out
    assert "reading the text 2.4 times, 8 steps each\n" in shown
    assert "was lowest, 1.0000, at step 10: python train.py --sample thrice/best.pt" in shown
    assert main(["--sample", "thrice/best.pt"]) == 0

@pytest.mark.parametrize("ratio, changes, verdict", [
    (1.4, {}, "there: "), (1.6, {}, "not there yet"), (1 / 1.6, {}, "not there yet"),
    (2, {"norm_scale": 2.0}, "there: "), (1, {"placement": "mlp"}, "there: "),
    (1, {"steps": 2000}, "not there yet"), (1, {"weight_decay": 0.0}, "not there yet")])
def test_the_sentence_about_the_norms(ratio, changes, verdict, tmp_path):
    """draw() says "there" if lr * decay * steps > 1, and if the median norm of the hidden matrices,
    before the lr falls, is within a factor of 1.5 of S sqrt(lr / 2 decay)."""
    c, rows = Config(**({"steps": 10_000, "lr": 4e-3, "weight_decay": 0.1} | changes)), []
    rms = ratio * small_step_rms(4e-3, 0.1)
    attn = 9.0 if c.placement == "mlp" else rms
    # the lr falls in the last fifth of the run: the norms of the last step are not compared
    for part, factor in ((0.0, 5.0), (0.8, 1.0), (1.0, 0.1)):
        # RMS(W) and RMS(W_eff) / RMS(W)
        for name, W, scale in (*((f"blocks.0.attn.{m}", attn, 1.5) for m in "qkv"), ("head", 1, 1),
                               ("blocks.0.mlp.up", rms, 1.5), ("blocks.0.mlp.down", rms, 3),
                               ("embedding", 1, 2)):
            rows.append({"step": int(part * c.steps), "name": name, "W": W * factor,
                         "W_eff": W * factor * scale})
    log = [{"step": 1, "loss": 5.0}, {"step": c.steps, "loss": 2.0, "val_loss": 2.1}]
    sentence = train.draw({"config": asdict(c), "log": log, "norms": rows}, tmp_path / "run.png")
    assert sentence.startswith(verdict)
    assert f"RMS(W) {rms:.3f}" in sentence and "1.00 to 3.00" in sentence
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

def test_a_sample_is_by_the_merged_model(monkeypatch, capsys):
    """--sample continues --prompt with the merged model, in the same way for the same seed. Tokens
    beyond the vocabulary are left out."""
    def generate(model, *arguments, right=GPT.generate, **keywords):
        assert not any(is_multiplier(name) for name, _ in model.named_parameters())
        tokens = right(model, *arguments, **keywords)
        return torch.cat((tokens, torch.full_like(tokens, 50303)), dim=1)
    finished()
    monkeypatch.setattr(GPT, "generate", generate)
    for seed in ("1", "1", "2"):
        assert main(["--sample", "finished", "--prompt", "class é", "--seed", seed]) == 0
    first, second, other = capsys.readouterr().out.split("class é")[1:]
    assert first == second != other

# ---------------------------------------------------------------- text to tokens to batches
@pytest.mark.parametrize("vocab_size", [257, 300])
def test_the_shards_hold_the_text_and_nothing_is_lost(vocab_size, monkeypatch):
    """Decoded shards are the documents, each behind one END, even if a document spells out END. A
    byte order mark is dropped. The tokenizer, rustbpe's, learns from the training part alone."""
    odd = "🤖👩‍👩‍👧 e\u0301 \u202e\u00a0\t\n  "
    odd += "".join(map(chr, range(32, 55296, 97)))
    texts, learned = {f"{i:02}.txt": f"{i} {odd}{train.END}" * 2 for i in range(40)}, []
    write("odd", {name: "\ufeff" + text.replace("\n", "\r\n") for name, text in texts.items()})
    listen(monkeypatch, train, "train_tokenizer", lambda _, texts, size: learned.extend(texts))
    corpus, trainer = Corpus("odd", 8, vocab_size), rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(learned), vocab_size=vocab_size - 1, pattern=train.PATTERN)
    for part, documents in train.split(texts).items():
        tokens = np.concatenate(corpus.shards[part]).tolist()
        whole = "".join(train.END + document for document in documents)
        assert train.load_tokenizer(corpus.lines).decode(tokens) == whole
        ids = [t for document in documents for t in (vocab_size - 1, *trainer.encode(document))]
        assert tokens == ids
    assert learned == train.split(texts)["train"]

def test_the_split_by_files():
    """About a tenth of the files is validation text, and new files move no old file. Of fewer than
    ten files the last tenth of each is validation text."""
    names = [f"{i}.txt" for i in range(100)]
    old, new = (train.split(dict(zip(some, some))) for some in (names[::2], names))
    assert old["val"] and all(set(old[part]) <= set(new[part]) for part in ("train", "val"))
    assert sorted(new["train"] + new["val"]) == sorted(names) and 5 <= len(new["val"]) <= 15
    assert train.split({"a": "0123456789", "b": "x" * 20})["val"] == ["9", "xx"]

def test_text_is_prepared_once_and_again_when_it_changes():
    """The same text uses the same folder; a changed text or another vocabulary makes a new one."""
    folders = []
    for word, size in (("first", 300), ("third", 300), ("first", 301), ("first", 300)):
        write("changing", {"a.txt": f"{word} " * 500})
        folders.append(train.prepare("changing", size))
    assert len(set(folders)) == 3 and folders[0] == folders[3]

def test_a_prepared_text_is_used_only_if_it_is_complete():
    """A folder in data/ of which a file is missing or cut short is made again, the same as before.
    What dead processes left in data/ is removed after a day: younger files may be in use."""
    write("whole", {"a.txt": "some words " * 500})
    folder = train.prepare("whole", 300)
    before, (old, young) = snapshot(folder), (train.DATA / f".partial-{i}" for i in "ab")
    for spoil in (lambda: os.truncate(folder / "val.bin", 1030), (folder / "about.txt").unlink,
                  lambda: (folder / "sizes").write_text("[", encoding="utf-8")):
        old.mkdir(), young.mkdir(exist_ok=True)
        os.utime(old, (0, 0))
        spoil()
        assert train.prepare("whole", 300) == folder and snapshot(folder) == before
        assert young.exists() and not old.exists()

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_preparing_needs_little_memory(tmp_path):
    """Preparing a text takes less than 15 bytes of memory for each byte of the text."""
    text = "".join(f"{i * i} is the square of {i}, as {i % 7} knows. " for i in range(100_000))
    write(tmp_path, {f"{i}.txt": text[i::20] for i in range(20)})
    code = f"""import re, sys; sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import train
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak(); train.prepare({str(tmp_path)!r}, 512); print((peak() - before) / {len(text)})"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True,
                           **TERMINAL | {"env": TERMINAL["env"] | {"LRM_HOME": str(tmp_path)}})
    assert 1 < float(child.stdout.split()[-1]) < 15                            # measured: 9.0

def test_links_are_followed_once_and_closed_folders_are_named(monkeypatch, capsys):
    """A folder behind a link is read; a link back to a folder that was read is not read again. A
    folder without the right to read is one sentence with its name."""
    write("linked", {"a/b/one.txt": "one"}), write("elsewhere", {"two.txt": "two"})
    for name, target in (("linked/a/b/back", "../.."), ("linked/c", "../elsewhere")):
        os.symlink(target, name)
    assert train.read_texts(Path("linked"), False) == {"a/b/one.txt": "one", "c/two.txt": "two"}
    def closed(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr(os, "scandir", closed)
    refused(flags(out="new", data="linked"), "Permission denied: ", capsys)

def test_what_is_not_text_is_left_out(capsys):
    """Latin-1 and binary files are left out and named; hidden files, runs and prepared texts are
    ignored. Of the standard library only .py files count, without tests and generated files."""
    finished()
    write("mixed", {"good.txt": "good", "latin.txt": b"caf\xe9", "sub/image.png": b"PNG\0\0",
                    ".git/secret": "no", ".hidden": "no"})
    shutil.copytree("finished", "mixed/sub/run")
    shutil.copytree(train.prepare("text", 512), "mixed/data/text")
    assert train.read_texts(Path("mixed"), False) == {"good.txt": "good"}
    assert "2 files, latin.txt, sub/image.png" in capsys.readouterr().out
    assert train.read_texts(Path("finished"), False) == {}
    write("library", dict.fromkeys((
        "a.py", "json/b.py", "c.txt", "test/d.py", "json/tests/e.py", "site-packages/f.py",
        "encodings/g.py", "_sysconfigdata_x.py", "config-3.11/h.py", ".i.py"), "x"))
    assert train.read_texts(Path("library"), True) == {"a.py": "x", "json/b.py": "x"}

def sparse(path, count):
    """A shard of so many zeros that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array([train.MAGIC, train.VERSION, count], "<i4").tobytes())
    os.truncate(path, train.HEADER + 2 * count)

def test_shards_are_those_of_llm_c(tmp_path):
    """write_shard makes llm.c's format (20240520, 1, count, then uint16). read_shard maps a shard:
    in 3 * 10^9 tokens (6 GB) a window beyond number 2^31 is the right window."""
    path, tokens = tmp_path / "val.bin", [0, 1, 50256, 65535, *range(96)]
    train.write_shard(path, np.array(tokens))
    assert np.fromfile(path, "<i4", 256).tolist() == [20240520, 1, 100] + [0] * 253
    for read in (np.fromfile(path, "<u2", offset=1024), train.read_shard(path)):
        assert read.tolist() == tokens
    for i in range(3):
        sparse(tmp_path / f"train_{i}.bin", 10 ** 9)
    with open(tmp_path / "train_2.bin", "r+b") as file:
        file.seek(train.HEADER + 2 * 5 * 10 ** 8)
        file.write(np.arange(1, 10, dtype="<u2").tobytes())
    x, y = Corpus(str(tmp_path), 8).windows("train", np.array([2 * (10 ** 9 - 8) + 5 * 10 ** 8]))
    assert x.tolist() == [[*range(1, 9)]] and y.tolist() == [[*range(2, 10)]]

@pytest.mark.parametrize("mutant", [
    lambda corpus, part, starts, right=Corpus.windows: right(corpus, part, starts % 12),
    lambda *arguments, right=Corpus.windows: (right(*arguments)[0],) * 2])
def test_windows_are_slices_of_one_shard(mutant, monkeypatch, tmp_path):
    """Windows number 0, 1, ... are all the slices of all the shards, none across a border; targets
    are one token later. Mutants: only the first shard (12 windows); targets without a shift."""
    def check():
        x, y = corpus.windows("train", np.arange(corpus.ends["train"][-1]))
        assert (x == x[:, :1] + torch.arange(8)).all() and (y == x + 1).all()
        assert x[:, 0].tolist() == [*range(1000, 1012), 2000, *range(3000, 3025)]
    corpus = Corpus(shards(tmp_path, 40, 20, 9, 33), 8)
    assert_mutant_fails(check, monkeypatch, Corpus, "windows", mutant)

def test_val_is_a_word_of_the_name(tmp_path):
    """interval_1.bin and valley.bin are for training. Without a validation shard the last tenth of
    the last training shard is for validation, and is not trained on."""
    for i, name in enumerate(("interval_1", "my-val-2", "valley")):
        train.write_shard(tmp_path / f"{name}.bin", 1000 * i + np.arange(100))
    assert [shard[0] for shard in Corpus(str(tmp_path), 8).shards["val"]] == [1000]
    (tmp_path / "my-val-2.bin").unlink()
    for data, first in ((tmp_path, [*range(100)]), (tmp_path / "valley.bin", [])):
        corpus = Corpus(str(data), 8)
        pair = corpus.windows("train", np.arange(corpus.ends["train"][-1]))
        assert torch.cat(pair).unique().tolist() == first + [*range(2000, 2090)]
        assert corpus.shards["val"][0].tolist() == [*range(2090, 2100)]

def test_validation_windows_are_always_the_same(tmp_path):
    """Every evaluation sees the same windows, evenly spaced over the whole part, whatever the
    batch size. The windows do not overlap: of a short part there are fewer."""
    corpus = Corpus(shards(tmp_path, 108, 20), 8)
    for batch_size in (1, 3, 3):
        x = torch.cat([x for x, _ in corpus.val_batches(batch_size, 4)])
        assert x.tolist() == [[*range(i, i + 8)] for i in (0, 33, 66, 99)]
    x = torch.cat([x for x, _ in corpus.val_batches(3, 100)])
    assert x[:, 0].tolist() == [*range(0, 100, 8)]

def test_tokens_train_without_the_vocabulary_of_gpt2(tmp_path, capsys):
    """Shards without a tokenizer hold GPT-2's tokens: 50304, a rounded number. Without a network
    there is no vocabulary: bits per byte are NaN and there is no sample."""
    data = shards(tmp_path / "web", 400, 400)
    assert main(flags(data=data, n_embd=8, n_head=1, out=tmp_path / "run")) == 0
    shown = capsys.readouterr().out
    assert re.search("no sample without GPT-2(.*\n)*final: val loss 10.* nan bits", shown)
    assert train.load(tmp_path / "run")[0].config.vocab_size == 50304

# ---------------------------------------------------------------- several processes
# a step has 8 windows: 4 passes of one process, or 2 of each of two
PAIR = {"adamw": {}, "muon": {"optimizer": "muon"}, "half": {}}
TERMINAL = dict(text=True, encoding="utf-8", env=os.environ | {
    "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(train.DATA.parent)})

def two_processes(data):
    """What each process of a pair runs: main() for every run of PAIR, and notes of train()."""
    distributed, right = torch.distributed, train.train
    # a program joins its group once
    distributed.init_process_group = functools.cache(distributed.init_process_group)
    leave, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
    for name, changes in PAIR.items():
        def note(config, stop, quiet):
            # one process is told to stop, and both have to stop
            half = StopAfter(3) if name == "half" and train.RANK == 1 else stop
            seen = watch(right, config, half, quiet)
            torch.save(vars(seen) | {"model": None, "out": config.out}, f"{name}-{train.RANK}.pt")
            return seen.result
        train.train = note
        assert main(flags(data=data, out=name, batch_size=2, accumulate=4, **changes)) == 0
    leave()

@pytest.fixture(scope="module")
def pair(workshop):
    """The notes of both processes, by the name of the run; "output" is what they printed."""
    child = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         __file__, train.prepare("text", 512)], capture_output=True, timeout=120, **TERMINAL)
    assert child.returncode == 0, child.stderr
    return {"output": child.stdout} | {name: [SimpleNamespace(**torch.load(f"{name}-{rank}.pt"))
                                              for rank in (0, 1)] for name in PAIR}

def assert_like_one_process(seen, **changes):
    """The same losses, evaluation and weights as of one process, to rounding."""
    one = observe(batch_size=2, accumulate=4, **changes)
    assert seen.losses == pytest.approx(one.losses, rel=1e-6)                  # measured: 8e-8
    assert seen.log[-1]["val_bits"] == pytest.approx(one.log[-1]["val_bits"], rel=1e-6)
    # measured: 2.1e-7
    assert max(distance(p, one.weights[name]) for name, p in seen.weights.items()) < 3e-6
    return one

@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
def test_two_processes_are_one_with_the_same_step(optimizer, pair):
    """Losses and weights are those of one process, to rounding. Both processes have the same
    weights. Each takes every other window of the one batch. Rank 0 alone has a folder."""
    assert_same(*(seen.weights for seen in pair[optimizer]))
    for rank, seen in enumerate(pair[optimizer]):
        one = assert_like_one_process(seen, optimizer=optimizer)
        assert_same(seen.batches, [(x[rank::2], y[rank::2]) for x, y in one.batches])
        assert seen.out == ("" if rank else optimizer)

def test_two_processes_stop_together(pair):
    """If one process has to stop, both stop; one process goes on with their checkpoint to the end
    of a run without a stop. Every line is printed once."""
    for words, count in (("in clip norm", 3), ("final: val loss", 2), ("--resume half", 1)):
        assert pair["output"].count(words) == count
    assert [seen.result["step"] for seen in pair["half"]] == [3, 3]
    assert_like_one_process(observe(resume="half", batch_size=2, accumulate=4))

# ---------------------------------------------------------------- the command line
def test_every_setting_is_a_flag_with_help(capsys):
    """--help names each field of Config, below what the file teaches. A flag sets its field."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "learnable multipliers" in shown and all(
        re.search(rf"--{f.name.replace('_', '-')}\b", shown) for f in fields(Config))
    assert train.parse(flags(out="x") + ["--compile"]) == config(compile=True, out="x")

def test_a_preset_gives_way_to_flags():
    """A flag beats the preset, auto on a CPU is the cpu preset, and every preset is valid. gpt2 has
    GPT-2's blocks of 84,934,656 weights, and 524,288 tokens in a step."""
    parse = lambda *words: train.parse([*words, "--device", "cpu", "--vocab-size", "50304"])
    assert parse() == Config(device="cpu", vocab_size=50304)
    assert (Config().multipliers, Config().multiplier_lr) == ("scalar", Config().lr)
    assert (c := parse("--preset", "gpu", "--n-layer", "9")).n_layer == 9 and c.n_embd == 384
    for c in [parse("--preset", preset) for preset in train.PRESETS]:
        c.check()
    assert c.preset == "gpt2" and c.batch_size * c.accumulate * c.block_size == 524_288
    # shapes without numbers
    with torch.device("meta"):
        parameters = GPT(c).blocks.named_parameters()
    assert sum(p.numel() for name, p in parameters if "weight" in name) == 84_934_656

def test_the_folder_of_a_run():
    """The default name says what the run is; a second run gets -2, a third -3. --out is made with
    its parents, but an existing --out is refused. A resumed run keeps its folder and settings."""
    assert [train.new_folder(config(seed=5)) for _ in range(3)] == [
        str(train.RUNS / f"vector-adamw-s5{suffix}") for suffix in ("", "-2", "-3")]
    assert train.new_folder(config(out="deep/er")) == "deep/er" and Path("deep/er").is_dir()
    with pytest.raises(FileExistsError):
        train.new_folder(config(out="deep/er"))
    run(StopAfter(3), out="kept", seed=7, head_norm_scale=2.0)
    assert train.parse(["--resume", "kept", "--lr", "0.001"]) == config(
        seed=7, head_norm_scale=2.0, resume="kept", lr=0.001)
    assert main(["--resume", "kept"]) == 0 and train.load("kept")[1]["step"] == 8

def refused(arguments, words, capsys):
    """The command prints these words, returns 2, and changes no file but prepared text."""
    files = lambda: {k: v for k, v in snapshot(".").items() if not k.startswith("data")}
    before, _ = files(), capsys.readouterr()
    try:
        code = main(arguments)
    # tyro ends the program itself
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and "Traceback" not in error and files() == before
    assert error.startswith("error: ") == (error.count("\n") == 1)

@functools.cache
def bad_files():
    """Input that the commands below must refuse."""
    finished()
    run(StopAfter(3), out="started")
    write("bad", {"blank.txt": " \n", "short.txt": "a", "h.bin": b"8", "latin.txt": b"\xe9" * 999,
                  "other.txt": "other words " * 500, "words.bin": "words, not tokens " * 99})
    # tokens up to 1399, for a vocabulary of 512
    shutil.copy(train.prepare("text", 512) / "tokenizer.tiktoken", shards("foreign", 400, 400))
    os.truncate(shards("cut", 400, 400) + "/web_val_000000.bin", 1024 + 2 * 399)

NEW = flags(out="new")

@pytest.mark.parametrize("given, words", [
    ("--learning-rate 1", "--learning-rate"), ("--step 1", "--warmup-steps"),
    ("--optimizer sgd", "adamw"), ("--steps many", "--steps"), ("--steps 0", "steps is out of"),
    ("--weight-decay -1", "weight_decay is out"), ("--warmup-steps -1", "warmup_steps is out"),
    ("--lr -1", "lr is out"), ("--lr nan", "lr is out"), ("--n-embd 30", "divisible"),
    ("--vocab-size 100", "vocab_size must be"), ("--device abacus", "device abacus"),
    ("--device meta", "device meta"),
    ("--data nowhere.txt", "nowhere.txt"), ("--data bad/blank.txt", "no UTF-8 text"),
    ("--data bad/short.txt", "too short"), ("--data bad/latin.txt", "no UTF-8 text"),
    ("--data cut", "cut short"), ("--data foreign", "the vocabulary has 512"),
    ("--data bad/words.bin", "not a token shard"), ("--data bad/h.bin", "not a token shard"),
    ("--out finished", "finished"), ("--out bad/h.bin/run", "h.bin"),
    ("--resume nowhere", "nowhere"), ("--resume text", "checkpoint.pt"),
    ("--sample nowhere", "nowhere"), ("--resume finished", "complete at step 8"),
    ("--resume started --n-embd 64", "another shape"), ("--resume started --out bad", "bad"),
    ("--resume started --optimizer muon", "another shape"),
    ("--resume started --multipliers none", "another shape"),
    ("--resume started --data bad/other.txt", "another text")])
def test_bad_input_gets_one_sentence(given, words, capsys):
    """Bad input gets one sentence (of tyro: a box) and exit code 2; nothing is left behind."""
    bad_files()
    own = given.startswith(("--resume", "--sample"))
    refused(given.split() if own else NEW + given.split(), words, capsys)

@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 ..."),
     "GPU 0 ...; half the --batch-size and twice the --accumulate"),
    (RuntimeError("inductor raised:\nNo working C++ compiler found\n\nSet TORCHDYNAMO ..."),
     "error: inductor raised: No working C++ compiler found\n")])
def test_missing_memory_and_a_missing_compiler_are_one_sentence(error, words, monkeypatch, capsys):
    """Out of memory, the sentence names --batch-size and --accumulate. Of a long message, as that
    of torch.compile without a C++ compiler, the first two lines are shown in one."""
    def fail(*_):
        raise error
    monkeypatch.setattr(train, "clip_gradients", fail)
    refused(NEW, words, capsys)

def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(monkeypatch, capsys):
    """Without the right to write into its folder a resumed run ends before it trains."""
    def no_permission(dir):
        raise PermissionError(13, "Permission denied", dir)
    bad_files()
    monkeypatch.setattr(train.tempfile, "TemporaryFile", no_permission)
    monkeypatch.setattr(train, "train", None)
    refused(["--resume", "started"], "Permission denied: 'started'", capsys)

def test_a_reader_that_has_gone_does_not_end_the_run(monkeypatch, capsys):
    """If nobody reads the output any more (`| head`), the run goes on, saves and returns 0."""
    def gone(text):
        raise BrokenPipeError
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(write=gone, flush=lambda: None))
        assert main(flags(out="unread")) == 0
    assert train.load("unread")[1]["step"] == 8 and Path("unread/run.png").exists()
    assert capsys.readouterr() == ("", "")

@pytest.mark.parametrize("fault", [lambda *_: [a for a, b in [(1, 2, 3)]],
                                   lambda *_: torch.ones(2) @ torch.ones(3)])
def test_a_fault_of_the_program_shows_its_traceback(fault, monkeypatch):
    """An error that no `raise` statement made is not turned into a sentence: that of a wrong
    unpacking, or of shapes that do not match. The run leaves no folder."""
    monkeypatch.setattr(train, "clip_gradients", fault)
    with pytest.raises((ValueError, RuntimeError)):
        main(NEW)
    assert not Path("new").exists()

def test_signals_ask_for_a_stop(signals, monkeypatch):
    """SIGINT, SIGTERM and SIGHUP set the event. A second signal ends one process at once, but not
    the processes of torchrun, which sends every signal twice. An ignored signal stays ignored."""
    for number in signals:
        stop = train.stop_at_signals()
        signal.raise_signal(number)
        assert stop.is_set()
        with pytest.raises(SystemExit):
            signal.raise_signal(number)
        with monkeypatch.context() as patch:
            patch.setattr(train, "WORLD", 2)
            signal.raise_signal(number)
        # as nohup does
        signal.signal(number, signal.SIG_IGN)
        stop = train.stop_at_signals()
        signal.raise_signal(number)
        assert not stop.is_set()

@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGTERM to one process")
def test_a_terminated_command_saves_and_says_how_to_go_on():
    """SIGTERM in a running command ends it with code 0, a checkpoint, and the line to resume it."""
    command = [sys.executable, train.__file__, *flags(data=train.prepare("text", 512),
                                                      out="stopped", steps=10 ** 6)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          **TERMINAL) as child:
        # wait for the first evaluation
        while not child.stdout.readline().startswith("step "):
            assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        output, errors = child.communicate(timeout=120)
    step = train.load("stopped")[1]["step"]
    assert (child.returncode, errors) == (0, "") and f"stopped after step {step} of" in output
    assert output.endswith("python train.py --resume stopped\n")
    assert main(["--resume", "stopped", "--steps", str(step + 1)]) == 0

if __name__ == "__main__":
    two_processes(sys.argv[1])
