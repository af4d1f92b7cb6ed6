"""Tests of kernel.py, most of them for a machine without a GPU.

Four kinds, each skipped with a reason where it cannot run:
  the op        on CPU tensors, where it is PyTorch's formula: gradients, compile, errors
  the source    the CUDA text itself, compiled by g++ and executed on the CPU by cuda_on_cpu.h:
                every index, bound, alignment and sum, for all dtypes and shapes around every edge;
                and a list of bugs put into it on purpose, each of which these checks must find
  the compiler  nvcc builds it for sm_80 and sm_90 without spills, in few enough registers
  the GPU       the same results on the real thing, in streams, CUDA graphs and torch.compile

What the first three cannot show: races, since coroutines never run at the same time (a missing
barrier is found only if one of two orders of threads gives wrong numbers); offsets beyond 2^31
entries; whether PyTorch's loader and the driver take the build; and speed. All that needs a GPU.
"""
import contextlib
import ctypes
import inspect
import mmap
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import kernel
import train
from kernel import TYPES, scale, scale_backward
from model import GPT, GPTConfig
from multipliers import use_kernel

pytestmark = pytest.mark.kernel
HERE = Path(__file__).parent
EDGES = (1, 31, 32, 33, 127, 128, 129, 255, 256, 257)     # of a warp, of a block with V = 1 and 4


def example(rows, cols, dtype, device="cpu", seed=0):
    """Random W, r, c (float32) and G (dtype); multipliers between 0.5 and 1.5."""
    draw = torch.Generator().manual_seed(seed)
    W, G = torch.randn(2, rows, cols, generator=draw)
    r, c = (torch.rand(n, generator=draw) + 0.5 for n in (rows, cols))
    return [t.to(device) for t in (W, r, c, G.to(dtype))]


def check(results, W, r, c, G, case=""):
    """W_eff and dW must have the bits of PyTorch's formula; dr and dc within 5e-7 of float64,
    relative to the sum of the terms' sizes. The largest error in all cases here is 1.8e-7."""
    W_eff, dW, dr, dc = results
    assert torch.equal(W_eff, (r[:, None] * W * c).to(G.dtype)), f"W_eff {case}"
    assert torch.equal(dW, G.float() * c * r[:, None]), f"dW {case}"
    W, r, c, G = (t.double() for t in (W, r, c, G))
    for name, got, terms, axis in (("dr", dr, G * W * c, 1), ("dc", dc, r[:, None] * G * W, 0)):
        error, size = (got - terms.sum(axis)).abs(), terms.abs().sum(axis)
        assert (error <= 5e-7 * size).all(), f"{name} {case}"              # also fails for NaN


# ---------------------------------------------------------------- the op on CPU tensors


def test_gradients_agree_with_finite_differences():
    """The backward formulas are the derivatives of the forward one."""
    inputs = [t.double().requires_grad_() for t in example(5, 7, torch.float32)[:3]]
    assert torch.autograd.gradcheck(lambda *t: scale(*t, torch.float64), inputs)


@pytest.mark.parametrize("dtype", TYPES)
def test_cpu_op_is_the_formula(dtype):
    """On CPU tensors the op's outputs pass the same check as the kernel's."""
    W, r, c, G = example(33, 129, dtype)
    check([scale(W, r, c, dtype), *scale_backward(G, W, r, c)], W, r, c, G)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "empty"])
def test_opcheck(layout):
    """PyTorch's own checks of a custom op: schema, fake tensors, strides, autograd registration."""
    W, r, c, G = example(0 if layout == "empty" else 6, 10, torch.bfloat16)
    if layout == "strided":
        W, G, c = W.T.contiguous().T[:, ::2], G.T.contiguous().T[:, ::2], c[::2]
    inputs = [t.detach().requires_grad_() for t in (W, r, c)]
    torch.library.opcheck(scale, (*inputs, torch.bfloat16))
    torch.library.opcheck(scale_backward, (G, W, r, c))


def test_compiles_into_one_graph():
    """torch.compile(fullgraph=True) takes the op in, and gives the gradients of eager mode."""
    W, r, c, _ = example(64, 32, torch.bfloat16)
    inputs, x = [t.requires_grad_() for t in (W, r, c)], torch.randn(8, 32).bfloat16()

    def loss(W, r, c):
        y = torch.nn.functional.linear(x, scale(W, 2 * r, c, torch.bfloat16))
        return y.float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))):
        assert torch.equal(a, b)


def test_scalar_folds_into_the_rows():
    """scale(W, s * r, c) differentiates to the ds of s W: <W_eff / s, G> (paper, eq. 4)."""
    W, r, c, G = (t.double() for t in example(5, 7, torch.float32))
    s = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (ds,) = torch.autograd.grad(scale(W, s * r, c, torch.float64), s, G)
    torch.testing.assert_close(ds, (r[:, None] * W * c * G).sum())


BAD = {
    "transposed r and c": lambda W, r, c: scale(W, c, r, torch.bfloat16),
    "W is a vector": lambda W, r, c: scale(W[0], r, c, torch.bfloat16),
    "a number for r": lambda W, r, c: scale(W, r[:1], c, torch.bfloat16),
    "W in bfloat16": lambda W, r, c: scale(W.bfloat16(), r, c, torch.bfloat16),
    "r in float64": lambda W, r, c: scale(W, r.double(), c, torch.bfloat16),
    "integer W_eff": lambda W, r, c: scale(W, r, c, torch.int32),
    "float64 W_eff of float32": lambda W, r, c: scale(W, r, c, torch.float64),
    "G of another shape": lambda W, r, c: scale_backward(W.T, W, r, c),
    "G of a wrong dtype": lambda W, r, c: scale_backward(W.double(), W, r, c),
    "two devices": lambda W, r, c: kernel.validate(W, r.to("meta"), c, torch.bfloat16),
    "the same, before a launch": lambda W, r, c: kernel.forward_cuda(W, c, r, torch.bfloat16),
    "and before that of backward": lambda W, r, c: kernel.backward_cuda(W, W, c, r),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_gets_one_clear_sentence(bad):
    """Whatever the op is not meant for raises ValueError with the shapes and dtypes it got."""
    with pytest.raises(ValueError, match=r"^scale makes .* not torch.* from torch.*\[3"):
        BAD[bad](*example(3, 4, torch.float32)[:3])


def test_cpu_user_needs_no_compiler():
    """Without nvcc, ninja or g++ on PATH: importing kernel.py loads no build tools, the op works,
    and `python kernel.py` says that there is no GPU."""
    code = ("import kernel, sys\nassert 'torch.utils.cpp_extension' not in sys.modules\n"
            "kernel.main()")
    environment = os.environ | {"PATH": "", "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-B", "-c", code], cwd=HERE.parent, env=environment,
                         capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert "No CUDA device here" in run.stdout and "16.3 bytes per weight" in run.stdout


@pytest.mark.parametrize("missing", ["nvcc", "ninja"])
def test_missing_tool_is_named(monkeypatch, tmp_path, missing):
    """CUDA tensors without nvcc or without ninja: one sentence with the tool and the way around."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: missing != "ninja")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(RuntimeError, match=f"(?i){missing}.*without --scale-kernel") as error:
        kernel.library.__wrapped__(torch.bfloat16)
    assert "\n" not in str(error.value) and error.value.__cause__ is not None


# ---------------------------------------------------------------- the source, run on the CPU


def fenced(tensor, side):
    """A copy of `tensor` whose first byte ("start") or last byte ("end") touches a page that may be
    neither read nor written; another such page lies at the other end."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (address, address + page + pages):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), page, 0) == 0
    offset = page + (pages - size if side == "end" else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


class Fences(TorchDispatchMode):
    """Fences in every tensor allocated inside; new memory is NaN until the kernel writes to it."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty", "new_empty", "empty_like"):
            return fenced(out.fill_(float("nan")), self.side)
        return fenced(out, self.side) if name == "clone" else out


def emulated(folder, dtype, source=kernel.CUDA):
    """The CUDA source as a CPU library. Two things in it are not C++: the headers, which
    cuda_on_cpu.h stands in for, and the launches f<<<grid, block, ...>>>(arguments)."""
    source = re.sub(r"#include <cuda\w+\.h>", "", source)
    source, launches = re.subn(r"(\w+)<<<(.*?), 0, stream>>>\((.*?)\);",
                               r"launch(\2, [&] { \1(\3); });", source)
    assert launches == 3
    name = folder / f"{TYPES[dtype]}_{len(list(folder.iterdir()))}"
    name.with_suffix(".cpp").write_text(source, encoding="utf-8")
    subprocess.run(["g++", "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE",
                    "-ffp-contract=off", "-fsanitize=alignment,bounds",
                    "-fsanitize-undefined-trap-on-error", f"-DELEMENT={TYPES[dtype]}",
                    "-include", HERE / "cuda_on_cpu.h", name.with_suffix(".cpp"), "-o", name],
                   check=True)
    functions = ctypes.CDLL(str(name))
    functions.run_forward.restype = functions.run_backward.restype = ctypes.c_char_p
    return functions


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The unchanged source for every dtype: {dtype: library}."""
    if not (shutil.which("g++") and sys.platform == "linux"):
        pytest.skip("executing the CUDA source on the CPU takes Linux and g++")
    folder = tmp_path_factory.mktemp("emulated")
    return {dtype: emulated(folder, dtype) for dtype in TYPES}


@contextlib.contextmanager
def calls(library):
    """kernel.py's CUDA functions call `library`, with addresses of CPU tensors and stream 0."""
    with mock.patch.object(kernel, "library", lambda dtype: library), \
            mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()), \
            mock.patch.object(torch.cuda, "current_stream", lambda: mock.Mock(cuda_stream=0)):
        yield


def run(library, W, r, c, G, side="end", descending=0):
    """W_eff, dW, dr, dc from kernel.py's CUDA functions, run on the CPU between fences, threads and
    blocks in ascending or descending order."""
    W, r, c, G = (fenced(t, side) if t.is_contiguous() else t for t in (W, r, c, G))
    ctypes.c_int.in_dll(library, "descending").value = descending
    with calls(library), Fences(side):
        return kernel.forward_cuda(W, r, c, G.dtype), *kernel.backward_cuda(G, W, r, c)


def run_and_check(library, W, r, c, G, case=""):
    """Two runs, with fences and threads the other way round: both right, and equal bit for bit."""
    one = run(library, W, r, c, G, "end", descending=0)
    two = run(library, W, r, c, G, "start", descending=1)
    check(one, W, r, c, G, case)
    assert all(map(torch.equal, one, two)), f"the order of threads changes the result {case}"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cols", EDGES + (4, 124, 260))
def test_source_around_every_edge(libraries, dtype, cols):
    """Right results and no touch outside any buffer, for rows and columns next to every edge."""
    for rows in EDGES:
        run_and_check(libraries[dtype], *example(rows, cols, dtype), f"{rows} x {cols}")


@pytest.mark.parametrize("rows, cols", [(1100, 3), (3, 1100), (2, 4300)])
def test_source_adds_many_partial_sums(libraries, rows, cols):
    """The second stage is right also where its 32 warps have more than 32 lines to add."""
    run_and_check(libraries[torch.bfloat16], *example(rows, cols, torch.bfloat16))


@pytest.mark.parametrize("layout", ["transposed", "every other column", "an odd start", "expanded"])
def test_source_takes_any_strides(libraries, layout):
    """Strided tensors and misaligned starts give the results of their contiguous copies."""
    W, r, c, G = example(64, 72, torch.bfloat16)
    W, r, c, G = {"transposed": lambda: (W.T, c, r, G.T),
                  "every other column": lambda: (W[:, ::2], r, c[::2], G[:, 1::2]),
                  "an odd start": lambda: (W.view(-1)[1:-7].view(46, 100), *torch.rand(147)[1:]
                                           .split([46, 100]), G.view(-1)[3:-5].view(46, 100)),
                  "expanded": lambda: (W, r[:1].expand(64), c, G[:, :1].expand(64, 72))}[layout]()
    run_and_check(libraries[torch.bfloat16], W, r, c, G)


@pytest.mark.parametrize("rows, cols", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrix_launches_nothing(rows, cols):
    """Empty W: empty W_eff and dW, zero dr and dc, and the library is not even asked for."""
    with mock.patch.object(kernel, "library", lambda dtype: pytest.fail("launched")):
        W, r, c, G = example(rows, cols, torch.bfloat16)
        results = kernel.forward_cuda(W, r, c, G.dtype), *kernel.backward_cuda(G, W, r, c)
    check(results, W, r, c, G)


def edge_numbers(dtype):
    """Every finite number of `dtype` as float32, what lies halfway to the next one, the float32
    just below and above that, infinities, NaN and 100,000 random bit patterns; [n, 128]."""
    exact = torch.arange(-2**15, 2**15).short().view(dtype).float()
    exact = exact[exact.isfinite()].unique()
    half = exact[:-1] / 2 + exact[1:] / 2
    past = torch.tensor([float("inf")])
    bits = torch.randint(-2**31, 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    limits = torch.tensor([3.4028235e38, 65519.996, 65520.0, -0.0, -past, float("nan")])
    numbers = torch.cat([half, half.nextafter(past), half.nextafter(-past), past, limits, exact,
                         bits.int().view(torch.float32)])
    return numbers[:len(numbers) // 128 * 128].view(-1, 128)     # cuts off some random ones


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shim_rounds_like_pytorch(libraries, dtype):
    """cuda_on_cpu.h's 16-bit formats have PyTorch's bits: from float32 at every rounding boundary,
    and to float32 for all 65,536 patterns. (r and c are 1, so W_eff = W and dW = G.)"""
    W, G = edge_numbers(dtype), torch.arange(-2**15, 2**15).short().view(dtype).view(-1, 128)
    with calls(libraries[dtype]):
        rounded = kernel.forward_cuda(W, torch.ones(len(W)), torch.ones(128), dtype)
        widened = kernel.backward_cuda(G, torch.ones(512, 128), torch.ones(512), torch.ones(128))[0]
    for got, want, bits in (rounded, W.to(dtype), torch.int16), (widened, G.float(), torch.int32):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.view(bits)[~got.isnan()], want.view(bits)[~want.isnan()])


def test_refused_launch_raises_in_cudas_words(libraries):
    """A grid beyond CUDA's limit (65535 blocks of 32 rows) is an error with CUDA's own text, which
    does not disturb the next launch."""
    rows = 65536 * 32
    W, r, c = torch.ones(rows, 1), torch.ones(rows), torch.ones(1)
    with pytest.raises(RuntimeError, match=f"W \\({rows}, 1\\): invalid configuration argument"):
        with calls(libraries[torch.bfloat16]):
            kernel.forward_cuda(W, r, c, torch.bfloat16)
    run_and_check(libraries[torch.bfloat16], *example(5, 5, torch.bfloat16))


def test_library_is_built_as_pytorch_expects(libraries, monkeypatch):
    """kernel.library calls load_inline with arguments it has, and makes a working library of what
    comes back. (Here a CPU build of the same source; PyTorch for CPUs cannot build CUDA.)"""
    real, given = inspect.signature(cpp_extension.load_inline), {}

    def load_inline(*args, **kwargs):
        given.update(real.bind(*args, **kwargs).arguments)
        return libraries[torch.float16]._name

    monkeypatch.setattr(cpp_extension, "load_inline", load_inline)
    inputs = example(40, 40, torch.float16)
    check(run(kernel.library.__wrapped__(torch.float16), *inputs), *inputs)
    assert given["name"].isidentifier() and "-DELEMENT=__half" in given["extra_cuda_cflags"]
    assert given["no_implicit_headers"] and not given["is_python_module"]


# What each bug changes in the source, and the reason for which the checks above must reject it.
BUGS = {
    "no barrier": ("__syncthreads();", "", "dr|dc"),
    "half a warp in the row sum": ("half = 16", "half = 8", "dr"),
    "lanes leave before a shuffle": ("if (inside) cj", "if (!inside) return;\n  cj", "deadlock"),
    "a share on the wrong line": ("blockIdx.x * rows", "blockIdx.y * rows", "dr|illegal"),
    "dW without r": ("dw.x[v] = gc * ri[k]", "dw.x[v] = gc", "dW"),
    "r for c in dr": ("dr[k] += gc", "dr[k] += rg", "dr"),
    "a warp left out of the column sum": ("int warp = 1", "int warp = 2", "dr|dc"),
    "lines left out of the second stage": ("line += 32", "line += 33", "dr|dc"),
    "one shared line too few": ("shared[N][32]", "shared[N - 1][32]", "misaligned"),
    "a grid that is cut short": ("rows + TILE - 1", "rows", "W_eff"),
    "a register never set": ("g[ROWS] = {}", "g[ROWS]", "dr|dc"),
    "factors in another order": ("ri[k] * w[k].x[v] * cj.x[v]", "ri[k] * (w[k].x[v] * cj.x[v])",
                                 "W_eff"),
    "forward reads below W": ("if (row < rows) ri[k]", "ri[k]", "illegal"),
    "forward reads right of c": ("if (col >= cols) return;", "", "illegal"),
    "forward writes below W_eff": ("if (row < rows) store", "store", "illegal"),
    "backward reads below G": ("if (inside && row < rows) {", "if (inside) {", "illegal"),
    "backward writes below dW": ("if (inside && row < rows) store", "if (inside) store", "illegal"),
    "backward writes right of dc": ("threadIdx.y == 0 && inside", "threadIdx.y == 0", "illegal|dc"),
    "backward writes below dr": ("threadIdx.x == 0 && row < rows", "threadIdx.x == 0", "illegal"),
    "the second stage reads too far": ("if (i < size) sum", "sum", "illegal"),
}


def hunt(library):
    """The checks that every bug must fail: three shapes, each a little larger than its blocks."""
    for rows, cols in (33, 132), (65, 33), (1100, 1):
        run_and_check(library, *example(rows, cols, torch.float32))


def test_no_bug_is_found_where_there_is_none(libraries):
    """The source as it is passes the hunt, so that what fails in the next test is the bug."""
    hunt(libraries[torch.float32])


@pytest.mark.parametrize("bug", BUGS)
def test_injected_bug_is_caught(libraries, tmp_path, bug):
    """The checks above reject a source with this bug, for the reason expected."""
    right, wrong, reason = BUGS[bug]
    assert right in kernel.CUDA
    with pytest.raises((AssertionError, RuntimeError), match=reason):
        hunt(emulated(tmp_path, torch.float32, kernel.CUDA.replace(right, wrong)))


@pytest.mark.parametrize("cols, start, reason", [(100, 1, "misaligned"), (101, 0, "misal|illegal")])
def test_wrong_vector_width_is_caught(libraries, monkeypatch, cols, start, reason):
    """Groups of four where W starts, or goes on, at an address they do not divide are caught."""
    monkeypatch.setattr(kernel, "width", lambda *tensors: 4)
    W = torch.randn(40 * cols + start)[start:].view(40, cols)
    with calls(libraries[torch.bfloat16]), pytest.raises(RuntimeError, match=reason):
        kernel.forward_cuda(W, torch.ones(40), torch.ones(cols), torch.bfloat16)


# ---------------------------------------------------------------- the compiler


@pytest.fixture(scope="session", params=TYPES, ids=TYPES.get)
def built(request, tmp_path_factory):
    """(library, what ptxas reports) of nvcc's build with PyTorch's flags, for one dtype."""
    nvcc = shutil.which("nvcc") or os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if not os.path.exists(nvcc):
        pytest.skip("compiling the CUDA source takes nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "scale.cu").write_text(kernel.CUDA, encoding="utf-8")
    run = subprocess.run([nvcc, *cpp_extension.COMMON_NVCC_FLAGS, "-std=c++20", "-O3", "-shared",
                          "-Xcompiler", "-fPIC", f"-DELEMENT={TYPES[request.param]}",
                          *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)),
                          "-Xptxas", "-v", folder / "scale.cu", "-o", folder / "scale.so"],
                         check=True, capture_output=True, encoding="utf-8")
    library = ctypes.CDLL(str(folder / "scale.so"))
    library.run_forward.restype = ctypes.c_char_p
    return library, run.stdout + run.stderr


def test_registers(built):
    """No spills, and few enough registers that 5 blocks of forward and 4 of backward (256 threads
    each) share a multiprocessor's 65536: 80 KB and, with 16-bit G, 96 KB of loads in flight."""
    entry = re.compile(r"entry function '_Z\d+(\w+?)(?:ILi|P).*?' for '(sm_\d+)'.*?(\d+) bytes "
                       r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
                       r"Used (\d+) registers", re.DOTALL)
    found = entry.findall(built[1])
    assert len(found) == 2 * 5                  # forward and backward with V = 1 and 4, and finish
    for name, arch, *memory, registers in found:
        assert memory == ["0", "0", "0"], (name, arch)
        assert int(registers) <= {"forward": 48, "backward": 64, "finish": 64}[name], (name, arch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_reports_that_there_is_no_gpu(built):
    """The compiled library loads, and its failed launch is a RuntimeError with CUDA's own text."""
    W, r, c, _ = example(4, 4, torch.float32)
    with calls(built[0]), pytest.raises(RuntimeError, match="^CUDA refused .*: .*(driver|device)"):
        kernel.forward_cuda(W, r, c, torch.bfloat16)


# ---------------------------------------------------------------- the GPU


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if not (cpp_extension.CUDA_HOME and cpp_extension.is_ninja_available()):
        pytest.skip("needs nvcc and ninja")
    return "cuda"


def both_passes(W, r, c, G):
    """W_eff, dW, dr, dc through autograd."""
    inputs = [t.detach().requires_grad_() for t in (W, r, c)]
    W_eff = scale(*inputs, G.dtype)
    return W_eff.detach(), *torch.autograd.grad(W_eff, inputs, G)


@pytest.mark.parametrize("dtype", TYPES)
def test_gpu_is_right_and_repeatable(cuda, dtype):
    """On the GPU: the bits of PyTorch's formula, float64's gradients, three times the same bits."""
    for rows, cols in (1, 1), (1, 999), (999, 1), (33, 129), (257, 132), (2048, 768), (50304, 768):
        inputs = example(rows, cols, dtype, cuda)
        runs = [both_passes(*inputs) for _ in range(3)]
        check(runs[0], *inputs, f"{rows} x {cols}")
        for other in runs[1:]:
            assert all(map(torch.equal, runs[0], other)), f"not repeatable: {rows} x {cols}"


def test_gpu_takes_strides_and_empty_matrices(cuda):
    """Views and empty matrices on the GPU give what their contiguous copies give."""
    W, r, c, G = example(64, 72, torch.bfloat16, cuda)
    for view in ((W.T, c, r, G.T), (W[:, 1::2], r, c[::2], G[:, ::2]), (W[:0], r[:0], c, G[:0])):
        check(both_passes(*view), *view)


def test_gpu_current_stream(cuda):
    """The kernels wait for earlier work on the current stream, here a W that takes long to make."""
    W, r, c, G = example(768, 768, torch.bfloat16, cuda)
    scale(W, r, c, torch.bfloat16)                                           # compiles
    with torch.cuda.stream(torch.cuda.Stream()):
        slow, late = torch.randn(4096, 4096, device=cuda), torch.zeros_like(W)
        for _ in range(50):
            slow = (slow @ slow).clamp(-1, 1)
        late.copy_(W)
        results = both_passes(late, r, c, G)
        torch.cuda.current_stream().synchronize()
    check(results, W, r, c, G)


def test_gpu_cuda_graph(cuda):
    """Captured in a CUDA graph, the op follows new values of W when replayed."""
    W, r, c, G = example(768, 768, torch.bfloat16, cuda)
    both_passes(W, r, c, G)                                                  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both_passes(W, r, c, G)
    W.copy_(example(768, 768, torch.bfloat16, cuda, seed=1)[0])
    graph.replay()
    check(results, W, r, c, G)


def test_gpu_torch_compile(cuda):
    """Inside torch.compile(fullgraph=True) the op has the bits it has outside."""
    W, r, c, G = example(2048, 768, torch.bfloat16, cuda)
    inputs = [t.requires_grad_() for t in (W, r, c)]
    compiled = torch.compile(lambda W, r, c: scale(W, r, c, torch.bfloat16), fullgraph=True)
    W_eff = compiled(*inputs)
    check((W_eff, *torch.autograd.grad(W_eff, inputs, G)), *(t.detach() for t in (W, r, c, G)))


def test_gpu_mixed_devices(cuda):
    """A multiplier left on the CPU is refused before any launch."""
    W, r, c, _ = example(4, 4, torch.float32, cuda)
    with pytest.raises(ValueError, match="on one device"):
        scale(W, r.cpu(), c, torch.bfloat16)


def test_gpu_other_device(cuda):
    """Tensors on the second GPU are worked on there while the first is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = example(257, 132, torch.bfloat16, "cuda:1")
    check(both_passes(*inputs), *inputs)


def test_gpu_beyond_two_to_the_31(cuda):
    """Offsets do not overflow: the last rows of a matrix with more than 2^31 entries are right."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    rows, cols = 65600, 32768
    W, r = torch.randn(rows, cols, device=cuda), torch.rand(rows, device=cuda) + 0.5
    c, G = torch.rand(cols, device=cuda) + 0.5, torch.randn(rows, cols, device=cuda).bfloat16()
    W_eff, (dW, dr, _) = scale(W, r, c, torch.bfloat16), scale_backward(G, W, r, c)
    last = slice(rows - 64, rows)
    W, r, G = W[last], r[last], G[last]
    rest = (r[:, None] * G.float() * W).sum(0)                # dc runs over all rows: not compared
    check((W_eff[last], dW[last], dr[last], rest), W, r, c, G)


# ---------------------------------------------------------------- in training


@pytest.mark.parametrize("multipliers", ["scalar", "vector"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def test_training_agrees_with_and_without_the_kernel(device, multipliers, tmp_path, monkeypatch):
    """20 steps of train.py with --scale-kernel have the losses of 20 steps without it, to the
    rounding of dr and dc: on a CPU 5e-7 at most; a GPU's matmuls are in bf16, so 1e-3 there."""
    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}. " for i in range(2000)), encoding="utf-8")
    config = train.Config(data=str(text), vocabulary=300, device=device, multipliers=multipliers,
                          n_layer=1, n_head=2, n_embd=32, block_size=32, steps=20, warmup_steps=2,
                          log_interval=1, multiplier_lr=1e-2)
    losses = [[row["loss"] for row in train.train(run, quiet=True)["log"]]
              for run in (config, replace(config, scale_kernel=True))]
    tolerance = 5e-6 if device == "cpu" else 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=tolerance)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_use_kernel_reaches_every_matrix_with_multipliers():
    """After use_kernel the forward pass calls the op once for each of a block's seven matrices, and
    not for the head, which has no multiplier."""
    model = GPT(GPTConfig(50, 8, 1, 2, 16))
    use_kernel(model)
    with mock.patch.object(kernel, "scale", wraps=scale) as calls:
        model(torch.zeros(1, 8, dtype=torch.long))
    assert calls.call_count == 7


def test_no_compiler_is_one_sentence_before_training(monkeypatch):
    """Where the kernel cannot be compiled, train.py says so at its start, and how to do without."""
    monkeypatch.setattr(train, "matmul_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(cpp_extension, "load_inline", mock.Mock(side_effect=OSError("no nvcc.")))
    kernel.library.cache_clear()
    with pytest.raises(train.UserError, match="needs .*nvcc.*no nvcc.*without --scale-kernel"):
        train.attach_kernel(GPT(GPTConfig(50, 8, 1, 2, 16)), torch.device("cuda"))
