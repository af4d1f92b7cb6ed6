"""A first CUDA kernel: the learnable multipliers, forward and backward (arXiv 2601.04890).

    forward, eq. 3:    W_eff_ij = r_i W_ij c_j
    backward, eq. 4:   dW_ij = r_i G_ij c_j                     with G = dL/dW_eff
                       dr_i = sum_j G_ij W_ij c_j               dc_j = sum_i r_i G_ij W_ij

Autocast, PyTorch's mixed precision, gives each matmul a bfloat16 copy of its float32 weight. The
kernel multiplies by r and c in the pass that makes the copy. A weight takes few multiplications, so
the bytes decide the time. Bytes per weight, counted for float32 W, dW and bfloat16 W_eff, G:

                                     forward   backward
    autocast, no multipliers             6         6      W in, copy out; G in, dW out
    this kernel                          6        10.3    G and W in, dW out; 0.3 for partial sums
    PyTorch, operation by operation     22        54      each product is written and read again

The operator `scale` runs the kernels on CUDA, and a formula elsewhere. `use_kernel` puts it into a
model. Check: `python kernel.py`. Timing, on CUDA: `python tests/benchmark.py --only kernel`.
"""
import ctypes
import functools

import torch
from torch import Tensor, nn

from multipliers import multipliers_of

CUDA = r"""
// PyTorch's flags forbid conversions like float(x) of 16-bit numbers. Allow them again.
#undef __CUDA_NO_HALF_CONVERSIONS__
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using Element = ELEMENT;   // the type of W_eff and G, from the compiler's command line

// STEP 1: the naive kernel. A kernel (__global__) is a function that the GPU runs in
// many threads at once. Threads form blocks, here of 32 x 32, and blocks form a grid.
// threadIdx is the thread's place in its block, blockIdx the block's place in the grid.
// A thread computes one entry of W_eff.
__global__ void naive(const float* W, const float* r, const float* c,
                      Element* W_eff, int rows, int cols) {
  const int row = blockIdx.y * 32 + threadIdx.y;
  const int col = blockIdx.x * 32 + threadIdx.x;
  if (row >= rows || col >= cols) return;
  const size_t i = (size_t)row * cols + col;
  W_eff[i] = Element(r[row] * W[i] * c[col]);
}

// STEP 2: more bytes per thread. The 32 threads with the same threadIdx.y form a warp:
// they execute each instruction together. threadIdx.x is the lane, a thread's place in
// its warp. If the lanes access neighbouring addresses, the GPU joins the accesses into
// a few wide ones (coalescing). A block of 8 warps covers a tile of 32 rows and 32 V
// columns; a lane takes V columns in 4 rows:
//     row  0  | lane 0 | lane 1 | ... | lane 31 |  warp 0
//     row  1  | lane 0 | lane 1 | ... | lane 31 |  warp 1
//      ...
//     row  8  | lane 0 | lane 1 | ... | lane 31 |  warp 0, which also takes 16 and 24
//      ...
//     row 31  | lane 0 | lane 1 | ... | lane 31 |  warp 7
constexpr int WARPS = 8, ROWS = 4, TILE = WARPS * ROWS;

// V neighbours in a row. One instruction loads or stores all of them: 16 bytes for 4
// floats. From a template the compiler makes one function for each V, here 1 and 4.
template <class X, int V> struct alignas(V * sizeof(X)) Vec { X x[V]; };
template <int V, class X>
__device__ Vec<X, V> load(const X* from) { return *(const Vec<X, V>*)from; }
template <int V, class X>
__device__ void store(X* to, Vec<X, V> numbers) { *(Vec<X, V>*)to = numbers; }

template <int V>
__global__ void forward(const float* W, const float* r, const float* c,
                        Element* W_eff, int rows, int cols) {
  const int first = blockIdx.y * TILE + threadIdx.y;
  const int col = (blockIdx.x * 32 + threadIdx.x) * V;
  if (col >= cols) return;
  Vec<float, V> cj = load<V>(c + col), w[ROWS];
  float ri[ROWS];
  // Memory answers after hundreds of nanoseconds: request all rows, then compute.
  for (int k = 0; k < ROWS; k++) {
    const int row = first + k * WARPS;
    if (row >= rows) continue;
    ri[k] = r[row];
    w[k] = load<V>(W + (size_t)row * cols + col);
  }
  for (int k = 0; k < ROWS; k++) {
    const int row = first + k * WARPS;
    Vec<Element, V> out;
    for (int v = 0; v < V; v++) out.x[v] = Element(ri[k] * w[k].x[v] * cj.x[v]);
    if (row < rows) store(W_eff + (size_t)row * cols + col, out);
  }
}

// STEP 3: backward. A helper first: it adds one Vec per lane over the N warps of a
// block, always in the same order; warp 0 gets the sum. Warps exchange numbers through
// shared memory, which belongs to the block. At __syncthreads each thread waits until
// all threads of the block have written.
template <int N, int V>
__device__ Vec<float, V> sum_over_warps(Vec<float, V> sum) {
  __shared__ Vec<float, V> shared[N][32];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int warp = 1; warp < N && threadIdx.y == 0; warp++)
    for (int v = 0; v < V; v++) sum.x[v] += shared[warp][threadIdx.x].x[v];
  return sum;
}

// The tile is that of step 2. Many blocks share a row or a column of W. So each block
// writes its part of dr and dc to a line of its own in dr_part and dc_part; step 4 adds
// the lines. (atomicAdd needs no step 4, but adds in order of arrival: two equal runs
// could give different bits.)
template <int V>
__global__ void backward(const Element* G, const float* W, const float* r,
                         const float* c, float* dW, float* dr_part, float* dc_part,
                         int rows, int cols) {
  const int first = blockIdx.y * TILE + threadIdx.y;
  const int col = (blockIdx.x * 32 + threadIdx.x) * V;
  // The shuffle below needs all 32 lanes: lanes beyond the last column add zeros.
  const bool inside = col < cols;
  Vec<float, V> cj = {}, dc = {}, w[ROWS] = {};
  Vec<Element, V> g[ROWS] = {};
  float ri[ROWS] = {}, dr[ROWS] = {};
  if (inside) cj = load<V>(c + col);
  for (int k = 0; k < ROWS; k++) {
    const int row = first + k * WARPS;
    if (row >= rows || !inside) continue;
    const size_t i = (size_t)row * cols + col;
    ri[k] = r[row];
    g[k] = load<V>(G + i);
    w[k] = load<V>(W + i);
  }
  for (int k = 0; k < ROWS; k++) {
    const int row = first + k * WARPS;
    Vec<float, V> dw;
    for (int v = 0; v < V; v++) {
      const float gc = float(g[k].x[v]) * cj.x[v];
      const float rg = ri[k] * float(g[k].x[v]);
      dw.x[v] = gc * ri[k];
      dr[k] += gc * w[k].x[v];
      dc.x[v] += rg * w[k].x[v];
    }
    if (row < rows && inside) store(dW + (size_t)row * cols + col, dw);
  }
  // A shuffle reads a number of lane (own lane XOR half). After 5 of them each lane has
  // the sum over its warp. (The inner loop keeps 4 independent shuffles on their way.)
  for (int half = 16; half > 0; half /= 2)
    for (int k = 0; k < ROWS; k++) dr[k] += __shfl_xor_sync(0xffffffff, dr[k], half);
  for (int k = 0; k < ROWS; k++) {
    const int row = first + k * WARPS;
    float* to = dr_part + (size_t)blockIdx.x * rows + row;
    if (row < rows && threadIdx.x == 0) *to = dr[k];
  }
  dc = sum_over_warps<WARPS>(dc);
  if (inside && threadIdx.y == 0) store(dc_part + (size_t)blockIdx.y * cols + col, dc);
}

// STEP 4: add the lines. Blocks with y = 0 make dr from dr_part [lines.x, rows]; blocks
// with y = 1 make dc from dc_part [lines.y, cols]. A lane adds one column, and warp w
// adds the lines w, w + 32, ...
__global__ void add_parts(const float* dr_part, const float* dc_part, float* dr,
                          float* dc, int rows, int cols, dim3 lines) {
  const bool make_dc = blockIdx.y == 1;
  const float* part = make_dc ? dc_part : dr_part;
  float* total = make_dc ? dc : dr;
  const int size = make_dc ? cols : rows;
  const int count = make_dc ? lines.y : lines.x;
  const int i = blockIdx.x * 32 + threadIdx.x;
  Vec<float, 1> sum = {};
  #pragma unroll 4
  for (int line = threadIdx.y; line < count; line += 32)
    if (i < size) sum.x[0] += part[(size_t)line * size + i];
  sum = sum_over_warps<32>(sum);
  if (i < size && threadIdx.y == 0) total[i] = sum.x[0];
}

// What Python calls. kernel<<<grid, block, 0, stream>>>(...) starts grid.x * grid.y
// blocks of block.x * block.y threads. A stream is a queue: the GPU does the work of
// one stream in order. vec is V; 0 means naive. The result is CUDA's error text.
// extern "C" keeps the names as written.
static int ceil_div(int a, int b) { return (a + b - 1) / b; }   // a / b, rounded up

extern "C" const char* run_forward(int rows, int cols, int vec, cudaStream_t stream,
                                   float* W, float* r, float* c, Element* W_eff) {
  auto kernel = vec == 1 ? forward<1> : forward<4>;
  if (vec == 0) kernel = naive;
  const dim3 block(32, vec == 0 ? 32 : WARPS);
  const dim3 grid(ceil_div(cols, 32 * max(vec, 1)), ceil_div(rows, TILE));
  kernel<<<grid, block, 0, stream>>>(W, r, c, W_eff, rows, cols);
  return cudaGetErrorString(cudaGetLastError());
}

extern "C" const char* run_backward(
    int rows, int cols, int vec, cudaStream_t stream, Element* G, float* W, float* r,
    float* c, float* dW, float* dr_part, float* dc_part, float* dr, float* dc) {
  const auto kernel = vec == 1 ? backward<1> : backward<4>;
  const dim3 block(32, WARPS), grid(ceil_div(cols, 32 * vec), ceil_div(rows, TILE));
  const dim3 block4(32, 32), grid4(ceil_div(max(rows, cols), 32), 2);   // for step 4
  kernel<<<grid, block, 0, stream>>>(G, W, r, c, dW, dr_part, dc_part, rows, cols);
  add_parts<<<grid4, block4, 0, stream>>>(dr_part, dc_part, dr, dc, rows, cols, grid);
  return cudaGetErrorString(cudaGetLastError());
}
"""
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return (a + b - 1) // b


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for one dtype of W_eff, compiled. OSError, in one sentence, if that fails."""
    from torch.utils.cpp_extension import load_inline
    name = "scale_" + TYPES[dtype].strip("_")
    flags = ["-O3", "-DELEMENT=" + TYPES[dtype]]
    # load_inline(functions=[...]) would make Python functions, but it compiles PyTorch's headers,
    # which takes over ten times as long. Without them it takes seconds; ctypes calls the result.
    # A killed build leaves a lock, and the next build hangs: delete ~/.cache/torch_extensions.
    try:
        path = load_inline(name, "", CUDA, extra_cuda_cflags=flags,
                           is_python_module=False, no_implicit_headers=True)
        return ctypes.CDLL(path)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError("the scale kernel needs Linux, nvcc (set CUDA_HOME) and ninja to be compiled "
                      f"({reason}); training without --scale-kernel computes the same") from error


def launch(function: str, dtype: torch.dtype, vec: int, *tensors: Tensor) -> None:
    """Queue run_forward or run_backward on the current stream; tensors[0] is [out, in]."""
    rows, cols = tensors[0].shape
    run = getattr(library(dtype), function)
    run.restype = ctypes.c_char_p
    with torch.cuda.device(tensors[0].device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        error = run(rows, cols, vec, stream, *addresses).decode()
    if error != "no error":
        raise RuntimeError(f"CUDA refused {function} for [{rows}, {cols}]: {error}")


def width(*tensors: Tensor) -> int:
    """V: 4 if all rows of all tensors split into aligned groups of 4 numbers, otherwise 1."""
    for t in tensors:
        group = 4 * t.element_size()        # bytes
        if t.shape[-1] % 4 or t.data_ptr() % group:
            return 1
    return 4


def forward_cuda(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    W, r, c = [t.contiguous() for t in (W, r, c)]
    W_eff = torch.empty_like(W, dtype=dtype)
    launch("run_forward", dtype, width(W, c), W, r, c, W_eff)
    return W_eff


def backward_cuda(G: Tensor, W: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    G, W, r, c = [t.contiguous() for t in (G, W, r, c)]
    rows, cols = W.shape
    vec = width(G, W, c)
    # dr_part has a line for each column of blocks, dc_part one for each row of blocks.
    dr_part = W.new_empty(ceil_div(cols, 32 * vec), rows)
    dc_part = W.new_empty(ceil_div(rows, 32), cols)
    dW, dr, dc = [torch.empty_like(t) for t in (W, r, c)]
    launch("run_backward", G.dtype, vec, G, W, r, c, dW, dr_part, dc_part, dr, dc)
    return dW, dr, dc


def formula(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(r) W diag(c). The kernels give the same bits: this order, rounded once, at the end."""
    return (r[:, None] * W * c).to(dtype).contiguous()


def validate(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype, *G: Tensor) -> None:
    """ValueError, in one sentence, for shapes, dtypes and devices that `scale` does not take."""
    # float64 is for gradcheck, PyTorch's check of gradients, on a CPU.
    real = torch.float32 if W.is_cuda or W.dtype != torch.float64 else torch.float64
    good = W.ndim == 2 and max(W.shape) < 2**31 and dtype in (*TYPES, real)
    wanted = [(real, W.shape), (real, W.shape[:1]), (real, W.shape[1:]), (dtype, W.shape)]
    tensors = (W, r, c, *G)
    for t, want in zip(tensors, wanted):
        good = good and (t.dtype, t.shape) == want and t.device == W.device
    if not good:
        given = ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors)
        raise ValueError("scale makes float32, float16 or bfloat16 from W [out, in], r [out] and c "
                         f"[in], float32 on one device (G like W), not {dtype} from {given}")


@torch.library.custom_op("multipliers::scale", mutates_args=())
def scale(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """W_eff [out, in] = diag(r) W diag(c) in `dtype`, contiguous, differentiable once (eq. 3).

    W [out, in], r [out], c [in]: float32 on one device, any strides; on a CPU also float64. dtype:
    float32, float16, bfloat16. ValueError for other input. On CUDA: OSError if the kernel cannot be
    compiled, RuntimeError if CUDA refuses the launch (over 2 million rows).
    """
    validate(W, r, c, dtype)
    # CUDA refuses a grid without blocks, so an empty W goes to the formula.
    if W.is_cuda and W.numel() > 0:
        return forward_cuda(W, r, c, dtype)
    return formula(W, r, c, dtype)


@torch.library.custom_op("multipliers::scale_backward", mutates_args=())  # exercise 11
def scale_backward(G: Tensor, W: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dW [out, in], dr [out], dc [in] in W's dtype, from G = dL/dW_eff [out, in] (eq. 4)."""
    validate(W, r, c, G.dtype, G)
    if W.is_cuda and W.numel() > 0:
        return backward_cuda(G, W, r, c)
    G = G.to(W.dtype)
    Gc = G * c
    rG = r[:, None] * G
    dW = (Gc * r[:, None]).contiguous()
    dr = (Gc * W).sum(1)
    dc = (rG * W).sum(0)
    return dW, dr, dc


def save_inputs(ctx, inputs, output) -> None:
    W, r, c, _ = inputs
    ctx.save_for_backward(W, r, c)


def gradients(ctx, G: Tensor):
    dW, dr, dc = scale_backward(G, *ctx.saved_tensors)
    return dW, dr, dc, None     # no gradient for dtype


scale.register_autograd(gradients, setup_context=save_inputs)
# torch.compile asks only for shapes and dtypes: it calls these functions with "fake" tensors.
scale.register_fake(lambda W, r, c, dtype: W.new_empty(W.shape, dtype=dtype))
scale_backward.register_fake(lambda G, *inputs: tuple(t.new_empty(t.shape) for t in inputs))


# ---------------------------------------------------------------- in a model
def fused_forward(multipliers: nn.Module, W: Tensor) -> Tensor:
    """W_eff [out, in] by `scale`, in place of `Multipliers.forward`."""
    dtype = W.dtype
    # Autocast would cast W_eff to its own dtype, mostly bfloat16. `scale` does so in passing.
    if torch.is_autocast_enabled(W.device.type):
        dtype = torch.get_autocast_dtype(W.device.type)
    # The multipliers are float32, even beside a W in bfloat16. `scale` takes one dtype for all.
    W = W.to(next(multipliers.parameters()).dtype)
    row, column = multipliers.row, multipliers.column
    # A missing multiplier is 1.
    if row is None:
        row = W.new_ones(W.shape[0])
    if column is None:
        column = W.new_ones(W.shape[1])
    # s W = diag(s r) W
    if multipliers.scalar is not None:
        row = multipliers.scalar * row
    return scale(W, row, column, dtype)


def use_kernel(model: nn.Module) -> None:
    """From now on every nn.Linear with multipliers computes W_eff by `scale`."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and multipliers_of(layer):
            multipliers = layer.parametrizations.weight[0]
            # `layer.weight` calls multipliers.forward(W).
            multipliers.forward = functools.partial(fused_forward, multipliers)


def check(W: Tensor, dtype: torch.dtype) -> None:
    """The check of `python kernel.py`, for one W [out, in] and one dtype of W_eff."""
    r = torch.rand_like(W[:, 0]) + 0.5
    c = torch.rand_like(W[0]) + 0.5
    G = torch.randn_like(W).to(dtype)
    W_eff = scale(W, r, c, dtype)
    assert torch.equal(W_eff, formula(W, r, c, dtype)), "W_eff is wrong"
    first = scale_backward(G, W, r, c)
    again = scale_backward(G, W, r, c)
    exact = [t.double().requires_grad_() for t in (W, r, c)]
    wanted = torch.autograd.grad(formula(*exact, torch.float64), exact, G.double())
    for a, b, want in zip(first, again, wanted):
        assert torch.equal(a, b), "two runs differ"
        # A number goes through about 30 roundings of at most 6e-8, with random signs:
        # their sum is about sqrt(30) * 6e-8 = 3e-7.
        assert (a - want).norm() < 1e-6 * want.norm(), "a gradient is wrong"


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in TYPES:
        check(torch.randn(33, 129, device=device), dtype)
        check(torch.randn(257, 1000, device=device), dtype)
    print(f"{device}: W_eff has the bits of PyTorch's formula, a second run those of the first.\n"
          "dW, dr and dc are within a relative error of 1e-6 of float64.")
