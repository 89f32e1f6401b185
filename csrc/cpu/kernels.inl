// The vector kernels. cpu.cpp includes this file once for each instruction set, with AMOS_ISA = its namespace and
// AMOS_VECTOR_BYTES = the width of its registers. Plain serial loops over ranges of rows or columns: no threads, no
// allocation, no torch.
//
// Results do not depend on the width: sums run in kLanes lanes (element i of a chunk in lane i mod kLanes) that a fixed
// tree joins, chunks of kChunk elements are joined in double, in order, and -ffp-contract=off keeps every product
// rounded.
//
// A core's reads are bound by how many cache lines it has under way. The hardware's prefetcher stops at each 4 KB page,
// so the main loops ask for the elements kAhead further on themselves: a fifth less time (docs/performance.md).

namespace AMOS_ISA {

template <class T>
struct VectorOf {
  // aligned(sizeof(T)): gradients are views at any offset
  typedef T type __attribute__((vector_size(AMOS_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int width = AMOS_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kWidth = VectorOf<T>::width;
template <class T>
constexpr int kParts = kLanes / kWidth<T>;  // vectors that hold all lanes

typedef float VecF __attribute__((vector_size(AMOS_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(AMOS_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(AMOS_VECTOR_BYTES / 2), aligned(2), may_alias));

AMOS_FN VecF as_float(VecU u) { return (VecF)u; }
AMOS_FN VecU as_bits(VecF f) { return (VecU)f; }

AMOS_FN VecF widen(VecU h, BFloat16) { return as_float(h << 16); }
AMOS_FN VecF widen(VecU h, Float16) {
  // Exponent and fraction move up, and the bias grows by 112. A subnormal is made as 2^-14 (1 + fraction) - 2^-14:
  // exact, and without a subnormal float, which the processor may be told to flush to zero.
  const VecU magnitude = (h & 0x7fffu) << 13;
  const VecU small = as_bits(as_float(magnitude + (113u << 23)) - 0x1p-14f);
  const VecU is_small = (VecU)((h & 0x7c00u) == 0u);
  const VecU finite = (is_small & small) | (~is_small & (magnitude + (112u << 23)));
  const VecU special = magnitude | 0x7f800000u;  // inf and NaN
  const VecU is_special = (VecU)((h & 0x7c00u) == 0x7c00u);
  return as_float(((h & 0x8000u) << 16) | (is_special & special) | (~is_special & finite));
}

AMOS_FN VecU narrow(VecF f, BFloat16) {  // round to nearest, ties to even
  const VecU u = as_bits(f), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU is_nan = (VecU)(f != f);
  return (is_nan & 0x7fc0u) | (~is_nan & rounded);
}
AMOS_FN VecU narrow(VecF f, Float16) {
  const VecU u = as_bits(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const VecU rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below the smallest normal half, adding 0.5 shifts the fraction to where the hardware rounds it.
  const VecU subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const VecU tiny = (VecU)(magnitude < (113u << 23)), huge = (VecU)(magnitude >= 0x477ff000u), nan = (VecU)(f != f);
  const VecU finite = (tiny & subnormal) | (~tiny & rounded);
  return sign | (nan & 0x7e00u) | (~nan & huge & 0x7c00u) | (~nan & ~huge & finite);
}

AMOS_FN Vec<float> load(const float* p) { return *(const Vec<float>*)p; }
AMOS_FN Vec<double> load(const double* p) { return *(const Vec<double>*)p; }
template <class S>
AMOS_FN Vec<float> load(const S* p) {
  return widen(__builtin_convertvector(*(const VecH*)p, VecU), S{});
}
AMOS_FN void store(float* p, Vec<float> x) { *(Vec<float>*)p = x; }
AMOS_FN void store(double* p, Vec<double> x) { *(Vec<double>*)p = x; }
template <class S>
AMOS_FN void store(S* p, Vec<float> x) {
  *(VecH*)p = __builtin_convertvector(narrow(x, S{}), VecH);
}

// The first n elements of a vector, zeros (a gradient's neutral element) behind: so that a row's tail runs the same
// code. Where n is the constant kWidth, what is left is the plain load or store.
template <class T, class S>
AMOS_FN Vec<T> load_some(const S* p, int64_t n) {
  if (n == kWidth<T>) return load(p);
  S all[kWidth<T>] = {};
  __builtin_memcpy(all, p, n * sizeof(S));
  return load(all);
}
template <class T, class S>
AMOS_FN void store_some(S* p, Vec<T> x, int64_t n) {
  if (n == kWidth<T>) return store(p, x);
  S all[kWidth<T>];
  store(all, x);
  __builtin_memcpy(p, all, n * sizeof(S));
}

// Asks for the memory of kLanes elements. It may lie beyond the array: no fault.
template <class S>
AMOS_FN void prefetch(const S* p) {
  for (size_t line = 0; line < kLanes * sizeof(S); line += 64) __builtin_prefetch((const char*)p + line);
}

template <class T>
AMOS_FN Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}

// Bounds in registers: a loop that stores through pointers must not read them anew from memory.
template <class T>
struct Clip {
  Vec<T> high, low;
  AMOS_FN explicit Clip(T clip) : high(broadcast<T>(clip)), low(broadcast<T>(-clip)) {}
  AMOS_FN Vec<T> operator()(Vec<T> g) const {  // one instruction for each bound in this form; a NaN stays a NaN
    g = high < g ? high : g;
    return low > g ? low : g;
  }
};

template <class T>
AMOS_FN Vec<T> squared(Vec<T> g, const Clip<T>& clip) {
  g = clip(g);
  return g * g;
}

template <class T>
AMOS_FN double lanes_sum(const Vec<T>* parts) {
  T s[kLanes];
  __builtin_memcpy(s, parts, sizeof s);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return double(s[0]);
}

// Sum of squares of n <= kChunk elements.
template <class T, class G>
AMOS_FN double chunk_sum(const G* g, int64_t n, T bound) {
  const Clip<T> clip(bound);
  Vec<T> acc[kParts<T>] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(g + i + kAhead);
    for (int k = 0; k < kParts<T>; ++k) acc[k] += squared<T>(load(g + i + k * kWidth<T>), clip);
  }
  for (int k = 0; i < n; ++k, i += kWidth<T>)
    acc[k] += squared<T>(load_some<T>(g + i, n - i < kWidth<T> ? n - i : kWidth<T>), clip);
  return lanes_sum<T>(acc);
}

template <class T, class G>
void chunk_sums(const G* g, int64_t n, T clip, int64_t first, int64_t last, double* out) {
  for (int64_t k = first; k < last; ++k)
    out[k] = chunk_sum<T>(g + k * kChunk, n - k * kChunk < kChunk ? n - k * kChunk : kChunk, clip);
}

template <class T, class G>
AMOS_FN double row_sum(const G* g, int64_t n, T clip) {
  double s = 0;
  for (int64_t i = 0; i < n; i += kChunk) s += chunk_sum<T>(g + i, n - i < kChunk ? n - i : kChunk, clip);
  return s;
}

template <class T, class G>
void row_sums(const G* g, int64_t cols, T clip, int64_t first, int64_t last, T* out) {
  for (int64_t r = first; r < last; ++r) out[r] = T(row_sum<T>(g + r * cols, cols, clip));
}

// kRows rows of n <= kTileCols elements into `columns` (added) and into their own sums (rows[0], rows[stride], ...), in
// one reading. g: the first element, cols apart from the next row's.
template <int kRows, class T, class G>
AMOS_FN void panel_sums(const G* g, int64_t cols, int64_t n, T bound, double* rows, int64_t stride, T* columns) {
  const Clip<T> clip(bound);
  Vec<T> acc[kRows][kParts<T>] = {};
  auto add = [&](Vec<T> column_sum, auto load_row, int part) __attribute__((always_inline)) {
    Vec<T> column[kRows];
    for (int m = 0; m < kRows; ++m) {
      column[m] = squared<T>(load_row(m), clip);
      acc[m][part] += column[m];
    }
    for (int half = kRows / 2; half > 0; half /= 2)
      for (int m = 0; m < half; ++m) column[m] += column[m + half];
    return column_sum + column[0];
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int m = 0; m < kRows; ++m) prefetch(g + (m + kRows) * cols + i);  // the next panel's
    for (int part = 0; part < kParts<T>; ++part) {
      const int64_t at = i + part * kWidth<T>;
      store(columns + at, add(load(columns + at), [&](int m) { return load(g + m * cols + at); }, part));
    }
  }
  for (int part = 0; i < n; ++part, i += kWidth<T>) {
    const int64_t some = n - i < kWidth<T> ? n - i : kWidth<T>;
    auto load_row = [&](int m) { return load_some<T>(g + m * cols + i, some); };
    store_some<T>(columns + i, add(load_some<T>(columns + i, some), load_row, part), some);
  }
  for (int m = 0; m < kRows; ++m) rows[m * stride] = lanes_sum<T>(acc[m]);
}

// Rows [first, last) of a tile of columns. rows: where the first row's sum goes.
template <class T, class G>
void column_sums(const G* g, int64_t cols, int64_t n, T clip, int64_t first, int64_t last, double* rows, int64_t stride,
                 T* columns) {
  int64_t r = first;
  for (; r + 4 <= last; r += 4) panel_sums<4, T>(g + r * cols, cols, n, clip, rows + r * stride, stride, columns);
  for (; r < last; ++r) panel_sums<1, T>(g + r * cols, cols, n, clip, rows + r * stride, stride, columns);
}

// What one row's update needs besides the row itself. P and Q: A and B of each column (`column`), or P (`factored`).
template <class T>
struct RowCoefs {
  T A, B, limit;
  const T *P, *Q;
};

// The same in registers.
template <class T>
struct RowVectors {
  Vec<T> A, B, factor, most, momentum, one_minus_momentum;  // factor and most: `limited` of amos_math.h
  Clip<T> clip;
  AMOS_FN RowVectors(const RowCoefs<T>& row, const Consts<T>& k)
      : A(broadcast<T>(row.A)),
        B(broadcast<T>(row.B)),
        factor(broadcast<T>(row.limit < T(0) ? -row.limit : T(1))),
        most(broadcast<T>(row.limit < T(0) ? T(1) : row.limit)),
        momentum(broadcast<T>(k.momentum)),
        one_minus_momentum(broadcast<T>(k.one_minus_momentum)),
        clip(k.clip) {}
};

// Sums of squares of Delta and of the old theta, where a monitor asks for them (block.h: norms): element i of a row in
// lane i mod kNormLanes.
template <bool asked, class T>
struct Norms {
  AMOS_FN void add(int, Vec<T>, Vec<T>, int64_t) {}
  AMOS_FN void flush(double*) {}
};
template <class T>
struct Norms<true, T> {
  static constexpr int kVectors = kNormLanes / kWidth<T>;
  Vec<T> step[kVectors] = {}, theta[kVectors] = {};

  // Behind the first n elements of a vector may be anything.
  AMOS_FN void add(int part, Vec<T> s, Vec<T> old, int64_t n) {
    s = load_some<T>((const T*)&s, n);
    step[part % kVectors] += s * s;
    theta[part % kVectors] += old * old;
  }
  // Adds them to two doubles, and begins anew.
  AMOS_FN void flush(double* sums) {
    sums[0] += take(step);
    sums[1] += take(theta);
  }
  AMOS_FN double take(Vec<T>* lanes) {
    T s[kNormLanes];
    __builtin_memcpy(s, lanes, sizeof s);
    for (int half = kNormLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) s[i] += s[i + half];
    for (int i = 0; i < kVectors; ++i) lanes[i] = Vec<T>{};
    return double(s[0]);
  }
};

// One vector of a row: theta <- theta - Delta. The caller loads and stores. Returns Delta.
template <Moments kind, bool with_momentum, class T>
AMOS_FN Vec<T> update_vector(Vec<T>& theta, Vec<T> g, Vec<T>& m, Vec<T> P, Vec<T> Q, const RowVectors<T>& row) {
  const Vec<T> limited = row.most < row.factor * P ? row.most : row.factor * P;
  const Vec<T> A = kind == Moments::column ? P : kind == Moments::row ? row.A : row.A * limited;
  const Vec<T> B = kind == Moments::column ? Q : row.B;
  Vec<T> step = A * row.clip(g) + B * theta;
  if constexpr (with_momentum) {
    m = row.momentum * m + row.one_minus_momentum * step;
    step = m;
  }
  theta -= step;
  return step;
}

// Random bits of elements that follow each other. index: the number of the first of them in the parameter.
template <class T>
AMOS_FN VecU random_lanes(int64_t index, const Consts<T>& k) {
  VecU low;
  for (int lane = 0; lane < kWidth<float>; ++lane) low[lane] = uint32_t(lane);
  low += uint32_t(index);
  const uint32_t high = uint32_t(uint64_t(index) >> 32);
  const VecU carried = (VecU)(low < uint32_t(index));  // in these lanes the lower half has wrapped around
  const VecU key = (carried & stream_key(high + 1, k)) | (~carried & stream_key(high, k));
  return mixed(low ^ key, k.salt);
}

// The bits of bfloat16s, rounded stochastically.
template <class T>
AMOS_FN VecU narrow_stochastically(VecF f, int64_t index, const Consts<T>& k) {
  const VecU rounded = rounded_stochastically(as_bits(f), random_lanes(index, k)), is_nan = (VecU)(f != f);
  return (is_nan & 0x7fc0u) | (~is_nan & rounded);
}

// Writes the new parameter; n < kWidth elements of it, or all where n is the constant kWidth.
template <Write write, class P, class G, class M, class T>
AMOS_FN void put(const Elements<P, G, M>& e, int64_t i, Vec<T> theta, int64_t n, const Consts<T>& k) {
  if constexpr (write == Write::stochastic) {
    const VecH bits = __builtin_convertvector(narrow_stochastically(theta, e.index + i, k), VecH);
    __builtin_memcpy(e.theta + i, &bits, n * sizeof(P));
  } else {
    store_some<T>(e.theta + i, theta, n);
    if constexpr (write == Write::low) store_some<T>(e.low + i, theta, n);
  }
}

// Updates n elements of a row; with `next`, also returns the sum of squares of the n gradients there (n <= kChunk):
// the update waits for memory, so the other row's sum costs no time.
template <Moments kind, Write write, class P, class G, class M, class T, bool with_norms>
AMOS_FN double update_chunk(const Elements<P, G, M>& e, int64_t n, const RowCoefs<T>& coefs, const Consts<T>& k,
                            const G* next, int64_t ahead, Norms<with_norms, T>& norms) {
  constexpr bool with_momentum = !std::is_same<M, NoMomentum>::value;
  constexpr int W = kWidth<T>;
  using Momentum = typename std::conditional<with_momentum, M, T>::type;
  auto* mp = reinterpret_cast<Momentum*>(e.m);
  const RowVectors<T> row(coefs, k);
  const T *pp = coefs.P, *qp = coefs.Q;
  Vec<T> acc[kParts<T>] = {};
  auto vector_at = [&](int part, int64_t i, int64_t some) __attribute__((always_inline)) {
    Vec<T> t = load_some<T>(e.theta + i, some), mv = {}, p = {}, q = {};
    if constexpr (with_momentum) mv = load_some<T>(mp + i, some);
    if constexpr (kind != Moments::row) p = load_some<T>(pp + i, some);
    if constexpr (kind == Moments::column) q = load_some<T>(qp + i, some);
    const Vec<T> old = t;
    norms.add(part, update_vector<kind, with_momentum, T>(t, load_some<T>(e.g + i, some), mv, p, q, row), old, some);
    put<write>(e, i, t, some, k);
    if constexpr (with_momentum) store_some<T>(mp + i, mv, some);
  };
  int64_t i = 0;
  if (next) {
    for (; i + kLanes <= n; i += kLanes) {
      prefetch(next + i + ahead);
      prefetch(e.g + i + ahead);  // in L2 where rows are long
      prefetch(e.theta + i + ahead);
      for (int part = 0; part < kParts<T>; ++part) {
        acc[part] += squared<T>(load(next + i + part * W), row.clip);
        vector_at(part, i + part * W, W);
      }
    }
  } else {
    for (; i + kLanes <= n; i += kLanes) {
      prefetch(e.g + i + ahead);
      prefetch(e.theta + i + ahead);
      for (int part = 0; part < kParts<T>; ++part) vector_at(part, i + part * W, W);
    }
  }
  for (int part = 0; i < n; ++part, i += W) {
    const int64_t some = n - i < W ? n - i : W;
    if (next) acc[part] += squared<T>(load_some<T>(next + i, some), row.clip);
    vector_at(part, i, some);
  }
  return next ? lanes_sum<T>(acc) : 0;
}

// n elements of row r, from column c on, which `at` begins with; the coefficients are in planes.
template <Write write, class P, class G, class M, class T, bool with_norms>
AMOS_FN void update_part(const Elements<P, G, M>& at, int64_t r, int64_t c, int64_t n, Moments kind,
                         const Planes<T>& planes, const Consts<T>& k, int64_t ahead, Norms<with_norms, T>& norms) {
  const G* no_next = nullptr;
  if (kind == Moments::row) {
    const RowCoefs<T> row{planes.A[r], planes.B[r], 0, nullptr, nullptr};
    update_chunk<Moments::row, write>(at, n, row, k, no_next, ahead, norms);
  } else if (kind == Moments::factored) {
    const RowCoefs<T> row{planes.A[r], planes.B[r], planes.limit[r], planes.P + c, nullptr};
    update_chunk<Moments::factored, write>(at, n, row, k, no_next, ahead, norms);
  } else {
    const RowCoefs<T> row{0, 0, 0, planes.P + c, planes.Q + c};
    update_chunk<Moments::column, write>(at, n, row, k, no_next, ahead, norms);
  }
}

// Columns [c0, c1) of rows [r0, r1), with the coefficients in the planes of the workspace.
template <bool with_norms, Write write, class P, class G, class M, class T>
void update_rows(const Elements<P, G, M>& e, const Span& span, Moments kind, const Planes<T>& planes,
                 const Consts<T>& k, const NormParts& parts) {
  Norms<with_norms, T> norms;
  const int64_t n = span.c1 - span.c0;
  const bool tile = n < e.cols && span.r1 - span.r0 > 1;
  const int64_t ahead = tile ? e.cols : kAhead;  // of a tile: its next row
  auto update = [&](int64_t r, int64_t c, int64_t some) __attribute__((always_inline)) {
    update_part<write>(e.at(r, c), r, c, some, kind, planes, k, ahead, norms);
  };
  for (int64_t r = span.r0; r < span.r1; ++r) {
    if constexpr (!with_norms) {
      update(r, span.c0, n);
    } else {
      for (int64_t c = span.c0; c < span.c1; c += kChunk) {
        update(r, c, span.c1 - c < kChunk ? span.c1 - c : kChunk);
        if (parts.end_with(r, span.r1)) norms.flush(parts.of(r));
      }
    }
  }
}

// `row` moments in one pass over memory: row r is updated while row r + 1 is summed.
template <bool with_norms, Write write, class P, class G, class M, class T>
void row_steps(const Elements<P, G, M>& e, int64_t r0, int64_t r1, int64_t row_count, T* moment, T* decay,
               const Consts<T>& k, const NormParts& parts) {
  Norms<with_norms, T> norms;
  const int64_t cols = e.cols;
  double sum = row_sum<T>(e.g + r0 * cols, cols, k.clip);
  for (int64_t r = r0; r < r1; ++r) {
    const T G2 = T(sum) / T(row_count);
    moment[r] = next_moment(moment[r], G2, k);
    const Coefs<T> c = coefficients(G2, moment[r], decay[r], k);
    const RowCoefs<T> row{c.A, c.B, 0, nullptr, nullptr};
    const bool more = r + 1 < r1;
    sum = 0;
    for (int64_t i = 0; i < cols; i += kChunk) {
      const Elements<P, G, M> at = e.at(r, i);
      const int64_t n = cols - i < kChunk ? cols - i : kChunk;
      sum += update_chunk<Moments::row, write>(at, n, row, k, more ? at.g + cols : nullptr, kAhead, norms);
      if (with_norms && parts.end_with(r, r1)) norms.flush(parts.of(r));
    }
  }
}

// Rows of one element (moments = "full"): each element has its own v and b.
template <bool with_norms, Write write, class P, class G, class M, class T>
void element_steps(const Elements<P, G, M>& all, int64_t r0, int64_t r1, T* moment, T* decay, const Consts<T>& k,
                   const NormParts& parts) {
  Norms<with_norms, T> norms;
  constexpr bool with_momentum = !std::is_same<M, NoMomentum>::value;
  constexpr int W = kWidth<T>;
  using Momentum = typename std::conditional<with_momentum, M, T>::type;
  auto* mp = reinterpret_cast<Momentum*>(all.m);
  const RowVectors<T> row(RowCoefs<T>{}, k);
  for (int64_t i = r0; i < r1; i += W) {
    const int64_t n = r1 - i < W ? r1 - i : W;
    Vec<T> t = load_some<T>(all.theta + i, n), gv = load_some<T>(all.g + i, n), mv = {}, A = {}, B = {};
    const Vec<T> G2 = squared<T>(gv, row.clip);
    if constexpr (with_momentum) mv = load_some<T>(mp + i, n);
    T g2[W], a[W] = {}, b[W] = {};
    __builtin_memcpy(g2, &G2, sizeof g2);
    for (int64_t j = 0; j < n; ++j) {
      moment[i + j] = next_moment(moment[i + j], g2[j], k);
      const Coefs<T> c = coefficients(g2[j], moment[i + j], decay[i + j], k);
      a[j] = c.A;
      b[j] = c.B;
    }
    __builtin_memcpy(&A, a, sizeof A);
    __builtin_memcpy(&B, b, sizeof B);
    const Vec<T> old = t;
    norms.add(int(i / W % kNormLanes), update_vector<Moments::column, with_momentum, T>(t, gv, mv, A, B, row), old, n);
    if (with_norms && parts.end_with(i + n - 1, r1)) norms.flush(parts.of(i));
    put<write>(all, i, t, n, k);
    if constexpr (with_momentum) store_some<T>(mp + i, mv, n);
  }
}

#include "runs.inl"

template <class T, class G>
SumKernels<T, G> sum_kernels() {
  return {&row_sums<T, G>, &chunk_sums<T, G>, &column_sums<T, G>};
}
template <bool with_norms, Write write, class P, class G, class M>
UpdateKernels<P, G, M> update_kernels() {
  using T = Compute<P>;
  if constexpr (std::is_same<M, Int8>::value)
    return {&update_runs<with_norms, write, P, G>};
  else
    return {&update_rows<with_norms, write, P, G, M, T>, &row_steps<with_norms, write, P, G, M, T>,
            &element_steps<with_norms, write, P, G, M, T>};
}

}  // namespace AMOS_ISA
