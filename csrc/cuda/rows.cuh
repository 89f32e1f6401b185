// `row` with complete rows, in one pass: sum, coefficients and update without going back to memory for the gradient.
#pragma once
#include "slots.cuh"
#include "update.cuh"

namespace amos::cuda {

// What one thread holds of a row between sum and update, in registers: much in few threads, of which 512 fit an SM with
// 128 registers each.
template <class T>
constexpr int kHeld = sizeof(T) == 4 ? 32 : 8;
constexpr int kCtaLeast = 64, kCtaMost = 512;

template <class T>
constexpr int64_t kWarpCols = int64_t(kWarp) * kHeld<T>;  // longest row that a warp holds
template <class T>
constexpr int64_t kCtaCols = int64_t(kCtaMost) * kHeld<T>;  // and a CTA

// Fewer long rows than this are worth many CTAs each, and the three phases. Not the number of SMs: results would depend
// on the device.
constexpr int64_t kFewRows = 64;

// A row that has as many lanes as this can give each of its unaligned ends' elements one.
template <class P>
constexpr int kLeastLanes = 2 * kVector<P>;

// The state of a row, asked for before its sum, so that the wait is over when the sum is there.
template <class T>
struct RowState {
  T v = 0, b = 0;
  __device__ RowState(const Entry<T>& e, int64_t row, bool there) {
    if (there) v = e.row_moment[row], b = e.decay[row];
  }
};

// A row shared by `lanes` threads. reduce(x) is the sum of x over the lanes, and none of them is past it before all
// have come to it.
template <class T, class P, class G, class Reduce, bool asked>
__device__ void held_row(const Args<T>& args, const Entry<T>& e, int64_t row, int lane, int lanes, const Reduce& reduce,
                         Norms<T, asked>& norms) {
  constexpr int V = kVector<P>, kVectors = kHeld<T> / V, kAhead = kVectors / 4;
  const bool there = row < e.rows;
  const Arrays<T, P, G> arrays(args, e, row, 0);
  const int n = there ? static_cast<int>(e.cols) : 0;
  const Consts<T>& consts = args.consts[e.hyper];
  const T clip = consts.clip;
  RowState<T> state(e, row, there);

  // Each lane has at most one element of the row's ends, and `mine` vectors.
  const bool fit = arrays.fit();
  const Split s = arrays.split(n);
  const int head = static_cast<int>(s.head), body = static_cast<int>(s.body);
  const int edge = lane >= n - body ? -1 : lane < head ? lane : lane + body;
  const int first = head + lane * V, stride = lanes * V, mine = (head + body - first + stride - V) / stride;
  Raw<1, G> edge_g{};
  Raw<1, P> edge_theta{};
  Raw<V, G> g[kVectors] = {};
  Raw<V, P> theta[kVectors] = {};
  T sum;
  if (fit) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {  // all loads before any use, of what the sum needs first
      if (i < mine) g[i] = load<Cache::once, V>(arrays.g + first + i * stride);
    }
    if (edge >= 0) edge_g = load<Cache::once, 1>(arrays.g + edge);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i < mine) theta[i] = load<Cache::once, V>(arrays.theta + first + i * stride);
    }
    if (edge >= 0) edge_theta = load<Cache::once, 1>(arrays.theta + edge);
    T sums[V] = {}, ends[1] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) add_squares(g[i], clip, sums);
    add_squares(edge_g, clip, ends);
    sum = total(sums) + ends[0];
  } else {  // single elements; the gradient's second read comes from L1 or L2
    sum = sum_squares(arrays.g, n, clip, lane, lanes);
  }
  sum = reduce(sum);
  const Coefs<T> c = row_coefficients(e, consts, row, sum, state.v, state.b, there && lane == 0);
  const Segment<T> all{c.A, c.B, T(INFINITY)};
  const Consts<T> k = element_consts(consts);
  const Arrays<T, P, G> out(args, e, row, 0);  // made again: the registers held something better until here
  if (!fit) {
    update_ends(out, n, Split{n, 0}, all, k, lane, lanes, norms);  // what s is here, without holding it until here
    return;
  }
  if (edge >= 0) {
    Elements<1, T, P, G> single{edge_theta, edge_g, {}};
    out.load_momentum(edge, single.m);
    single.update(out, edge, all, k, norms);
  }
#pragma unroll
  for (int i = 0; i < kVectors; i += kAhead) {
    Elements<V, T, P, G> es[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      es[a].g = g[i + a];
      es[a].theta = theta[i + a];
      if (i + a < mine) out.load_momentum(first + (i + a) * stride, es[a].m);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a < mine) es[a].update(out, first + (i + a) * stride, all, k, norms);
    }
  }
}

// A warp takes a row, or several narrow ones; or, of longer rows, a CTA takes one: a CTA just large enough to hold it.
template <class T, class P, class G, bool asked>
__global__ void __launch_bounds__(kCtaMost) held_rows(__grid_constant__ const Args<T> args) {
  __shared__ T part[2][kWarp];
  __shared__ double norm_part[asked ? 2 : 1][kWarp];
  const bool cta = args.row_for_cta;
  const int units = cta ? 1 : kWarps;  // of a CTA, at a time
  Cursor<T> cursor;
  int turn = 0;
  for (int64_t u = blockIdx.x * int64_t(units) + (cta ? 0 : warp_id()); u < args.units; u += gridDim.x * units) {
    const Entry<T>& e = cursor.at(args, u);
    const int lanes = cta ? blockDim.x : e.row_lanes, rows = cta ? 1 : kWarp / lanes;
    const int64_t row = (u - cursor.begin) * rows + (cta ? 0 : lane_id() / lanes);
    const auto reduce = [&](T sum) {
      // Norms bring barriers of their own, so that there is no turn to hold a register.
      if (cta) return cta_sum(sum, part[asked ? 0 : turn ^= 1]);
      __syncwarp();  // all lanes have read the state before one of them writes it
      return warp_sum(sum, lanes);
    };
    Norms<T, asked> norms;
    held_row<T, P, G>(args, e, row, threadIdx.x % lanes, lanes, reduce, norms);
    if constexpr (asked) {
      if (cta) {
        norms.leave(e, u - cursor.begin, norm_part);
      } else {
        __syncwarp();
        norms.leave(e, u - cursor.begin);
      }
    }
  }
}

__device__ inline uint4* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// Rows that are too long for registers: a CTA holds the gradient in shared memory, as much of it as fits; the second
// read of the rest comes from L2. Each thread reads back what it wrote itself, so no barrier guards it.
template <class T, class P, class G, bool asked>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1) long_rows(__grid_constant__ const Args<T> args) {
  constexpr int V = kVector<P>, kAhead = 16 / V;  // elements in flight: 16
  __shared__ T part[2][kWarp];
  __shared__ double norm_part[asked ? 2 : 1][kWarp];
  auto* const held = reinterpret_cast<Raw<V, G>*>(dynamic_shared());
  const int64_t capacity = args.shared_bytes / sizeof(Raw<V, G>);
  Cursor<T> cursor;
  int turn = 0;
  for (int64_t u = blockIdx.x; u < args.units; u += gridDim.x) {
    const Entry<T>& e = cursor.at(args, u);
    const int lane = threadIdx.x;
    const int64_t row = u - cursor.begin, n = e.cols;
    const Arrays<T, P, G> arrays(args, e, row, 0);
    const Consts<T>& consts = args.consts[e.hyper];
    const Consts<T> k = element_consts(consts);
    RowState<T> state(e, row, true);
    const Split s = arrays.split(n);
    const int64_t vectors = s.body / V, fit = vectors < capacity ? vectors : capacity;
    T sums[V] = {}, ends[1] = {};
    int64_t i = lane;
#pragma unroll 4
    for (; i < fit; i += kThreads) {
      const Raw<V, G> g = load<Cache::once, V>(arrays.g + s.head + i * V);
      held[i] = g;
      add_squares(g, k.clip, sums);
    }
#pragma unroll 4
    for (; i < vectors; i += kThreads) add_squares(load<Cache::keep, V>(arrays.g + s.head + i * V), k.clip, sums);
#pragma unroll 4
    for (i = lane; i < n - s.body; i += kThreads) {
      add_squares(load<Cache::keep, 1>(arrays.g + (i < s.head ? i : i + s.body)), k.clip, ends);
    }
    const T sum = cta_sum(total(sums) + ends[0], part[turn ^= 1]);
    const Coefs<T> c = row_coefficients(e, consts, row, sum, state.v, state.b, lane == 0);
    const Segment<T> all{c.A, c.B, T(INFINITY)};

    Norms<T, asked, double> norms;  // a thread may have a million elements
    update_ends(arrays, n, s, all, k, lane, kThreads, norms);
    for (i = lane; i < vectors; i += kAhead * kThreads) {
      Elements<V, T, P, G> es[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t at = i + a * kThreads;
        if (at >= vectors) continue;
        es[a].theta = load<Cache::once, V>(arrays.theta + s.head + at * V);
        arrays.load_momentum(s.head + at * V, es[a].m);
        es[a].g = at < fit ? held[at] : load<Cache::once, V>(arrays.g + s.head + at * V);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t at = i + a * kThreads;
        if (at < vectors) es[a].update(arrays, s.head + at * V, all, k, norms);
      }
    }
    if constexpr (asked) norms.leave(e, row, norm_part);
  }
}

// Rows of one element (moments = "full"): a thread for each, four at a time.
constexpr int kThreadRows = 4;

template <class T, class P, class G, bool asked>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2) thread_rows(__grid_constant__ const Args<T> args) {
  Cursor<T> cursor;
  for (int64_t u = blockIdx.x * int64_t(kWarps) + warp_id(); u < args.units; u += gridDim.x * int64_t(kWarps)) {
    const Entry<T>& e = cursor.at(args, u);
    const Arrays<T, P, G> arrays(args, e, 0, 0);
    const Consts<T>& consts = args.consts[e.hyper];
    const Consts<T> k = element_consts(consts);
    const int64_t first = (u - cursor.begin) * (kThreadRows * kWarp) + lane_id();
    Norms<T, asked> norms;
    Elements<1, T, P, G> es[kThreadRows];
    T v[kThreadRows], b[kThreadRows];
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) {
      const int64_t row = first + a * kWarp;
      if (row >= e.rows) continue;
      es[a].load_all(arrays, row);
      v[a] = e.row_moment[row];
      b[a] = e.decay[row];
    }
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) {
      const int64_t row = first + a * kWarp;
      if (row >= e.rows) continue;
      T sum[1] = {};
      add_squares(es[a].g, k.clip, sum);
      const Coefs<T> c = row_coefficients(e, consts, row, sum[0], v[a], b[a], true);
      es[a].update(arrays, row, Segment<T>{c.A, c.B, T(INFINITY)}, k, norms);
    }
    __syncwarp();
    norms.leave(e, u - cursor.begin);
  }
}

}  // namespace amos::cuda
