"""Train a small GPT with learnable multipliers on real text, on whatever machine this is.

    python train.py                          # Python's standard library as text: no download
    python train.py --multipliers none       # the baseline: same batches, same initial weights
    python train.py --optimizer muon         # Muon for the matrices inside the blocks
    python train.py --data my_book.txt       # your own text: a file, a folder, or token shards
    python train.py --preset gpt2 --data fineweb                     # GPT-2's size, on a GPU
    torchrun --nproc_per_node=8 train.py --preset gpt2 --data fineweb    # the same run on eight
    python train.py --sample runs/vector-adamw-s0 --prompt "def main("

To be read from top to bottom: settings, text to tokens, measuring, which parameter is trained how,
the loop, the files of a run, what it shows at the end, the command line. The subject of this
repository is in "which parameter is trained how": the multipliers have an lr and a (fifty times
smaller) weight decay of their own, and do not count in the norm that clips the gradient. With "the
loop" that is a quarter of the file, and can be read first; the rest (text, checkpoints, flags) is
what any training program needs.
"""
import argparse
import base64
import csv
import ctypes
import hashlib
import http.client
import json
import math
import os
import signal
import sys
import sysconfig
import tempfile
import time
import typing
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Callable

import numpy as np
import rustbpe
import tiktoken
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import resource
except ImportError:           # Windows
    resource = None

import kernel
from model import CHOICES, GPT, GPTConfig
from multipliers import MULTIPLIERS, is_multiplier, merge, use_kernel
from muon import Muon

HERE = Path(__file__).parent
DATA = HERE / "data"          # prepared text, shared by all runs
RUNS = HERE / "runs"          # a folder for each run: checkpoint, logs, settings, picture
# torchrun tells each of its processes which of how many it is; without it we are number 0 of 1
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


class UserError(Exception):
    """Something the user can mend: the command line prints one sentence and exits with code 2."""


# ---------------------------------------------------------------- settings

def setting(default, help, choices=None, group=None):
    return field(default=default, metadata={"help": help, "choices": choices, "group": group})


@dataclass
class Config:
    """Every setting of a run. Each field is also a flag of the command line."""
    preset: str = setting("auto", "cpu, gpu (larger), auto: by the device; gpt2: for fineweb",
                          ("auto", "cpu", "gpu", "gpt2"), "what to train on")
    data: str = setting("stdlib", "stdlib (Python's own source), shakespeare (downloads 1 MB), "
                        "fineweb (200 MB for 10^8 tokens, as many as the run needs), a text file, "
                        "a folder of text files, a token shard or a folder of shards")
    vocabulary: int = setting(4096, "tokens to learn from a text; 257 for single bytes")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = setting(0, "of the initial weights, the batches and the sample")
    out: str | None = setting(None, "folder of the run (default: a new one in runs/)")
    n_layer: int = setting(4, "blocks", group="model")
    n_head: int = setting(4, "attention heads")
    n_embd: int = setting(128, "width of the residual stream")
    block_size: int = setting(128, "context, in tokens")
    multipliers: str = setting("vector", "what the matrices carry", CHOICES["multipliers"])
    placement: str = setting("all", "which matrices carry it", CHOICES["placement"])
    final_gain: str = setting("vector", "the final RMSNorm gain, which is the head's multiplier",
                              CHOICES["final_gain"])
    block_gains: str = setting("vector", "the RMSNorm gains in the blocks", CHOICES["block_gains"])
    scale_kernel: bool = setting(False, "compute W_eff by the CUDA kernel of kernel.py; needs nvcc")
    compile: bool = setting(False, "torch.compile the model: a minute first, faster steps after")
    optimizer: str = setting("adamw", "for the matrices inside the blocks", ("adamw", "muon"),
                             "optimization")
    steps: int = setting(1500, "optimizer steps")
    batch_size: int = setting(8, "sequences in a forward pass, on each GPU")
    tokens_per_step: int | None = setting(None, "tokens in a step, over as many forward passes and "
                                          "GPUs as it takes (default: one forward pass on each)")
    lr: float | None = setting(None, "peak lr of all but the multipliers (default: as tuned)")
    embedding_lr: float | None = setting(None, "peak lr of the embedding (default: the preset's)")
    weight_decay: float = setting(0.1, "of all matrices but the embedding")
    multiplier_lr: float | None = setting(None, "peak lr of the multipliers (default: as tuned)")
    multiplier_weight_decay: float = setting(2e-3, "only to hold symmetric pairs (paper, 4.1)")
    head_norm_scale: float = setting(1.0, "S: lr * S and weight decay / S for the head (paper, 3)")
    mlp_norm_scale: float = setting(1.0, "S: the same for gate, up and down (paper, App. B)")
    grad_clip: float = setting(1.0, "largest gradient norm, multipliers left out; 0 for no limit")
    clip_multipliers: bool = setting(False, "count them after all, to see the harm (paper, 4.3)")
    warmup_steps: int = setting(100, "steps of linear warm-up")
    decay_fraction: float = setting(0.2, "last part of the run, in which the lr falls to 0")
    eval_interval: int = setting(250, "steps between evaluations; each is followed by a checkpoint",
                                 group="watching")
    eval_windows: int = setting(256, "windows of validation text, the same every time")
    log_interval: int = setting(10, "steps between rows of log.csv")
    norm_interval: int = setting(50, "steps between rows of norms.csv: RMS of W, W_eff, ...")


# What differs from Config's defaults. The embedding begins at RMS 1, a matrix at 0.09, and a row
# moves only when its token comes: it wants a far larger lr (sweep in README.md).
# gpu: about nanoGPT's small model, not tuned. gpt2: GPT-2's blocks, 85M parameters, with the
# settings with which others reach a loss of 3.28 on FineWeb, in our units (README.md); compiling
# pays in a run of an hour.
PRESETS = {"cpu": {"embedding_lr": 0.2},
           "gpu": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 32,
                   "steps": 1200, "embedding_lr": 0.2},
           "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024,
                    "batch_size": 32, "tokens_per_step": 2 ** 19, "steps": 4000,
                    "optimizer": "muon", "embedding_lr": 0.2, "weight_decay": 0.3,
                    "decay_fraction": 0.7, "eval_windows": 10240, "compile": True}}
# Peak lrs by optimizer, from the sweep in README.md, made with the cpu preset (gpu: not yet tuned)
LR = {"adamw": 4e-3, "muon": 4e-3}
MULTIPLIER_LR = {"adamw": 4e-4, "muon": 4e-4}


def resolve(config: Config) -> Config:
    """The same with the open lrs filled in. Raises UserError for values that no run can have."""
    positive = ("steps", "batch_size", "block_size", "tokens_per_step", "eval_interval",
                "eval_windows", "log_interval", "norm_interval", "lr", "embedding_lr",
                "multiplier_lr", "head_norm_scale", "mlp_norm_scale")
    for f in fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        choices, least = f.metadata["choices"], "positive" if f.name in positive else "0 or more"
        if choices and value not in choices:
            raise UserError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
        if isinstance(value, (int, float)) and not (
                0 <= value < math.inf and (value > 0 or f.name not in positive)):
            raise UserError(f"{flag} must be {least}, not {value}")
    if config.decay_fraction > 1:
        raise UserError(f"--decay-fraction must be at most 1, not {config.decay_fraction}")
    if config.seed >= 2 ** 63:
        raise UserError(f"--seed must be below 2^63, not {config.seed}")
    if not 257 <= config.vocabulary <= 65536:                        # tokens are stored as uint16
        raise UserError(f"--vocabulary must be 257 (the bytes and {END}) to 65536, "
                        f"not {config.vocabulary}")
    at_once = config.batch_size * config.block_size * WORLD
    if (config.tokens_per_step or at_once) % at_once:
        raise UserError(f"--tokens-per-step must be a multiple of {at_once} (--batch-size times "
                        f"--block-size times processes), not {config.tokens_per_step}")
    return replace(config, lr=config.lr or LR[config.optimizer],
                   multiplier_lr=config.multiplier_lr or MULTIPLIER_LR[config.optimizer],
                   tokens_per_step=config.tokens_per_step or at_once)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"                                  # torchrun: to each its own
    try:
        probe = torch.ones(1, device=name)
        probe.item()                                                 # "meta" cannot
        return probe.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}")


# ---------------------------------------------------------------- text to tokens

END = "<|endoftext|>"         # stands before every document; the last token of a vocabulary
# GPT-2's way of cutting text into words before merging bytes, in tiktoken's faster spelling
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MAGIC, VERSION, HEADER = 20240520, 1, 1024       # llm.c's shards: 1 KB of header, then uint16
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
# Parts of the standard library that are data, or that some installations lack
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
              "lib2to3", "idlelib", "turtledemo", "pydoc_data", "ensurepip"}


def write_whole(path: Path, write) -> None:
    """Call write(temporary path), then rename: a crash leaves the old file or the new one."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(HEADER // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped. Raises UserError if the file is something else."""
    header = np.fromfile(path, dtype="<i4", count=HEADER // 4)
    if len(header) < HEADER // 4 or tuple(header[:2]) != (MAGIC, VERSION):
        raise UserError(f"{path} is not a token shard (llm.c's, which begins with {MAGIC}): give "
                        "--data a folder without such .bin files, or a folder of shards")
    if path.stat().st_size != HEADER + 2 * int(header[2]):
        raise UserError(f"{path} is cut short or damaged: its header promises {header[2]} tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER, shape=(int(header[2]),))


def train_tokenizer(texts: list[str], vocabulary: int) -> str:
    """Byte-pair merges learned from the texts, as lines `base64(bytes) rank`, tiktoken's format."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocabulary - 1, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return "".join(f"{base64.b64encode(bytes(token)).decode()} {rank}\n" for token, rank in ranks)


def load_tokenizer(lines: str) -> tiktoken.Encoding | None:
    """lines as train_tokenizer wrote them, or "gpt2" (None where that cannot be fetched)."""
    if lines == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")                     # downloads 1.5 MB once
        except OSError:                                              # requests' errors are OSErrors
            print("GPT-2's vocabulary cannot be fetched: no bits per byte and no sample")
            return None
    pairs = (line.split() for line in lines.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def find_files(root: Path, stdlib: bool) -> dict[str, Path]:
    """Name -> path of every file below root, hidden ones left out; or root itself if it is one."""
    if root.is_file():
        return {root.name: root}
    names = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*"))}
    return {name: path for name, path in names.items() if path.is_file()
            and not any(part.startswith(".") for part in name.split("/"))
            and not (stdlib and (not name.endswith(".py") or NOT_STDLIB & set(name.split("/"))
                                 or path.name.startswith("_sysconfigdata") or "config-" in name))}


def split(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """Train and validation texts. A tenth of the files, chosen by their names alone, so that a new
    file moves no other; where there are fewer than ten, the last tenth of each."""
    val = [name for name in documents
           if zlib.crc32(name.encode("utf-8", "surrogateescape")) % 10 == 0]
    if len(documents) >= 10 and 0 < len(val) < len(documents):
        return ([text for name, text in documents.items() if name not in val],
                [documents[name] for name in val])
    cuts = [(text, len(text) * 9 // 10) for text in documents.values()]
    return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]


def prepare(files: dict[str, Path], folder: Path, label: str, vocabulary: int) -> None:
    """Tokenizer, train.bin, val.bin and about.json in `folder`, which appears when all is done."""
    documents, skipped = {}, []
    for name, path in files.items():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            text = "\0"
        if "\0" in text:                                             # a binary file
            skipped.append(name)
        else:
            documents[name] = text
    if not any(text.strip() for text in documents.values()):
        raise UserError(f"{label} holds no UTF-8 text to train on")
    train, val = split(documents)
    lines = train_tokenizer(train, vocabulary)
    tokenizer = load_tokenizer(lines)
    about = {"text": label, "files": len(documents), "skipped": skipped,
             "bytes": sum(len(text.encode("utf-8")) for text in documents.values()),
             "sha256": hashlib.sha256("\0".join(documents.values()).encode("utf-8")).hexdigest()}
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA, prefix=".partial-") as partial:
        made = Path(partial, "made")
        made.mkdir()
        (made / "tokenizer.tiktoken").write_text(lines, encoding="utf-8")
        for part, texts in (("train", train), ("val", val)):
            tokens = np.array([token for ids in tokenizer.encode_ordinary_batch(texts)
                               for token in (tokenizer.eot_token, *ids)])
            write_shard(made / f"{part}.bin", tokens)
            about[part] = len(tokens)
        (made / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        if not folder.exists():                                      # another run may be faster
            made.rename(folder)


def download(url: str, path: Path, check: Callable[[Path], object]) -> None:
    """Fetch url to path. What has come lies in a .partial file, where the next call goes on;
    check(file) raises UserError if it is not what it should be. Two at once do no harm: they write
    the same bytes."""
    print(f"downloading {url}")
    partial = path.with_name(f".partial-{path.name}")
    # From the last byte that is here: of a whole file a server would refuse to send nothing
    start = max(0, partial.stat().st_size - 1) if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            with open(partial, "r+b") as file, tqdm(
                    total=reply.length, desc=path.name, unit="B", unit_scale=True,
                    disable=None) as bar:
                if reply.status == 206:      # 200: all of it comes, once more
                    file.seek(start)
                while chunk := reply.read(2 ** 20):
                    bar.update(file.write(chunk))
            if reply.length:
                raise OSError(f"the connection broke {reply.length:,} bytes before the end")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) == 416:                         # longer than the file there
            partial.unlink()
        raise UserError(f"{url} cannot be downloaded ({error}): the same command goes on where "
                        f"this one stopped; or fetch it another way, to {path}")
    try:
        check(partial)
        os.replace(partial, path)
    except FileNotFoundError:                # another run was faster
        check(path)
    except UserError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{url} is not what it should be: {error}")


def check_shakespeare(path: Path) -> None:
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE[1]:
        raise UserError("its SHA-256 differs")


def fineweb(tokens: int) -> list[Path]:
    """The shards of FineWeb, in GPT-2's tokens, that a run over so many tokens needs: 10^8 tokens
    in each, 103 for training, one for validation. Those that are not here yet are downloaded."""
    shards = min(103, max(1, math.ceil(tokens / 10 ** 8)))
    paths = [DATA / "fineweb10B" / f"fineweb_{name}.bin"
             for name in ("val_000000", *(f"train_{i:06}" for i in range(1, shards + 1)))]
    for path in paths:
        if not path.exists():
            download(FINEWEB + path.name, path, read_shard)
    return paths


def locate(data: str, vocabulary: int) -> Path:
    """The shard, or the folder of shards, for --data. New text is prepared first."""
    root, label = Path(data), data
    if data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        label = f"standard library of Python {sys.version.split()[0]}"
    elif data == "shakespeare":
        root = DATA / "shakespeare.txt"
        if not root.exists():
            download(SHAKESPEARE[0], root, check_shakespeare)
    elif not root.exists():
        raise UserError(f"--data {data}: there is no such file or folder")
    if root.suffix == ".bin" or any(root.glob("*.bin")):
        return root
    files = find_files(root, data == "stdlib")
    # Names, sizes and times tell whether the text has changed, without reading it
    listing = [(name, p.stat().st_size, p.stat().st_mtime_ns) for name, p in files.items()]
    key = hashlib.sha256(repr((listing, vocabulary)).encode("utf-8")).hexdigest()[:10]
    folder = DATA / f"{'stdlib' if data == 'stdlib' else root.resolve().stem}-{key}"
    if not folder.exists():
        print(f"preparing {label}")
        prepare(files, folder, label, vocabulary)
    return folder


def describe(folder: Path) -> str:
    """What `prepare` made of a text, in a line or two."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    line = (f"text: {about['text']}, {about['files']} files, {about['bytes']:,} bytes, "
            f"{about['train']:,} + {about['val']:,} tokens (train + val), "
            f"sha256 {about['sha256'][:12]}")
    if about["skipped"]:
        line += (f"\nleft out, not UTF-8 text: {len(about['skipped'])} files, "
                 f"{', '.join(about['skipped'][:5])}{', ...' * (len(about['skipped']) > 5)}")
    return line


class Corpus:
    """Train and val: lists of shards. `windows` cuts block_size + 1 tokens out of them."""

    def __init__(self, data: str, block_size: int, vocabulary: int = 4096, tokens: int = 0):
        """tokens: how many the run will see, which decides how much of fineweb it needs."""
        self.block_size = block_size
        if data == "fineweb":
            paths = fineweb(tokens)
        else:
            path = locate(data, vocabulary)
            paths = sorted(path.glob("*.bin")) if path.is_dir() else [path]
        folder = paths[0].parent
        self.about = (describe(folder) if (folder / "about.json").is_file() else
                      f"shards: {data}, {len(paths)} files")
        val = [read_shard(p) for p in paths if "val" in p.name]
        train = [read_shard(p) for p in paths if "val" not in p.name]
        if data == "fineweb":                    # the field's validation text: its first 10 * 2^20
            val = [val[0][:10 * 2 ** 20 + 1]]
        if train and not val:                                        # keep the end for validation
            cut = len(train[-1]) * 9 // 10
            train[-1], val = train[-1][:cut], [train[-1][cut:]]
        self.shards = {"train": train, "val": val}
        self.starts = {}                         # windows up to the end of each shard
        for part, shards in self.shards.items():
            counts = [len(shard) - block_size for shard in shards] or [0]
            if min(counts) < 1:
                raise UserError(f"{data} is too short: its {part} part has fewer than the "
                                f"{block_size + 1} tokens of one window (--block-size + 1)")
            self.starts[part] = np.cumsum(counts)
        own = folder / "tokenizer.tiktoken"
        self.lines = own.read_text(encoding="utf-8") if own.is_file() else "gpt2"
        self.tokenizer = load_tokenizer(self.lines)
        # GPT-2's 50257 rounded up: rows of 64 numbers suit a GPU, and no target is among the new
        self.vocab_size = 50304 if self.lines == "gpt2" else self.tokenizer.n_vocab
        # Bytes behind each token, to turn nats per token into bits per byte; END stands for none
        self.token_bytes = self.tokenizer and np.array([
            len(self.tokenizer.decode_single_token_bytes(t)) * (t != self.tokenizer.eot_token)
            for t in range(self.tokenizer.n_vocab)])

    def windows(self, part: str, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, T], int64, of the windows at these starts."""
        rows = []
        for start in starts:
            i = int(np.searchsorted(self.starts[part], start, side="right"))
            first = int(start) - (int(self.starts[part][i - 1]) if i else 0)
            rows.append(self.shards[part][i][first:first + self.block_size + 1])
        tokens = np.stack(rows)
        if tokens.max() >= self.vocab_size:
            raise UserError(f"a shard holds token {tokens.max()}, the vocabulary {self.vocab_size} "
                            "tokens: put the tokenizer.tiktoken of the shards beside them")
        x, y = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(y)

    def train_batch(self, size: int, generator: torch.Generator, part=slice(None)):
        """Random windows: of `size` that are drawn, those in this part."""
        starts = torch.randint(int(self.starts["train"][-1]), (size,), generator=generator)
        return self.windows("train", starts.numpy()[part])

    def val_batches(self, batch_size: int, count: int):
        """Evenly spaced windows, the same at every call, as many as fit side by side."""
        total = int(self.starts["val"][-1])
        count = min(count, (total - 1) // self.block_size + 1)
        starts = np.arange(count) * ((total - 1) // max(1, count - 1))
        for i in range(0, count, batch_size):
            yield self.windows("val", starts[i:i + batch_size])


def prefetch(corpus: Corpus, config: Config, generator: torch.Generator, device: torch.device):
    """For one step after the other: its batches, and the generator's state after them. A thread
    reads those of the next step from the disk while this step computes."""
    size = config.tokens_per_step // config.block_size

    def read():                              # the same draw in every process, to each its share
        pair = corpus.train_batch(size, generator, slice(RANK, None, WORLD))
        if device.type == "cuda":            # from pinned memory a copy need not hold up the CPU
            pair = [t.pin_memory() for t in pair]
        return list(zip(*(t.split(config.batch_size) for t in pair))), generator.get_state()
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(read)
        while True:
            step = ahead.result()
            ahead = thread.submit(read)
            yield step


# ---------------------------------------------------------------- measuring

def matmul_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs that have it (compute capability 8.0 on), fp32 everywhere else."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device):
    dtype = matmul_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def add_up(*numbers: float) -> list[float]:
    """The sum of each over all processes, which wait for each other here (on the CPU)."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        try:
            dist.all_reduce(sums)
        except RuntimeError as error:
            raise UserError(f"process {RANK} ends: another one did ({str(error).splitlines()[0]})")
    return sums.tolist()


@torch.no_grad()
def evaluate(model: GPT, corpus: Corpus, config: Config, device: torch.device) -> dict[str, float]:
    """Over the fixed validation windows: nats per token, bits per byte, RMS of the logits."""
    nats = squares = tokens = n_bytes = 0.0
    for x, y in islice(corpus.val_batches(config.batch_size, config.eval_windows),
                       RANK, None, WORLD):                           # each process takes a share
        with autocast(device):               # forward: not compiled, which would take a minute more
            logits, loss = model.forward(x.to(device), y.to(device))
        nats += loss.item() * y.numel()
        squares += logits.float().square().mean().item() * y.numel()
        tokens += y.numel()
        n_bytes += 0 if corpus.token_bytes is None else int(corpus.token_bytes[y.numpy()].sum())
    nats, squares, tokens, n_bytes = add_up(nats, squares, tokens, n_bytes)
    return {"val_loss": nats / tokens, "logit_rms": math.sqrt(squares / tokens),
            "val_bits": nats / math.log(2) / n_bytes if n_bytes else math.nan}


@torch.no_grad()
def norms(model: GPT, step: int) -> list[dict]:
    """The RMS of every matrix W, its W_eff and its multipliers, and of every gain."""
    def rms(x: Tensor) -> float:
        return x.float().square().mean().sqrt().item()
    rows = []
    for name, module in model.named_modules():
        if hasattr(module, "effective_weight"):
            rows.append({"step": step, "name": name, "W": rms(module.weight),
                         "W_eff": rms(module.effective_weight()),
                         **{m: rms(getattr(module, m)) for m in MULTIPLIERS
                            if getattr(module, m) is not None}})
        elif getattr(module, "gain", None) is not None:
            rows.append({"step": step, "name": name, "gain": rms(module.gain)})
    return rows


# ---------------------------------------------------------------- which parameter is trained how

def parameter_groups(model: GPT, config: Config) -> list[dict]:
    """Every parameter in exactly one group: pattern, params, optimizer, lr, weight decay, and
    whether it counts in the clip norm. The embedding and the gains are not decayed.

    S of the norm experiments multiplies a group's lr and divides its weight decay: that moves the
    equilibrium norm sqrt(lr / 2 wd) by S and keeps the effective lr sqrt(lr wd) (paper, section 3).
    """
    S_mlp, S_head = config.mlp_norm_scale, config.head_norm_scale
    lr, wd, matrices = config.lr, config.weight_decay, config.optimizer
    kinds = {
        "attn": ("blocks.*.attn.*.weight", matrices, lr, wd),
        "mlp": ("blocks.*.mlp.*.weight", matrices, lr * S_mlp, wd / S_mlp),
        "head": ("head.weight", "adamw", lr * S_head, wd / S_head),
        "embedding": ("embedding.weight", "adamw", config.embedding_lr or lr, 0.0),
        "gain": ("*.gain", "adamw", lr, 0.0),
        # 1-D and 0-D, so never Muon's; an lr of their own, since nothing holds their random walk
        "multiplier": ("*.scalar, *.row, *.column", "adamw",
                       config.multiplier_lr, config.multiplier_weight_decay)}
    members = {kind: [] for kind in kinds}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        kind = ("multiplier" if is_multiplier(name) else "gain" if parts[-1] == "gain" else
                parts[2] if parts[0] == "blocks" else parts[0])
        members[kind].append(parameter)
    groups = [{"kind": kind, "pattern": pattern, "params": members[kind], "optimizer": optimizer,
               "lr": lr, "initial_lr": lr, "weight_decay": wd, "clip": kind != "multiplier"}
              for kind, (pattern, optimizer, lr, wd) in kinds.items() if members[kind]]
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in model.parameters()}
    return groups


def print_groups(groups: list[dict], config: Config) -> None:
    print(f"{'parameters':<27}{'tensors':>8}{'numbers':>12}  {'optimizer':<10}{'lr':>9}{'decay':>9}"
          "  in clip norm")
    for g in groups:
        numbers = sum(p.numel() for p in g["params"])
        print(f"{g['pattern']:<27}{len(g['params']):>8}{numbers:>12,}  {g['optimizer']:<10}"
              f"{g['lr']:>9.2g}{g['weight_decay']:>9.2g}  "
              f"{'yes' if g['clip'] or config.clip_multipliers else 'no'}")


def make_optimizers(groups: list[dict], device: torch.device) -> list[torch.optim.Optimizer]:
    adamw = [group for group in groups if group["optimizer"] == "adamw"]
    muon = [group for group in groups if group["optimizer"] == "muon"]
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=device.type != "mps")]
    return optimizers + [Muon(muon)] if muon else optimizers


def schedule(step: int, steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Warm-up, stable, decay: the factor on every group's own lr in this step (counted from 0)."""
    left = (steps - step) / max(1, round(steps * decay_fraction))
    return min(1.0, (step + 1) / (warmup_steps + 1), left)


def clip_gradients(groups: list[dict], config: Config) -> tuple[Tensor, Tensor]:
    """Shrink the gradient to grad_clip; return its norm without and with the multipliers.

    A multiplier's gradient is a sum over a whole row of W: at the start the multipliers would
    dominate the norm and shrink everybody's step, so they are not counted (paper, 4.3). The factor
    does not touch them either, where the paper is silent: what is not measured is not clipped.
    """
    others = [p for g in groups if g["clip"] for p in g["params"]]
    everyone = [p for g in groups for p in g["params"]]
    norm, norm_with = (torch.nn.utils.get_total_norm([p.grad for p in some])
                       for some in (others, everyone))
    if config.grad_clip > 0:
        clipped, total = (everyone, norm_with) if config.clip_multipliers else (others, norm)
        torch.nn.utils.clip_grads_with_norm_(clipped, config.grad_clip, total)
    return norm, norm_with


# ---------------------------------------------------------------- the loop

def build(config: Config, vocab_size: int) -> GPT:
    shape = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    try:
        return GPT(GPTConfig(vocab_size, **shape), config.seed)
    except ValueError as error:
        raise UserError(str(error))


def attach_kernel(model: GPT, device: torch.device) -> None:
    """Compute W_eff by kernel.py. It is compiled here, where a missing compiler is one sentence."""
    use_kernel(model)
    try:
        if device.type == "cuda":
            kernel.library(matmul_dtype(device))
    except RuntimeError as error:
        raise UserError(str(error))


def out_of_memory(error: Exception) -> bool:
    """Is it? CUDA has a class for that, a CPU has only words."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory"))


def compile_model(model: GPT, config: Config, device: torch.device) -> None:
    """torch.compile, tried at once on a batch of zeros, so that what it lacks is one sentence."""
    zeros = torch.zeros(config.batch_size, config.block_size, dtype=torch.long, device=device)
    try:
        model.compile()
        with autocast(device):
            loss = model(zeros, zeros)[1]
        loss.backward()
    except Exception as error:               # many kinds: no C++ compiler, no Triton, an old GPU
        if out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"torch.compile fails here ({reason}): --no-compile trains without it")
    model.zero_grad()


def keep_freed_memory() -> None:
    """Up to 1 GB for the next step. By default Linux's C library gives what a step has freed back
    to the system, and the next step waits for each page to be zeroed again: a tenth of its time."""
    if sys.platform == "linux":
        M_TOP_PAD = -2                       # from malloc.h
        ctypes.CDLL(None).mallopt(M_TOP_PAD, 2 ** 30)


def peak_memory(device: torch.device) -> float:
    """In GB: what the GPU's allocator gave at most; elsewhere, that of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e9 if sys.platform == "darwin" else 1e6) if resource else math.nan


def train_step(parallel, batches: list[tuple[Tensor, Tensor]], groups: list[dict],
               optimizers: list[torch.optim.Optimizer], config: Config, device: torch.device):
    """One update from the gradient's mean over the batches. Returns the loss and both gradient
    norms as tensors: nothing here asks the GPU for a number, so the CPU can run ahead of it."""
    train_loss = 0.0
    for i, (x, y) in enumerate(batches, 1):
        if WORLD > 1:                        # one mean over the processes for all these batches
            parallel.require_backward_grad_sync = i == len(batches)
        x, y = (t.to(device, non_blocking=device.type == "cuda") for t in (x, y))
        with autocast(device):
            loss = parallel(x, y)[1]         # the logits, gigabytes in a large run, are not kept
        (loss / len(batches)).backward()
        train_loss += loss.detach() / len(batches)
    norm, norm_with = clip_gradients(groups, config)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return train_loss, norm, norm_with


def train(config: Config, resume: str | None = None, stop: Event | None = None,
          quiet: bool = False) -> dict:
    """Train; return {"config", "step", "log", "norms", "final"}: log and norms are lists of rows as
    in the files of a run, final is the last evaluation.

    Files are written only where config.out says. resume: the checkpoint to go on from. stop: once
    it is set, the run ends after the step under way, with a checkpoint. Raises UserError.
    """
    config, device = resolve(config), pick_device(config.device)
    keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if LOCAL_RANK > 0:                       # wait: the first process of a machine prepares the
        add_up(0)                            # text, and comes to this only after that
    corpus = Corpus(config.data, config.block_size, config.vocabulary,
                    config.steps * config.tokens_per_step)
    if LOCAL_RANK == 0:
        add_up(0)
    model = build(config, corpus.vocab_size).to(device)
    if config.scale_kernel:
        attach_kernel(model, device)
    if config.compile:
        compile_model(model, config, device)
    # Each process has the whole model and its own part of a batch; what DistributedDataParallel
    # adds is the mean of their gradients. So all take the same step, Muon's too, and stay equal.
    parallel = DistributedDataParallel(model) if WORLD > 1 else model
    quiet = quiet or RANK > 0                # one of them talks and writes
    out = config.out if RANK == 0 else None
    groups = parameter_groups(model, config)
    optimizers = make_optimizers(groups, device)
    # Batches have a generator of their own, from which evaluation draws nothing
    generator = torch.Generator().manual_seed(config.seed)
    step, history, saved_at = 0, {"log": [], "norms": []}, None
    if resume:
        step, history = restore(resume, model, optimizers, generator, corpus)
        saved_at = f"{resume} (step {step})"
        if step >= config.steps:
            raise UserError(f"{resume} is complete at step {step}: --steps can make it longer")
    if not quiet:
        print(corpus.about)
        print_groups(groups, config)
    if out:                                  # now, not after the first hour
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be a folder: {error.strerror}")
    steps = prefetch(corpus, config, generator, device)
    clock, clock_step, stopped = time.perf_counter(), step, False
    bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True,
               disable=quiet or None)                                # None: only on a terminal

    while step < config.steps and not stopped:
        factor = schedule(step, config.steps, config.warmup_steps, config.decay_fraction)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * factor               # each group keeps its own peak
        batches, generator_state = next(steps)
        loss, norm, norm_with = train_step(parallel, batches, groups, optimizers, config, device)
        step += 1
        bar.update()

        stopped = add_up(stop is not None and stop.is_set())[0] > 0      # all of them, or none
        last = stopped or step == config.steps
        if step % config.norm_interval == 0 or last:
            history["norms"] += norms(model, step)
        evaluated = step % config.eval_interval == 0 or last
        if not evaluated and step % config.log_interval:
            continue
        row = {"step": step, "loss": add_up(float(loss))[0] / WORLD, "lr": config.lr * factor,
               "grad_norm": float(norm), "grad_norm_with_multipliers": float(norm_with)}
        seconds = time.perf_counter() - clock    # float() has waited for the GPU
        row["tokens_per_second"] = (step - clock_step) * config.tokens_per_step / seconds
        if evaluated:
            row |= evaluate(model, corpus, config, device)
        if not math.isfinite(row["loss"] + row["grad_norm"] + row.get("val_loss", 0)):
            bar.close()
            raise UserError(f"the loss is not a finite number any more by step {step}; last good "
                            f"checkpoint: {saved_at or 'none yet'}; try a lower --lr")
        history["log"].append(row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=f"{row['tokens_per_second']:,.0f}")
        if evaluated and not quiet:
            bar.write(f"step {step:>6}: val loss {row['val_loss']:.4f} nats/token, "
                      f"{row['val_bits']:.4f} bits/byte", file=sys.stdout)
        if evaluated and out:
            path = save(config, corpus, history, step, model, optimizers, generator_state)
            saved_at = f"{path} (step {step})"
        clock, clock_step = time.perf_counter(), step
    bar.close()
    return {"config": asdict(config), "step": step, **history,
            "final": {key: row[key] for key in ("val_loss", "val_bits", "logit_rms")}}


# ---------------------------------------------------------------- the files of a run

def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def save(config, corpus, history, step, model, optimizers, generator_state) -> Path:
    """config.json, log.csv, norms.csv and checkpoint.pt: each whole, or as it was before."""
    folder = Path(config.out)
    settings = json.dumps(asdict(config), indent=1)
    write_whole(folder / "config.json", lambda p: p.write_text(settings, encoding="utf-8"))
    write_whole(folder / "log.csv", lambda p: write_csv(p, history["log"]))
    write_whole(folder / "norms.csv", lambda p: write_csv(p, history["norms"]))
    checkpoint = {"config": asdict(config), "shape": asdict(model.config), "step": step,
                  "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                  "batches": generator_state, "history": history, "tokenizer": corpus.lines}
    write_whole(folder / "checkpoint.pt", lambda p: torch.save(checkpoint, p))
    return folder / "checkpoint.pt"


def load(path: str) -> tuple[Path, dict]:
    """The file and the content of a checkpoint, named by itself or by its run's folder."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{path}: there is no checkpoint")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        saved["config"], saved["shape"], saved["model"], saved["tokenizer"]
        asdict(Config(**saved["config"])), GPTConfig(**saved["shape"])
    except Exception:                        # torch.load fails in many ways on other files
        raise UserError(f"{file} is damaged, or not a checkpoint of this program")
    return file, saved


def restore(path: str, model: GPT, optimizers: list, generator: torch.Generator, corpus: Corpus):
    """Put everything back to where the checkpoint was written; return its step and history."""
    _, saved = load(path)
    if "optimizers" not in saved:
        raise UserError(f"{path} is merged: without its multipliers it cannot be trained further")
    if saved["tokenizer"] != corpus.lines:                           # another text has others
        raise UserError(f"{path} was trained on another text (other files, or another Python)")
    if saved["shape"] != asdict(model.config) or len(saved["optimizers"]) != len(optimizers):
        raise UserError(f"{path} has another shape: resume it with the model, the multipliers and "
                        "the optimizer that it began with")
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        groups = optimizer.state_dict()["param_groups"]              # lr and decay as asked now
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    generator.set_state(saved["batches"])
    return saved["step"], saved["history"]


def rebuild(saved: dict) -> GPT:
    """The model of a checkpoint."""
    model = GPT(GPTConfig(**saved["shape"]))
    model.load_state_dict(saved["model"])
    return model


def write_merged(path: str) -> Path:
    """Beside the checkpoint, merged.pt: its multipliers folded into its matrices. An ordinary
    Llama-type model, which GPT(multipliers="none") reads."""
    file, saved = load(path)
    merged = {"config": saved["config"], "tokenizer": saved["tokenizer"],
              "shape": saved["shape"] | {"multipliers": "none"},
              "model": merge(rebuild(saved)).state_dict()}
    write_whole(file.with_name("merged.pt"), lambda p: torch.save(merged, p))
    return file.with_name("merged.pt")


# ---------------------------------------------------------------- what a run shows at its end

def sample(model: GPT, lines: str, prompt: str, seed: int, new_tokens: int = 120) -> str:
    """Text that begins with the prompt; `lines` is the tokenizer."""
    tokenizer, device = load_tokenizer(lines), next(model.parameters()).device
    if tokenizer is None:
        return "(no sample without GPT-2's vocabulary)"
    start = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = model.generate(start, new_tokens, generator=generator)[0, 1:].tolist()
    return tokenizer.decode([t for t in tokens if t < tokenizer.n_vocab])    # not the rounded-up


def learned_scales(history: dict) -> dict[str, float]:
    """RMS(W_eff) / RMS(W) of every matrix with multipliers, at the end of the run."""
    end = history["norms"][-1]["step"]
    return {row["name"]: row["W_eff"] / row["W"] for row in history["norms"]
            if row["step"] == end and any(m in row for m in MULTIPLIERS)}


def draw(history: dict, path: Path) -> None:
    """The run in one picture: its losses, and where the matrices' norms went."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = history["log"]
    left.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=0.7, label="one batch")
    rows = [r for r in rows if "val_loss" in r]
    left.plot([r["step"] for r in rows], [r["val_loss"] for r in rows], "o-", label="validation")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend()
    end = history["norms"][-1]["step"]
    for kind in ("q", "k", "v", "out", "gate", "up", "down"):
        rows = [r for r in history["norms"] if r["step"] == end and r["name"].endswith(f".{kind}")]
        line, = right.plot([r["W_eff"] for r in rows], "o-", ms=4, label=kind)
        right.plot([r["W"] for r in rows], "--", lw=0.8, color=line.get_color())
    right.set(xlabel="block", xticks=range(history["config"]["n_layer"]),
              ylabel="RMS of W_eff (points) and of W (dashed)")
    right.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120, format="png")


# ---------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


def make_parser() -> Parser:
    """A flag for each field of Config, and the commands that do not train."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100))
    hints = typing.get_type_hints(Config)
    for f in fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind = (*typing.get_args(hints[f.name]), hints[f.name])[0]   # float of float | None
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if f.metadata["choices"]:
            how["choices"] = f.metadata["choices"]
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        group.add_argument("--" + f.name.replace("_", "-"), help=text, default=argparse.SUPPRESS,
                           **how)
    group = parser.add_argument_group("other commands (CHECKPOINT: the file, or the run's folder)")
    group.add_argument("--resume", metavar="CHECKPOINT", help="go on with a run that was stopped")
    group.add_argument("--sample", metavar="CHECKPOINT", help="write text with a trained model")
    group.add_argument("--prompt", default="", metavar="TEXT", help="how a sample begins")
    group.add_argument("--merge", metavar="CHECKPOINT", help="write merged.pt beside it: the "
                       "multipliers folded into the matrices, an ordinary model")
    return parser


def configure(flags: dict, resume: str | None) -> Config:
    """Flags override the preset, or the settings of the run that is resumed."""
    if resume:
        file, saved = load(resume)
        known = saved["config"] | {"out": str(file.parent)}
    else:
        preset = flags.get("preset", "auto")
        if preset == "auto":
            preset = "gpu" if pick_device(flags.get("device", "auto")).type == "cuda" else "cpu"
        known = PRESETS[preset]
    config = Config(**(known | flags))
    if config.out is None:                                           # a folder that no run has used
        name = f"{config.multipliers}-{config.optimizer}-s{config.seed}"
        config.out = str(RUNS / name)
        if Path(config.out).exists():
            config.out = str(RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    elif Path(config.out, "checkpoint.pt").exists() and not (
            resume and Path(config.out).resolve() == file.parent.resolve()):
        raise UserError(f"{config.out} holds a run: go on with it by --resume {config.out}, or "
                        "choose another --out")
    return config


def train_command(config: Config, resume: str | None, prompt: str) -> None:
    began, stop = time.perf_counter(), Event()

    def finish_step(*_):                 # the first Ctrl-C: save after this step; the second: abort
        print("stopping after this step (a second Ctrl-C stops at once)", file=sys.stderr)
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    before = signal.signal(signal.SIGINT, finish_step)
    if WORLD > 1:                                # the others wait while the first one downloads
        dist.init_process_group(timeout=timedelta(hours=3))
    try:
        result = train(config, resume, stop)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        halves = [n for n in range(1, config.batch_size // 2 + 1) if config.batch_size % n == 0]
        smaller = (f"--batch-size {halves[-1]} with --tokens-per-step "
                   f"{resolve(config).tokens_per_step}: the same step in smaller pieces"
                   if halves else "a smaller --block-size or --n-embd")
        raise UserError(f"out of memory; try {smaller}")
    finally:
        signal.signal(signal.SIGINT, before)
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    if result["step"] < config.steps:
        print(f"stopped after step {result['step']} of {config.steps} and saved; to go on: "
              f"python train.py --resume {config.out}")
        return
    scales = learned_scales(result)
    ranked = sorted(scales, key=scales.get)
    if ranked:
        print("learned scales RMS(W_eff) / RMS(W): smallest "
              + ", ".join(f"{name} {scales[name]:.2f}" for name in ranked[:3]) + "; largest "
              + ", ".join(f"{name} {scales[name]:.2f}" for name in ranked[:-4:-1]))
    write_whole(Path(config.out, "run.png"), lambda partial: draw(result, partial))
    _, saved = load(config.out)
    device = pick_device(config.device)
    memory, model = peak_memory(device), rebuild(saved).to(device)
    text = sample(model, saved["tokenizer"], prompt, config.seed)
    print(f"a sample:\n{'-' * 60}\n{text}\n{'-' * 60}")
    print(f"saved in {config.out}: checkpoint.pt, log.csv, norms.csv, config.json, run.png; "
          f"{time.perf_counter() - began:.0f} s in all, peak memory {memory:.2f} GB")
    print(f"final: val loss {result['final']['val_loss']:.4f} nats/token, "
          f"{result['final']['val_bits']:.4f} bits/byte")


def main(arguments: list[str] | None = None) -> int:
    try:
        flags = vars(make_parser().parse_args(arguments))
        resume, path, prompt, merging = map(flags.pop, ("resume", "sample", "prompt", "merge"))
        if merging:
            print(f"wrote {write_merged(merging)}")
        elif path:
            _, saved = load(path)
            model = rebuild(saved).to(pick_device(flags.get("device", "auto")))
            print(sample(model, saved["tokenizer"], prompt, flags.get("seed", 0)))
        else:
            train_command(configure(flags, resume), resume, prompt)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")     # a terminal without Unicode still gets a sample
    sys.exit(main())
