// The new parameters, from A, B and P: what all updating kernels share, and the kernel of the second pass.
#pragma once
#include "table.cuh"

namespace amos::cuda {

// Vectors are 16 bytes of the parameter, which is never narrower than the gradient: then each instruction of a warp
// covers whole sectors in every array.
template <class P>
constexpr int kVector = 16 / sizeof(P);

// The arrays of one row, or of a part of it.
template <class T, class P, class G>
struct Arrays {
  static constexpr bool kLow = sizeof(G) < sizeof(P);  // only then there is a low_param
  P* theta;
  const G* g;
  void* momentum;  // null: none. In T or in bf16: all threads branch alike, and half as many kernels are built
  G* low;          // null: none
  bool bf16;
  uint64_t first;  // number of the first element among the parameter's

  __device__ Arrays(const Args<T>& args, const Entry<T>& e, int64_t row, int64_t column) : bf16(args.bf16_momentum) {
    const int64_t i = row * e.cols + column;
    theta = static_cast<P*>(e.param) + i;
    g = static_cast<const G*>(e.grad) + i;
    momentum = e.momentum ? static_cast<char*>(e.momentum) + i * (bf16 ? sizeof(__nv_bfloat16) : sizeof(T)) : nullptr;
    low = kLow && e.low_param ? static_cast<G*>(e.low_param) + i : nullptr;
    first = e.first + row * e.row_count + column;
  }

  __device__ T* wide_momentum() const { return static_cast<T*>(momentum); }
  __device__ __nv_bfloat16* narrow_momentum() const { return static_cast<__nv_bfloat16*>(momentum); }

  // Whether all arrays have their vectors at the same elements: the same answer for all rows of a matrix.
  __device__ bool fit() const {
    constexpr int V = kVector<P>;
    const int64_t i = (16 - reinterpret_cast<uintptr_t>(theta) % 16) / sizeof(P) % V;
    return aligned<V>(g + i) && (!kLow || !low || aligned<V>(low + i)) &&
           (!momentum || (bf16 ? aligned<V>(narrow_momentum() + i) : aligned<V>(wide_momentum() + i)));
  }

  // How n elements split into vectors, none if the arrays do not fit each other.
  __device__ Split split(int64_t n) const { return fit() ? cuda::split<kVector<P>>(theta, n) : Split{n, 0}; }

  template <int V>
  __device__ void load_momentum(int64_t i, T (&m)[V]) const {
    if (!momentum) return;
    if (bf16) {
      load<Cache::once>(narrow_momentum() + i, m);
    } else {
      load<Cache::once>(wide_momentum() + i, m);
    }
  }

  template <int V>
  __device__ void store_momentum(int64_t i, const T (&m)[V]) const {
    if (!momentum) return;
    if (bf16) {
      store(narrow_momentum() + i, m);
    } else {
      store(wide_momentum() + i, m);
    }
  }

  template <int V>
  __device__ void store_param(int64_t i, const T (&x)[V], const Consts<T>& k) const {
    if constexpr (std::is_same_v<P, __nv_bfloat16>) {
      if (k.stochastic) {
        P s[V];
#pragma unroll
        for (int j = 0; j < V; ++j) s[j] = narrow_stochastically(x[j], first + i + j, k);
        store_raw(theta + i, s);
        return;
      }
    }
    store(theta + i, x);
    if constexpr (kLow) {
      if (low) store(low + i, x);
    }
  }
};

// What the elements of a row segment have in common, and the columns that it lies over.
template <class T>
struct Segment {
  T A, B, limit;
  const T* profile = nullptr;  // P of its first column (A for `column`); null: 1 everywhere
  int64_t to_column_B = 0;     // for `column`: from there to B of that column; else 0
};

// What updating an element takes of the constants. A copy, or each store would make the compiler read them again.
template <class T>
__device__ Consts<T> element_consts(const Consts<T>& from) {
  Consts<T> k{};
  k.clip = from.clip;
  k.momentum = from.momentum;
  k.one_minus_momentum = from.one_minus_momentum;
  k.key = from.key;
  k.salt = from.salt;
  k.stochastic = from.stochastic;
  return k;
}

// V values of a column vector; it stays in L1, so where it does not fit the vectors, single loads do.
template <int V, class T>
__device__ void load_columns(const T* p, int64_t i, T otherwise, T (&x)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = otherwise;
  if (!p) return;
  if (aligned<V>(p + i)) {
    load<Cache::keep>(p + i, x);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __ldg(p + i + j);
  }
}

// Sums of squares of Delta and of the old parameter, where a monitor asks for them (block.h: norms): of each thread in
// Sum, which `double` makes twice as many registers of, then of each unit of work in double.
template <class T, bool asked_, class Sum = T>
struct Norms {
  static constexpr bool asked = asked_;
  Sum step = 0, theta = 0;

  __device__ void add(T more_step, T more_theta) {
    step += more_step;
    theta += more_theta;
  }
  __device__ static void put(const Entry<T>& e, int64_t unit, double all_steps, double all_theta) {
    e.norm_parts[2 * unit] = all_steps;
    e.norm_parts[2 * unit + 1] = all_theta;
  }
  // Of a unit that a warp has done: all its lanes must come.
  __device__ void leave(const Entry<T>& e, int64_t unit) const {
    if constexpr (asked) {
      const double all_steps = warp_sum(double(step)), all_theta = warp_sum(double(theta));
      if (lane_id() == 0) put(e, unit, all_steps, all_theta);
    }
  }
  // Of one that a CTA has done.
  __device__ void leave(const Entry<T>& e, int64_t unit, double (&part)[2][kWarp]) const {
    const double all_steps = cta_sum(double(step), part[0]), all_theta = cta_sum(double(theta), part[1]);
    if (threadIdx.x == 0) put(e, unit, all_steps, all_theta);
  }
};

// V elements on their way, from element i on.
template <int V, class T, class P, class G>
struct Elements {
  Raw<V, P> theta;
  Raw<V, G> g;
  T m[V];

  __device__ void load_all(const Arrays<T, P, G>& arrays, int64_t i) {
    g = load<Cache::once, V>(arrays.g + i);
    theta = load<Cache::once, V>(arrays.theta + i);
    arrays.load_momentum(i, m);
  }

  template <class Norms>
  __device__ void update(const Arrays<T, P, G>& arrays, int64_t i, const Segment<T>& s, const Consts<T>& k,
                         Norms& norms) {
    T x[V], gs[V], profile[V], B[V], squares[2] = {};
    load_columns(s.profile, i, T(1), profile);
    load_columns(s.to_column_B ? s.profile + s.to_column_B : nullptr, i, s.B, B);
    theta.widen_to(x);
    g.widen_to(gs);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T step = delta(s.A * limited(profile[j], s.limit), clipped(gs[j], k.clip), B[j], x[j]);
      if (arrays.momentum) step = m[j] = next_momentum(m[j], step, k);
      if constexpr (Norms::asked) {
        squares[0] += step * step;
        squares[1] += x[j] * x[j];
      }
      x[j] -= step;
    }
    norms.add(squares[0], squares[1]);
    arrays.store_param(i, x, k);
    arrays.store_momentum(i, m);
  }
};

// Updates the n elements of a row that are in no vector: both ends, in one loop, or all. I: type of an index.
template <class I, class T, class P, class G, class Norms>
__device__ void update_ends(const Arrays<T, P, G>& arrays, I n, Split s, const Segment<T>& segment, const Consts<T>& k,
                            int lane, int lanes, Norms& norms) {
  constexpr int kAhead = 2;  // elements in flight
  const I head = static_cast<I>(s.head), body = static_cast<I>(s.body);
  for (I first = lane; first < n - body; first += kAhead * lanes) {
    Elements<1, T, P, G> e[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const I i = first + a * lanes;
      if (i < n - body) e[a].load_all(arrays, i < head ? i : i + body);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const I i = first + a * lanes;
      if (i < n - body) e[a].update(arrays, i < head ? i : i + body, segment, k, norms);
    }
  }
}

// Updates n elements of one row, which `lanes` threads take together.
template <class T, class P, class G, class Norms>
__device__ void update_segment(const Arrays<T, P, G>& arrays, int n, const Segment<T>& segment, const Consts<T>& k,
                               int lane, int lanes, Norms& norms) {
  constexpr int V = kVector<P>, kAhead = 64 / sizeof(T) / V;  // vectors in flight
  const Split s = arrays.split(n);
  update_ends(arrays, n, s, segment, k, lane, lanes, norms);
  const int end = static_cast<int>(s.head + s.body), stride = lanes * V;
  for (int i = static_cast<int>(s.head) + lane * V; i < end; i += kAhead * stride) {
    Elements<V, T, P, G> e[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a * stride < end) e[a].load_all(arrays, i + a * stride);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a * stride < end) e[a].update(arrays, i + a * stride, segment, k, norms);
    }
  }
}

// A warp updates one chunk of a row, or several narrow rows. The last units come first: of the gradients that the sums
// read last, many are still in L2.
template <class T, class P, class G, bool asked>
__global__ void __launch_bounds__(kThreads, 2) update_step(__grid_constant__ const Args<T> args) {
  Cursor<T> cursor;
  for (int64_t i = blockIdx.x * int64_t(kWarps) + warp_id(); i < args.units; i += gridDim.x * int64_t(kWarps)) {
    const int64_t u = args.units - 1 - i;
    const Entry<T>& e = cursor.at(args, u);
    const int lanes = e.lanes, groups = kWarp / lanes;
    const int64_t parts = ceil_div(e.cols, kChunk), unit = u - cursor.begin;
    const int64_t row = unit / parts * groups + lane_id() / lanes, begin = unit % parts * kChunk;
    Norms<T, asked> norms;
    if (row < e.rows) {
      const int n = static_cast<int>(begin + kChunk < e.cols ? kChunk : e.cols - begin);
      Segment<T> segment{T(1), T(0), T(INFINITY)};
      if (e.moments != Moments::row) segment.profile = e.column_work + e.column_start + begin;
      if (e.moments == Moments::column) {
        segment.to_column_B = args.plane;
      } else {
        segment.A = e.row_work[row];
        segment.B = e.row_work[row + e.row_plane];
      }
      if (e.moments == Moments::factored) segment.limit = e.row_work[row + 2 * e.row_plane];
      update_segment(Arrays<T, P, G>(args, e, row, begin), n, segment, element_consts(args.consts[e.hyper]),
                     lane_id() % lanes, lanes, norms);
    }
    __syncwarp();
    norms.leave(e, unit);
  }
}

// Adds what all units have left of the norms, in their order: a CTA for each place that they go to.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_norms(__grid_constant__ const Args<T> args) {
  __shared__ double part[2][kWarp];
  Cursor<T> cursor;
  for (int64_t u = blockIdx.x; u < args.units; u += gridDim.x) {
    const Entry<T>* const e = &cursor.at(args, u);
    double sums[2] = {};
    for (int block = 0; block < e->norm_blocks; ++block) {
      for (int64_t i = threadIdx.x; i < e[block].norm_units; i += kThreads) {
        sums[0] += e[block].norm_parts[2 * i];
        sums[1] += e[block].norm_parts[2 * i + 1];
      }
    }
    for (int i = 0; i < 2; ++i) {
      const double sum = cta_sum(sums[i], part[i]);
      if (threadIdx.x == 0) e->norms[i] += sum;
    }
  }
}

}  // namespace amos::cuda
