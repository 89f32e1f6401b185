// The four phases on the CPU: picks the instruction set and the types, and spreads rows over torch's threads.
// Every split is fixed by the shapes alone, so results do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <numeric>
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
struct Int8 {
  int8_t level;
};

template <class P>
using Compute = typename std::conditional<std::is_same<P, double>::value, double, float>::type;

constexpr int kLanes = 64;             // partial sums in a chunk: enough to hide the adder's latency
constexpr int64_t kChunk = 4096;       // elements that one float sum covers
constexpr int64_t kColumnSplits = 16;  // row ranges whose column sums are made apart, then joined in order
constexpr int64_t kTileCols = 1024;    // columns of such a range at a time: their sums and a few rows fit in L1
constexpr int64_t kGrain = 32768;      // elements that are worth a thread
constexpr int64_t kAhead = 1024;       // elements; see kernels.inl
constexpr int64_t kTileRows = 32;      // rows of such a tile that are summed before the next tile
constexpr int64_t kUpdateRows = 8;     // and updated: fewer, because two arrays share the table of pages
constexpr int64_t kTaskTiles = 16;     // tiles beside each other that one thread takes
constexpr int kNormLanes = 16;         // partial sums of norms: memory is slower than their additions

// How a new parameter is written: in its own type; also to low_param; in bf16 with stochastic rounding.
enum class Write { plain, low, stochastic };

// A matrix, or a part of one, in memory. index: the number of its first element in the parameter.
template <class P, class G, class M>
struct Elements {
  P* theta;
  const G* g;
  M* m;
  G* low;
  int64_t index, cols, row_count;

  Elements at(int64_t row, int64_t column) const {
    const int64_t i = row * cols + column;
    return {theta + i, g + i, m ? m + i : m, low ? low + i : low, index + row * row_count + column, cols, row_count};
  }
};

// Momentum in 8 bits of elements that lie one after another, the first of which begins a run. index: the number that
// its random number counts by; the next ones follow, also where a block's rows are parts of the parameter's.
struct Runs {
  int8_t* levels;
  float* scales;
  int64_t index;

  Runs from(int64_t element) const { return {levels + element, scales + element / kRun, index + element}; }
};

struct Span {
  int64_t r0, r1, c0, c1;
};

// Where norms go, if they are asked for: two doubles for each `rows` rows of a block.
struct NormParts {
  double* sums = nullptr;
  int64_t rows = 1;

  double* of(int64_t row) const { return sums + 2 * (row / rows); }
  // Whether they are complete with this row, of which `end` is the first that another thread may take.
  bool end_with(int64_t row, int64_t end) const { return (row + 1) % rows == 0 || row + 1 == end; }
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
  void (*columns)(const G*, int64_t cols, int64_t n, T clip, int64_t first, int64_t last, double* rows, int64_t stride,
                  T* columns);
};
template <class P, class G, class M>
struct UpdateKernels {
  using T = Compute<P>;
  using E = Elements<P, G, M>;
  void (*rows)(const E&, const Span&, Moments, const Planes<T>&, const Consts<T>&, const NormParts&);
  void (*row_steps)(const E&, int64_t r0, int64_t r1, int64_t row_count, T* moment, T* decay, const Consts<T>&,
                    const NormParts&);
  void (*element_steps)(const E&, int64_t r0, int64_t r1, T* moment, T* decay, const Consts<T>&, const NormParts&);
};

// Of momentum in 8 bits: elements [begin, end) of a block, which begin with a run. Elements' momentum is a buffer.
template <class P, class G>
struct UpdateKernels<P, G, Int8> {
  void (*runs)(const Elements<P, G, float>&, const Runs&, int64_t begin, int64_t end, Moments, const Planes<float>&,
               const Consts<float>&, double* norms);
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
template <bool with_norms, Write write, class P, class G, class M>
UpdateKernels<P, G, M> pick_updates() {
#ifdef AMOS_X86
  if (kIsa == Isa::avx512) return avx512::update_kernels<with_norms, write, P, G, M>();
  if (kIsa == Isa::avx2) return avx2::update_kernels<with_norms, write, P, G, M>();
#endif
  return baseline::update_kernels<with_norms, write, P, G, M>();
}
template <Write write, class P, class G, class M>
UpdateKernels<P, G, M> pick_updates(const Block& b) {
  return b.norms ? pick_updates<true, write, P, G, M>() : pick_updates<false, write, P, G, M>();
}
template <class P, class G, class M>
UpdateKernels<P, G, M> pick_updates(const Block& b, const Consts<Compute<P>>& k) {
  if constexpr (std::is_same<P, float>::value && !std::is_same<G, float>::value)
    if (b.low_param) return pick_updates<Write::low, P, G, M>(b);
  if constexpr (std::is_same<P, BFloat16>::value)
    if (k.stochastic) return pick_updates<Write::stochastic, P, G, M>(b);
  return pick_updates<Write::plain, P, G, M>(b);
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

// Memory for partial sums, kept from call to call: a step allocates nothing that grows with the parameters.
double* scratch(int64_t count) {
  static thread_local std::vector<double> memory;
  if (int64_t(memory.size()) < count) memory.resize(count);
  return memory.data();
}

template <class T>
Planes<T> planes_of(const Block& b, Work work) {
  T* w = static_cast<T*>(work.data);
  T *rows = w + b.row_work, *columns = w + b.column_work + b.column_start;
  return {rows, rows + work.plane, rows + 2 * work.plane, columns, columns + work.plane};
}

template <class P, class G, class M>
Elements<P, G, M> elements_of(const Block& b) {
  return {static_cast<P*>(b.param),
          static_cast<const G*>(b.grad),
          static_cast<M*>(b.momentum),
          static_cast<G*>(b.low_param),
          b.first,
          b.cols,
          b.row_count};
}

double sum_of(const double* parts, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += parts[i];
  return sum;
}

// The norms of a block while it is updated in `parts`, in which threads leave theirs.
class NormSums {
 public:
  NormSums(const Block& b, int64_t parts, int64_t rows_each) : to_(b.norms), parts_(parts) {
    if (!to_) return;
    parts_of.sums = scratch(2 * parts);
    parts_of.rows = rows_each;
    std::fill(parts_of.sums, parts_of.sums + 2 * parts, 0.0);
  }
  ~NormSums() {
    for (int64_t i = 0; to_ && i < 2 * parts_; ++i) to_[i % 2] += parts_of.sums[i];
  }
  NormParts parts_of;

 private:
  double* to_;
  int64_t parts_;
};

// Rows that a thread takes together: as many as a part of the norms has.
int64_t rows_together(const Block& b) { return b.norms ? std::max<int64_t>(1, kChunk / b.cols) : 1; }

template <class T, class G>
void row_block_sums(const Block& b, T clip, T* out) {
  const SumKernels<T, G> kernels = pick_sums<T, G>();
  const G* g = static_cast<const G*>(b.grad);
  const int64_t chunks = ceil_div(b.cols, kChunk);
  if (b.rows > 1 || chunks == 1) {
    parallel(b.rows, b.cols, [&](int64_t r0, int64_t r1) { kernels.rows(g, b.cols, clip, r0, r1, out); });
  } else {  // one long row (moments = "scalar"): threads take chunks of it
    double* parts = scratch(chunks);
    parallel(chunks, kChunk, [&](int64_t k0, int64_t k1) { kernels.chunks(g, b.cols, clip, k0, k1, parts); });
    out[0] = T(sum_of(parts, chunks));
  }
}

// Row and column sums in one reading. A task is a range of rows and of tiles; it takes few rows at a time, so that it
// comes back to the same pages of memory soon.
template <class T, class G>
void tile_sums(const Block& b, T clip, T* rows, T* columns) {
  const SumKernels<T, G> kernels = pick_sums<T, G>();
  const G* g = static_cast<const G*>(b.grad);
  const int64_t each = ceil_div(std::max<int64_t>(64, ceil_div(b.rows, kColumnSplits)), 4) * 4;
  const int64_t splits = ceil_div(b.rows, each), tiles = ceil_div(b.cols, kTileCols);
  const int64_t width = kTaskTiles * kTileCols, widths = ceil_div(b.cols, width);
  double* row_parts = scratch(b.rows * tiles + splits * b.cols);  // [row][tile], then [split][column]
  T* column_parts = reinterpret_cast<T*>(row_parts + b.rows * tiles);
  parallel(splits * widths, each * std::min(b.cols, width), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t split = task / widths, c0 = task % widths * width, c1 = std::min(b.cols, c0 + width);
      const int64_t r1 = std::min(b.rows, (split + 1) * each);
      T* out = column_parts + split * b.cols;
      std::fill(out + c0, out + c1, T(0));
      for (int64_t r = split * each; r < r1; r += kTileRows)
        for (int64_t c = c0; c < c1; c += kTileCols)
          kernels.columns(g + c, b.cols, std::min(kTileCols, c1 - c), clip, r, std::min(r1, r + kTileRows),
                          row_parts + c / kTileCols, tiles, out + c);
    }
  });
  if (rows)
    for (int64_t r = 0; r < b.rows; ++r) rows[r] = T(sum_of(row_parts + r * tiles, tiles));
  for (int64_t s = 0; s < splits; ++s)
    for (int64_t c = 0; c < b.cols; ++c) columns[c] += column_parts[s * b.cols + c];
}

template <class T, class G>
void block_sums(const Block& b, const Consts<T>& k, Work work) {
  const Planes<T> planes = planes_of<T>(b, work);
  if (b.moments == Moments::row)
    row_block_sums<T, G>(b, k.clip, planes.A);
  else
    tile_sums<T, G>(b, k.clip, b.moments == Moments::factored ? planes.A : nullptr, planes.P);
}

template <class T>
void row_slots(const Block& b, const Consts<T>& k, const Planes<T>& planes) {
  T *moment = static_cast<T*>(b.row_moment), *decay = static_cast<T*>(b.decay);
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

template <class T>
void column_slots(const Block& b, const Consts<T>& k, T* P, T* Q) {
  T *moment = static_cast<T*>(b.column_moment), *decay = static_cast<T*>(b.decay);
  const int64_t chunks = ceil_div(b.columns, kChunk);
  double* parts = scratch(chunks);
  auto each_chunk = [&](auto f) {
    parallel(chunks, 16 * kChunk, [&](int64_t k0, int64_t k1) {
      for (int64_t chunk = k0; chunk < k1; ++chunk) f(chunk, chunk * kChunk, std::min(b.columns, (chunk + 1) * kChunk));
    });
  };
  each_chunk([&](int64_t chunk, int64_t c0, int64_t c1) {
    double total = 0;
    for (int64_t c = c0; c < c1; ++c) {
      const T G = P[c] / T(b.column_count);
      moment[c] = next_moment(moment[c], G, k);
      total += double(moment[c]);
      if (b.moments == Moments::column) {
        const Coefs<T> coefs = coefficients(G, moment[c], decay[c], k);
        P[c] = coefs.A;
        Q[c] = coefs.B;
      }
    }
    parts[chunk] = total;
  });
  if (b.moments == Moments::column) return;
  const T mean = T(sum_of(parts, chunks) / double(b.columns));
  each_chunk([&](int64_t, int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) P[c] = column_profile(moment[c], mean);
  });
}

template <class T>
void block_slots(const Block& b, const Consts<T>& k, Work work) {
  const Planes<T> planes = planes_of<T>(b, work);
  if (b.moments != Moments::column) row_slots(b, k, planes);
  if (b.moments != Moments::row) column_slots(b, k, planes.P - b.column_start, planes.Q - b.column_start);
}

template <class P, class G, class M>
void block_update(const Block& b, const Consts<Compute<P>>& k, Work work) {
  const UpdateKernels<P, G, M> kernels = pick_updates<P, G, M>(b, k);
  const auto planes = planes_of<Compute<P>>(b, work);
  const Elements<P, G, M> elements = elements_of<P, G, M>(b);
  auto update = [&](const Span& span, const NormParts& norms) {
    kernels.rows(elements, span, b.moments, planes, k, norms);
  };
  // Coefficients of many columns: a tile of these at a time, for a few rows, so that they stay in L1.
  const int64_t vectors = b.moments == Moments::row ? 0 : b.moments == Moments::factored ? 1 : 2;
  const int64_t width = vectors * b.cols > 2 * kTileCols ? kTileCols : b.cols;
  if (b.rows == 1 && b.norms) {
    const int64_t chunks = ceil_div(b.cols, kChunk);
    const NormSums norms(b, chunks, 1);
    parallel(chunks, kChunk, [&](int64_t k0, int64_t k1) {
      for (int64_t i = k0; i < k1; ++i)
        update(Span{0, 1, i * kChunk, std::min(b.cols, (i + 1) * kChunk)}, {norms.parts_of.sums + 2 * i, 1});
    });
  } else if (b.rows == 1) {
    parallel(b.cols, 1, [&](int64_t c0, int64_t c1) { update(Span{0, 1, c0, c1}, {}); });
  } else if (width == b.cols) {
    const int64_t each = rows_together(b), groups = ceil_div(b.rows, each);
    const NormSums norms(b, groups, each);
    parallel(groups, each * b.cols, [&](int64_t first, int64_t last) {
      update(Span{first * each, std::min(b.rows, last * each), 0, b.cols}, norms.parts_of);
    });
  } else {
    const NormSums norms(b, b.rows, 1);
    parallel(ceil_div(b.rows, kUpdateRows), kUpdateRows * b.cols, [&](int64_t first, int64_t last) {
      for (int64_t r = first * kUpdateRows; r < last * kUpdateRows; r += kUpdateRows)
        for (int64_t c = 0; c < b.cols; c += width)
          update(Span{r, std::min(b.rows, r + kUpdateRows), c, std::min(b.cols, c + width)}, norms.parts_of);
    });
  }
}

// The three parts of a step of `row`, together for a few rows at a time.
template <class P, class G, class M>
void row_step(const Block& b, const Consts<Compute<P>>& k) {
  using T = Compute<P>;
  const UpdateKernels<P, G, M> kernels = pick_updates<P, G, M>(b, k);
  const Elements<P, G, M> elements = elements_of<P, G, M>(b);
  T *moment = static_cast<T*>(b.row_moment), *decay = static_cast<T*>(b.decay);
  const bool full = b.cols == 1 && b.row_count == 1;
  const int64_t each = rows_together(b), groups = ceil_div(b.rows, each);
  const NormSums norms(b, groups, each);
  parallel(groups, each * (full ? 16 : b.cols), [&](int64_t first, int64_t last) {
    const int64_t r0 = first * each, r1 = std::min(b.rows, last * each);
    if (full)
      kernels.element_steps(elements, r0, r1, moment, decay, k, norms.parts_of);
    else
      kernels.row_steps(elements, r0, r1, b.row_count, moment, decay, k, norms.parts_of);
  });
}

// ---- momentum in 8 bits: by runs, which may be of several rows, and not by rows ------------------------------------

// What is updated, and how. Rows of one element are for this one row that has coefficients for each column.
template <class P, class G>
struct RunMatrix {
  Elements<P, G, float> elements;
  Runs runs;
  Moments moments;

  explicit RunMatrix(const Block& b)
      : elements(elements_of<P, G, float>(b)),
        runs{static_cast<int8_t*>(b.momentum), b.scale, b.first},
        moments(b.moments) {
    elements.m = nullptr;
    if (b.moments == Moments::row && b.cols == 1 && b.row_count == 1) {
      moments = Moments::column;
      elements.cols = elements.row_count = b.rows;
    }
  }
};

template <class P, class G>
void block_update_runs(const Block& b, const Consts<float>& k, Work work) {
  const auto kernel = pick_updates<P, G, Int8>(b, k).runs;
  const RunMatrix<P, G> matrix(b);
  Planes<float> planes = planes_of<float>(b, work);
  if (matrix.moments != b.moments) planes.P = planes.A, planes.Q = planes.B;
  const int64_t n = b.rows * b.cols, chunks = ceil_div(n, kChunk);
  const NormSums norms(b, chunks, 1);
  parallel(chunks, kChunk, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      kernel(matrix.elements, matrix.runs, i * kChunk, std::min(n, (i + 1) * kChunk), matrix.moments, planes, k,
             norms.parts_of.of(i));
  });
}

// `row`: as many rows at a time as make whole runs.
template <class P, class G>
void row_step_runs(const Block& b, const Consts<float>& k) {
  const auto kernel = pick_updates<P, G, Int8>(b, k).runs;
  const SumKernels<float, G> sums = pick_sums<float, G>();
  const RunMatrix<P, G> matrix(b);
  const G* g = static_cast<const G*>(b.grad);
  float *moment = static_cast<float*>(b.row_moment), *decay = static_cast<float*>(b.decay);
  const int64_t each = kRun / std::gcd(b.cols, kRun), groups = ceil_div(b.rows, each);
  const NormSums norms(b, groups, 1);
  parallel(groups, each * std::max<int64_t>(16, b.cols), [&](int64_t first, int64_t last) {
    float A[kRun], B[kRun];
    for (int64_t i = first; i < last; ++i) {
      const int64_t r0 = i * each, rows = std::min(b.rows - r0, each), at = r0 * b.cols;
      sums.rows(g + at, b.cols, k.clip, 0, rows, A);
      for (int64_t r = 0; r < rows; ++r) {
        const float G2 = A[r] / float(b.row_count);
        moment[r0 + r] = next_moment(moment[r0 + r], G2, k);
        const Coefs<float> c = coefficients(G2, moment[r0 + r], decay[r0 + r], k);
        A[r] = c.A;
        B[r] = c.B;
      }
      const int64_t cols = matrix.elements.cols;
      kernel(matrix.elements.at(at / cols, at % cols), matrix.runs.from(at), 0, rows * b.cols, matrix.moments,
             {A, B, nullptr, A, B}, k, norms.parts_of.of(i));
    }
  });
}

template <class P, class G, class M>
void any_update(const Block& b, const Consts<Compute<P>>& k, Work work) {
  if constexpr (std::is_same<M, Int8>::value)
    block_update_runs<P, G>(b, k, work);
  else
    block_update<P, G, M>(b, k, work);
}

template <class P, class G, class M>
void block_step(const Block& b, const Consts<Compute<P>>& k, Work work) {
  using T = Compute<P>;
  if (b.moments == Moments::row && (b.rows > 1 || b.cols <= kGrain)) {
    if constexpr (std::is_same<M, Int8>::value)
      row_step_runs<P, G>(b, k);
    else
      row_step<P, G, M>(b, k);
    return;
  }
  T* columns = planes_of<T>(b, work).P;
  if (b.moments != Moments::row) std::fill(columns, columns + b.columns, T(0));
  block_sums<T, G>(b, k, work);
  block_slots<T>(b, k, work);
  any_update<P, G, M>(b, k, work);
}

enum class Phase { sums, slots, update, step };

template <class P, class G, class M>
void run(Phase phase, const Block* blocks, int64_t n, Hypers hypers, Work work) {
  using T = Compute<P>;
  std::vector<Consts<T>> consts;
  consts.reserve(hypers.count);
  for (int64_t i = 0; i < hypers.count; ++i) consts.push_back(make_consts<T>(hypers.rows[i]));
  for (int64_t i = 0; i < n; ++i) {
    const Block& b = blocks[i];
    const Consts<T>& k = consts[b.hyper];
    if (b.rows == 0 || b.cols == 0) continue;
    if (phase == Phase::sums) block_sums<T, G>(b, k, work);
    if (phase == Phase::slots) block_slots<T>(b, k, work);
    if (phase == Phase::update) any_update<P, G, M>(b, k, work);
    if (phase == Phase::step) block_step<P, G, M>(b, k, work);
  }
}

template <class P, class G>
void with_momentum_type(Phase phase, const Block* blocks, int64_t n, Types types, Hypers hypers, Work work) {
  if constexpr (std::is_same<Compute<P>, float>::value) {
    if (types.momentum == Dtype::bf16) return run<P, G, BFloat16>(phase, blocks, n, hypers, work);
    if (types.momentum == Dtype::i8) return run<P, G, Int8>(phase, blocks, n, hypers, work);
  }
  run<P, G, Compute<P>>(phase, blocks, n, hypers, work);
}

// Blocks without momentum in a call with it do not occur: the caller makes one call for each set of types.
void dispatch(Phase phase, const Block* blocks, int64_t n, Types types, Hypers hypers, Work work) {
  const bool momentum = std::any_of(blocks, blocks + n, [](const Block& b) { return b.momentum; });
  auto go = [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    if (momentum)
      with_momentum_type<P, G>(phase, blocks, n, types, hypers, work);
    else
      run<P, G, NoMomentum>(phase, blocks, n, hypers, work);
  };
  if (types.param == Dtype::f64) return go(double{}, double{});
  if (types.param == Dtype::bf16) return go(BFloat16{}, BFloat16{});
  if (types.param == Dtype::f16) return go(Float16{}, Float16{});
  if (types.grad == Dtype::bf16) return go(float{}, BFloat16{});
  if (types.grad == Dtype::f16) return go(float{}, Float16{});
  return go(float{}, float{});
}

}  // namespace

void sums(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work) {
  dispatch(Phase::sums, blocks, n, types, hypers, work);
}
void slots(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work) {
  dispatch(Phase::slots, blocks, n, types, hypers, work);
}
void update(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work) {
  dispatch(Phase::update, blocks, n, types, hypers, work);
}
void step(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work) {
  dispatch(Phase::step, blocks, n, types, hypers, work);
}

const char* instruction_set() { return kIsa == Isa::avx512 ? "avx512" : kIsa == Isa::avx2 ? "avx2" : "baseline"; }
const char* instruction_sets() {
#ifdef AMOS_X86
  return "baseline;avx2;avx512";
#else
  return "baseline";
#endif
}

}  // namespace amos::cpu
