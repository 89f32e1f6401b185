// The four phases on the CPU: picks the instruction set and the types, and spreads rows over torch's threads.
// Every split is fixed by the shapes alone, so results do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../amos_math.h"
#include "../block.h"

namespace amos::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct NoMomentum {};

template <class P>
using Compute = typename std::conditional<std::is_same<P, double>::value, double, float>::type;

constexpr int kLanes = 64;             // partial sums in a chunk: enough to hide the adder's latency
constexpr int64_t kChunk = 4096;       // elements that one float sum covers
constexpr int64_t kColumnSplits = 16;  // row ranges whose column sums are made apart, then joined in order
constexpr int64_t kGrain = 32768;      // elements that are worth a thread

struct Span {
  int64_t r0, r1, c0, c1, cols;
};

// Where a block's coefficients are in the workspace; see block.h.
template <class T>
struct Planes {
  T *A, *B, *limit;  // by row of the block
  T *P, *Q;          // by column of the block
};

template <class T, class G>
struct SumKernels {
  void (*rows)(const G*, int64_t cols, T clip, int64_t first, int64_t last, T* out);
  void (*chunks)(const G*, int64_t n, T clip, int64_t first, int64_t last, double* out);
  void (*columns)(const G*, int64_t cols, T clip, int64_t first, int64_t last, T* rows, T* columns);
};
template <class P, class G, class M>
struct UpdateKernels {
  using T = Compute<P>;
  void (*rows)(P*, const G*, M*, const Span&, Moments, const Planes<T>&, const Consts<T>&);
  void (*row_steps)(P*, const G*, M*, int64_t cols, int64_t r0, int64_t r1, int64_t row_count, T* moment, T* decay,
                    const Consts<T>&);
  void (*element_steps)(P*, const G*, M*, int64_t r0, int64_t r1, T* moment, T* decay, const Consts<T>&);
};

#define AMOS_ISA baseline
#define AMOS_VECTOR_BYTES 16
#include "kernels.inl"
#undef AMOS_ISA
#undef AMOS_VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define AMOS_X86 1
#pragma GCC push_options
#pragma GCC target("avx2")
#define AMOS_ISA avx2
#define AMOS_VECTOR_BYTES 32
#include "kernels.inl"
#undef AMOS_ISA
#undef AMOS_VECTOR_BYTES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define AMOS_ISA avx512
#define AMOS_VECTOR_BYTES 64
#include "kernels.inl"
#undef AMOS_ISA
#undef AMOS_VECTOR_BYTES
#pragma GCC pop_options
#endif

enum class Isa { baseline, avx2, avx512 };

// AMOS_ISA=baseline|avx2|avx512 in the environment lowers the choice (tests compare the results).
Isa choose_isa() {
#ifdef AMOS_X86
  const char* wanted = getenv("AMOS_ISA");
  Isa isa = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                ? Isa::avx512
            : __builtin_cpu_supports("avx2") ? Isa::avx2
                                             : Isa::baseline;
  if (wanted && !strcmp(wanted, "baseline")) isa = Isa::baseline;
  if (wanted && !strcmp(wanted, "avx2")) isa = std::min(isa, Isa::avx2);
  return isa;
#else
  return Isa::baseline;
#endif
}
const Isa kIsa = choose_isa();

template <class T, class G>
SumKernels<T, G> pick_sums() {
#ifdef AMOS_X86
  if (kIsa == Isa::avx512) return avx512::sum_kernels<T, G>();
  if (kIsa == Isa::avx2) return avx2::sum_kernels<T, G>();
#endif
  return baseline::sum_kernels<T, G>();
}
template <class P, class G, class M>
UpdateKernels<P, G, M> pick_updates() {
#ifdef AMOS_X86
  if (kIsa == Isa::avx512) return avx512::update_kernels<P, G, M>();
  if (kIsa == Isa::avx2) return avx2::update_kernels<P, G, M>();
#endif
  return baseline::update_kernels<P, G, M>();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(first, last) on threads, where the range is worth more than one.
template <class F>
void parallel(int64_t n, int64_t elements_each, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_each));
  if (n <= grain)
    f(int64_t(0), n);
  else
    torch::stable::parallel_for(0, n, grain, f);
}

template <class T>
Planes<T> planes_of(const Block& b, Work work) {
  T* w = static_cast<T*>(work.data);
  T *rows = w + b.row_work, *columns = w + b.column_work + b.column_start;
  return {rows, rows + work.plane, rows + 2 * work.plane, columns, columns + work.plane};
}

template <class T, class G>
void block_sums(const Block& b, Work work) {
  const SumKernels<T, G> kernels = pick_sums<T, G>();
  const G* g = static_cast<const G*>(b.grad);
  const T clip = T(b.hyper.clip);
  const Planes<T> planes = planes_of<T>(b, work);
  if (b.moments == Moments::row) {
    const int64_t chunks = ceil_div(b.cols, kChunk);
    if (b.rows > 1 || chunks == 1) {
      parallel(b.rows, b.cols, [&](int64_t r0, int64_t r1) { kernels.rows(g, b.cols, clip, r0, r1, planes.A); });
    } else {  // one long row (moments = "scalar"): threads take chunks of it
      std::vector<double> parts(chunks);
      parallel(chunks, kChunk, [&](int64_t k0, int64_t k1) { kernels.chunks(g, b.cols, clip, k0, k1, parts.data()); });
      double sum = 0;
      for (double part : parts) sum += part;
      planes.A[0] = T(sum);
    }
    return;
  }
  T* rows = b.moments == Moments::factored ? planes.A : nullptr;
  const int64_t each = ceil_div(std::max<int64_t>(64, ceil_div(b.rows, kColumnSplits)), 4) * 4;
  const int64_t splits = ceil_div(b.rows, each);
  std::vector<T> parts(splits * b.cols);
  parallel(splits, each * b.cols, [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s)
      kernels.columns(g, b.cols, clip, s * each, std::min(b.rows, (s + 1) * each), rows, parts.data() + s * b.cols);
  });
  for (int64_t s = 0; s < splits; ++s)
    for (int64_t c = 0; c < b.cols; ++c) planes.P[c] += parts[s * b.cols + c];
}

template <class T>
void block_slots(const Block& b, Work work) {
  const Consts<T> k = make_consts<T>(b.hyper);
  const Planes<T> planes = planes_of<T>(b, work);
  T* decay = static_cast<T*>(b.decay);
  if (b.moments != Moments::column) {
    T* moment = static_cast<T*>(b.row_moment);
    parallel(b.rows, 64, [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const T G = planes.A[r] / T(b.row_count);
        moment[r] = next_moment(moment[r], G, k);
        const Coefs<T> c = coefficients(G, moment[r], decay[r], k);
        planes.A[r] = c.A;
        planes.B[r] = c.B;
        if (b.moments == Moments::factored) planes.limit[r] = profile_limit(moment[r], k);
      }
    });
  }
  if (b.moments == Moments::row) return;
  T *moment = static_cast<T*>(b.column_moment), *P = planes.P - b.column_start, *Q = planes.Q - b.column_start;
  double total = 0;
  for (int64_t c = 0; c < b.columns; ++c) {
    const T G = P[c] / T(b.column_count);
    moment[c] = next_moment(moment[c], G, k);
    total += double(moment[c]);
    if (b.moments == Moments::column) {
      const Coefs<T> coefs = coefficients(G, moment[c], decay[c], k);
      P[c] = coefs.A;
      Q[c] = coefs.B;
    }
  }
  if (b.moments == Moments::factored) {
    const T mean = T(total / double(b.columns));
    for (int64_t c = 0; c < b.columns; ++c) P[c] = column_profile(moment[c], mean);
  }
}

template <class P, class G, class M>
void block_update(const Block& b, Work work) {
  using T = Compute<P>;
  const UpdateKernels<P, G, M> kernels = pick_updates<P, G, M>();
  const Consts<T> k = make_consts<T>(b.hyper);
  const Planes<T> planes = planes_of<T>(b, work);
  P* theta = static_cast<P*>(b.param);
  const G* g = static_cast<const G*>(b.grad);
  M* m = static_cast<M*>(b.momentum);
  if (b.rows == 1) {
    parallel(b.cols, 1, [&](int64_t c0, int64_t c1) {
      kernels.rows(theta, g, m, Span{0, 1, c0, c1, b.cols}, b.moments, planes, k);
    });
  } else {
    parallel(b.rows, b.cols, [&](int64_t r0, int64_t r1) {
      kernels.rows(theta, g, m, Span{r0, r1, 0, b.cols, b.cols}, b.moments, planes, k);
    });
  }
}

template <class P, class G, class M>
void block_step(const Block& b, Work work) {
  using T = Compute<P>;
  if (b.moments == Moments::row && (b.rows > 1 || b.cols <= kGrain)) {
    const UpdateKernels<P, G, M> kernels = pick_updates<P, G, M>();
    const Consts<T> k = make_consts<T>(b.hyper);
    P* theta = static_cast<P*>(b.param);
    const G* g = static_cast<const G*>(b.grad);
    M* m = static_cast<M*>(b.momentum);
    T *moment = static_cast<T*>(b.row_moment), *decay = static_cast<T*>(b.decay);
    if (b.cols == 1 && b.row_count == 1)
      parallel(b.rows, 16,
               [&](int64_t r0, int64_t r1) { kernels.element_steps(theta, g, m, r0, r1, moment, decay, k); });
    else
      parallel(b.rows, b.cols, [&](int64_t r0, int64_t r1) {
        kernels.row_steps(theta, g, m, b.cols, r0, r1, b.row_count, moment, decay, k);
      });
    return;
  }
  const Planes<T> planes = planes_of<T>(b, work);
  if (b.moments != Moments::row) std::fill(planes.P, planes.P + b.columns, T(0));
  block_sums<T, G>(b, work);
  block_slots<T>(b, work);
  block_update<P, G, M>(b, work);
}

enum class Phase { sums, slots, update, step };

template <class P, class G, class M>
void run(Phase phase, const Block* blocks, int64_t n, Work work) {
  for (int64_t i = 0; i < n; ++i) {
    const Block& b = blocks[i];
    if (b.rows == 0 || b.cols == 0) continue;
    if (phase == Phase::sums) block_sums<Compute<P>, G>(b, work);
    if (phase == Phase::slots) block_slots<Compute<P>>(b, work);
    if (phase == Phase::update) block_update<P, G, M>(b, work);
    if (phase == Phase::step) block_step<P, G, M>(b, work);
  }
}

template <class P, class G>
void with_momentum_type(Phase phase, const Block* blocks, int64_t n, Types types, Work work) {
  if constexpr (std::is_same<Compute<P>, float>::value)
    if (types.momentum == Dtype::bf16) return run<P, G, BFloat16>(phase, blocks, n, work);
  run<P, G, Compute<P>>(phase, blocks, n, work);
}

// Blocks without momentum in a call with it do not occur: the caller makes one call for each set of types.
void dispatch(Phase phase, const Block* blocks, int64_t n, Types types, Work work) {
  const bool momentum = n > 0 && blocks[0].momentum;
  auto go = [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    if (momentum)
      with_momentum_type<P, G>(phase, blocks, n, types, work);
    else
      run<P, G, NoMomentum>(phase, blocks, n, work);
  };
  if (types.param == Dtype::f64) return go(double{}, double{});
  if (types.param == Dtype::bf16) return go(BFloat16{}, BFloat16{});
  if (types.param == Dtype::f16) return go(Float16{}, Float16{});
  if (types.grad == Dtype::bf16) return go(float{}, BFloat16{});
  if (types.grad == Dtype::f16) return go(float{}, Float16{});
  return go(float{}, float{});
}

}  // namespace

void sums(const Block* blocks, int64_t n, Types types, Work work) { dispatch(Phase::sums, blocks, n, types, work); }
void slots(const Block* blocks, int64_t n, Types types, Work work) { dispatch(Phase::slots, blocks, n, types, work); }
void update(const Block* blocks, int64_t n, Types types, Work work) { dispatch(Phase::update, blocks, n, types, work); }
void step(const Block* blocks, int64_t n, Types types, Work work) { dispatch(Phase::step, blocks, n, types, work); }

const char* instruction_set() { return kIsa == Isa::avx512 ? "avx512" : kIsa == Isa::avx2 ? "avx2" : "baseline"; }
const char* instruction_sets() {
#ifdef AMOS_X86
  return "baseline;avx2;avx512";
#else
  return "baseline";
#endif
}

}  // namespace amos::cpu
