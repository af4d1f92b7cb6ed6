"""The kernel: W_eff = diag(r) W diag(c), in the dtype of the matmul, one pass over memory each way.

    forward     W_eff_ij = r_i W_ij c_j                                              (paper, eq. 3)
    backward    dW_ij = r_i G_ij c_j    dr_i = sum_j G_ij W_ij c_j    dc_j = sum_i r_i G_ij W_ij
                with G = dL/dW_eff; all three from one reading of G and W            (paper, eq. 4)

Autocast is PyTorch's mixed precision: weights stay float32 and each matmul gets a bfloat16 copy. A
few operations per number moved, so the time is that of moving bytes. Bytes per weight, with W and
dW in float32, W_eff and G in bfloat16, counted from the code:
                                     forward    backward
    autocast, no multipliers            6          6      casts W to bfloat16, and G back
    this kernel                         6         10.3    G and W in, dW out, 0.3 of partial sums
    PyTorch, operation by operation    22         54      every product goes to memory and back

Autocast makes the forward's pass anyway: the multipliers ride along. A scalar s is folded in by the
caller, `scale(W, s * r, c, dtype)`; autograd finds ds and dr behind it.

On CUDA the op runs the kernels below, compiled on first use (seconds; needs Linux, nvcc, ninja). On
any other device it runs PyTorch's formula. `python kernel.py` checks and times it where it stands.
"""
import ctypes
import functools
import itertools

import torch
from torch import Tensor

CUDA = r"""
// How a GPU runs this. A kernel (__global__) is the program of one thread. Threads come in warps of
// 32 lanes that step together: when neighbouring lanes load neighbouring addresses, memory serves
// the warp in a few wide transfers (coalescing). Warps form blocks, a block runs on one
// multiprocessor and owns some fast shared memory; blocks run in any order, many at a time.
// f<<<grid, block, 0, stream>>>(...) queues grid.x * grid.y blocks of block.x * block.y threads on
// a stream (work in one stream runs in order). In f, blockIdx and threadIdx say which thread this
// is. Here a block is 32 x WARPS, so threadIdx.x is the lane and threadIdx.y the warp.
#undef __CUDA_NO_HALF_CONVERSIONS__              // PyTorch's flags forbid float(x) for these types
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using T = ELEMENT;                               // of W_eff and G: named on the command line
using In = const float* __restrict__;            // restrict: nothing is written where we read
using Out = float* __restrict__;

constexpr int WARPS = 8;                         // in a block, one below the other
constexpr int ROWS = 4;                          // a warp takes ROWS rows, WARPS apart:
constexpr int TILE = WARPS * ROWS;               // a block covers 32 rows and 32 V columns

// V neighbours in a row, moved by one instruction: four floats are a 16-byte access per lane.
template <typename X, int V> struct alignas(sizeof(X) * V) Vec { X x[V]; };
template <int V, typename X> __device__ Vec<X, V> load(const X* p) { return *(const Vec<X, V>*)p; }
template <int V, typename X> __device__ void store(X* p, Vec<X, V> v) { *(Vec<X, V>*)p = v; }

template <int V>
__global__ void forward(In W, In r, In c, T* __restrict__ out, int rows, int cols) {
  const int first = blockIdx.y * TILE + threadIdx.y, col = (blockIdx.x * 32 + threadIdx.x) * V;
  if (col >= cols) return;
  const Vec<float, V> cj = load<V>(c + col);
  Vec<float, V> w[ROWS];
  float ri[ROWS];
  #pragma unroll                                 // memory answers after hundreds of ns: ask for
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS)         // all rows at once, then work
    if (row < rows) ri[k] = r[row], w[k] = load<V>(W + (size_t)row * cols + col);
  #pragma unroll
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS) {
    Vec<T, V> o;
    for (int v = 0; v < V; v++) o.x[v] = T(ri[k] * w[k].x[v] * cj.x[v]);     // PyTorch's order
    if (row < rows) store(out + (size_t)row * cols + col, o);
  }
}

// Adds one Vec per lane over the N warps of a block, always in the same order; warp 0 has the sum.
template <int N, int V> __device__ Vec<float, V> sum_over_warps(Vec<float, V> sum) {
  __shared__ Vec<float, V> shared[N][32];        // shared memory: how warps hand numbers over
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();                               // nobody reads before everybody has written
  if (threadIdx.y == 0)
    for (int warp = 1; warp < N; warp++)
      for (int v = 0; v < V; v++) sum.x[v] += shared[warp][threadIdx.x].x[v];
  return sum;
}

// dW is finished here. A row of dr and a column of dc cross many blocks, so each block writes its
// share to its own line of dr_part and dc_part, and `finish` adds the lines. atomicAdd would spare
// that, but adds in order of arrival: the same training run would not give the same bits twice.
template <int V>
__global__ void backward(const T* __restrict__ G, In W, In r, In c, Out dW, Out dr_part,
                         Out dc_part, int rows, int cols) {
  const int first = blockIdx.y * TILE + threadIdx.y, col = (blockIdx.x * 32 + threadIdx.x) * V;
  const bool inside = col < cols;                // lanes past the edge stay, with zeros, because
  Vec<float, V> cj = {}, dc = {}, w[ROWS] = {};  // the shuffles below need all 32
  Vec<T, V> g[ROWS] = {};
  float ri[ROWS] = {}, dr[ROWS] = {};
  if (inside) cj = load<V>(c + col);
  #pragma unroll
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS)
    if (inside && row < rows) {
      ri[k] = r[row];
      g[k] = load<V>(G + (size_t)row * cols + col);
      w[k] = load<V>(W + (size_t)row * cols + col);
    }
  #pragma unroll
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS) {
    Vec<float, V> dw;
    for (int v = 0; v < V; v++) {
      const float gc = float(g[k].x[v]) * cj.x[v], rg = ri[k] * float(g[k].x[v]);
      dw.x[v] = gc * ri[k];
      dr[k] += gc * w[k].x[v];
      dc.x[v] += rg * w[k].x[v];
    }
    if (inside && row < rows) store(dW + (size_t)row * cols + col, dw);
  }
  for (int half = 16; half > 0; half /= 2)       // a shuffle reads another lane's register: after
    for (int k = 0; k < ROWS; k++)               // 16, 8, 4, 2 and 1 every lane has the row's sum
      dr[k] += __shfl_xor_sync(0xffffffff, dr[k], half);
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS)
    if (threadIdx.x == 0 && row < rows) dr_part[(size_t)blockIdx.x * rows + row] = dr[k];
  dc = sum_over_warps<WARPS>(dc);
  if (threadIdx.y == 0 && inside) store(dc_part + (size_t)blockIdx.y * cols + col, dc);
}

// The second stage: blocks with y = 0 add up the lines of dr_part, those with y = 1 of dc_part.
__global__ void finish(In dr_part, In dc_part, Out dr, Out dc, int rows, int cols, dim3 lines) {
  const float* part = blockIdx.y ? dc_part : dr_part;
  const int size = blockIdx.y ? cols : rows, count = blockIdx.y ? lines.y : lines.x;
  const int i = blockIdx.x * 32 + threadIdx.x;
  Vec<float, 1> sum = {};
  #pragma unroll 4
  for (int line = threadIdx.y; line < count; line += 32)
    if (i < size) sum.x[0] += part[(size_t)line * size + i];
  sum = sum_over_warps<32>(sum);
  if (threadIdx.y == 0 && i < size) (blockIdx.y ? dc : dr)[i] = sum.x[0];
}

// What Python calls (extern "C" keeps the names as written, so that ctypes finds them). A launch
// that CUDA refuses leaves a reason behind; without one, "no error".
static dim3 tiles(int rows, int cols, int vec) {
  return dim3((cols + 32 * vec - 1) / (32 * vec), (rows + TILE - 1) / TILE);
}
extern "C" const char* run_forward(int rows, int cols, int vec, cudaStream_t stream,
                                   float* W, float* r, float* c, T* out) {
  const auto kernel = vec == 4 ? forward<4> : forward<1>;
  kernel<<<tiles(rows, cols, vec), dim3(32, WARPS), 0, stream>>>(W, r, c, out, rows, cols);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* run_backward(int rows, int cols, int vec, cudaStream_t stream, T* G,
    float* W, float* r, float* c, float* dW, float* dr_part, float* dc_part, float* dr, float* dc) {
  const auto kernel = vec == 4 ? backward<4> : backward<1>;
  const dim3 grid = tiles(rows, cols, vec), ends((max(rows, cols) + 31) / 32, 2);
  kernel<<<grid, dim3(32, WARPS), 0, stream>>>(G, W, r, c, dW, dr_part, dc_part, rows, cols);
  finish<<<ends, dim3(32, 32), 0, stream>>>(dr_part, dc_part, dr, dc, rows, cols, grid);
  return cudaGetErrorString(cudaGetLastError());
}
"""
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for one dtype of W_eff, compiled by the first call. Without PyTorch's headers,
    which ctypes makes possible, that takes seconds, not a minute. RuntimeError if it fails."""
    from torch.utils.cpp_extension import load_inline      # here: most users never need it
    try:                    # hangs? a killed build left a lock: delete ~/.cache/torch_extensions
        path = load_inline("scale_" + TYPES[dtype].strip("_"), "", CUDA, no_implicit_headers=True,
                           extra_cuda_cflags=["-O3", "-DELEMENT=" + TYPES[dtype]],
                           is_python_module=False)
        functions = ctypes.CDLL(path)
        functions.run_forward.restype = functions.run_backward.restype = ctypes.c_char_p
    except (OSError, RuntimeError, AttributeError) as reason:
        raise RuntimeError(
            "the scale kernel needs Linux, nvcc (of a CUDA toolkit, which CUDA_HOME names) and "
            f"ninja to be compiled ({str(reason).splitlines()[0]}); training without "
            "--scale-kernel computes the same and compiles nothing") from reason
    return functions


def launch(function: str, dtype: torch.dtype, vec: int, W: Tensor, *tensors: Tensor) -> None:
    """Queue a function of the library on W's device, behind the work on its current stream."""
    with torch.cuda.device(W.device):
        addresses = torch.cuda.current_stream().cuda_stream, *(t.data_ptr() for t in tensors)
        error = getattr(library(dtype), function)(*W.shape, vec, *map(ctypes.c_void_p, addresses))
    if error != b"no error":
        raise RuntimeError(f"CUDA refused {function} for W {tuple(W.shape)}: {error.decode()}")


def width(*tensors: Tensor) -> int:
    """4 if every row can be moved in groups of 4 at aligned addresses, otherwise 1."""
    return 4 if all(t.shape[-1] % 4 == 0 and t.data_ptr() % (4 * t.element_size()) == 0
                    for t in tensors) else 1


def validate(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype, *G: Tensor) -> None:
    """One clear ValueError, before any launch, for whatever the op is not meant for."""
    tensors = (W, r, c, *G)
    real = torch.float64 if W.dtype == torch.float64 and not W.is_cuda else torch.float32
    if not (W.ndim == 2 and max(W.shape) < 2**31 and all(g.shape == W.shape for g in G)
            and r.shape == W.shape[:1] and c.shape == W.shape[1:]
            and W.dtype == r.dtype == c.dtype == real and dtype in (*TYPES, real)
            and len({t.device for t in tensors}) == 1):
        given = ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors)
        raise ValueError("scale makes float32, float16 or bfloat16 from W [out, in], r [out] and c "
                         f"[in], float32 on one device (G like W), not {dtype} from {given}")


# ---------------------------------------------------------------- the op


def formula(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What the kernel must reproduce bit for bit: these products, in this order, rounded last."""
    return (r[:, None] * W * c).to(dtype)


@torch.library.custom_op("multipliers::scale", mutates_args=())
def scale(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """W_eff [out, in] = diag(r) W diag(c), rounded once to `dtype`, contiguous (paper, eq. 3).

    W [out, in], r [out], c [in]: float32 on one device, any strides (on a CPU float64 too, for
    gradcheck). dtype: float32, float16 or bfloat16. ValueError for anything else. On CUDA,
    RuntimeError if the kernel cannot be compiled or, in CUDA's words, not be launched (its limit
    is 2 million rows). Differentiable once.
    """
    validate(W, r, c, dtype)
    return formula(W, r, c, dtype).contiguous()


@torch.library.custom_op("multipliers::scale_backward", mutates_args=())
def scale_backward(G: Tensor, W: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dW [out, in], dr [out], dc [in] from G = dL/dW_eff [out, in] (paper, eq. 4), in W's dtype."""
    validate(W, r, c, G.dtype, G)
    Gc, rG = G.to(W.dtype) * c, r[:, None] * G.to(W.dtype)
    return (Gc * r[:, None]).contiguous(), (Gc * W).sum(1), (rG * W).sum(0)


@scale.register_kernel("cuda")
def forward_cuda(W, r, c, dtype):
    validate(W, r, c, dtype)
    W, r, c, out = W.contiguous(), r.contiguous(), c.contiguous(), W.new_empty(W.shape, dtype=dtype)
    if W.numel():                                          # CUDA refuses a grid without blocks
        launch("run_forward", dtype, width(W, c), W, W, r, c, out)
    return out


@scale_backward.register_kernel("cuda")
def backward_cuda(G, W, r, c):
    validate(W, r, c, G.dtype, G)
    if W.numel() == 0:
        return W.new_empty(W.shape), torch.zeros_like(r), torch.zeros_like(c)
    G, W, r, c = (t.contiguous() for t in (G, W, r, c))
    (rows, cols), vec = W.shape, width(G, W, c)
    dr_part = W.new_empty(-(-cols // (32 * vec)), rows)    # a line for each column of blocks
    dc_part = W.new_empty(-(-rows // 32), cols)            # a line for each row of blocks
    dW, dr, dc = W.new_empty(rows, cols), W.new_empty(rows), W.new_empty(cols)
    launch("run_backward", G.dtype, vec, W, G, W, r, c, dW, dr_part, dc_part, dr, dc)
    return dW, dr, dc


# torch.compile asks for shapes and dtypes only ("fake" tensors). Autograd saves just the inputs.
scale.register_fake(lambda W, r, c, dtype: W.new_empty(W.shape, dtype=dtype))
scale_backward.register_fake(
    lambda G, W, r, c: (W.new_empty(W.shape), torch.empty_like(r), torch.empty_like(c)))
scale.register_autograd(
    lambda ctx, G: (*scale_backward(G, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]))


# ---------------------------------------------------------------- python kernel.py

SHAPES = {(768, 768): 48, (2048, 768): 24, (768, 2048): 12,  # how many a 124M SwiGLU model has
          (50304, 768): 0, (4096, 4096): 0, (16384, 4096): 0}     # 0: only timed


def example(rows: int, cols: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Random W, r and c, with requires_grad, and G."""
    W, G = torch.randn(2, rows, cols, device=device)
    r, c = torch.rand(rows, device=device) + 0.5, torch.rand(cols, device=device) + 0.5
    return *(t.requires_grad_() for t in (W, r, c)), G.to(dtype)


def verify(device: str) -> float:
    """The largest relative error of dW, dr, dc against autograd in float64. AssertionError unless
    W_eff has the bits of PyTorch's formula and a second run has the bits of the first."""
    worst = 0.0
    for dtype, shape in itertools.product(TYPES, [(1, 1), (33, 129), (257, 1000), (768, 768)]):
        W, r, c, G = example(*shape, dtype, device)
        W_eff, again = scale(W, r, c, dtype), scale(W, r, c, dtype)
        grads, twice = (torch.autograd.grad(out, (W, r, c), G) for out in (W_eff, again))
        assert torch.equal(W_eff, formula(W, r, c, dtype)), f"W_eff differs: {shape}, {dtype}"
        assert all(map(torch.equal, (again, *twice), (W_eff, *grads))), "two runs differ"
        exact = [t.detach().double().requires_grad_() for t in (W, r, c)]
        exact = torch.autograd.grad(formula(*exact, torch.float64), exact, G.double())
        worst = max(worst, *(((a - b).norm() / b.norm()).item() for a, b in zip(grads, exact)))
    return worst


def milliseconds(way, sets: list[tuple[Tensor, ...]]) -> Tensor:
    """[forward, backward] time per matrix of W_eff = way(W, r, c). One CUDA graph (launches
    recorded once, replayed as one) runs all sets, so that launches leave no gaps, and the GPU's
    cache (L2) has forgotten a matrix when its turn comes again."""
    from triton.testing import do_bench                    # comes with PyTorch for CUDA
    stream, graphs = torch.cuda.Stream(), [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                        # compiles: a graph records launches only
        torch.autograd.grad(way(*sets[0][:3]), sets[0][:3], sets[0][3])
    with torch.cuda.graph(graphs[0], stream=stream):
        outs = [way(W, r, c) for W, r, c, _ in sets]
    with torch.cuda.graph(graphs[1], stream=stream, pool=graphs[0].pool()):
        grads = [torch.autograd.grad(out, s[:3], s[3]) for out, s in zip(outs, sets)]
    times = [do_bench(graph.replay, return_mode="median") / len(sets) for graph in graphs]
    del grads                                              # so far each result had its own memory
    return torch.tensor(times)


def show(name: str, ms: Tensor, weights: int, copy: float) -> None:
    """Three lines of the table, from ms [kernel, eager, torch.compile] x [forward, backward]."""
    for part, size, times in zip(("forward", "backward", "both"), (6, 10, 16), (*ms.T, ms.sum(1))):
        kernel, eager, compiled = times.tolist()
        rate = size * weights / kernel / 1e6               # bytes that must move, in GB/s
        print(f"{name:>14} {part:9}{kernel * 1e3:9.2f}{rate:7.0f}{rate / copy:9.0%}"
              f"{eager / kernel:9.2f}{compiled / kernel:11.2f}")


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}: W_eff has the bits of PyTorch's formula, a second run those of the first;\n"
          f"dW, dr and dc are within {verify(device):.0e} of float64.")
    weights = sum(count * rows * cols for (rows, cols), count in SHAPES.items())
    if device == "cpu":
        print("No CUDA device here: that was the formula itself, and there is nothing to time.\n"
              "What a GPU's table must be held against, bytes alone: one forward and backward\n"
              f"over the {weights:,} weights of a 124M GPT at 4.8 TB/s (data sheet of an H200):")
        for way, size in {"autocast alone": 12, "this kernel": 16.3, "PyTorch eager": 76}.items():
            print(f"{way:>16} {size:5} bytes per weight, {size * weights / 4.8e9:.2f} ms")
        return

    from triton.testing import do_bench
    big = torch.randn(2, 2**28, device=device)             # 1 GiB read, 1 GiB written
    copy = big.nbytes / do_bench(lambda: big[0].copy_(big[1]), return_mode="median") / 1e6
    del big
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.0f} GB/s\n"
          "         shape pass            us   GB/s  of copy  x eager  x compile")
    total = torch.zeros(3, 2)
    for (rows, cols), count in SHAPES.items():
        torch.compiler.reset()                             # one compilation per shape: its best
        ways = lambda W, r, c: scale(W, r, c, torch.bfloat16), formula, torch.compile(formula)
        sets = [example(rows, cols, torch.bfloat16, device)
                for _ in range(max(2, 2**27 // (rows * cols)))]
        ms = torch.stack([milliseconds(way, sets) for way in ways])
        show(f"{rows} x {cols}", ms, rows * cols, copy)
        total += count * ms
    show("124M model", total, weights, copy)
    print("what that is in a whole training step: python tests/benchmark.py")


if __name__ == "__main__":
    main()
