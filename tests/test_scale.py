"""What train.py promises beyond a laptop, one property per test: downloaded shards, GPT-2's size,
steps in pieces, batches read ahead, torch.compile, memory, a corpus of any size, several processes.

Nothing here needs a network or a GPU: the server is on this machine, and two processes talk over
gloo on the CPU. "The same" means bit for bit; a tolerance stands beside the error that it was set
from, measured with torch 2.13 on a CPU. A mutant is train.py with a small slip made: it has to fail
the check of its property. The last part of the file is what the processes of a pair run.

    python -m pytest tests/test_scale.py
"""
import contextlib
import functools
import gc
import http.server
import itertools
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import StopAfter
from train import Config, Corpus, UserError, main

pytestmark = pytest.mark.train

# A step is 8 windows of 32 tokens: four forward passes of one process, or two of each of two
TINY = dict(data="text", device="cpu", n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=2,
            tokens_per_step=256, steps=6, lr=3e-3, embedding_lr=3e-3, multiplier_lr=0.1,
            warmup_steps=2, eval_interval=3, eval_windows=6, log_interval=1, norm_interval=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def workshop(tmp_path_factory):
    """The current folder of these tests, with shards of a little text, and without a network."""
    root, library = tmp_path_factory.mktemp("scale"), Path(sysconfig.get_paths()["stdlib"])

    def unreachable(name):
        raise requests.exceptions.ConnectionError("no network")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(train, "DATA", root / "data")
        patch.setattr(train, "RUNS", root / "runs")
        patch.setattr(train.tiktoken, "get_encoding", unreachable)
        patch.setenv("NO_PROXY", "127.0.0.1")
        files = {f"{name}.py": library / f"{name}.py" for name in ("heapq", "copy", "textwrap")}
        train.prepare(files, Path("text"), "three files", 300)
        yield root


def config(**changes):
    return train.resolve(Config(**(TINY | changes)))


def flags(**changes):
    """The command line of config(**changes)."""
    given = {"--" + name.replace("_", "-"): value for name, value in (TINY | changes).items()}
    return [word for flag, value in given.items()
            for word in ([flag] if value is True else [flag, str(value)])]


def losses(result):
    return [row["loss"] for row in result["log"]]


def refused(arguments, capsys):
    """The one sentence with which the command ends, with code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def distance(a, b):
    """Largest difference of two states' tensors, each relative to the norm of b's."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in a)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- downloading

VAL, TRAIN = "fineweb_val_000000.bin", "fineweb_train_000001.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends a file from the byte that is asked for, in pieces, as far as the server lets it."""

    def do_GET(self):
        server, name = self.server, self.path[1:]
        asked = self.headers.get("Range", "bytes=0-")
        with server.lock:
            server.requests.append((name, asked))
        if name not in server.files:
            return self.send_error(404)
        first = int(asked[len("bytes="):-1]) if server.ranges else 0
        body = server.files[name][first:]
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for i in range(0, len(body[:server.cut]), 2 ** 16):
            piece = body[:server.cut][i:i + 2 ** 16]
            with server.lock:                # before the client can have it
                server.sent += len(piece)
            self.wfile.write(piece)
            time.sleep(server.pause)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(monkeypatch, tmp_path):
    """A server of the files in `files`, which is FineWeb for now; train.DATA is empty."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.sent, server.lock = {}, [], 0, threading.Lock()
        server.ranges, server.cut, server.pause = True, None, 0.0
        server.url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(train, "FINEWEB", server.url)
        monkeypatch.setattr(train, "DATA", tmp_path)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def shard(count, seed=0):
    """The bytes of a shard of so many of GPT-2's tokens, drawn at random."""
    tokens = np.random.default_rng(seed).integers(0, 50257, count)
    path = Path(f"{count}-{seed}.bin")
    train.write_shard(path, tokens)
    content = path.read_bytes()
    path.unlink()
    return content


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def get(web, tmp_path, name=TRAIN):
    """Download one shard; return what is on the disk then."""
    train.download(web.url + name, tmp_path / name, train.read_shard)
    return (tmp_path / name).read_bytes()


def test_shards_are_downloaded_once(web, tmp_path):
    """fineweb() leaves the very bytes of the server and nothing else, and asks no second time."""
    web.files = {VAL: shard(3000), TRAIN: shard(4000)}
    for _ in range(2):
        paths = train.fineweb(1000)
        assert {p.name: p.read_bytes() for p in paths} == web.files
        assert files_in(tmp_path) == sorted(web.files) and len(web.requests) == 2


@pytest.mark.parametrize("cut", [0, 1, 1500])
def test_a_download_goes_on_where_it_stopped(cut, web, tmp_path):
    """After a break, the next call asks for no more than what is missing and the last byte."""
    web.files, web.cut = {TRAIN: shard(4000)}, cut
    with pytest.raises(UserError, match="goes on"):
        get(web, tmp_path)
    assert files_in(tmp_path) == [f".partial-{TRAIN}"]
    web.cut, web.sent = None, 0
    assert get(web, tmp_path) == web.files[TRAIN]
    start = max(0, cut - 1)
    assert web.requests[-1] == (TRAIN, f"bytes={start}-")
    assert web.sent == len(web.files[TRAIN]) - start
    assert files_in(tmp_path) == [TRAIN]


def test_a_broken_download_gets_one_sentence(web, tmp_path, capsys):
    """A connection that breaks ends the command with code 2 and a sentence with the url."""
    web.files, web.cut = {VAL: shard(3000), TRAIN: shard(4000)}, 1500
    error = refused(flags(data="fineweb"), capsys)
    assert web.url + VAL in error and str(tmp_path / "fineweb10B" / VAL) in error


def test_a_server_without_ranges_sends_everything_again(web, tmp_path):
    """Where Range is ignored (200, not 206), the file begins anew and is right."""
    web.files, web.cut, web.ranges = {TRAIN: shard(4000)}, 1500, False
    with pytest.raises(UserError):
        get(web, tmp_path)
    web.cut = None
    assert get(web, tmp_path) == web.files[TRAIN]


def test_a_download_killed_before_its_end_is_finished(web, tmp_path):
    """A .partial file that is complete becomes the shard, for one byte more."""
    web.files = {TRAIN: shard(4000)}
    (tmp_path / f".partial-{TRAIN}").write_bytes(web.files[TRAIN])
    assert get(web, tmp_path) == web.files[TRAIN]
    assert web.sent == 1 and files_in(tmp_path) == [TRAIN]


@pytest.mark.parametrize("content", [b"<html>Log in first</html>" * 99, shard(4000)[:-2], b""],
                         ids=["a page", "too few tokens", "nothing"])
def test_a_wrong_file_is_an_error_and_does_not_stay(content, web, tmp_path):
    """What is not the shard that its header promises is a UserError with the url, and is gone."""
    web.files = {TRAIN: content}
    with pytest.raises(UserError, match=re.escape(web.url + TRAIN)):
        get(web, tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("port", [None, 1], ids=["404", "no network"])
def test_no_file_and_no_network_get_one_sentence(port, web, tmp_path, capsys, monkeypatch):
    """The sentence names the url and the place where the file could be put by hand."""
    url = web.url if port is None else f"http://127.0.0.1:{port}/"
    monkeypatch.setattr(train, "FINEWEB", url)
    error = refused(flags(data="fineweb"), capsys)
    assert url + VAL in error and str(tmp_path / "fineweb10B" / VAL) in error
    assert files_in(tmp_path) == []


def test_two_downloads_at_once_agree(web, tmp_path):
    """Two runs that fetch the same shard at the same time both end with the right file."""
    web.files, web.pause, errors = {TRAIN: shard(10 ** 6)}, 0.01, []
    meet = threading.Barrier(2)

    def check(path):                         # both are at the end of their download now
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(2)                     # unless one waits for the other: that is right too
        train.read_shard(path)

    def fetch():
        try:
            train.download(web.url + TRAIN, tmp_path / TRAIN, check)
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (tmp_path / TRAIN).read_bytes() == web.files[TRAIN] and files_in(tmp_path) == [TRAIN]


@pytest.mark.parametrize("tokens, count", [(0, 1), (1, 1), (10 ** 8, 1), (10 ** 8 + 1, 2),
                                           (4000 * 2 ** 19, 21), (10 ** 12, 103)])
def test_a_run_asks_for_the_shards_it_needs(tokens, count, monkeypatch, tmp_path):
    """fineweb() is the validation shard and ceil(tokens / 10^8) others, at least 1, at most 103."""
    asked = []
    monkeypatch.setattr(train, "DATA", tmp_path)
    monkeypatch.setattr(train, "download", lambda url, path, check: asked.append((url, path)))
    paths = train.fineweb(tokens)
    names = [VAL] + [f"fineweb_train_{i:06}.bin" for i in range(1, count + 1)]
    assert asked == [(train.FINEWEB + path.name, path) for path in paths]
    assert [path.name for path in paths] == names


def sparse(path, count):
    """A shard of so many zeros that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    train.write_shard(path, np.zeros(0))
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(np.array([count], "<i4").tobytes())
        file.truncate(train.HEADER + 2 * count)
    return path


def test_shards_of_longer_runs_change_nothing(monkeypatch, tmp_path):
    """A run draws from the shards that it needs, whatever else has been downloaded before."""
    monkeypatch.setattr(train, "DATA", tmp_path)
    for name, count in ((VAL, 3000), (TRAIN, 4000)):
        (tmp_path / "fineweb10B").mkdir(exist_ok=True)
        (tmp_path / "fineweb10B" / name).write_bytes(shard(count))
    before = Corpus("fineweb", 32, tokens=1000)
    (tmp_path / "fineweb10B" / TRAIN.replace("1", "2")).write_bytes(shard(5000, seed=1))
    after = Corpus("fineweb", 32, tokens=1000)
    assert before.starts["train"].tolist() == after.starts["train"].tolist() == [4000 - 32]


def test_a_mutant_that_takes_all_shards_is_caught(monkeypatch, tmp_path):
    """Taking whatever lies in the folder fails the check."""
    monkeypatch.setattr(train, "fineweb", lambda tokens: sorted(tmp_path.rglob("*.bin")))
    with pytest.raises(AssertionError):
        test_shards_of_longer_runs_change_nothing(monkeypatch, tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="a sparse file takes all its room on Windows")
def test_fineweb_is_validated_on_its_first_tokens(monkeypatch, tmp_path):
    """With GPT-2's settings the validation windows are those that lie side by side in the first
    10 * 2^20 tokens of the validation shard, one after the other."""
    monkeypatch.setattr(train, "DATA", tmp_path)
    for name in (VAL, TRAIN):
        sparse(tmp_path / "fineweb10B" / name, 10 ** 8)
    c, seen = train.configure({"preset": "gpt2", "data": "fineweb"}, None), []
    corpus = Corpus(c.data, c.block_size)
    assert len(corpus.shards["val"][0]) == 10 * 2 ** 20 + 1           # the last target is one more
    corpus.windows = lambda part, starts: seen.extend(starts.tolist())
    list(corpus.val_batches(c.batch_size, c.eval_windows))
    assert seen == list(range(0, 10 * 2 ** 20, 1024))


def test_fineweb_from_the_command_line_in_miniature(web, tmp_path, capsys):
    """--preset gpt2 --data fineweb downloads, trains and ends well, without a tokenizer too."""
    web.files = {VAL: shard(3000), TRAIN: shard(4000)}
    assert main("--preset gpt2 --data fineweb --device cpu --no-compile --n-layer 1 --n-head 2 "
                "--n-embd 32 --block-size 32 --batch-size 2 --tokens-per-step 128 --steps 2 "
                "--eval-windows 4 --out".split() + [str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "final: val loss 10.8" in shown                            # ln 50304 = 10.83
    assert "(no sample without GPT-2's vocabulary)" in shown
    assert len(web.requests) == 2


# ---------------------------------------------------------------- GPT-2's size

def test_the_gpt2_preset_is_gpt2():
    """12 blocks of width 768 with 84,934,656 weights, 50304 tokens, half a million in a step."""
    c = train.resolve(train.configure({"preset": "gpt2"}, None))
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (12, 12, 768, 1024)
    assert (c.tokens_per_step, c.optimizer) == (524288, "muon")
    with torch.device("meta"):               # shapes without numbers
        model = train.build(c, 50304)
    sizes = {name: p.numel() for name, p in model.named_parameters() if name.endswith("weight")}
    assert sizes.pop("head.weight") == sizes.pop("embedding.weight") == 50304 * 768
    assert sum(sizes.values()) == 84_934_656 and len(sizes) == 12 * 7


def test_gpt2_tokens_get_a_rounded_vocabulary(tmp_path):
    """Shards without a tokenizer are GPT-2's: 50304 tokens, 50257 and some that never come."""
    path = tmp_path / "web_train_0.bin"
    path.write_bytes(shard(1000))
    corpus = Corpus(str(path), 8)
    assert (corpus.vocab_size, corpus.lines) == (50304, "gpt2")


def test_a_sample_leaves_out_tokens_that_do_not_exist():
    """What a model draws beyond its tokenizer's vocabulary is not decoded, the rest is."""
    lines = Path("text/tokenizer.tiktoken").read_text(encoding="utf-8")
    tokenizer, model = train.load_tokenizer(lines), train.build(config(), 400)
    drawn = model.generate(torch.tensor([[tokenizer.eot_token]]), 120,
                           generator=torch.Generator().manual_seed(5))[0, 1:].tolist()
    known = [t for t in drawn if t < 300]
    assert tokenizer.n_vocab == 300 and 0 < len(known) < len(drawn)
    assert train.sample(model, lines, "", 5) == tokenizer.decode(known)


# ---------------------------------------------------------------- a step in pieces

def test_a_step_is_a_whole_number_of_forward_passes(capsys):
    """Tokens that no whole number of forward passes makes up get one sentence with the flag."""
    error = refused(flags(tokens_per_step=250), capsys)
    assert "--tokens-per-step must be a multiple of 64" in error


def test_a_step_is_one_forward_pass_by_default():
    """Without tokens_per_step a step is batch_size windows."""
    assert config(tokens_per_step=None).tokens_per_step == 2 * 32


def test_smaller_pieces_are_the_same_step():
    """Half the batch size at as many tokens a step gives the same losses, to rounding."""
    whole, halves, quarters = (losses(train.train(config(batch_size=size), quiet=True))
                               for size in (8, 4, 2))
    assert halves == pytest.approx(whole, rel=1e-6)                   # measured: 1.7e-7
    assert quarters == pytest.approx(whole, rel=1e-6)                 # measured: 1.7e-7


# ---------------------------------------------------------------- batches read ahead

def steps_of(c, count):
    """What prefetch gives for the first steps, and what it should: drawn one after the other."""
    corpus = Corpus(c.data, c.block_size)
    ahead, plain = (torch.Generator().manual_seed(3) for _ in range(2))
    given = list(itertools.islice(train.prefetch(corpus, c, ahead, CPU), count))
    wanted = []
    for _ in range(count):
        x, y = corpus.train_batch(8, plain)
        wanted.append((list(zip(x.split(c.batch_size), y.split(c.batch_size))), plain.get_state()))
    return given, wanted


def test_reading_ahead_gives_the_same_batches():
    """The batches of each step are those of a loop that reads them when it needs them."""
    given, wanted = steps_of(config(), 5)
    for (batches, _), (expected, _) in zip(given, wanted, strict=True):
        assert len(batches) == 4
        for pair, expected_pair in zip(batches, expected, strict=True):
            assert all(map(torch.equal, pair, expected_pair))


def test_reading_ahead_does_not_move_the_generator_state():
    """The state that comes with a step, and goes into its checkpoint, is that after its own draw,
    not after the draw of the next step, which has been made by then."""
    given, wanted = steps_of(config(), 5)
    assert all(torch.equal(state, expected) for (_, state), (_, expected) in zip(given, wanted))


def state_of_the_next_draw(*arguments, right=train.prefetch):
    """What `yield batches, generator.get_state()` gives once the thread has read the next step."""
    steps = right(*arguments)
    batches, _ = next(steps)
    for following, state in steps:
        yield batches, state
        batches = following


def test_a_mutant_of_the_generator_state_is_caught(monkeypatch):
    """The state of the step read ahead fails the check, and a resumed run draws other batches."""
    monkeypatch.setattr(train, "prefetch", state_of_the_next_draw)
    with pytest.raises(AssertionError):
        test_reading_ahead_does_not_move_the_generator_state()
    whole = train.train(config(), quiet=True)
    half = train.train(config(out="mutant"), stop=StopAfter(3), quiet=True)
    resumed = train.train(config(), resume="mutant", quiet=True)
    assert losses(resumed)[:3] == losses(half) == losses(whole)[:3]
    assert losses(resumed)[3:] != losses(whole)[3:]


def test_what_the_thread_finds_wrong_reaches_the_user(tmp_path, capsys):
    """A token beyond the vocabulary, met while reading ahead, is one sentence."""
    train.write_shard(tmp_path / "web_val_0.bin", np.zeros(100))
    train.write_shard(tmp_path / "web_train_1.bin", np.full(100, 60000))
    assert "token 60000" in refused(flags(data=str(tmp_path)), capsys)


def test_no_thread_outlives_its_run(tmp_path, capsys):
    """After train(), and after a command that failed in the middle of it, no thread is left."""
    before = threading.enumerate()
    train.train(config(), quiet=True)
    assert threading.enumerate() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "clip_gradients", out_of_memory)
        refused(flags(out=str(tmp_path / "run")), capsys)
    gc.collect()
    assert threading.enumerate() == before


# ---------------------------------------------------------------- nobody waits for the GPU

class Waits(TorchDispatchMode):
    """Counts in each step the operators for which the CPU would have to wait for a GPU.

    add_up's tolist() of a CPU tensor is none of them: it reads the memory, without an operator."""
    NAMES = {"_local_scalar_dense",          # .item(), float(), bool()
             "equal", "nonzero", "masked_select", "_unique2"}

    def __init__(self):
        super().__init__()
        self.steps = [0]

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.steps[-1] += function._schema.name.split("::")[1] in self.NAMES
        return function(*arguments, **(keywords or {}))


def waits_in_each_step(**changes):
    """train() for 4 steps of which the last alone is logged, measured and evaluated."""
    waits, right = Waits(), train.prefetch

    def prefetch(*arguments):
        for step in right(*arguments):
            waits.steps.append(0)
            yield step
    with pytest.MonkeyPatch.context() as patch, waits:
        patch.setattr(train, "prefetch", prefetch)
        train.train(config(**changes, steps=4, log_interval=99, norm_interval=99,
                           eval_interval=99), stop=threading.Event(), quiet=True)
    return waits.steps[1:]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_asks_the_device_for_no_number(optimizer):
    """Between the rows of the log no tensor becomes a Python number: a GPU never stands still."""
    steps = waits_in_each_step(optimizer=optimizer)
    assert steps[:3] == [0, 0, 0] and steps[3] > 0                    # the last one shows we count


def test_a_mutant_that_waits_is_caught(monkeypatch):
    """One float(norm) in each step is seen in each step."""
    def clip_gradients(groups, c, right=train.clip_gradients):
        norm, norm_with = right(groups, c)
        return torch.tensor(float(norm)), norm_with
    monkeypatch.setattr(train, "clip_gradients", clip_gradients)
    assert waits_in_each_step()[:3] == [1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_does_not_synchronize_the_gpu(optimizer, monkeypatch):
    """CUDA itself sees no synchronization from a step's batches to the question whether to stop."""
    prefetch, add_up = train.prefetch, train.add_up

    def begin(*arguments):
        for step in prefetch(*arguments):
            torch.cuda.set_sync_debug_mode("error")
            yield step

    def end(*numbers):                       # called first in a step to ask whether to stop
        torch.cuda.set_sync_debug_mode("default")
        return add_up(*numbers)
    monkeypatch.setattr(train, "prefetch", begin)
    monkeypatch.setattr(train, "add_up", end)
    try:
        train.train(config(device="cuda", optimizer=optimizer), quiet=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- torch.compile

@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: g++")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")       # torch, about itself
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_compiled_run_is_the_same_run(optimizer, tmp_path):
    """--compile changes the losses by rounding and the checkpoint's names not at all."""
    plain, compiled = (train.train(config(optimizer=optimizer, steps=3, compile=compile,
                                          out=str(tmp_path / str(compile))), quiet=True)
                       for compile in (False, True))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-6)        # measured: 8e-8
    names = [list(train.load(tmp_path / str(compile))[1]["model"]) for compile in (False, True)]
    assert names[0] == names[1]


@pytest.mark.parametrize("with_kernel", [False, True])
def test_the_model_is_one_graph(with_kernel):
    """torch.compile finds nothing in the model at which it would have to break off, under autocast,
    with the kernel too."""
    model, tokens = train.build(config(), 300), torch.zeros(2, 8, dtype=torch.long)
    if with_kernel:
        train.use_kernel(model)
    model.compile(fullgraph=True, backend="aot_eager")      # raises at a break; compiles no code
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens, tokens)[1].backward()


def test_a_compiler_that_fails_gets_one_sentence(tmp_path, capfd):
    """Where torch.compile does not work, the command ends with code 2 and names --no-compile."""
    import torch._inductor.config
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main(flags(compile=True, n_embd=16, out=str(tmp_path / "run"))) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: torch.compile fails here (") and "--no-compile" in error


def test_logits_beside_a_loss_are_for_looking_at():
    """Beside a loss the logits carry no gradient (a compiled backward pass would hold a second
    tensor of their size); without targets they do."""
    model, tokens = train.build(config(), 300), torch.zeros(1, 4, dtype=torch.long)
    logits, loss = model(tokens, tokens)
    assert loss.requires_grad and not logits.requires_grad
    assert model(tokens)[0].requires_grad


# ---------------------------------------------------------------- memory

def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")


@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 6, 7])
def test_out_of_memory_says_how_to_need_less(batch_size, monkeypatch, tmp_path, capsys):
    """The sentence names flags that this run could be repeated with: a smaller batch, and the
    tokens of the same step."""
    monkeypatch.setattr(train, "clip_gradients", out_of_memory)
    tokens = 2 * 32 * batch_size
    asked = dict(batch_size=batch_size, tokens_per_step=tokens, out=str(tmp_path / "run"))
    error = refused(flags(**asked), capsys)
    advice = re.findall(r"--(batch-size|tokens-per-step) (\d+)", error)
    smaller = {name.replace("-", "_"): int(number) for name, number in advice}
    assert "out of memory" in error and smaller["batch_size"] < batch_size
    assert config(**(asked | smaller)).tokens_per_step == tokens


def test_a_batch_of_one_cannot_be_smaller(monkeypatch, tmp_path, capsys):
    """Out of memory with one window at a time, the sentence names other settings."""
    monkeypatch.setattr(train, "clip_gradients", out_of_memory)
    error = refused(flags(batch_size=1, out=str(tmp_path / "run")), capsys)
    assert "--block-size" in error and "--batch-size" not in error


def test_other_errors_are_not_mistaken_for_it(monkeypatch, tmp_path):
    """Any other RuntimeError comes out as it is."""
    def fail(*_):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(train, "clip_gradients", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(flags(out=str(tmp_path / "run")))


def test_a_run_ends_with_its_peak_memory(tmp_path, capsys):
    """The end of a run says how many GB it took."""
    assert main(flags(steps=1, out=str(tmp_path / "run"))) == 0
    assert re.search(r"peak memory (\d+\.\d\d|nan) GB", capsys.readouterr().out)


def page_faults(keep):
    """How many pages a step of a model that makes 16 MB of logits waits for, after a warm-up."""
    code = f"""import resource, torch, train
if {keep}:
    train.keep_freed_memory()
torch.set_num_threads(1)
model, tokens = train.build(train.Config(n_layer=1), 4096), torch.zeros(8, 128, dtype=torch.long)
for step in range(26):
    if step == 6:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(tokens, tokens)[1].backward()
    model.zero_grad()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)"""
    return int(subprocess.run([sys.executable, "-c", code], env=environment(), check=True,
                              capture_output=True, text=True, timeout=120).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc, Linux's C library")
def test_a_step_reuses_the_memory_of_the_last():
    """keep_freed_memory() leaves a step nearly no new page to wait for; without it (the mutant)
    each step waits for thousands."""
    assert page_faults(keep=True) < 1000 < page_faults(keep=False)    # measured: 0-300, 3800-7500


def growth(root, small, large):
    """Bytes that Python and numpy take at most to open 10 shards and draw a batch: how many more
    for `large` than for `small` tokens in a shard."""
    peaks = []
    for count in (small, large):
        for i in range(11):
            sparse(root / f"{count}/web_{'train' if i else 'val'}_{i:06}.bin", count)
        tracemalloc.start()
        corpus = Corpus(str(root / str(count)), 1024)
        corpus.train_batch(32, torch.Generator().manual_seed(0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return peaks[1] - peaks[0]


@pytest.mark.skipif(os.name == "nt", reason="a sparse file takes all its room on Windows")
def test_a_corpus_takes_no_memory_of_its_own(tmp_path):
    """A corpus of 10^9 tokens takes no more memory than one of 10^6."""
    growth(tmp_path, 10 ** 4, 10 ** 4)       # what is made once, at the first batch
    assert growth(tmp_path, 10 ** 5, 10 ** 8) < 10_000      # measured: -1000; the tokens are 2 GB


def test_a_mutant_that_reads_the_corpus_is_caught(monkeypatch, tmp_path):
    """Reading shards instead of mapping them takes memory with their size."""
    right = train.read_shard
    monkeypatch.setattr(train, "read_shard", lambda path: np.array(right(path)))
    assert growth(tmp_path, 10 ** 4, 10 ** 5) > 10_000       # measured: 1,980,000


@pytest.mark.skipif(os.name == "nt", reason="a sparse file takes all its room on Windows")
def test_windows_lie_beyond_two_to_the_31(tmp_path):
    """A window number that no 32-bit integer holds is the right window of the right shard."""
    for i in range(4):
        path = sparse(tmp_path / f"web_{'train' if i else 'val'}_{i}.bin", 10 ** 9 if i else 100)
    place, tokens = 5 * 10 ** 8, np.arange(1, 10, dtype="<u2")
    with open(path, "r+b") as file:
        file.seek(train.HEADER + 2 * place)
        file.write(tokens.tobytes())
    corpus = Corpus(str(tmp_path), 8)
    start = 2 * (10 ** 9 - 8) + place
    x, y = corpus.windows("train", np.array([start]))
    assert start > 2 ** 31 and x.tolist() == [list(range(1, 9))]
    assert y.tolist() == [list(range(2, 10))]
    drawn = torch.randint(int(corpus.starts["train"][-1]), (100,)).max()
    assert drawn > 2 ** 31                   # and train_batch draws such numbers


# ---------------------------------------------------------------- several processes

def observe(resume=None, stop=None, **changes):
    """train(), with what it keeps to itself: the windows of each step, and the last weights."""
    build, windows, models, drawn = train.build, Corpus.windows, [], []

    def spy_build(*arguments):
        models.append(build(*arguments))
        return models[-1]

    def spy_windows(corpus, part, starts):
        if part == "train":
            drawn.append(starts.tolist())
        return windows(corpus, part, starts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", spy_build)
        patch.setattr(Corpus, "windows", spy_windows)
        result = train.train(config(**changes), resume, stop, quiet=True)
    return {"result": result, "model": models[0].state_dict(),
            "windows": drawn[:len(result["log"])]}                    # not what was read ahead


def in_two_processes():
    """What each process of the pair below runs, in one process group to save time."""
    def run(name, **how):
        torch.save(observe(**how, out=name), f"{name}-{train.RANK}.pt")

    train.dist.init_process_group()
    run("adamw")
    run("muon", optimizer="muon")
    run("half", stop=StopAfter(3) if train.RANK == 1 else None)       # all stop if one has to
    run("resumed", resume="half")
    with pytest.MonkeyPatch.context() as patch:
        right = Corpus.train_batch
        patch.setattr(Corpus, "train_batch", lambda corpus, size, generator, part: right(
            corpus, size, generator, slice(0, None, train.WORLD)))
        run("same_windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "DistributedDataParallel", lambda model: model)
        run("no_mean")
    train.dist.destroy_process_group()


def one_of_two_dies(*arguments):
    """The command, but the second process is gone in the middle of step 4."""
    clip, steps = train.clip_gradients, itertools.count(1)

    def clip_gradients(groups, c):
        if next(steps) == 4 and train.RANK == 1:
            os._exit(1)
        return clip(groups, c)
    train.clip_gradients = clip_gradients
    sys.exit(main(list(arguments)))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                         "PYTHONPATH": str(train.HERE), "MASTER_ADDR": "127.0.0.1"} | more


@contextlib.contextmanager
def torchrun(*words):
    """`torchrun --nproc_per_node=2 words`, which is killed if it has not ended in two minutes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_addr=127.0.0.1", f"--master_port={free_port()}", *words]
    with subprocess.Popen(command, env=environment(), text=True, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        watchdog = threading.Timer(120, child.kill)
        watchdog.start()
        yield child
        watchdog.cancel()


@pytest.fixture(scope="module")
def pair(workshop):
    """The runs of in_two_processes: a function of a run's name to what both processes saw."""
    shared = {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(subprocess.Popen(
            [sys.executable, __file__, "in_two_processes"], text=True, encoding="utf-8",
            stderr=subprocess.PIPE,
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)))) for rank in (0, 1)]
        watchdog = threading.Timer(120, lambda: [child.kill() for child in children])
        watchdog.start()
        errors = [child.communicate()[1] for child in children]
        watchdog.cancel()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    return functools.cache(lambda name: [torch.load(f"{name}-{rank}.pt") for rank in (0, 1)])


@functools.cache
def alone(optimizer):
    """The run of one process with as many tokens in a step."""
    return observe(optimizer=optimizer)


def assert_like_one_process(seen, one):
    # measured: 1.3e-7, 2.6e-6 and 3e-8; the mutants below: 6e-3 and 0.2
    assert losses(seen["result"]) == pytest.approx(losses(one["result"]), rel=1e-6)
    assert distance(seen["model"], one["model"]) < 3e-5
    assert seen["result"]["final"] == pytest.approx(one["result"]["final"], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_are_one_with_the_same_step(optimizer, pair):
    """The losses, the evaluation and the last weights are those of one process, to rounding."""
    for seen in pair(optimizer):
        assert_like_one_process(seen, alone(optimizer))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_processes_have_the_same_weights(optimizer, pair):
    """After the last step the models of both are equal bit for bit."""
    first, second = pair(optimizer)
    assert same(first["model"], second["model"])


def test_two_processes_share_one_draw(pair):
    """In each step each process has every other window of the draw that one process would make."""
    draws = alone("adamw")["windows"]
    assert [len(draw) for draw in draws] == [8] * 6
    for rank, seen in enumerate(pair("adamw")):
        assert seen["windows"] == [draw[rank::2] for draw in draws]


def test_two_processes_can_be_resumed(pair):
    """Stopped because one of them has to, then resumed, a pair ends as if it had not stopped."""
    for half, resumed, whole in zip(pair("half"), pair("resumed"), pair("adamw")):
        assert half["result"]["step"] == 3
        assert losses(resumed["result"])[3:] == losses(whole["result"])[3:]
        assert same(resumed["model"], whole["model"])


def test_a_checkpoint_of_two_processes_serves_one(pair):
    """One process goes on with the checkpoint of two, to the same end up to rounding."""
    pair("half")
    assert_like_one_process(observe(resume="half"), alone("adamw"))


def test_mutants_of_two_processes_are_caught(pair):
    """Processes that take the same windows, and such that do not average their gradients, are not
    like one process; the latter drift apart too."""
    for name in ("same_windows", "no_mean"):
        with pytest.raises(AssertionError):
            assert_like_one_process(pair(name)[0], alone("adamw"))
    first, second = pair("no_mean")
    assert not same(first["model"], second["model"])


@pytest.fixture(scope="module")
def interrupted(workshop):
    """A long run under torchrun that Ctrl-C stops after its first evaluation: what it printed."""
    with torchrun(train.__file__, *flags(steps=10 ** 6, eval_interval=1, out="stopped")) as child:
        lines = []
        while not (lines and lines[-1].startswith("step ")):
            lines.append(child.stdout.readline())
            assert lines[-1], child.stderr.read()
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate()
    return "".join(lines) + output, errors


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGINT to one process")
def test_ctrl_c_stops_all_processes_with_a_checkpoint(interrupted):
    """Ctrl-C under torchrun ends with a checkpoint of the last step, which can be resumed."""
    output, _ = interrupted
    step = train.load("stopped")[1]["step"]
    assert f"stopped after step {step} of" in output
    assert output.rstrip().endswith("python train.py --resume stopped")
    assert train.train(config(steps=step + 1), resume="stopped", quiet=True)["step"] == step + 1


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGINT to one process")
def test_one_of_the_processes_talks_and_writes(interrupted):
    """Under torchrun every line is printed once, and the files are those of one process."""
    output, _ = interrupted
    for words in ("three files", "in clip norm", "step      1: val", "stopped after step"):
        assert output.count(words) == 1
    assert files_in(Path("stopped")) == ["checkpoint.pt", "config.json", "log.csv", "norms.csv"]


def test_a_process_that_dies_ends_the_run(workshop):
    """When one of the processes is gone, torchrun ends with an error, and the last checkpoint is
    whole: one process can go on with it."""
    with torchrun(__file__, "one_of_two_dies", *flags(out="widowed")) as child:
        _, errors = child.communicate()
    assert child.returncode not in (0, None) and "rror" in errors
    assert train.load("widowed")[1]["step"] == 3
    assert_like_one_process(observe(resume="widowed"), alone("adamw"))


if __name__ == "__main__":
    {job.__name__: job for job in (in_two_processes, one_of_two_dies)}[sys.argv[1]](*sys.argv[2:])
