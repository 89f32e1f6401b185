// The launchers: blocks into batches, a kernel for each batch, kernels into phases. See block.h for what the phases
// mean.
#include "kernels.cuh"

#include <algorithm>

#ifndef AMOS_CUDA_ARCHS
#define AMOS_CUDA_ARCHS "unknown"
#endif

namespace amos::cuda {
namespace {

constexpr int64_t kWarpCols = 1024;  // longest row that one warp takes in the one-pass step; above, a CTA does
constexpr int64_t kCtaCols = 32768;  // a single row longer than this is worth many CTAs, and the three phases
constexpr int64_t kCtasPerSm = 16;   // more than can be resident, so that SMs that finish early get more

// How many threads a row gets in the one pass of `step`; 0: the block goes through the three phases. Only single rows
// do so (moments = "scalar"): others have no place in the workspace.
int step_lanes(const Block& b) {
  if (b.moments != Moments::row || (b.rows == 1 && b.cols > kCtaCols)) return 0;
  return b.cols == 1 ? 1 : b.cols <= kWarpCols ? kWarp : kThreads;
}

template <class T>
Entry<T> entry(const Block& b, bool bf16_momentum, int64_t first_unit, int64_t partial) {
  Entry<T> e;
  e.param = b.param;
  e.grad = b.grad;
  e.momentum = {b.momentum, bf16_momentum};
  e.row_moment = static_cast<T*>(b.row_moment);
  e.column_moment = static_cast<T*>(b.column_moment);
  e.decay = static_cast<T*>(b.decay);
  e.rows = b.rows;
  e.cols = b.cols;
  e.row_work = b.row_work;
  e.column_work = b.column_work;
  e.column_start = b.column_start;
  e.columns = b.columns;
  e.first_unit = first_unit;
  e.partial = partial;
  e.row_count = static_cast<T>(b.row_count);
  e.column_count = static_cast<T>(b.column_count);
  e.moments = b.moments;
  e.k = make_consts<T>(b.hyper);
  return e;
}

int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 1;
}

// One call of one phase: the blocks, and what every launch needs besides. `one_pass`: this is `step`.
template <class T>
struct Call {
  const Block* blocks;
  int64_t n;
  Types types;
  Work work;
  T* scratch;
  cudaStream_t stream;
  bool one_pass = false;
  int error = cudaSuccess;  // the first one; nothing is launched after it
  int sms = multiprocessors();

  // cudaLaunchKernelEx is an ordinary function, so this file is ordinary C++, which tests build for the CPU.
  void launch(void (*kernel)(Batch<T>), Batch<T>& batch, int64_t units_per_cta) {
    if (batch.size == 0 || error) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::min(ceil_div(batch.units, units_per_cta), sms * kCtasPerSm)));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, batch);
    const int last = cudaGetLastError();  // also clears it: the caller hears of it from us alone
    if (!error) error = last;
    batch.size = 0;
    batch.units = 0;
  }

  // Launches `kernel` over all blocks. units(block, nth): the block's units of work, 0 to leave it out; nth counts the
  // blocks of one parameter.
  template <class Units>
  void each(void (*kernel)(Batch<T>), int64_t units_per_cta, const Units& units) {
    Batch<T> batch;
    static_assert(sizeof(batch) <= 32764, "kernel parameters end here");
    batch.work = static_cast<T*>(work.data);
    batch.plane = work.plane;
    batch.scratch = scratch;
    batch.size = 0;
    batch.units = 0;
    batch.assign_columns = one_pass;
    int64_t partial = 0, nth = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Block& b = blocks[i];
      nth = b.columns > 0 ? 0 : nth + (i > 0);
      const int64_t count = b.rows > 0 && b.cols > 0 ? units(b, nth) : 0;
      if (count > 0) {
        if (batch.size == Batch<T>::kCapacity) launch(kernel, batch, units_per_cta);
        batch.entries[batch.size++] = entry<T>(b, types.momentum == Dtype::bf16, batch.units, partial);
        batch.units += count;
      }
      partial += partials(b.moments, b.rows, b.cols);
    }
    launch(kernel, batch, units_per_cta);
  }

  bool taken(const Block& b) const { return one_pass && step_lanes(b) > 0; }

  template <class G>
  void sums() {
    each(row_sums<T, G>, kWarps, [&](const Block& b, int64_t) {
      return b.moments == Moments::row && !taken(b) ? b.rows * row_parts(b.moments, b.cols) : 0;
    });
    each(tile_sums<T, G>, 1, [&](const Block& b, int64_t) {
      return b.moments == Moments::row ? 0 : column_parts(b.rows) * ceil_div(b.cols, kTileCols);
    });
    each(finish_rows<T>, kWarps,
         [&](const Block& b, int64_t) { return row_parts(b.moments, b.cols) > 1 && !taken(b) ? b.rows : 0; });
    // Blocks of one parameter add to the same columns, so each of them has its turn: the order is that of the launches.
    bool more = true;
    for (int64_t turn = 0; more; ++turn) {
      more = false;
      each(finish_columns<T>, 1, [&](const Block& b, int64_t nth) {
        if (b.moments != Moments::row && nth > turn) more = true;
        return b.moments != Moments::row && nth == turn ? ceil_div(b.cols, kWarp) : 0;
      });
    }
  }

  void slots() {
    each(slot_step<T>, 1, [&](const Block& b, int64_t) {
      if (taken(b)) return int64_t(0);
      const int64_t rows = ceil_div(b.rows, kThreads);
      return b.moments == Moments::row      ? rows
             : b.moments == Moments::column ? ceil_div(b.columns, kThreads)
                                            : rows + (b.columns > 0);
    });
  }

  template <class P, class G>
  void update() {
    each(update_step<T, P, G>, kWarps,
         [&](const Block& b, int64_t) { return taken(b) ? 0 : b.rows * ceil_div(b.cols, kChunk); });
  }

  template <int kLanes, class P, class G>
  void one_pass_rows() {
    each(row_step<kLanes, T, P, G>, kThreads / kLanes,
         [&](const Block& b, int64_t) { return step_lanes(b) == kLanes ? b.rows : 0; });
  }

  template <class P, class G>
  void step() {
    one_pass = true;
    one_pass_rows<1, P, G>();
    one_pass_rows<kWarp, P, G>();
    one_pass_rows<kThreads, P, G>();
    sums<G>();
    slots();
    update<P, G>();
  }
};

// ---- from Types to types ------------------------------------------------------------------------

// A type as a value.
template <class T>
struct Type {
  using type = T;
};

// f(compute, param, grad) with the C++ types.
template <class F>
int with_types(Types types, const F& f) {
  const auto is = [&](Dtype param, Dtype grad) { return types.param == param && types.grad == grad; };
  if (is(Dtype::f64, Dtype::f64)) return f(Type<double>{}, Type<double>{}, Type<double>{});
  if (is(Dtype::f32, Dtype::f32)) return f(Type<float>{}, Type<float>{}, Type<float>{});
  if (is(Dtype::f32, Dtype::bf16)) return f(Type<float>{}, Type<float>{}, Type<__nv_bfloat16>{});
  if (is(Dtype::f32, Dtype::f16)) return f(Type<float>{}, Type<float>{}, Type<__half>{});
  if (is(Dtype::bf16, Dtype::bf16)) return f(Type<float>{}, Type<__nv_bfloat16>{}, Type<__nv_bfloat16>{});
  if (is(Dtype::f16, Dtype::f16)) return f(Type<float>{}, Type<__half>{}, Type<__half>{});
  return cudaErrorInvalidValue;
}

// f(call, param, grad) in the types of the call; returns the call's error.
template <class F>
int run(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream, const F& f) {
  return with_types(types, [&](auto t, auto p, auto g) -> int {
    using T = typename decltype(t)::type;
    Call<T> call{blocks, n, types, work, static_cast<T*>(scratch), static_cast<cudaStream_t>(stream)};
    f(call, p, g);
    return call.error;
  });
}

}  // namespace

int sums(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream) {
  return run(blocks, n, types, work, scratch, stream,
             [](auto& call, auto, auto g) { call.template sums<typename decltype(g)::type>(); });
}

int slots(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream) {
  return run(blocks, n, types, work, scratch, stream, [](auto& call, auto, auto) { call.slots(); });
}

int update(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream) {
  return run(blocks, n, types, work, scratch, stream, [](auto& call, auto p, auto g) {
    call.template update<typename decltype(p)::type, typename decltype(g)::type>();
  });
}

int step(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream) {
  return run(blocks, n, types, work, scratch, stream, [](auto& call, auto p, auto g) {
    call.template step<typename decltype(p)::type, typename decltype(g)::type>();
  });
}

int64_t scratch_bytes(const Block* blocks, int64_t n, Types types) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += partials(blocks[i].moments, blocks[i].rows, blocks[i].cols);
  return count * static_cast<int64_t>(types.param == Dtype::f64 ? sizeof(double) : sizeof(float));
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char* architectures() { return AMOS_CUDA_ARCHS; }

}  // namespace amos::cuda
