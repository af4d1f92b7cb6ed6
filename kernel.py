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

On CUDA the operator `scale` runs the kernels, compiled by the first call; elsewhere, a formula.
Check: `python kernel.py`. Timing, on CUDA: `python tests/benchmark.py --only kernel`.
"""
import ctypes
import functools
import itertools

import torch
from torch import Tensor

CUDA = r"""
// PyTorch's compiler flags forbid conversions like float(x) of 16-bit numbers. Allow them again.
#undef __CUDA_NO_HALF_CONVERSIONS__
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using Element = ELEMENT;   // the type of W_eff and G, from the compiler's command line

// STEP 1: the naive kernel. A kernel (__global__) is a function that the GPU runs in many threads
// at once. Threads form blocks, here of 32 x 32, and blocks form a grid. threadIdx is the thread's
// place in its block, blockIdx the block's place in the grid. A thread computes one entry of W_eff.
__global__ void naive(const float* W, const float* r, const float* c, Element* W_eff,
                      int rows, int cols) {
  const int row = blockIdx.y * 32 + threadIdx.y, col = blockIdx.x * 32 + threadIdx.x;
  if (row >= rows || col >= cols) return;
  const size_t i = (size_t)row * cols + col;
  W_eff[i] = Element(r[row] * W[i] * c[col]);
}

// STEP 2: more bytes per thread. The 32 threads with the same threadIdx.y form a warp: they execute
// each instruction together. threadIdx.x is the lane, a thread's place in its warp. If the lanes
// access neighbouring addresses, the GPU joins the accesses into a few wide ones (coalescing). A
// block of 8 warps covers a tile of 32 rows and 32 V columns; a lane takes V columns in 4 rows:
//     row  0  | lane 0 | lane 1 | ... | lane 31 |  warp 0
//     row  1  | lane 0 | lane 1 | ... | lane 31 |  warp 1
//      ...
//     row  8  | lane 0 | lane 1 | ... | lane 31 |  warp 0, which also takes rows 16 and 24
//      ...
//     row 31  | lane 0 | lane 1 | ... | lane 31 |  warp 7
constexpr int WARPS = 8, ROWS = 4, TILE = WARPS * ROWS;
// V neighbours in a row. One instruction loads or stores all of them: 16 bytes for 4 floats.
template <class X, int V> struct alignas(V * sizeof(X)) Vec { X x[V]; };
template <int V, class X> __device__ Vec<X, V>& at(const X* p) { return *(Vec<X, V>*)p; }

template <int V> __global__ void forward(const float* W, const float* r, const float* c,
                                         Element* W_eff, int rows, int cols) {
  const int first = blockIdx.y * TILE + threadIdx.y, col = (blockIdx.x * 32 + threadIdx.x) * V;
  if (col >= cols) return;
  Vec<float, V> cj = at<V>(c + col), w[ROWS];
  float ri[ROWS];
  // Memory answers after hundreds of nanoseconds: request all rows first, then compute.
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS)
    if (row < rows) ri[k] = r[row], w[k] = at<V>(W + (size_t)row * cols + col);
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS) {
    Vec<Element, V> out;
    for (int v = 0; v < V; v++) out.x[v] = Element(ri[k] * w[k].x[v] * cj.x[v]);
    if (row < rows) at<V>(W_eff + (size_t)row * cols + col) = out;
  }
}

// STEP 3: backward. A helper first: it adds one Vec per lane over the N warps of a block, always in
// the same order; warp 0 gets the sum. Warps exchange numbers through shared memory, which belongs
// to the block. At __syncthreads each thread waits until all threads of the block have written.
template <int N, int V> __device__ Vec<float, V> sum_over_warps(Vec<float, V> sum) {
  __shared__ Vec<float, V> shared[N][32];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int warp = 1; warp < N && threadIdx.y == 0; warp++)
    for (int v = 0; v < V; v++) sum.x[v] += shared[warp][threadIdx.x].x[v];
  return sum;
}

// The tile is that of step 2. Many blocks share a row or a column of W. So each block writes its
// part of dr and dc to a line of its own in dr_part and dc_part; step 4 adds the lines. (atomicAdd
// needs no step 4, but adds in order of arrival: two equal runs could give different bits.)
template <int V> __global__ void backward(const Element* G, const float* W, const float* r,
    const float* c, float* dW, float* dr_part, float* dc_part, int rows, int cols) {
  const int first = blockIdx.y * TILE + threadIdx.y, col = (blockIdx.x * 32 + threadIdx.x) * V;
  // The shuffle below needs all 32 lanes: lanes beyond the last column take part, with zeros.
  const bool inside = col < cols;
  Vec<float, V> cj = {}, dc = {}, w[ROWS] = {};
  Vec<Element, V> g[ROWS] = {};
  float ri[ROWS] = {}, dr[ROWS] = {};
  if (inside) cj = at<V>(c + col);
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS)
    if (inside && row < rows) {
      const size_t i = (size_t)row * cols + col;
      ri[k] = r[row], g[k] = at<V>(G + i), w[k] = at<V>(W + i);
    }
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS) {
    Vec<float, V> dw;
    for (int v = 0; v < V; v++) {
      const float gc = float(g[k].x[v]) * cj.x[v], rg = ri[k] * float(g[k].x[v]);
      dw.x[v] = gc * ri[k], dr[k] += gc * w[k].x[v], dc.x[v] += rg * w[k].x[v];
    }
    if (inside && row < rows) at<V>(dW + (size_t)row * cols + col) = dw;
  }
  // A shuffle reads a number of lane (own lane XOR half). After 5 of them each lane has the sum.
  for (int half = 16; half > 0; half /= 2)
    for (int k = 0; k < ROWS; k++) dr[k] += __shfl_xor_sync(0xffffffff, dr[k], half);
  for (int k = 0, row = first; k < ROWS; k++, row += WARPS)
    if (threadIdx.x == 0 && row < rows) dr_part[(size_t)blockIdx.x * rows + row] = dr[k];
  dc = sum_over_warps<WARPS>(dc);
  if (threadIdx.y == 0 && inside) at<V>(dc_part + (size_t)blockIdx.y * cols + col) = dc;
}

// STEP 4: add the lines. Blocks with y = 0 make dr from dr_part [lines.x, rows]; blocks with y = 1
// make dc from dc_part [lines.y, cols]. A lane adds one column, warp w the lines w, w + 32, ...
__global__ void finish(const float* dr_part, const float* dc_part, float* dr, float* dc,
                       int rows, int cols, dim3 lines) {
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

// What Python calls. kernel<<<grid, block, 0, stream>>>(...) starts grid.x * grid.y blocks of
// block.x * block.y threads. A stream is a queue: the GPU does the work of one stream in order.
// vec is V; 0 means naive. The result is CUDA's error text. extern "C" keeps the names as written.
static int up(int a, int b) { return (a + b - 1) / b; }   // a / b, rounded up
extern "C" const char* run_forward(int rows, int cols, int vec, cudaStream_t stream,
                                   float* W, float* r, float* c, Element* W_eff) {
  const auto kernel = vec == 0 ? naive : vec == 1 ? forward<1> : forward<4>;
  const dim3 grid(up(cols, 32 * max(vec, 1)), up(rows, TILE)), block(32, vec == 0 ? 32 : WARPS);
  kernel<<<grid, block, 0, stream>>>(W, r, c, W_eff, rows, cols);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* run_backward(int rows, int cols, int vec, cudaStream_t stream, Element* G,
    float* W, float* r, float* c, float* dW, float* dr_part, float* dc_part, float* dr, float* dc) {
  const auto kernel = vec == 1 ? backward<1> : backward<4>;
  const dim3 grid(up(cols, 32 * vec), up(rows, TILE)), ends(up(max(rows, cols), 32), 2);
  kernel<<<grid, dim3(32, WARPS), 0, stream>>>(G, W, r, c, dW, dr_part, dc_part, rows, cols);
  finish<<<ends, dim3(32, 32), 0, stream>>>(dr_part, dc_part, dr, dc, rows, cols, grid);
  return cudaGetErrorString(cudaGetLastError());
}
"""
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}

@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for one dtype of W_eff, compiled in seconds. RuntimeError if they cannot be."""
    from torch.utils.cpp_extension import load_inline
    # A killed build leaves a lock, and the next build hangs: delete ~/.cache/torch_extensions.
    try:
        functions = ctypes.CDLL(load_inline(
            "scale_" + TYPES[dtype].strip("_"), "", CUDA, is_python_module=False,
            no_implicit_headers=True, extra_cuda_cflags=["-O3", "-DELEMENT=" + TYPES[dtype]]))
    except (OSError, RuntimeError, AttributeError) as reason:
        raise RuntimeError("the scale kernel needs Linux, nvcc (set CUDA_HOME) and ninja to be "
                           f"compiled ({str(reason).splitlines()[0]}); training without "
                           "--scale-kernel computes the same") from reason
    functions.run_forward.restype = functions.run_backward.restype = ctypes.c_char_p
    return functions

def launch(function: str, dtype: torch.dtype, vec: int, *tensors: Tensor) -> None:
    """Queue run_forward or run_backward on the current stream; tensors[0] is [out, in]."""
    with torch.cuda.device(tensors[0].device):
        addresses = torch.cuda.current_stream().cuda_stream, *(t.data_ptr() for t in tensors)
        arguments = *tensors[0].shape, vec, *map(ctypes.c_void_p, addresses)
        error = getattr(library(dtype), function)(*arguments).decode()
    if error != "no error":
        raise RuntimeError(f"CUDA refused {function} for {list(tensors[0].shape)}: {error}")

def width(*tensors: Tensor) -> int:
    """V: 4 if all rows of all tensors split into aligned groups of 4 numbers, otherwise 1."""
    return 4 if all(t.shape[-1] % 4 == 0 and t.data_ptr() % (4 * t.element_size()) == 0
                    for t in tensors) else 1

def forward_cuda(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    W, r, c, W_eff = *(t.contiguous() for t in (W, r, c)), W.new_empty(W.shape, dtype=dtype)
    launch("run_forward", dtype, width(W, c), W, r, c, W_eff)
    return W_eff

def backward_cuda(G: Tensor, W: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    G, W, r, c = (t.contiguous() for t in (G, W, r, c))
    (rows, cols), vec = W.shape, width(G, W, c)
    # One line for each column of blocks, and one for each row of blocks; -(-a // b) rounds up.
    dr_part, dc_part = W.new_empty(-(-cols // (32 * vec)), rows), W.new_empty(-(-rows // 32), cols)
    dW, dr, dc = map(torch.empty_like, (W, r, c))
    launch("run_backward", G.dtype, vec, G, W, r, c, dW, dr_part, dc_part, dr, dc)
    return dW, dr, dc

def formula(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(r) W diag(c). The kernels give the same bits: this order, rounded once, at the end."""
    return (r[:, None] * W * c).to(dtype).contiguous()

def validate(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype, *G: Tensor) -> None:
    """ValueError, in one sentence, for shapes, dtypes and devices that `scale` does not take."""
    real = torch.float64 if W.dtype == torch.float64 and not W.is_cuda else torch.float32
    given = [(t.dtype, t.shape, t.device) for t in (W, r, c, *G)]
    wanted = [(real, shape, W.device) for shape in (W.shape, W.shape[:1], W.shape[1:])]
    wanted += [(dtype, W.shape, W.device) for _ in G]
    if W.ndim != 2 or max(W.shape) >= 2**31 or dtype not in (*TYPES, real) or given != wanted:
        given = ", ".join(f"{kind} {list(shape)} on {device}" for kind, shape, device in given)
        raise ValueError("scale makes float32, float16 or bfloat16 from W [out, in], r [out] and c "
                         f"[in], float32 on one device (G like W), not {dtype} from {given}")

@torch.library.custom_op("multipliers::scale", mutates_args=())
def scale(W: Tensor, r: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """W_eff [out, in] = diag(r) W diag(c) in `dtype`, contiguous, differentiable once (eq. 3).

    W [out, in], r [out], c [in]: float32 on one device, any strides; on a CPU also float64. dtype:
    float32, float16, bfloat16. ValueError for other input; on CUDA, RuntimeError if compilation
    fails or CUDA refuses the launch (over 2 million rows). A scalar multiplier s enters as s * r.
    """
    validate(W, r, c, dtype)
    # CUDA refuses a grid without blocks, so an empty W goes to the formula.
    return (forward_cuda if W.is_cuda and W.numel() else formula)(W, r, c, dtype)

@torch.library.custom_op("multipliers::scale_backward", mutates_args=())  # exercise 11
def scale_backward(G: Tensor, W: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dW [out, in], dr [out], dc [in] in W's dtype, from G = dL/dW_eff [out, in] (eq. 4)."""
    validate(W, r, c, G.dtype, G)
    if W.is_cuda and W.numel():
        return backward_cuda(G, W, r, c)
    Gc, rG = G.to(W.dtype) * c, r[:, None] * G.to(W.dtype)
    return (Gc * r[:, None]).contiguous(), (Gc * W).sum(1), (rG * W).sum(0)

# torch.compile asks for shapes and dtypes only ("fake" tensors). Autograd saves only the inputs.
scale.register_fake(lambda W, r, c, dtype: W.new_empty(W.shape, dtype=dtype))
scale_backward.register_fake(lambda G, *inputs: tuple(t.new_empty(t.shape) for t in inputs))
scale.register_autograd(
    lambda ctx, G: (*scale_backward(G, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]))

if __name__ == "__main__":
    # Compare W_eff, a second run and the gradients (largest error measured: 2e-7).
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for rows, cols, dtype in itertools.product((33, 257), (129, 1000), TYPES):
        W, G = (torch.randn(rows, cols, device=device).to(t) for t in (torch.float32, dtype))
        r, c = (torch.rand(n, device=device) + 0.5 for n in (rows, cols))
        first, again = ((scale(W, r, c, dtype), *scale_backward(G, W, r, c)) for _ in range(2))
        exact = [t.double().requires_grad_() for t in (W, r, c)]
        exact = torch.autograd.grad(formula(*exact, torch.float64), exact, G.double())
        close = all((a - b).norm() < 1e-6 * b.norm() for a, b in zip(first[1:], exact))
        same = all(map(torch.equal, (first[0], *again), (formula(W, r, c, dtype), *first)))
        if not (same and close):
            raise SystemExit(f"scale is wrong on {device} for {dtype} and W [{rows}, {cols}]")
    print(f"{device}: W_eff has the bits of PyTorch's formula, a second run those of the first.\n"
          "dW, dr and dc are within a relative error of 1e-6 of float64.")
