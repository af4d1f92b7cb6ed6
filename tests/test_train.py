"""What train.py promises, one property per test, in its own order: which parameter is trained how,
the loop, data, measuring, the files of a run, the command line.

Everything happens in a temporary folder, on a model of one small block and on a few files of the
standard library. "The same" and "equals" mean bit for bit; a tolerance stands beside the error that
it was set from, measured with torch 2.13 on a CPU. The mutants at the end are train.py with a small
slip made: each of them has to fail the very test that watches over its property.

    python -m pytest -m train
"""
import contextlib
import csv
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from dataclasses import asdict, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import rustbpe
import torch

import train
from conftest import StopAfter
from multipliers import MULTIPLIERS, is_multiplier
from train import Config, Corpus, UserError, main

pytestmark = pytest.mark.train

# Ten files: enough for a split by file. The names decide: calendar, copy and glob are validation
SOURCES = "argparse ast calendar cmd codecs copy csv glob heapq textwrap".split()
TINY = dict(data="text", vocabulary=512, device="cpu", n_layer=1, n_head=2, n_embd=32,
            block_size=32, batch_size=4, steps=6, lr=3e-3, embedding_lr=3e-3, multiplier_lr=0.1,
            warmup_steps=2, eval_interval=3, eval_windows=6, log_interval=1, norm_interval=3)
ODD = "🤖👩‍👩‍👧 e\u0301 \u202e\u00a0\t\r\n  <|endoftext|> " + "".join(map(chr, range(1, 55296, 97)))


@pytest.fixture(scope="module", autouse=True)
def workshop(tmp_path_factory):
    """The current folder of these tests; prepared data and runs go there, not into the project."""
    root, library = tmp_path_factory.mktemp("train"), Path(sysconfig.get_paths()["stdlib"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(train, "DATA", root / "data")
        patch.setattr(train, "RUNS", root / "runs")
        write("text", {f"{name}.py": (library / f"{name}.py").read_bytes() for name in SOURCES})
        yield root


def write(folder, files):
    """Files of this content (text or bytes) in a folder; returns its name."""
    Path(folder).mkdir(parents=True)
    for name, content in files.items():
        Path(folder, name).parent.mkdir(exist_ok=True)
        Path(folder, name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def config(**changes):
    return train.resolve(Config(**(TINY | changes)))


def flags(**changes):
    """The command line of config(**changes)."""
    return [word for name, value in (TINY | changes).items()
            for word in ("--" + name.replace("_", "-"), str(value))]


@functools.cache
def text():
    return Corpus("text", TINY["block_size"], TINY["vocabulary"])


def observe(**changes):
    """train(), with what it keeps to itself: the model, every batch and each group's lrs."""
    seen = SimpleNamespace(batches=[], lrs=[])
    build, optimizers, batch = train.build, train.make_optimizers, Corpus.train_batch

    def spy_build(*arguments):
        seen.model = build(*arguments)
        return seen.model

    def spy_optimizers(*arguments):
        made = optimizers(*arguments)
        made[0].register_step_pre_hook(lambda *_: seen.lrs.append(
            {g["kind"]: g["lr"] for o in made for g in o.param_groups}))
        return made

    def spy_batch(*arguments):
        seen.batches.append(batch(*arguments))
        return seen.batches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", spy_build)
        patch.setattr(train, "make_optimizers", spy_optimizers)
        patch.setattr(Corpus, "train_batch", spy_batch)
        seen.result = train.train(config(**changes), quiet=True)
    return seen


def assert_same(a, b):
    """Equal bit for bit, all the way down; only the clock and the name of the folder may differ."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a.keys() - {"tokens_per_second", "out"}:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def distance(a, b):
    """Norm of a - b relative to that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------- which parameter is trained how

def every_combination():
    names = ("multipliers", "placement", "final_gain", "block_gains")
    for values in itertools.product(*(train.CHOICES[name] for name in names)):
        for optimizer in ("adamw", "muon"):
            yield config(**dict(zip(names, values)), optimizer=optimizer, n_embd=8)


def test_every_parameter_is_in_exactly_one_group():
    """In all 108 combinations of options each parameter has one group, the one the printed pattern
    says: block matrices in Muon, matrices but the embedding decayed, multipliers not clipped."""
    for c in every_combination():
        model = train.build(c, 11)
        groups = train.parameter_groups(model, c)
        names = {id(p): name for name, p in model.named_parameters()}
        listed = [names[id(p)] for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(names.values())              # each once, none forgotten
        for group in groups:
            for name in (names[id(p)] for p in group["params"]):
                assert any(fnmatch(name, pattern) for pattern in group["pattern"].split(", "))
                assert group["clip"] != is_multiplier(name)
                assert group["lr"] == (c.multiplier_lr if is_multiplier(name) else c.lr)
                inside = name.startswith("blocks") and name.endswith(".weight")
                assert group["optimizer"] == (c.optimizer if inside else "adamw")
                assert group["weight_decay"] == (
                    c.multiplier_weight_decay if is_multiplier(name) else
                    c.weight_decay if inside or name == "head.weight" else 0)
        optimizers = train.make_optimizers(groups, torch.device("cpu"))
        given = [names[id(p)] for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(given) == sorted(listed)
        assert {type(o).__name__ for o in optimizers} == {"AdamW", "Muon"} - {
            "Muon" if c.optimizer == "adamw" else ""}


def test_norm_scales_keep_the_effective_lr():
    """S multiplies lr and divides the decay of its own matrices alone, so that sqrt(lr / 2 wd)
    becomes S times as large and lr * wd stays."""
    plain, scaled = ({g["kind"]: g for g in train.parameter_groups(train.build(c, 11), c)}
                     for c in (config(), config(head_norm_scale=4.0, mlp_norm_scale=0.5)))
    for kind, S in {"head": 4.0, "mlp": 0.5, "attn": 1, "multiplier": 1, "gain": 1}.items():
        assert scaled[kind]["lr"] == plain[kind]["lr"] * S
        assert scaled[kind]["weight_decay"] == plain[kind]["weight_decay"] / S


def gradients(multiplier_size):
    """(config, groups, gradients of the others, of the multipliers), drawn at random."""
    c = config(grad_clip=1.0)
    model = train.build(c, 11)
    generator = torch.Generator().manual_seed(1)
    parts = {False: [], True: []}
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=generator) * (
            multiplier_size if is_multiplier(name) else 1.0)
        parts[is_multiplier(name)].append(p.grad)
    return c, train.parameter_groups(model, c), parts[False], parts[True]


def norm_of(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def test_clipping_does_not_see_the_multipliers():
    """The norm is that of the other gradients, which are scaled to grad_clip; the gradients of the
    multipliers are neither counted nor touched, however large."""
    for size in (1.0, 1000.0):
        c, groups, others, multipliers = gradients(size)
        before, untouched = norm_of(others), [g.clone() for g in multipliers]
        everything = norm_of(others + multipliers)
        first = others[0].clone()
        norm, norm_with = train.clip_gradients(groups, c)
        assert norm.item() == pytest.approx(before, rel=1e-6)         # measured: 6e-8
        assert norm_with.item() == pytest.approx(everything, rel=1e-6)
        assert norm_of(others) == pytest.approx(1.0, rel=1e-5)        # torch adds 1e-6 to the norm
        assert distance(others[0], first / before) < 1e-5
        assert_same(multipliers, untouched)


def test_clip_multipliers_counts_and_scales_them_too():
    """With clip_multipliers a large multiplier gradient shrinks all others too."""
    c, groups, others, multipliers = gradients(1000.0)
    before, everything = norm_of(others), norm_of(others + multipliers)
    train.clip_gradients(groups, replace(c, clip_multipliers=True))
    assert norm_of(others + multipliers) == pytest.approx(1.0, rel=1e-5)
    assert norm_of(others) == pytest.approx(before / everything, rel=1e-5)


@pytest.mark.parametrize("limit", [0, 1e9])
def test_nothing_is_clipped_below_the_limit(limit):
    """A norm below grad_clip, and grad_clip 0, leave every gradient as it was."""
    c, groups, others, multipliers = gradients(1.0)
    before = [g.clone() for g in others + multipliers]
    train.clip_gradients(groups, replace(c, grad_clip=limit))
    assert_same(others + multipliers, before)


def test_schedule_warms_up_stays_and_falls():
    """The factor rises in equal steps to 1, stays there, and falls in equal steps towards 0."""
    factors = [train.schedule(step, 100, 9, 0.2) for step in range(100)]
    assert factors[:9] == pytest.approx([0.1 * (i + 1) for i in range(9)])
    assert factors[9:81] == [1.0] * 72
    assert factors[80:] == pytest.approx([1 - i / 20 for i in range(20)])


def test_every_group_keeps_its_own_lr_through_the_schedule():
    """In each step each group trains with its own peak lr times the schedule's factor."""
    seen = observe(optimizer="muon", head_norm_scale=4.0, mlp_norm_scale=0.5, multiplier_lr=7e-4,
                   embedding_lr=0.1)
    peaks = {"attn": 3e-3, "mlp": 1.5e-3, "head": 1.2e-2, "embedding": 0.1, "gain": 3e-3,
             "multiplier": 7e-4}
    assert len(seen.lrs) == 6
    for step, lrs in enumerate(seen.lrs):
        factor = train.schedule(step, 6, 2, 0.2)
        assert lrs == pytest.approx({kind: peak * factor for kind, peak in peaks.items()})


# ---------------------------------------------------------------- the loop

def test_the_seed_decides_everything():
    """The same seed gives the same run; another seed gives other weights and other batches."""
    first, second, other = observe(seed=3), observe(seed=3), observe(seed=4)
    assert_same(first.result, second.result)
    assert_same(first.model.state_dict(), second.model.state_dict())
    assert not torch.equal(first.batches[0][0], other.batches[0][0])
    heads = [train.build(config(seed=seed), 11).head.weight for seed in (3, 4)]
    assert not torch.equal(*heads)


def test_evaluating_more_often_changes_nothing():
    """The evaluation interval changes no training batch, no weight and no final loss."""
    often, seldom = observe(eval_interval=1, norm_interval=1), observe(eval_interval=6)
    assert_same(often.batches, seldom.batches)
    assert_same(often.model.state_dict(), seldom.model.state_dict())
    assert_same(often.result["final"], seldom.result["final"])


def test_runs_with_and_without_multipliers_begin_equal():
    """none, scalar and vector see the same batches, and start from the same function of them."""
    runs = [observe(multipliers=kind, steps=3) for kind in train.CHOICES["multipliers"]]
    for run in runs[1:]:
        assert_same(run.batches, runs[0].batches)
        assert run.result["log"][0]["loss"] == runs[0].result["log"][0]["loss"]
        assert run.result["log"][2]["loss"] != runs[0].result["log"][2]["loss"]


@pytest.mark.parametrize("changes", [{"optimizer": "adamw"}, {"optimizer": "muon"},
                                     {"multipliers": "scalar", "tokens_per_step": 256}])
def test_resuming_equals_not_stopping(changes, tmp_path):
    """3 + 3 steps end in the same checkpoint as 6: weights, optimizers, generator and history."""
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    train.train(config(**changes, out=whole), quiet=True)
    stopped = train.train(config(**changes, out=halves), stop=StopAfter(3), quiet=True)
    assert stopped["step"] == 3
    train.train(config(**changes, out=halves), resume=halves, quiet=True)
    a, b = train.load(whole)[1], train.load(halves)[1]
    assert {"model", "optimizers", "batches", "history", "step"} < set(a)
    assert_same(a, b)


def test_accumulation_equals_a_larger_batch(monkeypatch):
    """3 x 2 windows give the windows, the gradient and the loss of 6 windows, to rounding."""
    seen, clip = [], train.clip_gradients

    def spy(groups, c):
        seen.append(torch.cat([p.grad.flatten() for g in groups for p in g["params"]]))
        return clip(groups, c)

    monkeypatch.setattr(train, "clip_gradients", spy)
    parts = observe(batch_size=2, tokens_per_step=192, steps=1)
    whole = observe(batch_size=6, steps=1)
    assert_same(parts.batches, whole.batches)
    assert distance(*seen) < 3e-6                                     # measured: 2e-7
    losses = [run.result["log"][0]["loss"] for run in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_run_without_a_folder_writes_nothing():
    """train() with out=None leaves no file anywhere."""
    text()
    before = snapshot(".")
    train.train(config(), quiet=True)
    assert snapshot(".") == before


def test_a_nan_stops_the_run_and_spares_the_checkpoint(monkeypatch, tmp_path):
    """A NaN is a UserError with the step and the last good checkpoint, which stays as it was."""
    clip, steps = train.clip_gradients, itertools.count(1)

    def spoil_step_4(groups, c):
        if next(steps) == 4:
            groups[0]["params"][0].data.fill_(math.nan)
        return clip(groups, c)

    monkeypatch.setattr(train, "clip_gradients", spoil_step_4)
    with pytest.raises(UserError, match=r"step 4.*checkpoint\.pt \(step 2\)"):
        train.train(config(out=str(tmp_path / "run"), eval_interval=2), quiet=True)
    _, saved = train.load(tmp_path / "run")
    assert saved["step"] == 2
    assert all(weights.isfinite().all() for weights in saved["model"].values())


def test_a_short_run_learns():
    """150 steps on real text bring the loss of other files well below the entropy of their own
    token frequencies, the least that a guess without context can have."""
    counts = np.bincount(np.concatenate(text().shards["val"]))
    p = counts[counts > 0] / counts.sum()
    unigram = -(p * np.log(p)).sum()
    result = train.train(config(n_embd=64, batch_size=8, steps=150, warmup_steps=10,
                                eval_interval=150, eval_windows=100), quiet=True)
    assert result["final"]["val_loss"] < unigram - 0.4       # measured: 0.57 to 0.62, three seeds


# ---------------------------------------------------------------- data

def decoded(corpus, part):
    """What the shards of a part say, END left out of the text: one string per document."""
    tokens = np.concatenate(corpus.shards[part]).tolist()
    return corpus.tokenizer.decode(tokens).split(train.END)[1:]


def test_the_shards_hold_the_text_and_nothing_is_lost():
    """Decoded shards are the documents of both parts, each behind one END, whatever is in them."""
    files = {f"{i}.txt": f"{i} {ODD}".replace(train.END, "") * 3 for i in range(40)}
    corpus = Corpus(write("odd", files), 8, 300)
    read = {name: Path("odd", name).read_text(encoding="utf-8") for name in sorted(files)}
    for part, documents in zip(("train", "val"), train.split(read)):
        assert documents and decoded(corpus, part) == documents


@pytest.mark.parametrize("vocabulary", [257, 512])
def test_the_tokenizer_round_trips_and_is_rustbpe(vocabulary):
    """tiktoken gives the ids of rustbpe, which learned the merges, and decodes them to the text,
    be it single bytes, emoji, rare letters, or "<|endoftext|>" spelled out in it."""
    document = Path("text/heapq.py").read_text(encoding="utf-8") + ODD
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter([document]), vocab_size=vocabulary - 1, pattern=train.PATTERN)
    tokenizer = train.load_tokenizer(train.train_tokenizer([document], vocabulary))
    ids = tokenizer.encode_ordinary(document)
    assert ids == trainer.encode(document)
    assert tokenizer.decode(ids) == document and tokenizer.n_vocab == vocabulary
    assert tokenizer.eot_token == vocabulary - 1 and tokenizer.eot_token not in ids


def test_new_files_move_no_old_file_to_the_other_side():
    """About a tenth of the files is validation text, and stays so when files are added."""
    names = [f"{i}.txt" for i in range(100)]
    before, after = ({n: n for n in names[::step]} for step in (2, 1))
    (old_train, old_val), (new_train, new_val) = train.split(before), train.split(after)
    assert old_val and set(old_val) <= set(new_val) and set(old_train) <= set(new_train)
    assert sorted(new_train + new_val) == sorted(names) and 5 <= len(new_val) <= 15


def test_few_files_are_cut_each():
    """With fewer than ten files, the last tenth of each is validation text."""
    assert train.split({"a": "x" * 90 + "y" * 10, "b": "0123456789"}) == (
        ["x" * 90, "012345678"], ["y" * 10, "9"])


def test_shards_are_llm_c_shards(tmp_path):
    """write_shard makes llm.c's format (20240520, 1, count, then uint16); read_shard reads it."""
    tokens = np.array([0, 1, 50256, 65535])
    train.write_shard(tmp_path / "x.bin", tokens)
    content = (tmp_path / "x.bin").read_bytes()
    assert np.frombuffer(content[:1024], "<i4").tolist() == [20240520, 1, 4] + [0] * 253
    assert np.frombuffer(content[1024:], "<u2").tolist() == tokens.tolist()
    assert train.read_shard(tmp_path / "x.bin").tolist() == tokens.tolist()


def prepared(name):
    """The finished folders of prepared text."""
    return sorted(path.name for path in train.DATA.glob(f"{name}-*"))


def test_text_is_prepared_once_and_again_when_it_changes():
    """The same files use the same folder; a changed file or another vocabulary makes a new one."""
    folder = write("changing", {"a.txt": "first " * 500})
    for expected in (1, 1):
        Corpus(folder, 8, 300)
        assert len(prepared("changing")) == expected
    Corpus(folder, 8, 301)
    assert len(prepared("changing")) == 2
    Path("changing/a.txt").write_text("second " * 500, encoding="utf-8")
    assert "second" in decoded(Corpus(folder, 8, 300), "val")[0]
    assert len(prepared("changing")) == 3


@pytest.mark.parametrize("crash", [RuntimeError, KeyboardInterrupt])
def test_a_crash_while_preparing_leaves_nothing(crash, monkeypatch):
    """Whatever interrupts a preparation, no folder appears, and the next one succeeds."""
    folder = write(f"crash-{crash.__name__}", {"a.txt": "some words " * 500})
    before, right = snapshot(train.DATA), train.write_shard

    def second_shard_fails(path, tokens):
        if path.name == "val.bin":
            raise crash
        right(path, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_shard", second_shard_fails)
        with pytest.raises(crash):
            Corpus(folder, 8, 300)
    assert snapshot(train.DATA) == before
    Corpus(folder, 8, 300)


def test_two_preparations_at_once_agree(monkeypatch):
    """A preparation that ends second finds the folder of the first, and uses it."""
    folder, learn = write("twice", {"a.txt": "some words " * 500}), train.train_tokenizer

    def another_run_is_faster(*arguments):
        monkeypatch.setattr(train, "train_tokenizer", learn)
        Corpus(folder, 8, 300)
        return learn(*arguments)

    monkeypatch.setattr(train, "train_tokenizer", another_run_is_faster)
    assert "".join(decoded(Corpus(folder, 8, 300), "train")) == "some words " * 450
    assert len(prepared("twice")) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_preparation_leaves_nothing_half_made(monkeypatch):
    """After SIGKILL there is no folder that a later run would trust, and the later run succeeds."""
    code = ("import os, signal, train; from pathlib import Path; train.DATA = Path('killed'); "
            "train.write_shard = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
            "train.Corpus('text', 32, 512)")
    child = subprocess.run([sys.executable, "-c", code], cwd=Path.cwd(), capture_output=True,
                           env=os.environ | {"PYTHONPATH": str(train.HERE)}, timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".partial-") for path in Path("killed").iterdir())
    monkeypatch.setattr(train, "DATA", Path("killed"))
    assert_same(decoded(Corpus("text", 32, 512), "val"), decoded(text(), "val"))


def test_unreadable_files_are_counted_and_named():
    """Latin-1 and binary files are left out and named, hidden ones not looked at, the rest used."""
    folder = write("mixed", {"good.txt": "good text " * 300, "latin.txt": b"caf\xe9",
                             "sub/image.png": b"PNG\0\0", ".git/secret": "no", ".hidden": "no"})
    corpus = Corpus(folder, 8, 300)
    assert "1 files" in corpus.about and "2 files, latin.txt, sub/image.png" in corpus.about
    assert "".join(decoded(corpus, "train") + decoded(corpus, "val")) == "good text " * 300


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_file_names_that_are_no_text_are_no_obstacle():
    """A file whose name is not UTF-8 is used like any other."""
    write("names", {"a.txt": "plain " * 300})
    Path(os.fsdecode(b"names/\xff.txt")).write_text("strange " * 300, encoding="utf-8")
    assert "2 files" in Corpus("names", 8, 300).about


def test_the_standard_library_is_its_portable_part():
    """Of the standard library only .py files count, without tests, packages and generated files."""
    kept = ["a.py", "json/b.py"]
    left_out = ["c.txt", "test/d.py", "json/tests/e.py", "site-packages/f.py", "encodings/g.py",
                "_sysconfigdata_x.py", "config-3.11/h.py", ".i.py"]
    folder = write("library", dict.fromkeys(kept + left_out, "x"))
    assert sorted(train.find_files(Path(folder), True)) == kept


def shards(folder, *counts):
    """Shards without a tokenizer: number i holds the tokens 1000 i, 1000 i + 1, ..."""
    Path(folder).mkdir(parents=True)
    for i, count in enumerate(counts):
        part = "val" if i == 0 else "train"
        train.write_shard(Path(folder, f"web_{part}_{i:06}.bin"), 1000 * i + np.arange(count))
    return str(folder)


@pytest.fixture
def offline(monkeypatch):
    """tiktoken as it is without a network."""
    def refuse(name):
        raise requests.exceptions.ConnectionError("no network")
    monkeypatch.setattr(train.tiktoken, "get_encoding", refuse)


def test_windows_are_slices_of_one_shard(offline, tmp_path):
    """Windows number 0, 1, ... are all the slices of all the shards, none across a border."""
    corpus = Corpus(shards(tmp_path / "shards", 40, 20, 9, 33), 8)
    total = int(corpus.starts["train"][-1])
    x, y = corpus.windows("train", np.arange(total))
    assert (y == x + 1).all()                        # slices of a shard: no window crosses a border
    firsts = [1000 * i + j for i, count in ((1, 20), (2, 9), (3, 33)) for j in range(count - 8)]
    assert x[:, 0].tolist() == firsts                                 # each possible window once


def test_validation_windows_are_always_the_same():
    """Every evaluation sees the same windows, spread over the whole part, in any batch size."""
    one_by_one, threes, again = ([torch.cat(batch) for batch in zip(*text().val_batches(size, 10))]
                                 for size in (1, 3, 3))
    assert_same(one_by_one, threes)
    assert_same(threes, again)
    tokens = np.concatenate(text().shards["val"])
    assert len(threes[0]) == 10 and (threes[0][0].numpy() == tokens[:32]).all()
    assert any((threes[1][-1].numpy() == tokens[-32 - i:len(tokens) - i]).all() for i in range(10))


def test_validation_windows_do_not_overlap(offline, tmp_path):
    """Where fewer windows are to be had than asked for, they are those that fit side by side."""
    corpus = Corpus(shards(tmp_path / "shards", 40, 20), 8)
    x = torch.cat([x for x, _ in corpus.val_batches(3, 100)])
    assert x.tolist() == [list(range(i, i + 8)) for i in (0, 10, 20, 30)]


def test_shards_of_others_train_without_a_network(offline, tmp_path, capsys):
    """GPT-2 shards train although their vocabulary cannot be fetched: bits per byte are NaN."""
    result = train.train(config(data=shards(tmp_path / "web", 400, 400, 400), steps=2,
                                n_embd=8, n_head=1, out=str(tmp_path / "run")), quiet=True)
    assert math.isfinite(result["final"]["val_loss"]) and math.isnan(result["final"]["val_bits"])
    assert "GPT-2's vocabulary cannot be fetched" in capsys.readouterr().out
    assert main(["--sample", str(tmp_path / "run")]) == 0


@contextlib.contextmanager
def web(reply, length):
    """The address of a server on this machine that sends `reply` and promises `length` bytes."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments):
            pass
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/input.txt"
        server.shutdown()


def test_shakespeare_is_downloaded_once(monkeypatch):
    """--data shakespeare fetches its text, checks it, prepares it, and never fetches it again."""
    play = b"To be, or not to be: that is the question.\n" * 50
    with web(play, len(play)) as url:
        monkeypatch.setattr(train, "SHAKESPEARE", (url, hashlib.sha256(play).hexdigest()))
        first = Corpus("shakespeare", 8, 300)
    second = Corpus("shakespeare", 8, 300)                            # the server is gone by now
    assert_same(decoded(first, "train"), decoded(second, "train"))
    assert "".join(decoded(first, "train") + decoded(first, "val")).encode() == play


@pytest.mark.parametrize("reply, length, word", [
    (b"another text", 12, "SHA-256"), (b"the t", 8, "broke"), (None, 0, "downloaded")],
    ids=["wrong", "cut short", "refused"])
def test_a_failed_download_is_an_error_and_leaves_no_text(reply, length, word, monkeypatch):
    """A wrong text, a broken connection and no connection are UserErrors, and no text to train on
    appears; only a part that came is kept, hidden, for the next try."""
    before = snapshot(".")
    with web(reply, length) as url:
        if reply is None:
            url = "http://127.0.0.1:1/input.txt"                      # a port that nobody serves
        monkeypatch.setattr(train, "SHAKESPEARE",
                            (url, hashlib.sha256(b"the text").hexdigest()))
        monkeypatch.setattr(train, "DATA", Path("nothing"))
        with pytest.raises(UserError, match=word):
            Corpus("shakespeare", 8, 300)
    kept = {"nothing/.partial-shakespeare.txt": reply} if word == "broke" else {}
    assert {k: v for k, v in snapshot(".").items() if k not in before} == kept
    shutil.rmtree("nothing", ignore_errors=True)


# ---------------------------------------------------------------- measuring

def test_bits_per_byte_are_nats_per_token_in_other_units():
    """evaluate() gives the mean of -log p over all windows in float64, and the same divided by
    ln 2 and by the bytes per token of the targets, where END counts as no byte."""
    many = write("many", {f"{i}.txt": f"document {i} " * 5 for i in range(99)})
    c, corpus = config(eval_windows=50), Corpus(many, 32, 300)
    model = train.build(c, corpus.vocab_size)
    measured = train.evaluate(model, corpus, c, torch.device("cpu"))
    x, y = map(torch.cat, zip(*corpus.val_batches(7, 50)))
    assert (y == corpus.tokenizer.eot_token).sum() > 1
    with torch.no_grad():
        logits = model(x)[0].double()
    nats = -logits.log_softmax(-1).gather(-1, y[..., None]).mean().item()
    text_tokens = [token for token in y.flatten().tolist() if token != corpus.tokenizer.eot_token]
    bytes_per_token = len(corpus.tokenizer.decode_bytes(text_tokens)) / y.numel()
    assert measured == pytest.approx(                                 # measured: 2e-8
        {"val_loss": nats, "val_bits": nats / math.log(2) / bytes_per_token,
         "logit_rms": logits.square().mean().sqrt().item()}, rel=1e-6)


@pytest.mark.parametrize("kind", train.CHOICES["multipliers"])
def test_norms_are_those_of_the_definition(kind):
    """norms.csv holds the RMS of W, of s W or r W c, of each multiplier and of each gain."""
    def rms(x):
        return x.double().square().mean().sqrt().item()
    seen = observe(multipliers=kind)
    p = {name: value.double() for name, value in seen.model.state_dict().items()}
    rows = [row for row in seen.result["norms"] if row["step"] == 6]
    assert {row["name"] for row in rows} == {name.rsplit(".", 1)[0] for name in p}
    for row in rows:
        own = {key.rsplit(".", 1)[1]: value for key, value in p.items()
               if key.rsplit(".", 1)[0] == row["name"]}
        want = {"W" if key == "weight" else key: rms(value) for key, value in own.items()}
        if "weight" in own:
            W_eff = own["weight"] * own.get("scalar", 1.0)
            W_eff = own["row"][:, None] * W_eff if "row" in own else W_eff
            want["W_eff"] = rms(W_eff * own["column"] if "column" in own else W_eff)
        assert row.keys() - {"step", "name"} == want.keys()
        for key in want:
            assert row[key] == pytest.approx(want[key], rel=1e-6)     # measured: 4e-8
    scales = train.learned_scales(seen.result)
    assert scales == {r["name"]: r["W_eff"] / r["W"] for r in rows if r.keys() & set(MULTIPLIERS)}
    assert bool(scales) == (kind != "none")


# ---------------------------------------------------------------- the files of a run

@functools.cache
def finished():
    """A run made by the command line, in the folder "finished"; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(flags(out="finished", prompt="def ")) == 0
    return output.getvalue()


def snapshot(folder):
    """Every file below a folder, with its content."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def table(name):
    with open(Path("finished", name), newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_run_leaves_its_files():
    """A run's folder holds the checkpoint, two tables, the settings and the picture, no more."""
    finished()
    assert {path.name for path in Path("finished").iterdir()} == {
        "checkpoint.pt", "config.json", "log.csv", "norms.csv", "run.png"}
    settings = json.loads(Path("finished/config.json").read_text(encoding="utf-8"))
    assert settings == asdict(config(out="finished"))
    assert list(table("log.csv")[-1]) == [
        "step", "loss", "lr", "grad_norm", "grad_norm_with_multipliers", "tokens_per_second",
        "val_loss", "logit_rms", "val_bits"]
    assert [row["step"] for row in table("log.csv") if row["val_loss"]] == ["3", "6"]
    assert {"step", "name", "W", "W_eff", "row", "column", "gain"} <= set(table("norms.csv")[0])
    assert Path("finished/run.png").read_bytes().startswith(b"\x89PNG")
    assert torch.load("finished/checkpoint.pt", weights_only=True)["step"] == 6


def test_the_output_ends_with_the_final_loss():
    """What a run prints: the text, a row per group, the scales, a sample, and at last the loss."""
    lines, last = finished().splitlines(), table("log.csv")[-1]
    assert lines[-1] == (f"final: val loss {float(last['val_loss']):.4f} nats/token, "
                         f"{float(last['val_bits']):.4f} bits/byte")
    for words in ("text: text, 10 files", "blocks.*.attn.*.weight", "*.row", "learned scales",
                  "step      3: val loss", "a sample:", "def ", "saved in finished"):
        assert words in finished()


def test_a_failed_save_keeps_the_old_checkpoint(monkeypatch, tmp_path):
    """A crash in the middle of writing leaves the previous checkpoint whole, and no litter."""
    run = str(tmp_path / "run")
    train.train(config(out=run), stop=StopAfter(3), quiet=True)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()

    def disk_full(saved, path):
        Path(path).write_bytes(before[:1000])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        train.train(config(out=run), resume=run, quiet=True)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*partial*"))


def test_a_merged_checkpoint_is_the_same_model(tmp_path):
    """merged.pt is a model without multipliers, with the same logits and the same sample."""
    finished()
    run = shutil.copytree("finished", tmp_path / "run")
    assert main(["--merge", str(run)]) == 0
    (_, own), (_, merged) = train.load(run), train.load(run / "merged.pt")
    assert merged["shape"]["multipliers"] == "none"
    assert not any(is_multiplier(name) for name in merged["model"])
    a, b = train.rebuild(own), train.rebuild(merged)
    x = text().windows("val", np.arange(8))[0]
    with torch.no_grad():
        assert distance(b(x)[0], a(x)[0]) < 1e-6                      # measured: 0
    assert train.sample(a, own["tokenizer"], "def ", 0) == train.sample(
        b, merged["tokenizer"], "def ", 0)


def test_a_sample_begins_with_its_prompt_and_depends_on_the_seed_alone(capsys):
    """--sample continues --prompt, in the same way each time, and otherwise with another seed."""
    finished()
    written = []
    for seed in (1, 1, 2):
        assert main(["--sample", "finished", "--prompt", "class é", "--seed", str(seed)]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]
    assert all(sample.startswith("class é") for sample in written)


# ---------------------------------------------------------------- the command line

def test_every_setting_is_a_flag_with_help(capsys):
    """Each field of Config is named by --help, and its flag sets that field."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out.replace(",", " ").split()
    for f in fields(Config):
        flag = "--" + f.name.replace("_", "-")
        assert flag in shown
        value = (f.metadata["choices"] or (8 if f.default is None else f.default,))[-1]
        words = [flag] if value is False else [flag, str(value)]
        given = vars(train.make_parser().parse_args(words))[f.name]
        assert given == (True if value is False else type(given)(value))


def test_a_preset_gives_way_to_flags():
    """The gpu preset is larger, a flag beats it, and auto on a CPU is the cpu preset."""
    large = train.configure({"preset": "gpu", "n_layer": 2}, None)
    assert (large.n_embd, large.n_layer) == (train.PRESETS["gpu"]["n_embd"], 2)
    assert train.configure({"device": "cpu"}, None).n_embd == Config().n_embd


def test_a_run_without_a_name_gets_a_folder_of_its_own():
    """By default a run's folder says what it is, and is not one that exists."""
    first = train.configure({"device": "cpu", "seed": 5}, None).out
    assert Path(first) == train.RUNS / "vector-adamw-s5"
    Path(first).mkdir(parents=True)
    assert not Path(train.configure({"device": "cpu", "seed": 5}, None).out).exists()


def spoiled_checkpoints():
    """Files that are no checkpoints, each in its own way."""
    whole = Path("finished/checkpoint.pt").read_bytes()
    for name, content in {"empty": b"", "words": b"hello world", "cut": whole[:len(whole) // 2],
                          "byte": b"\x80", "dot": b"."}.items():
        Path(f"{name}.pt").write_bytes(content)
        yield f"{name}.pt"
    for name, content in {"tensor": torch.ones(3), "list": [1], "other": {"model": {}},
                          "hollow": dict.fromkeys(("config", "shape", "model", "tokenizer"), 1)
                          }.items():
        torch.save(content, f"{name}.pt")
        yield f"{name}.pt"


@functools.cache
def bad_files():
    """Input that the commands below must refuse."""
    finished()
    train.train(config(out="another", steps=3), quiet=True)
    train.train(config(out="started"), stop=StopAfter(3), quiet=True)
    train.write_merged("started")
    write("empty", {"empty.txt": "", "blank.txt": " \n"})
    write("short", {"short.txt": "a"})
    write("latin", {"latin.txt": b"\xe9" * 1000})
    write("text2", {"a.txt": "other words " * 500})
    shards("cut", 400, 400)
    Path("cut/web_val_000000.bin").write_bytes(Path("cut/web_val_000000.bin").read_bytes()[:-2])
    Path("words.bin").write_text("these are words, not tokens " * 100, encoding="utf-8")
    Path("header.bin").write_bytes(b"\x08")
    shards("foreign", 400, 400)                      # tokens up to 1399 for a vocabulary of 512
    Path("foreign/tokenizer.tiktoken").write_text(text().lines, encoding="utf-8")


NEW = flags(out="new")
MORE = ["--resume", "started"]
BAD = {
    "unknown flag": (NEW + ["--learning-rate", "1"], "--learning-rate"),
    "no abbreviations": (NEW + ["--step", "1"], "--step"),
    "unknown value": (NEW + ["--optimizer", "sgd"], "adamw"),
    "no number": (NEW + ["--steps", "many"], "--steps"),
    "negative lr": (NEW + ["--lr", "-1"], "--lr must be positive"),
    "nan": (NEW + ["--weight-decay", "nan"], "--weight-decay"),
    "infinite": (NEW + ["--grad-clip", "inf"], "--grad-clip"),
    "no steps": (NEW + ["--steps", "0"], "--steps must be positive"),
    "negative seed": (NEW + ["--seed", "-1"], "--seed"),
    "endless seed": (NEW + ["--seed", "9" * 30], "--seed"),
    "uneven step": (NEW + ["--tokens-per-step", "100"], "--tokens-per-step must be a multiple of"),
    "no layers": (NEW + ["--n-layer", "0"], "n_layer"),
    "width and heads": (NEW + ["--n-embd", "30", "--n-head", "4"], "divisible"),
    "vocabulary": (NEW + ["--vocabulary", "100"], "--vocabulary"),
    "unknown device": (NEW + ["--device", "abacus"], "--device abacus"),
    "absent device": (NEW + ["--device", "cuda:99"], "--device cuda:99"),
    "no real device": (NEW + ["--device", "meta"], "--device meta"),
    "missing file": (NEW + ["--data", "nowhere.txt"], "nowhere.txt"),
    "empty file": (NEW + ["--data", "empty/empty.txt"], "no UTF-8 text"),
    "empty files": (NEW + ["--data", "empty"], "no UTF-8 text"),
    "no UTF-8": (NEW + ["--data", "latin"], "no UTF-8 text"),
    "too short": (NEW + ["--data", "short"], "too short"),
    "no shard": (NEW + ["--data", "words.bin"], "not a token shard"),
    "no header": (NEW + ["--data", "header.bin"], "not a token shard"),
    "shard cut short": (NEW + ["--data", "cut"], "cut short"),
    "other vocabulary": (NEW + ["--data", "foreign"], "vocabulary"),
    "out holds a run": (flags(out="finished"), "--resume"),
    "out is a file": (flags(out="words.bin"), "words.bin"),
    "out is in a file": (flags(out="words.bin/run"), "words.bin"),
    "resume nothing": (["--resume", "nowhere"], "no checkpoint"),
    "resume a folder without one": (["--resume", "text"], "no checkpoint"),
    "resume a merged one": (["--resume", "started/merged.pt"], "merged"),
    "resume another shape": (MORE + ["--n-embd", "64"], "another shape"),
    "resume without multipliers": (MORE + ["--multipliers", "none"], "another shape"),
    "resume with another optimizer": (MORE + ["--optimizer", "muon"], "another shape"),
    "resume on another text": (MORE + ["--data", "text2"], "another text"),
    "resume over another run": (MORE + ["--out", "another"], "another"),
    "resume a complete run": (["--resume", "finished"], "complete"),
    "sample of nothing": (["--sample", "nowhere"], "no checkpoint"),
    "merge nothing": (["--merge", "nowhere"], "no checkpoint"),
}


def refused(arguments, words, capsys):
    """The command prints one sentence with these words, returns 2, and no run is touched."""
    def runs():
        return {name: content for name, content in snapshot(".").items()
                if not Path(name).parts[0] == "data"}
    bad_files()
    before = runs()
    capsys.readouterr()
    code = main(arguments)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert runs() == before


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case, capsys):
    """Bad input prints one line beginning with "error:", ends with code 2, and loses nothing."""
    refused(*BAD[case], capsys)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")     # torch, about tensor.pt
def test_a_damaged_checkpoint_gets_one_sentence(capsys):
    """Whatever a file named as checkpoint holds, all commands refuse it in one sentence."""
    bad_files()
    for name in list(spoiled_checkpoints()):
        for command in ("--sample", "--resume", "--merge"):
            refused([command, name], f"{name} is damaged, or not a checkpoint", capsys)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGINT to one process")
def test_ctrl_c_saves_and_says_how_to_go_on(workshop, capsys):
    """SIGINT in a running command ends it with code 0, a checkpoint, and the line to resume it."""
    text()
    data = str(train.DATA / prepared("text")[0])
    command = [sys.executable, train.__file__, *flags(data=data, out="stopped", steps=10 ** 6,
                                                      eval_interval=1)]
    with subprocess.Popen(command, cwd=workshop, text=True, encoding="utf-8",
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as child:
        watchdog = threading.Timer(120, child.kill)
        watchdog.daemon = True
        watchdog.start()
        while not child.stdout.readline().startswith("step "):        # the first evaluation
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate()
        watchdog.cancel()
    assert child.returncode == 0 and errors.startswith("stopping") and errors.count("\n") == 1
    assert output.splitlines()[-1].endswith("python train.py --resume stopped")
    step = train.load("stopped")[1]["step"]
    assert main(["--resume", "stopped", "--steps", str(step + 1)]) == 0
    assert "final: val loss" in capsys.readouterr().out


def test_a_terminal_without_unicode_gets_its_sample():
    """Characters that the terminal cannot show do not end a command with an exception."""
    finished()
    command = [sys.executable, train.__file__, "--sample", "finished", "--prompt", "é"]
    child = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=120,
                           capture_output=True)
    assert (child.returncode, child.stderr) == (0, b"")


# ---------------------------------------------------------------- mutants

def multipliers_in_the_clip_norm(groups, c, right=train.clip_gradients):
    return right(groups, replace(c, clip_multipliers=True))


def one_lr_for_all(model, c, right=train.parameter_groups):
    """What `for group in groups: group["lr"] = lr` does."""
    return [group | {"initial_lr": c.lr} for group in right(model, c)]


def decay_not_divided(model, c, right=train.parameter_groups):
    S = {"head": c.head_norm_scale, "mlp": c.mlp_norm_scale}
    return [group | {"weight_decay": group["weight_decay"] * S.get(group["kind"], 1.0)}
            for group in right(model, c)]


def multiplier_in_two_groups(model, c, right=train.parameter_groups):
    groups = right(model, c)
    if groups[-1]["kind"] == "multiplier":
        groups[0]["params"] += groups[-1]["params"][:1]
    return groups


def multipliers_to_muon(model, c, right=train.parameter_groups):
    return [group | {"optimizer": c.optimizer} for group in right(model, c)]


def generator_forgotten(path, model, optimizers, batches, corpus, right=train.restore):
    state = batches.get_state()
    restored = right(path, model, optimizers, batches, corpus)
    batches.set_state(state)
    return restored


def optimizers_forgotten(path, model, optimizers, batches, corpus, right=train.restore):
    restored = right(path, model, optimizers, batches, corpus)
    for optimizer in optimizers:
        optimizer.state.clear()
    return restored


def split_by_position(documents):
    val = list(documents.values())[::10]
    return [text for text in documents.values() if text not in val], val


def shards_joined(corpus, part, starts):
    tokens = torch.from_numpy(np.concatenate(corpus.shards[part]).astype(np.int64))
    rows = torch.stack([tokens[s:s + corpus.block_size + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("check, name, mutant", [
    (test_clipping_does_not_see_the_multipliers, "clip_gradients", multipliers_in_the_clip_norm),
    (test_every_group_keeps_its_own_lr_through_the_schedule, "parameter_groups", one_lr_for_all),
    (test_norm_scales_keep_the_effective_lr, "parameter_groups", decay_not_divided),
    (test_every_parameter_is_in_exactly_one_group, "parameter_groups", multiplier_in_two_groups),
    (test_every_parameter_is_in_exactly_one_group, "parameter_groups", multipliers_to_muon),
    (test_new_files_move_no_old_file_to_the_other_side, "split", split_by_position)])
def test_mutants_are_caught(check, name, mutant, monkeypatch):
    """Each slip makes the check of its property fail."""
    monkeypatch.setattr(train, name, mutant)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("mutant", [generator_forgotten, optimizers_forgotten])
def test_mutants_of_resuming_are_caught(mutant, monkeypatch, tmp_path):
    """Forgetting the batches' generator, or the optimizers' states, fails the resume check."""
    monkeypatch.setattr(train, "restore", mutant)
    with pytest.raises(AssertionError):
        test_resuming_equals_not_stopping({}, tmp_path)


def test_a_mutant_of_windows_is_caught(monkeypatch, offline, tmp_path):
    """Joining the shards into one long text fails the check of the windows."""
    monkeypatch.setattr(Corpus, "windows", shards_joined)
    with pytest.raises(AssertionError):
        test_windows_are_slices_of_one_shard(offline, tmp_path)


def test_a_mutant_of_evaluation_is_caught(monkeypatch):
    """Drawing validation windows from the training generator changes the training batches."""
    right, used = Corpus.train_batch, []

    def train_batch(corpus, batch_size, generator, part):
        used.append(generator)
        return right(corpus, batch_size, generator, part)

    def val_batches(corpus, batch_size, count):
        yield right(corpus, batch_size, used[-1])

    monkeypatch.setattr(Corpus, "train_batch", train_batch)
    monkeypatch.setattr(Corpus, "val_batches", val_batches)
    with pytest.raises(AssertionError):
        test_evaluating_more_often_changes_nothing()
