"""Tests of kernel.py: the operator on CPU tensors; the model that uses it; the CUDA text, run on
the CPU by cuda_on_cpu.h; mutants of the text; the compilers; the GPU.

Only a GPU shows races (the emulated threads never run at the same time) and speed.
"""
import contextlib
import copy
import ctypes
import functools
import mmap
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import kernel
from conftest import assert_mutant_fails
from kernel import TYPES, scale, scale_backward
from multipliers import Multipliers, attach_multipliers, merge, multipliers_of, raw_weight

pytestmark = pytest.mark.kernel
BF16 = torch.bfloat16
FP32 = torch.float32
# Each operation in float32 rounds by at most 2^-24. In these tests no number goes through more than
# 100 of them: 2 products, 4 rows of a lane, 8 warps, up to 50 lines per warp, 32 warps.
ROUNDING = 100 * 2**-24


def example(rows, cols, dtype, device="cpu"):
    """Random W, r, c (float32) and G (dtype). G has the signs of W: then all terms of dr and dc are
    positive, nothing cancels, and the relative error of a sum is that of its roundings."""
    torch.manual_seed(0)
    W = torch.randn(rows, cols)
    r = torch.rand(rows) + 0.5
    c = torch.rand(cols) + 0.5
    G = W.sign() * torch.rand(rows, cols)
    return [W.to(device), r.to(device), c.to(device), G.to(device, dtype)]


def close(got, exact, what=None):
    exact = exact.to(got.dtype)
    torch.testing.assert_close(got, exact, rtol=ROUNDING, atol=0, msg=what)


def check(results, W, r, c, G, case=""):
    """W_eff and dW have the bits of PyTorch's formula. dr and dc are sums: compare with float64."""
    W_eff, dW, dr, dc = results
    assert torch.equal(W_eff, (r[:, None] * W * c).to(G.dtype)), f"W_eff {case}"
    assert torch.equal(dW, G.float() * c * r[:, None]), f"dW {case}"
    GW = G.double() * W.double()
    close(dr, (GW * c).sum(1), f"dr {case}")
    close(dc, (GW * r[:, None]).sum(0), f"dc {case}")


def both_passes(W, r, c, G):
    """W_eff, dW, dr, dc"""
    return scale(W, r, c, G.dtype), *scale_backward(G, W, r, c)


# ---------------------------------------------------------------- the operator on CPU tensors
@pytest.mark.parametrize("dtype", TYPES)
def test_operator_is_the_formula_for_any_layout(dtype):
    """Contiguous, strided and empty matrices give the results of eq. 3 and 4."""
    W, r, c, G = example(33, 10, dtype)
    strided = (W.T.contiguous().T[:, ::2], r, c[::2], G[:, ::2])
    empty = (W[:0], r[:0], c, G[:0])
    for inputs in ((W, r, c, G), strided, empty):
        results = both_passes(*inputs)
        check(results, *inputs)
        assert all(t.is_contiguous() for t in results)


def test_operator_passes_the_checks_of_pytorch():
    """Schema, fake tensors and torch.compile's tracing are right; autograd gives the gradient that
    gradcheck measures by finite differences in float64."""
    W, r, c, G = [t.double() for t in example(3, 4, FP32)]
    torch.library.opcheck(scale_backward, (G, W, r, c))
    inputs = [t.requires_grad_() for t in (W, r, c)]
    torch.library.opcheck(scale, (*inputs, BF16))
    assert torch.autograd.gradcheck(scale, (*inputs, torch.float64))


def test_bad_input_gets_one_clear_sentence():
    """Input that the operators do not take raises ValueError with the shapes and dtypes given."""
    W, r, c, G = example(3, 4, FP32)

    def refuses(operator, *inputs):
        with pytest.raises(ValueError, match=r"^scale makes .* not torch.* from torch.*\[3"):
            operator(*inputs)

    refuses(scale, W, c, r, BF16)                   # r and c exchanged
    refuses(scale, W[0], r, c, BF16)                # not a matrix
    refuses(scale, W, r.double(), c, BF16)
    refuses(scale, W, r, c, torch.float64)          # float64 from float32
    refuses(scale_backward, W.T, W, r, c)           # G of another shape
    refuses(kernel.validate, W, r.to("meta"), c, BF16)      # two devices


def test_check_needs_no_compiler_and_rejects_a_mutant(monkeypatch):
    """The check of `python kernel.py` passes on a CPU without compiling, and fails for gradients
    that are wrong."""
    check_one = functools.partial(kernel.check, torch.randn(33, 129), BF16)
    without_c = lambda G, W, r, c: scale_backward(G, W, r, torch.ones_like(c))
    monkeypatch.setattr(kernel, "library", None)
    assert_mutant_fails(check_one, monkeypatch, kernel, "scale_backward", without_c, "gradient")


@pytest.mark.parametrize("missing", ["nvcc", "ninja"])
def test_missing_tool_is_named(monkeypatch, tmp_path, missing):
    """Without nvcc or ninja: OSError in one sentence, with the way to train without the kernel."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: missing != "ninja")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    # In a regular expression "." is any character but the end of a line.
    with pytest.raises(OSError, match=rf"(?i)^.*{missing}.*without --scale-kernel.*\Z"):
        kernel.library.__wrapped__(BF16)


# ---------------------------------------------------------------- the operator in a model
CHOICES = [{"scalar": True}, {"row": True}, {"column": True}, {"row": True, "column": True}]


def pair(chosen):
    """Two equal layers, 7 -> 5, with positive parameters. The second one uses the kernel."""
    torch.manual_seed(0)
    plain = nn.Linear(7, 5)
    attach_multipliers(plain, **chosen)
    for p in plain.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    fused = copy.deepcopy(plain)
    kernel.use_kernel(fused)
    return plain, fused


def check_use_kernel(chosen, autocast):
    plain, fused = pair(chosen)
    x = torch.rand(3, 7)
    with torch.autocast("cpu", BF16, enabled=autocast):
        assert fused.weight.dtype == (BF16 if autocast else FP32)
        y, wanted = fused(x), plain(x)
    assert torch.equal(y, wanted)
    y.sum().backward()
    wanted.sum().backward()
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        # dr, dc and ds are sums, which autograd adds in another order.
        close(p.grad, q.grad)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chosen", CHOICES, ids="+".join)
def test_use_kernel_gives_the_same_bits(chosen, autocast):
    """The output has the bits that it has without the kernel, the gradients agree up to rounding,
    and under autocast W_eff is made in autocast's dtype."""
    check_use_kernel(chosen, autocast)


def test_use_kernel_with_both_kinds():
    """(s r) W c and r (s W) c are rounded in another order."""
    plain, fused = pair({"scalar": True, "row": True, "column": True})
    x = torch.rand(3, 7)
    close(fused(x), plain(x))


def test_mutants_of_fused_forward_are_rejected(monkeypatch):
    """The check above fails if autocast or the scalar is forgotten."""
    right = kernel.fused_forward

    def without_autocast(multipliers, W):
        with torch.autocast("cpu", enabled=False):
            return right(multipliers, W)

    def without_scalar(multipliers, W):
        return right(multipliers, W) / multipliers.scalar

    mutants = ((without_autocast, True, "bfloat16"), (without_scalar, False, "equal"))
    for mutant, autocast, match in mutants:
        check_scalar = functools.partial(check_use_kernel, {"scalar": True}, autocast)
        assert_mutant_fails(check_scalar, monkeypatch, kernel, "fused_forward", mutant, match)


def test_use_kernel_leaves_an_embedding_alone(monkeypatch):
    """An embedding and a plain layer do not call the operator."""
    embedding = nn.Embedding(5, 7)
    attach_multipliers(embedding, row=True)
    kernel.use_kernel(nn.ModuleList([embedding, nn.Linear(7, 5)]))
    monkeypatch.setattr(kernel, "scale", None)
    assert torch.equal(embedding.weight, raw_weight(embedding))


def test_copies_merge_and_state_dict():
    """A copy computes with its own numbers, and so does a layer that loads a state. `merge` gives a
    plain layer with the same weight. In bfloat16, W_eff has the same bits as without the kernel."""
    plain, fused = pair({"row": True, "column": True})
    other = copy.deepcopy(fused)
    multipliers_of(other)["row"].data.mul_(2)
    assert torch.equal(other.weight, 2 * fused.weight)
    plain.load_state_dict(other.state_dict())
    assert torch.equal(other.weight, plain.weight)
    fused.load_state_dict(plain.state_dict())
    assert torch.equal(other.weight, fused.weight)
    merged = merge(fused)
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, fused.weight)
    assert fused.bfloat16().weight.dtype == BF16
    assert torch.equal(plain.bfloat16().weight, fused.weight)


@pytest.mark.parametrize("name", ["scalar", "row", "column"])
def test_fused_forward_stays_on_the_gpu(name):
    """On CUDA tensors without data ("fake" ones) all results are on CUDA, in the right shapes."""
    # Without CUDA, PyTorch makes such tensors only if no gradient is asked for.
    with FakeTensorMode(), torch.no_grad():
        W = torch.empty(4, 6, device="cuda")
        W_eff = kernel.fused_forward(Multipliers(W, **{name: True}), W)
        gradients = scale_backward(W_eff, W, W.new_ones(4), W.new_ones(6))
    for t, shape in zip((W_eff, *gradients), ((4, 6), (4, 6), (4,), (6,))):
        assert t.is_cuda and t.shape == shape


# ---------------------------------------------------------------- the CUDA text, run on the CPU
# Above the split: only macros and CUDA's headers, which cuda_on_cpu.h replaces.
HEADERS, REST = re.split("(?=using Element)", kernel.CUDA)
PAGE = mmap.PAGESIZE


def fenced(tensor, side):
    """A copy of `tensor` beside a page that may be neither read nor written: the page touches the
    first byte of the copy ("start") or the last one ("end"). A view stays as it is: kernel.py
    copies a strided one, and an unaligned one would lose its place."""
    if not tensor.is_contiguous() or tensor.data_ptr() % 16 != 0:
        return tensor
    size = kernel.ceil_div(tensor.nbytes, PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = PAGE
    if side == "end":
        fence += size
        offset = size - tensor.nbytes
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), PAGE, 0) == 0
    copied = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copied.view(tensor.shape).copy_(tensor)


class Fences(TorchDispatchMode):
    """Fences around every tensor allocated inside. New memory is NaN until the kernel writes it."""
    side = "end"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty_like", "new_empty"):
            out.fill_(float("nan"))
        # A clone is the contiguous copy of a strided tensor.
        if name in ("empty_like", "new_empty", "clone"):
            out = fenced(out, self.side)
        return out


def one_file(texts):
    """The texts {key: text} as one file, each in a namespace, with run_forward_0, run_forward_1 ...
    A key that is a dtype chooses the type of W_eff; other keys stand for float32."""
    code = ""
    for number, (key, text) in enumerate(texts.items()):
        text = re.sub(r"\b(run_\w+)", rf"\1_{number}", text)
        text = text.replace("ELEMENT", TYPES.get(key, "float"))
        code += f"namespace n{number} {{\n{text}}}\n"
    return code


# A mutant: what it changes in the text, and the reason for which the checks must reject it.
MUTANTS = {
    "naive reads beyond the columns": ("|| col >= cols) return", ") return", "illegal|differ"),
    "no barrier": ("__syncthreads();", "", "^dr|^dc"),
    "half a warp in the row sum": ("half = 16", "half = 8", "^dr"),
    "half a warp in the shuffle": ("0xffffffff", "0x0000ffff", "partial"),
    "lanes leave before a shuffle": ("if (inside) cj", "if (!inside) return;\n  cj", "deadlock"),
    "a part on the wrong line": ("blockIdx.x * rows", "blockIdx.y * rows", "^dr|illegal"),
    "dW without r": ("dw.x[v] = gc * ri[k]", "dw.x[v] = gc", "^dW"),
    "lines left out in step 4": ("line += 32", "line += 33", "^dr|^dc"),
    "one shared line too few": ("shared[N][32]", "shared[N - 1][32]", "misaligned"),
    "a grid that is cut short": ("(a + b - 1) / b", "a / b", "^W_eff|invalid"),
    "a register never set": ("g[ROWS] = {}", "g[ROWS]", "^dr|^dc"),
    "another order of factors": (
        "ri[k] * w[k].x[v] * cj.x[v]", "w[k].x[v] * cj.x[v] * ri[k]", "^W_eff"),
    "forward reads below W": ("if (row >= rows) continue;", "", "illegal"),
    "forward reads right of c": ("if (col >= cols) return;", "", "illegal"),
    "forward writes below W_eff": ("if (row < rows) store", "store", "illegal"),
    "backward reads below G": ("row >= rows || !inside", "!inside", "illegal"),
    "backward writes below dW": ("(row < rows && inside)", "(inside)", "illegal"),
    "backward writes right of dc": (
        "inside && threadIdx.y == 0", "threadIdx.y == 0", "illegal|^dc"),
    "backward writes below dr": ("row < rows && threadIdx.x == 0", "threadIdx.x == 0", "illegal"),
    "step 4 reads too far": ("if (i < size) sum", "sum", "illegal"),
}
FLAGS = ["-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off",
         "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """What kernel.library returns, for the CPU: one for each dtype, and a float32 one for each
    mutant. All are compiled together, as one C++ file."""
    if not (shutil.which("g++") and sys.platform == "linux"):
        pytest.skip("running the CUDA text on the CPU takes Linux and g++")
    texts = dict.fromkeys(TYPES, REST)
    for name, (right, wrong, _) in MUTANTS.items():
        assert REST.count(right) == 1
        texts[name] = REST.replace(right, wrong)
    # The launches f<<<grid, block, ...>>>(arguments) are not C++.
    launch = r"(\w+)<<<(.*?), 0, stream>>>\((.*?)\);"
    code = re.sub(launch, r"launch(\2, [&] { \1(\3); });", one_file(texts))
    path = tmp_path_factory.mktemp("emulated") / "kernels.cpp"
    path.write_text(code, encoding="utf-8")
    header = Path(__file__).with_name("cuda_on_cpu.h")
    subprocess.run(["g++", *FLAGS, "-include", header, path, "-o", path.with_suffix(".so")],
                   check=True)
    functions = ctypes.CDLL(path.with_suffix(".so"))
    made = {}
    for number, key in enumerate(texts):
        made[key] = SimpleNamespace(run_forward=functions[f"run_forward_{number}"],
                                    run_backward=functions[f"run_backward_{number}"],
                                    descending=ctypes.c_int.in_dll(functions, "descending"))
    return made


@contextlib.contextmanager
def calls(library):
    """kernel.py's CUDA functions call `library`, with addresses of CPU tensors and stream 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "library", lambda dtype: library)
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        yield patch


def run(library, inputs, side):
    """W_eff, dW, dr, dc and the naive W_eff, with fences around all tensors. Blocks and threads run
    in one order for the side "end" and in the other order for "start"."""
    W, r, c, G = [fenced(t, side) for t in inputs]
    library.descending.value = side == "start"
    fences = Fences()
    fences.side = side
    with calls(library) as patch, fences:
        W_eff = kernel.forward_cuda(W, r, c, G.dtype)
        gradients = kernel.backward_cuda(G, W, r, c)
        patch.setattr(kernel, "width", lambda *tensors: 0)
        naive = kernel.forward_cuda(W, r, c, G.dtype)
    return W_eff, *gradients, naive


def run_and_check(library, inputs, case=""):
    """The results are right, naive equals fast, and two orders of the threads give equal bits."""
    first = run(library, inputs, "end")
    check(first[:4], *inputs, case)
    assert torch.equal(first[4], first[0]), f"naive and fast W_eff differ {case}"
    for a, b in zip(first, run(library, inputs, "start")):
        assert torch.equal(a, b), f"the order of threads changes the result {case}"


@pytest.mark.parametrize("dtype", TYPES)
def test_text_is_right_around_every_edge(libraries, dtype):
    """Right results and no access outside a buffer, for rows and columns next to the edges of a
    tile: 32 rows, and 32 columns with V = 1 or 128 columns with V = 4."""
    for cols in (1, 31, 32, 33, 124, 128, 132):
        for rows in (1, 31, 32, 33):
            run_and_check(libraries[dtype], example(rows, cols, dtype), f"{rows} x {cols}")


def test_text_takes_any_layout_and_many_lines(libraries):
    """Strided tensors give the results of their contiguous copies. Step 4 is right where its 32
    warps have more than 32 lines to add. CUDA's error text (here: at most 65535 blocks of 32 rows)
    comes out of Python."""
    library = libraries[BF16]
    W, r, c, G = example(64, 72, BF16)
    run_and_check(library, (W.T, c, r, G.T))
    run_and_check(library, (W[:, 1::2], r, c[::2], G[:, 1::2]))
    run_and_check(library, example(1100, 3, BF16))
    run_and_check(library, example(2, 4300, BF16))
    W, r, c, _ = example(65536 * 32, 1, BF16)
    with calls(library), pytest.raises(RuntimeError, match="invalid configuration"):
        kernel.forward_cuda(W, r, c, BF16)


@pytest.mark.parametrize("name", ["W", "c", "G"])
def test_unaligned_view_is_moved_one_number_at_a_time(libraries, name):
    """A contiguous view that starts one number after an aligned address gives right results with
    V = 1. With V = 4 the same view is a misaligned access."""
    inputs = dict(zip("WrcG", example(40, 100, BF16)))
    t = inputs[name]
    inputs[name] = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    run_and_check(libraries[BF16], inputs.values())
    with calls(libraries[BF16]) as patch, pytest.raises(RuntimeError, match="misaligned"):
        patch.setattr(kernel, "width", lambda *tensors: 4)
        kernel.backward_cuda(**inputs)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_rejected(libraries, mutant):
    """The checks that the text passes above reject the mutant, for the reason expected, in one of
    three shapes that are a little larger than their tiles."""
    reason = MUTANTS[mutant][2]
    with pytest.raises((AssertionError, RuntimeError), match=reason):
        for rows, cols in ((33, 132), (65, 33), (1100, 1)):
            run_and_check(libraries[mutant], example(rows, cols, FP32))


# ---------------------------------------------------------------- the compilers
def test_nvcc_builds_without_spills(tmp_path):
    """nvcc compiles the text for four GPUs and all dtypes. Every kernel keeps its variables in
    registers, at most 64 of them: with 64, four blocks of 256 threads fit into a multiprocessor."""
    if shutil.which("nvcc") is None:
        pytest.skip("compiling the CUDA text takes nvcc on PATH")
    # One file for all dtypes, since most of the time goes into CUDA's headers.
    path = tmp_path / "kernels.cu"
    path.write_text(HEADERS + one_file(dict.fromkeys(TYPES, REST)), encoding="utf-8")
    gpus = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 80, 90, 100)]
    command = ["nvcc", *cpp_extension.COMMON_NVCC_FLAGS, *gpus, "-O3", "-Xptxas=-v"]
    # A fatbin is the code for the GPUs alone.
    command += ["-fatbin", path, "-o", path.with_suffix(".fatbin")]
    said = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stderr
    # naive, add_parts; forward and backward with V = 1 and 4
    kernels = 6 * len(TYPES) * len(gpus)
    assert said.count("    0 bytes stack frame, 0 bytes spill stores") == kernels
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == kernels and max(registers) <= 64


def test_load_inline_builds_and_loads(monkeypatch, tmp_path):
    """PyTorch compiles and loads the text, also where there is no GPU."""
    if torch.version.cuda is None or cpp_extension.CUDA_HOME is None:
        pytest.skip("needs a CUDA build of PyTorch, and nvcc: set CUDA_HOME")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    library = kernel.library.__wrapped__(BF16)
    assert library.run_forward and library.run_backward


# ---------------------------------------------------------------- the GPU
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows, cols", [(0, 5), (1, 1), (999, 1), (33, 129), (2048, 768)])
def test_gpu_is_right_and_repeatable(rows, cols, dtype):
    """The GPU's results pass `check`. A second run on another stream, whose W takes long to make,
    gives equal bits: the kernels wait for earlier work on their stream."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, nvcc and ninja")
    W, r, c, G = example(rows, cols, dtype, "cuda")
    for inputs in ((W.T, c, r, G.T), (W, r, c, G)):
        first = both_passes(*inputs)
        check(first, *inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.zeros_like(W)
        # Ten million clock cycles are about 0.01 s.
        torch.cuda._sleep(10_000_000)
        late.copy_(W)
        second = both_passes(late, r, c, G)
    torch.cuda.synchronize()
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_gpu_offsets_do_not_overflow():
    """The last rows of a matrix with more than 2^31 entries are right."""
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    W = torch.rand(65600, 32768, device="cuda") + 0.5
    r, c = W[:, 0].clone(), W[0].clone()
    G = W.bfloat16()
    W_eff, dW, dr, _ = both_passes(W, r, c, G)
    W, r, G, W_eff, dW, dr = [t[-64:] for t in (W, r, G, W_eff, dW, dr)]
    # dc is a sum over all rows: a sum over the last rows stands for it in `check`.
    dc = (r[:, None] * G.float() * W).sum(0)
    check((W_eff, dW, dr, dc), W, r, c, G)
