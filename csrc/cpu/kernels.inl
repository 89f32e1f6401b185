// The vector kernels. cpu.cpp includes this file once for each instruction set, with AMOS_ISA = its namespace and
// AMOS_VECTOR_BYTES = the width of its registers. Plain serial loops over ranges of rows or columns: no threads, no
// allocation, no torch.
//
// Results do not depend on the width: sums run in kLanes lanes (element i of a chunk in lane i mod kLanes) that a fixed
// tree joins, chunks of kChunk elements are joined in double, in order, and -ffp-contract=off keeps every product
// rounded.

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
// code.
template <class T, class S>
AMOS_FN Vec<T> load_some(const S* p, int64_t n) {
  S all[kWidth<T>] = {};
  __builtin_memcpy(all, p, n * sizeof(S));
  return load(all);
}
template <class T, class S>
AMOS_FN void store_some(S* p, Vec<T> x, int64_t n) {
  S all[kWidth<T>];
  store(all, x);
  __builtin_memcpy(p, all, n * sizeof(S));
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
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kParts<T>; ++k) acc[k] += squared<T>(load(g + i + k * kWidth<T>), clip);
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

// kRows rows into `columns` (added) and, where rows is not null, into their own sums, in one reading.
template <int kRows, class T, class G>
AMOS_FN void panel_sums(const G* g, int64_t cols, T bound, T* rows, T* columns) {
  const Clip<T> clip(bound);
  double total[kRows] = {};
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t end = cols - begin < kChunk ? cols : begin + kChunk;
    Vec<T> acc[kRows][kParts<T>] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int k = 0; k < kParts<T>; ++k) {
        const int64_t at = i + k * kWidth<T>;
        Vec<T> column[kRows];
        for (int m = 0; m < kRows; ++m) {
          column[m] = squared<T>(load(g + m * cols + at), clip);
          acc[m][k] += column[m];
        }
        for (int half = kRows / 2; half > 0; half /= 2)
          for (int m = 0; m < half; ++m) column[m] += column[m + half];
        store(columns + at, load(columns + at) + column[0]);
      }
    for (int k = 0; i < end; ++k, i += kWidth<T>) {
      const int64_t n = end - i < kWidth<T> ? end - i : kWidth<T>;
      Vec<T> column[kRows];
      for (int m = 0; m < kRows; ++m) {
        column[m] = squared<T>(load_some<T>(g + m * cols + i, n), clip);
        acc[m][k] += column[m];
      }
      for (int half = kRows / 2; half > 0; half /= 2)
        for (int m = 0; m < half; ++m) column[m] += column[m + half];
      store_some<T>(columns + i, load_some<T>(columns + i, n) + column[0], n);
    }
    for (int m = 0; m < kRows; ++m) total[m] += lanes_sum<T>(acc[m]);
  }
  if (rows)
    for (int m = 0; m < kRows; ++m) rows[m] = T(total[m]);
}

template <class T, class G>
void column_sums(const G* g, int64_t cols, T clip, int64_t first, int64_t last, T* rows, T* columns) {
  int64_t r = first;
  for (; r + 4 <= last; r += 4) panel_sums<4, T>(g + r * cols, cols, clip, rows ? rows + r : nullptr, columns);
  for (; r < last; ++r) panel_sums<1, T>(g + r * cols, cols, clip, rows ? rows + r : nullptr, columns);
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

// One vector of a row: theta <- theta - Delta. The caller loads and stores.
template <Moments kind, bool with_momentum, class T>
AMOS_FN void update_vector(Vec<T>& theta, Vec<T> g, Vec<T>& m, Vec<T> P, Vec<T> Q, const RowVectors<T>& row) {
  const Vec<T> limited = row.most < row.factor * P ? row.most : row.factor * P;
  const Vec<T> A = kind == Moments::column ? P : kind == Moments::row ? row.A : row.A * limited;
  const Vec<T> B = kind == Moments::column ? Q : row.B;
  Vec<T> step = A * row.clip(g) + B * theta;
  if constexpr (with_momentum) {
    m = row.momentum * m + row.one_minus_momentum * step;
    step = m;
  }
  theta -= step;
}

// Updates n elements of a row; with `next`, also returns the sum of squares of the n gradients there (n <= kChunk):
// the update waits for memory, so the other row's sum costs no time.
template <Moments kind, class P, class G, class M, class T>
AMOS_FN double update_chunk(P* theta, const G* g, M* m, int64_t n, const RowCoefs<T>& coefs, const Consts<T>& k,
                            const G* next) {
  constexpr bool with_momentum = !std::is_same<M, NoMomentum>::value;
  constexpr int W = kWidth<T>;
  using Momentum = typename std::conditional<with_momentum, M, T>::type;
  auto* mp = reinterpret_cast<Momentum*>(m);
  const RowVectors<T> row(coefs, k);
  const T *pp = coefs.P, *qp = coefs.Q;
  Vec<T> acc[kParts<T>] = {};
  auto vector_at = [&](int64_t i) __attribute__((always_inline)) {
    Vec<T> t = load(theta + i), mv = {}, p = {}, q = {};
    if constexpr (with_momentum) mv = load(mp + i);
    if constexpr (kind != Moments::row) p = load(pp + i);
    if constexpr (kind == Moments::column) q = load(qp + i);
    update_vector<kind, with_momentum, T>(t, load(g + i), mv, p, q, row);
    store(theta + i, t);
    if constexpr (with_momentum) store(mp + i, mv);
  };
  int64_t i = 0;
  if (next) {
    for (; i + kLanes <= n; i += kLanes)
      for (int part = 0; part < kParts<T>; ++part) {
        acc[part] += squared<T>(load(next + i + part * W), row.clip);
        vector_at(i + part * W);
      }
  } else {
    for (; i + kLanes <= n; i += kLanes)
      for (int part = 0; part < kParts<T>; ++part) vector_at(i + part * W);
  }
  for (int part = 0; i < n; ++part, i += W) {
    const int64_t some = n - i < W ? n - i : W;
    if (next) acc[part] += squared<T>(load_some<T>(next + i, some), row.clip);
    Vec<T> t = load_some<T>(theta + i, some), mv = {}, p = {}, q = {};
    if constexpr (with_momentum) mv = load_some<T>(mp + i, some);
    if constexpr (kind != Moments::row) p = load_some<T>(pp + i, some);
    if constexpr (kind == Moments::column) q = load_some<T>(qp + i, some);
    update_vector<kind, with_momentum, T>(t, load_some<T>(g + i, some), mv, p, q, row);
    store_some<T>(theta + i, t, some);
    if constexpr (with_momentum) store_some<T>(mp + i, mv, some);
  }
  return next ? lanes_sum<T>(acc) : 0;
}

template <class M>
AMOS_FN M* advance(M* m, int64_t n) {
  return m ? m + n : m;
}

// Columns [c0, c1) of rows [r0, r1), with the coefficients in the planes of the workspace.
template <class P, class G, class M, class T>
void update_rows(P* theta, const G* g, M* m, const Span& span, Moments kind, const Planes<T>& planes,
                 const Consts<T>& k) {
  const int64_t n = span.c1 - span.c0;
  for (int64_t r = span.r0; r < span.r1; ++r) {
    const int64_t at = r * span.cols + span.c0;
    if (kind == Moments::row) {
      const RowCoefs<T> row{planes.A[r], planes.B[r], 0, nullptr, nullptr};
      update_chunk<Moments::row>(theta + at, g + at, advance(m, at), n, row, k, (const G*)nullptr);
    } else if (kind == Moments::factored) {
      const RowCoefs<T> row{planes.A[r], planes.B[r], planes.limit[r], planes.P + span.c0, nullptr};
      update_chunk<Moments::factored>(theta + at, g + at, advance(m, at), n, row, k, (const G*)nullptr);
    } else {
      const RowCoefs<T> row{0, 0, 0, planes.P + span.c0, planes.Q + span.c0};
      update_chunk<Moments::column>(theta + at, g + at, advance(m, at), n, row, k, (const G*)nullptr);
    }
  }
}

// `row` moments in one pass over memory: row r is updated while row r + 1 is summed.
template <class P, class G, class M, class T>
void row_steps(P* theta, const G* g, M* m, int64_t cols, int64_t r0, int64_t r1, int64_t row_count, T* moment, T* decay,
               const Consts<T>& k) {
  double sum = row_sum<T>(g + r0 * cols, cols, k.clip);
  for (int64_t r = r0; r < r1; ++r) {
    const T G2 = T(sum) / T(row_count);
    moment[r] = next_moment(moment[r], G2, k);
    const Coefs<T> c = coefficients(G2, moment[r], decay[r], k);
    const RowCoefs<T> row{c.A, c.B, 0, nullptr, nullptr};
    const bool more = r + 1 < r1;
    sum = 0;
    for (int64_t i = 0; i < cols; i += kChunk) {
      const int64_t at = r * cols + i, n = cols - i < kChunk ? cols - i : kChunk;
      sum += update_chunk<Moments::row>(theta + at, g + at, advance(m, at), n, row, k, more ? g + at + cols : nullptr);
    }
  }
}

// Rows of one element (moments = "full"): each element has its own v and b.
template <class P, class G, class M, class T>
void element_steps(P* theta, const G* g, M* m, int64_t r0, int64_t r1, T* moment, T* decay, const Consts<T>& k) {
  constexpr bool with_momentum = !std::is_same<M, NoMomentum>::value;
  constexpr int W = kWidth<T>;
  using Momentum = typename std::conditional<with_momentum, M, T>::type;
  auto* mp = reinterpret_cast<Momentum*>(m);
  const RowVectors<T> row(RowCoefs<T>{}, k);
  for (int64_t i = r0; i < r1; i += W) {
    const int64_t n = r1 - i < W ? r1 - i : W;
    Vec<T> t = load_some<T>(theta + i, n), gv = load_some<T>(g + i, n), mv = {}, A = {}, B = {};
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
    update_vector<Moments::column, with_momentum, T>(t, gv, mv, A, B, row);
    store_some<T>(theta + i, t, n);
    if constexpr (with_momentum) store_some<T>(mp + i, mv, n);
  }
}

template <class T, class G>
SumKernels<T, G> sum_kernels() {
  return {&row_sums<T, G>, &chunk_sums<T, G>, &column_sums<T, G>};
}
template <class P, class G, class M>
UpdateKernels<P, G, M> update_kernels() {
  using T = Compute<P>;
  return {&update_rows<P, G, M, T>, &row_steps<P, G, M, T>, &element_steps<P, G, M, T>};
}

}  // namespace AMOS_ISA
