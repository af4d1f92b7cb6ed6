// Runs the CUDA text of kernel.py on a CPU, for the tests: g++ -include this kernels.cpp
//
// Each CUDA thread is a coroutine with its own stack. A coroutine runs until its thread must wait
// for others, at a barrier or a shuffle; then the next one runs. Blocks run one after another.
// Errors have CUDA's words: an access to the forbidden pages that the test puts around each buffer,
// a misaligned access (-fsanitize=alignment), a launch outside CUDA's limits.
// Linux only: ucontext starts a coroutine; _setjmp/_longjmp switch coroutines.
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#define __global__ static
#define __device__ static
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static int max(int a, int b) { return a > b ? a : b; }

// ---- number formats: round to nearest, ties to even

static uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
static float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

struct __nv_bfloat16 {                                  // the upper half of a float
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float f) {
    const uint32_t u = bits_of(f);
    bits = f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  explicit operator float() const { return float_of(uint32_t(bits) << 16); }
};

struct __half {                                         // 1 sign, 5 exponent (bias 15), 10 mantissa
  uint16_t bits;
  __half() = default;
  explicit __half(float f) {
    uint32_t u = bits_of(f) & 0x7fffffff;
    if (u > 0x7f800000) {                               // NaN
      u = 0x7e00;
    } else if (u >= 0x47800000) {                       // >= 65536: infinity
      u = 0x7c00;
    } else if (u >= 0x38800000) {                       // normal
      u = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
    } else {                                            // subnormal: 0.5 has ulp 2^-24
      u = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
    }
    bits = u | (bits_of(f) >> 16 & 0x8000);
  }
  explicit operator float() const {
    const uint32_t e = bits >> 10 & 31;
    const uint32_t m = bits & 1023;
    const uint32_t sign = uint32_t(bits & 0x8000) << 16;
    float size = m * 0x1p-24f;                          // subnormal
    if (e > 0) size = float_of((e + 112) << 23 | m << 13);
    if (e == 31) size = float_of(0x7f800000 | m << 13);
    return float_of(bits_of(size) | sign);
  }
};

// ---- threads

// The top FRAME bytes of a stack belong to thread_main. The POISON bytes below them hold the
// kernel's variables. (Stacks of 64 KiB + 192 bytes do not compete for the same cache lines.)
constexpr int MAX_THREADS = 1024;
constexpr int STACK = (1 << 16) + 192;
constexpr int FRAME = 256;
constexpr int POISON = 1 << 11;
static dim3 blockIdx, gridDim, blockDim, threadIdx;
struct Thread {
  jmp_buf here;
  bool started, finished;
  int shuffles;
};
static Thread threads[MAX_THREADS];
alignas(64) static char stacks[MAX_THREADS][STACK];
static jmp_buf scheduler;
static sigjmp_buf escape;                               // the way out of a kernel with an error
typedef const char* cudaError_t;
static cudaError_t last_error = "no error";
static void (*program)(void*), *arguments;
static int self, alive;
static bool progress;
// The test sets `descending`: blocks and threads run in ascending or in descending order.
extern "C" { int descending = 0; }

static void fail(cudaError_t error) {
  last_error = error;
  siglongjmp(escape, 1);
}

// Stop this thread; resume() goes on from here.
static void yield() {
  if (!_setjmp(threads[self].here)) _longjmp(scheduler, 1);
}

static void thread_main() {
  for (;;) {                                            // one turn per block
    program(arguments);
    threads[self].finished = true;
    progress = true;
    alive--;
    yield();
  }
}

__attribute__((noinline)) static void resume(int t) {
  self = t;
  threadIdx = dim3(t % blockDim.x, t / blockDim.x);
  if (_setjmp(scheduler)) return;                       // the thread yielded
  if (threads[t].started) _longjmp(threads[t].here, 1);
  threads[t].started = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[t];
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, thread_main, 0);
  setcontext(&context);
}

struct Barrier { int arrived, round; };
static Barrier block_barrier, warp_barrier[MAX_THREADS / 32];
static float slots[MAX_THREADS][2];

static void wait(Barrier& barrier, const int& expected) {
  const int round = barrier.round;
  barrier.arrived++;
  progress = true;
  while (barrier.round == round) {
    if (barrier.arrived < expected) {
      yield();
    } else {
      barrier.arrived = 0;
      barrier.round++;
    }
  }
}
// A barrier waits for all threads of the block that have not ended.
static void __syncthreads() { wait(block_barrier, alive); }

// A shuffle waits for all 32 lanes of the warp. Each lane has two slots: in the next shuffle a fast
// lane writes the other slot, so a slow lane can still read the first.
static float __shfl_xor_sync(unsigned lanes, float value, int mask) {
  static const int LANES = 32;
  if (lanes != 0xffffffff) fail("a partial shuffle mask");
  const int side = threads[self].shuffles++ % 2;
  slots[self][side] = value;
  wait(warp_barrier[self / 32], LANES);
  return slots[self ^ mask][side];
}

// ---- launches

typedef void* cudaStream_t;
static const char* cudaGetErrorString(cudaError_t e) { return e; }
static cudaError_t cudaGetLastError() {                 // reading the error resets it
  const cudaError_t e = last_error;
  last_error = "no error";
  return e;
}

static void caught(int signal) {
  if (signal == SIGSEGV || signal == SIGBUS) fail("an illegal memory access was encountered");
  fail("misaligned address");                           // the sanitizer
}

static void run_block() {
  const int count = blockDim.x * blockDim.y;
  alive = count;
  block_barrier = {};
  memset(warp_barrier, 0, sizeof warp_barrier);
  for (int t = 0; t < count; t++) {
    threads[t].finished = false;
    threads[t].shuffles = 0;
    memset(stacks[t] + STACK - FRAME - POISON, 0xff, POISON);   // local variables start as NaN
  }
  while (alive) {
    progress = false;
    for (int t = 0; t < count; t++) {
      const int next = descending ? count - 1 - t : t;
      if (!threads[next].finished) resume(next);
    }
    if (!progress) fail("deadlock: some thread missed a barrier or a shuffle");
  }
}

template <typename Kernel> static void launch(dim3 grid, dim3 block, Kernel kernel) {
  if (strcmp(last_error, "no error")) return;           // as on a GPU: nothing runs after an error
  if (!grid.x || !grid.y || grid.x > 0x7fffffff || grid.y > 65535 ||
      block.x * block.y > MAX_THREADS) {
    last_error = "invalid configuration argument";
    return;
  }
  program = [](void* k) { (*(Kernel*)k)(); };
  arguments = &kernel;
  gridDim = grid;
  blockDim = block;
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction catching = {}, before[4];
  catching.sa_handler = caught;
  catching.sa_flags = SA_NODEFER;
  for (int i = 0; i < 4; i++) sigaction(signals[i], &catching, &before[i]);
  if (sigsetjmp(escape, 1)) {
    memset(threads, 0, sizeof threads);                 // after an error: abandon the coroutines
  } else {
    for (unsigned y = 0; y < grid.y; y++) {
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = descending ? dim3(grid.x - 1 - x, grid.y - 1 - y) : dim3(x, y);
        run_block();
      }
    }
  }
  for (int i = 0; i < 4; i++) sigaction(signals[i], &before[i], nullptr);
}
