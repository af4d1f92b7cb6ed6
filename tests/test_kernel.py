"""Tests of kernel.py: the op on CPU tensors; the CUDA source, executed on the CPU by cuda_on_cpu.h;
mutants of the source; nvcc's build; the GPU.

Only a GPU shows races (the emulated threads never run at the same time) and speed.
"""
import contextlib
import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import kernel
from kernel import TYPES, scale, scale_backward

pytestmark = pytest.mark.kernel
HERE = Path(__file__).parent
BF16, FP32 = torch.bfloat16, torch.float32
EDGES = (1, 31, 32, 33, 127, 128, 129, 255, 256, 257)     # of a warp, of tiles with V = 1 and 4

def example(rows, cols, dtype, device="cpu", seed=0):
    """Random W, r, c (float32) and G (dtype); multipliers between 0.5 and 1.5."""
    torch.manual_seed(seed)
    (W, G), r, c = torch.randn(2, rows, cols), torch.rand(rows) + 0.5, torch.rand(cols) + 0.5
    return [t.to(device) for t in (W, r, c, G.to(dtype))]

def check(results, W, r, c, G, case=""):
    """W_eff and dW must have the bits of PyTorch's formula. dr and dc must be within 5e-7 of
    float64, relative to the sum of the sizes of the terms. The largest error measured is 1.7e-7."""
    W_eff, dW, dr, dc = results
    assert torch.equal(W_eff, (r[:, None] * W * c).to(G.dtype)), f"W_eff {case}"
    assert torch.equal(dW, G.float() * c * r[:, None]), f"dW {case}"
    W, r, c, G = (t.double() for t in (W, r, c, G))
    for name, got, terms, axis in (("dr", dr, G * W * c, 1), ("dc", dc, r[:, None] * G * W, 0)):
        error, size = (got - terms.sum(axis)).abs(), terms.abs().sum(axis)
        assert (error <= 5e-7 * size).all(), f"{name} {case}"              # also fails for NaN

# ---------------------------------------------------------------- the op on CPU tensors

@pytest.mark.parametrize("layout", ["contiguous", "strided", "empty"])
def test_op_on_cpu(layout):
    """The op gives the formula's results for each dtype and passes PyTorch's checks of an op."""
    for dtype in TYPES:
        W, r, c, G = example(0 if layout == "empty" else 33, 10, dtype)
        if layout == "strided":
            W, G, c = W.T.contiguous().T[:, ::2], G.T.contiguous().T[:, ::2], c[::2]
        check([scale(W, r, c, dtype), *scale_backward(G, W, r, c)], W, r, c, G)
    inputs = [t.detach().requires_grad_() for t in (W, r, c)]
    torch.library.opcheck(scale, (*inputs, dtype))
    torch.library.opcheck(scale_backward, (G, W, r, c))

@pytest.mark.parametrize("bad", [
    lambda W, r, c: scale(W, c, r, BF16),                              # r and c exchanged
    lambda W, r, c: scale(W[0], r, c, BF16),
    lambda W, r, c: scale(W.bfloat16(), r, c, BF16),
    lambda W, r, c: scale(W, r.double(), c, BF16),
    lambda W, r, c: scale(W, r, c, torch.float64),
    lambda W, r, c: scale_backward(W.T, W, r, c),                      # G of another shape
    lambda W, r, c: kernel.validate(W, r.to("meta"), c, BF16)])        # two devices
def test_bad_input_gets_one_clear_sentence(bad):
    """Input that the op does not take raises ValueError with the shapes and dtypes given."""
    with pytest.raises(ValueError, match=r"^scale makes .* not torch.* from torch.*\[3"):
        bad(*example(3, 4, FP32)[:3])

def test_cpu_user_needs_no_compiler():
    """`python kernel.py` passes without nvcc, ninja and g++ on PATH."""
    environment = os.environ | {"PATH": "", "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, HERE.parent / "kernel.py"], env=environment,
                         capture_output=True, encoding="utf-8")
    assert run.returncode == 0 and run.stdout.startswith("cpu: W_eff has the bits"), run.stderr

@pytest.mark.parametrize("missing", ["nvcc", "ninja"])
def test_missing_tool_is_named(monkeypatch, tmp_path, missing):
    """Without nvcc or ninja: one sentence with the tool and with the way to train without it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: missing != "ninja")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(RuntimeError, match=f"(?i){missing}.*without --scale-kernel") as error:
        kernel.library.__wrapped__(BF16)
    assert "\n" not in str(error.value) and error.value.__cause__ is not None

# ---------------------------------------------------------------- the source, run on the CPU
def fenced(tensor, side):
    """A copy of `tensor` between two pages that may be neither read nor written. The first byte of
    the copy ("start") or the last one ("end") touches such a page."""
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
    """Fences around every tensor allocated inside. New memory is NaN until the kernel writes it."""
    side = "end"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like"):
            out.fill_(float("nan"))
        elif func.overloadpacket.__name__ != "clone":
            return out
        return fenced(out, self.side)

def emulated(folder, dtype, source=kernel.CUDA):
    """The CUDA source as a CPU library. Two things in the source are not C++: CUDA's headers, which
    cuda_on_cpu.h replaces, and the launches f<<<grid, block, ...>>>(arguments)."""
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

def run_and_check(library, W, r, c, G, case=""):
    """Two runs, with fences and the order of threads the other way round, are right and equal bit
    for bit, and naive equals fast. Strided and unaligned inputs get no fences."""
    runs, fences = [], Fences()
    for fences.side, descending in ("end", 0), ("start", 1):
        inputs = [fenced(t, fences.side) if t.is_contiguous() and t.data_ptr() % 16 == 0 else t
                  for t in (W, r, c, G)]
        ctypes.c_int.in_dll(library, "descending").value = descending
        with calls(library), fences:
            W_eff = kernel.forward_cuda(*inputs[:3], G.dtype)
            runs.append((W_eff, *kernel.backward_cuda(inputs[3], *inputs[:3])))
            with mock.patch.object(kernel, "width", lambda *tensors: 0):
                naive = kernel.forward_cuda(*inputs[:3], G.dtype)
        assert torch.equal(naive, W_eff), f"naive and fast W_eff differ {case}"
    check(runs[0], W, r, c, G, case)
    assert all(map(torch.equal, *runs)), f"the order of threads changes the result {case}"

@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cols", EDGES + (4, 124, 260))
def test_source_around_every_edge(libraries, dtype, cols):
    """Right results and no access outside a buffer, for rows and columns next to every edge."""
    for rows in EDGES:
        run_and_check(libraries[dtype], *example(rows, cols, dtype), f"{rows} x {cols}")

def test_source_takes_any_strides_and_many_rows(libraries):
    """Strided tensors give the results of their contiguous copies. The second stage is right where
    its 32 warps have more than 32 lines to add. CUDA's limit is 65535 blocks of 32 rows."""
    W, r, c, G = example(64, 72, BF16)
    with calls(libraries[BF16]), pytest.raises(RuntimeError, match="invalid configuration"):
        kernel.forward_cuda(*example(65536 * 32, 1, BF16)[:3], BF16)
    for case in ((W.T, c, r, G.T), (W[:, ::2], r, c[::2], G[:, 1::2]),
                 (W, r[:1].expand(64), c, G[:, :1].expand(64, 72)),
                 example(1100, 3, BF16), example(3, 1100, BF16), example(2, 4300, BF16)):
        run_and_check(libraries[BF16], *case)

@pytest.mark.parametrize("name", ["W", "c", "G"])
def test_unaligned_view_is_moved_one_number_at_a_time(libraries, monkeypatch, name):
    """A contiguous view that starts one number after an aligned address gives right results with
    V = 1. With V = 4 the same view is a misaligned access."""
    inputs = dict(zip("WrcG", example(40, 100, BF16)))
    t = inputs[name]
    inputs[name] = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    assert inputs[name].is_contiguous() and inputs[name].data_ptr() % 16 != 0
    W, r, c, G = inputs.values()
    assert kernel.width(G, W, c) == 1
    run_and_check(libraries[BF16], W, r, c, G)
    monkeypatch.setattr(kernel, "width", lambda *tensors: 4)
    with calls(libraries[BF16]), pytest.raises(RuntimeError, match="misaligned"):
        kernel.backward_cuda(G, W, r, c)

# A mutant: what it changes in the source, and the reason for which the checks must reject it.
MUTANTS = {
    "naive reads beyond the columns": ("|| col >= cols) return", ") return", "illegal|differ"),
    "no barrier": ("__syncthreads();", "", "dr|dc"),
    "half a warp in the row sum": ("half = 16", "half = 8", "dr"),
    "half a warp in the shuffle": ("0xffffffff", "0x0000ffff", "partial"),
    "lanes leave before a shuffle": ("if (inside) cj", "if (!inside) return;\n  cj", "deadlock"),
    "a share on the wrong line": ("blockIdx.x * rows", "blockIdx.y * rows", "dr|illegal"),
    "dW without r": ("dw.x[v] = gc * ri[k]", "dw.x[v] = gc", "dW"),
    "lines left out of the second stage": ("line += 32", "line += 33", "dr|dc"),
    "one shared line too few": ("shared[N][32]", "shared[N - 1][32]", "misaligned"),
    "a grid that is cut short": ("(a + b - 1) / b", "a / b", "W_eff|invalid"),
    "a register never set": ("g[ROWS] = {}", "g[ROWS]", "dr|dc"),
    "another order of factors": ("w[k].x[v] * cj.x[v])", "(w[k].x[v] * cj.x[v]))", "W_eff"),
    "forward reads below W": ("if (row < rows) ri[k]", "ri[k]", "illegal"),
    "forward reads right of c": ("if (col >= cols) return;", "", "illegal"),
    "forward writes below W_eff": ("if (row < rows) at", "at", "illegal"),
    "backward reads below G": ("if (inside && row < rows) {", "if (inside) {", "illegal"),
    "backward writes below dW": ("if (inside && row < rows) at", "if (inside) at", "illegal"),
    "backward writes right of dc": ("threadIdx.y == 0 && inside", "threadIdx.y == 0", "illegal|dc"),
    "backward writes below dr": ("threadIdx.x == 0 && row < rows", "threadIdx.x == 0", "illegal"),
    "the second stage reads too far": ("if (i < size) sum", "sum", "illegal"),
}

@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_rejected(libraries, tmp_path, mutant):
    """For three shapes, each a little larger than its tiles, the checks accept the source and
    reject the mutant, for the reason expected."""
    def checks(library):
        for rows, cols in (33, 132), (65, 33), (1100, 1):
            run_and_check(library, *example(rows, cols, FP32))

    checks(libraries[FP32])
    right, wrong, reason = MUTANTS[mutant]
    assert right in kernel.CUDA
    with pytest.raises((AssertionError, RuntimeError), match=reason):
        checks(emulated(tmp_path, FP32, kernel.CUDA.replace(right, wrong)))

# ---------------------------------------------------------------- the compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_nvcc_builds_without_spills(tmp_path, dtype):
    """nvcc compiles the source for two GPUs without a stack and without spilled registers."""
    nvcc = shutil.which("nvcc") or os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if not os.path.exists(nvcc):
        pytest.skip("compiling the CUDA source takes nvcc")
    (tmp_path / "scale.cu").write_text(kernel.CUDA, encoding="utf-8")
    built = subprocess.run([nvcc, *cpp_extension.COMMON_NVCC_FLAGS, "-std=c++20", "-O3", "-shared",
                            "-Xcompiler", "-fPIC", f"-DELEMENT={TYPES[dtype]}",
                            *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)),
                            "-Xptxas", "-v", tmp_path / "scale.cu", "-o", tmp_path / "scale.so"],
                           check=True, capture_output=True, encoding="utf-8")
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill load",
                       built.stdout + built.stderr)
    # naive, finish; forward and backward with V = 1 and 4
    assert found == [("0", "0", "0")] * 2 * 6

# ---------------------------------------------------------------- the GPU
@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: run pytest tests/test_kernel.py on a machine that has one")
    if not (cpp_extension.CUDA_HOME and cpp_extension.is_ninja_available()):
        pytest.skip("needs nvcc and ninja: install a CUDA toolkit and run pip install ninja")
    return "cuda"

def both_passes(W, r, c, G, op=scale):
    """W_eff, dW, dr, dc through autograd."""
    inputs = [t.detach().requires_grad_() for t in (W, r, c)]
    W_eff = op(*inputs, G.dtype)
    return W_eff.detach(), *torch.autograd.grad(W_eff, inputs, G)

@pytest.mark.parametrize("dtype", TYPES)
def test_gpu_is_right_and_repeatable(cuda, dtype):
    """The GPU's results pass `check`; three runs, and naive and fast W_eff, have equal bits."""
    for rows, cols in (1, 1), (1, 999), (999, 1), (33, 129), (257, 132), (2048, 768), (50304, 768):
        inputs = example(rows, cols, dtype, cuda)
        runs = [both_passes(*inputs) for _ in range(3)]
        check(runs[0], *inputs, f"{rows} x {cols}")
        for other in runs[1:]:
            assert all(map(torch.equal, runs[0], other)), f"not repeatable: {rows} x {cols}"
        with mock.patch.object(kernel, "width", lambda *tensors: 0):
            assert torch.equal(scale(*inputs[:3], dtype), runs[0][0]), f"naive {rows} x {cols}"

def test_gpu_layouts_devices_and_compile(cuda):
    """Views and empty matrices give what their contiguous copies give, torch.compile gives the same
    bits, a multiplier on the CPU is refused, and a second GPU works while the first is current."""
    W, r, c, G = example(64, 72, BF16, cuda)
    for view in ((W.T, c, r, G.T), (W[:, 1::2], r, c[::2], G[:, ::2]), (W[:0], r[:0], c, G[:0])):
        check(both_passes(*view), *view)
    op = torch.compile(lambda W, r, c, dtype: scale(W, r, c, dtype), fullgraph=True)
    check(both_passes(W, r, c, G, op=op), W, r, c, G)
    with pytest.raises(ValueError, match="on one device"):
        scale(W, r.cpu(), c, BF16)
    inputs = example(257, 132, BF16, f"cuda:{torch.cuda.device_count() - 1}")
    check(both_passes(*inputs), *inputs)

def test_gpu_streams_and_graphs(cuda):
    """The kernels wait for earlier work on the current stream, here a W that takes long to make. A
    CUDA graph that captured the op follows new values of W when it is replayed."""
    W, r, c, G = example(768, 768, BF16, cuda)
    both_passes(W, r, c, G)                                                  # compiles
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.zeros_like(W)
        torch.cuda._sleep(100_000_000)                                       # clock cycles
        late.copy_(W)
        results = both_passes(late, r, c, G)
        torch.cuda.current_stream().synchronize()
    check(results, W, r, c, G)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both_passes(W, r, c, G)
    W.copy_(example(768, 768, BF16, cuda, seed=1)[0])
    graph.replay()
    check(results, W, r, c, G)

def test_gpu_beyond_two_to_the_31(cuda):
    """Offsets do not overflow: the last rows of a matrix with more than 2^31 entries are right."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    W, G = torch.randn(65600, 32768, device=cuda), torch.randn(65600, 32768, device=cuda).bfloat16()
    r, c = (torch.rand(n, device=cuda) + 0.5 for n in W.shape)
    W_eff, (dW, dr, _) = scale(W, r, c, BF16), scale_backward(G, W, r, c)
    W, r, G, W_eff, dW, dr = (t[-64:] for t in (W, r, G, W_eff, dW, dr))
    # dc is a sum over all rows: check compares a sum over the last rows with itself
    check((W_eff, dW, dr, (r[:, None] * G.float() * W).sum(0)), W, r, c, G)
