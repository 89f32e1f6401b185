// The kernels. A launch walks `units` of work over a batch of blocks; a unit belongs to one block and to a thread, a
// warp or a CTA. Grids are bounded and loop over units, so that a launch of many small tensors costs what one large one
// does.
#pragma once
#include "device.cuh"

namespace amos::cuda {

__device__ inline int lane_id() { return threadIdx.x % kWarp; }
__device__ inline int warp_id() { return threadIdx.x / kWarp; }

// ---- pieces that kernels share ------------------------------------------------------------------

template <class T, class G>
__device__ T square(G g, T clip) {
  const T x = clipped(T(widen(g)), clip);
  return x * x;
}

// This lane's share of the sum of squares of n elements, which `lanes` threads take together.
template <class T, class G>
__device__ T sum_squares(const G* g, int64_t n, T clip, int lane, int lanes) {
  constexpr int V = 16 / sizeof(G);
  const Split s = split<V>(g, n);
  T sums[V] = {};                                       // several, so that an addition need not wait for the one before
  for (int64_t i = lane; i < n - s.body; i += lanes) {  // both ends, in one loop
    sums[0] += square(__ldg(g + (i < s.head ? i : i + s.body)), clip);
  }
#pragma unroll 4
  for (int64_t i = s.head + lane * V; i < s.head + s.body; i += lanes * V) {
    T x[V];
    load<Cache::keep>(g + i, x);
#pragma unroll
    for (int j = 0; j < V; ++j) sums[j] += square(x[j], clip);
  }
#pragma unroll
  for (int half = V / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// What the elements of a row segment have in common, and the columns that it lies over.
template <class T>
struct Segment {
  T A, B, limit;
  const T* profile;   // P of its first column (A for `column`); null: 1 everywhere
  const T* column_B;  // B of its first column, for `column`; else null
};

// V elements on their way: what was loaded of them, and what is made of it.
template <int V, class T>
struct Elements {
  T theta[V], g[V], m[V], P[V], B[V];

  __device__ void update(bool with_momentum, const Segment<T>& s, const Consts<T>& k) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T step = delta(s.A * limited(P[j], s.limit), clipped(g[j], k.clip), B[j], theta[j]);
      if (with_momentum) step = m[j] = next_momentum(m[j], step, k);
      theta[j] -= step;
    }
  }
};

// V values of a column vector; it stays in L1, so where it does not fit the vectors, single loads do.
template <int V, class T>
__device__ void load_columns(const T* p, T otherwise, T (&x)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = otherwise;
  if (!p) return;
  if (aligned<V>(p)) {
    load<Cache::keep>(p, x);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = __ldg(p + j);
  }
}

// V elements from `i` on, in vectors.
template <int V, class T, class P, class G>
__device__ void update_vector(P* theta, const G* g, Momentum<T> m, int64_t i, const Segment<T>& segment,
                              const Consts<T>& k) {
  Elements<V, T> e;
  load<Cache::keep>(g + i, e.g);
  load<Cache::once>(theta + i, e.theta);
  (m + i).load(e.m);
  load_columns(segment.profile ? segment.profile + i : nullptr, T(1), e.P);
  load_columns(segment.column_B ? segment.column_B + i : nullptr, segment.B, e.B);
  e.update(bool(m), segment, k);
  store(theta + i, e.theta);
  (m + i).store(e.m);
}

// Updates n elements of one row, which `lanes` threads take together.
template <class T, class P, class G>
__device__ void update_segment(P* theta, const G* g, Momentum<T> m, int64_t n, const Segment<T>& segment,
                               const Consts<T>& k, int lane, int lanes) {
  // Vectors begin where the narrower type has a 16-byte border, and only if the other arrays have one there too.
  constexpr bool kNarrowParam = sizeof(P) <= sizeof(G);
  constexpr int V = 16 / (kNarrowParam ? sizeof(P) : sizeof(G));
  Split s{n, 0};
  if constexpr (kNarrowParam) {
    s = split<V>(theta, n);
  } else {
    s = split<V>(g, n);
  }
  if (!aligned<V>(theta + s.head) || !aligned<V>(g + s.head) || !(m + s.head).template fits<V>()) s = {n, 0};

  for (int64_t edge = lane; edge < n - s.body; edge += lanes) {  // both ends, in one loop
    update_vector<1>(theta, g, m, edge < s.head ? edge : edge + s.body, segment, k);
  }
  for (int64_t i = s.head + lane * V; i < s.head + s.body; i += lanes * V) update_vector<V>(theta, g, m, i, segment, k);
}

// ---- sums ---------------------------------------------------------------------------------------

// `row`: a warp sums one chunk of one row. Rows of several chunks are finished by finish_rows.
template <class T, class G>
__global__ void __launch_bounds__(kThreads) row_sums(__grid_constant__ const Batch<T> batch) {
  for (int64_t u = blockIdx.x * int64_t(kWarps) + warp_id(); u < batch.units; u += gridDim.x * int64_t(kWarps)) {
    const Entry<T>& e = find(batch, u);
    const int64_t parts = row_parts(Moments::row, e.cols), part = u - e.first_unit;  // [row][part]
    const int64_t row = part / parts, begin = part % parts * kChunk;
    const int64_t n = begin + kChunk < e.cols ? kChunk : e.cols - begin;
    const G* g = static_cast<const G*>(e.grad) + row * e.cols + begin;
    const T sum = warp_sum(sum_squares(g, n, e.k.clip, lane_id(), kWarp));
    T* out = parts > 1 ? batch.scratch + e.partial : batch.work + e.row_work;
    if (lane_id() == 0) out[part] = sum;
  }
}

// `column` and `factored`: a CTA reads a tile of the gradient once. A warp takes every eighth row of it; a lane keeps
// the sums of its own 16 columns in registers, and the warps' sums meet in shared memory.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2) tile_sums(__grid_constant__ const Batch<T> batch) {
  constexpr int V = 16 / sizeof(G), kVectors = kTileCols / (kWarp * V);
  __shared__ T columns[kWarps][kTileCols];
  for (int64_t u = blockIdx.x; u < batch.units; u += gridDim.x) {
    const Entry<T>& e = find(batch, u);
    const int64_t across = ceil_div(e.cols, kTileCols), tile = u - e.first_unit;
    const int64_t down = tile / across, part = tile % across;
    const int64_t begin = part * kTileCols, end = (down + 1) * kTileRows;
    const int width = static_cast<int>(begin + kTileCols < e.cols ? kTileCols : e.cols - begin);
    const int64_t rows = end < e.rows ? end : e.rows;
    const G* corner = static_cast<const G*>(e.grad) + begin;
    const bool vectors = aligned<V>(corner) && e.cols % V == 0;  // then every row of the tile is aligned
    T sums[kVectors][V] = {};
    for (int64_t row = down * kTileRows + warp_id(); row < rows; row += kWarps) {
      const G* g = corner + row * e.cols;
      T x[kVectors][V] = {};
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {  // all loads before any use
        const int column = (i * kWarp + lane_id()) * V;
        if (vectors) {
          if (column < width) load<Cache::keep>(g + column, x[i]);
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (column + j < width) x[i][j] = widen(__ldg(g + column + j));
          }
        }
      }
      T sum = 0;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const T xx = square(x[i][j], e.k.clip);
          sums[i][j] += xx;
          sum += xx;
        }
      }
      if (e.moments == Moments::factored) {
        sum = warp_sum(sum);
        T* out = across > 1 ? batch.scratch + e.partial : batch.work + e.row_work;
        if (lane_id() == 0) out[row * across + part] = sum;
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) columns[warp_id()][(i * kWarp + lane_id()) * V + j] = sums[i][j];
    }
    __syncthreads();
    T* out = batch.scratch + e.partial + row_partials(e.moments, e.rows, e.cols) + down * e.cols + begin;
    for (int column = threadIdx.x; column < width; column += kThreads) {
      T sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += columns[w][column];
      out[column] = sum;
    }
    __syncthreads();  // the next tile overwrites `columns`
  }
}

// A warp adds up the parts of one row, in double: a tensor of one row may have many thousands.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_rows(__grid_constant__ const Batch<T> batch) {
  for (int64_t u = blockIdx.x * int64_t(kWarps) + warp_id(); u < batch.units; u += gridDim.x * int64_t(kWarps)) {
    const Entry<T>& e = find(batch, u);
    const int64_t parts = row_parts(e.moments, e.cols), row = u - e.first_unit;
    const T* partial = batch.scratch + e.partial + row * parts;
    double sum = 0;
    for (int64_t i = lane_id(); i < parts; i += kWarp) sum += partial[i];
    sum = warp_sum(sum);
    if (lane_id() == 0) batch.work[e.row_work + row] = T(sum);
  }
}

// A CTA adds up 32 columns: a lane for each column, a warp for every eighth row tile.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_columns(__grid_constant__ const Batch<T> batch) {
  __shared__ double sums[kWarps][kWarp];
  for (int64_t u = blockIdx.x; u < batch.units; u += gridDim.x) {
    const Entry<T>& e = find(batch, u);
    const int64_t column = (u - e.first_unit) * kWarp + lane_id(), parts = column_parts(e.rows);
    const T* partial = batch.scratch + e.partial + row_partials(e.moments, e.rows, e.cols) + column;
    double sum = 0;
    if (column < e.cols) {
      for (int64_t i = warp_id(); i < parts; i += kWarps) sum += partial[i * e.cols];
    }
    sums[warp_id()][lane_id()] = sum;
    __syncthreads();
    if (warp_id() == 0 && column < e.cols) {
      T& total = batch.work[e.column_work + e.column_start + column];
      sum = batch.assign_columns ? 0.0 : double(total);
      for (int w = 0; w < kWarps; ++w) sum += sums[w][lane_id()];
      total = T(sum);
    }
    __syncthreads();  // the next unit overwrites `sums`
  }
}

// ---- slots --------------------------------------------------------------------------------------

template <class T>
__device__ void row_slot(const Batch<T>& batch, const Entry<T>& e, int64_t row) {
  T* work = batch.work + e.row_work + row;
  const T G = *work / e.row_count, v = next_moment(e.row_moment[row], G, e.k);
  const Coefs<T> c = coefficients(G, v, e.decay[row], e.k);
  e.row_moment[row] = v;
  work[0] = c.A;
  work[batch.plane] = c.B;
  if (e.moments == Moments::factored) work[2 * batch.plane] = profile_limit(v, e.k);
}

template <class T>
__device__ void column_slot(const Batch<T>& batch, const Entry<T>& e, int64_t column) {
  T* work = batch.work + e.column_work + column;
  const T G = *work / e.column_count, v = next_moment(e.column_moment[column], G, e.k);
  const Coefs<T> c = coefficients(G, v, e.decay[column], e.k);
  e.column_moment[column] = v;
  work[0] = c.A;
  work[batch.plane] = c.B;
}

// A CTA takes all columns of a parameter, because each of them needs the mean of all.
template <class T>
__device__ void column_profiles(const Batch<T>& batch, const Entry<T>& e) {
  __shared__ T mean;
  T* work = batch.work + e.column_work;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < e.columns; c += kThreads) {
    const T v = next_moment(e.column_moment[c], work[c] / e.column_count, e.k);
    e.column_moment[c] = v;
    sum += v;
  }
  sum = cta_sum(sum);
  if (threadIdx.x == 0) mean = T(sum / double(e.columns));
  __syncthreads();  // the next parameter's cta_sum has another, between this read of `mean` and the next write
  for (int64_t c = threadIdx.x; c < e.columns; c += kThreads) work[c] = column_profile(e.column_moment[c], mean);
}

// A unit is 256 rows, or 256 columns of `column`, or all columns of `factored`; the rows come first.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_step(__grid_constant__ const Batch<T> batch) {
  for (int64_t u = blockIdx.x; u < batch.units; u += gridDim.x) {
    const Entry<T>& e = find(batch, u);
    const int64_t unit = u - e.first_unit, i = unit * kThreads + threadIdx.x;
    if (e.moments == Moments::column) {
      if (i < e.columns) column_slot(batch, e, i);
    } else if (unit < ceil_div(e.rows, kThreads)) {
      if (i < e.rows) row_slot(batch, e, i);
    } else {
      column_profiles(batch, e);
    }
  }
}

// ---- update -------------------------------------------------------------------------------------

// A warp updates one chunk of one row.
template <class T, class P, class G>
__global__ void __launch_bounds__(kThreads) update_step(__grid_constant__ const Batch<T> batch) {
  for (int64_t u = blockIdx.x * int64_t(kWarps) + warp_id(); u < batch.units; u += gridDim.x * int64_t(kWarps)) {
    const Entry<T>& e = find(batch, u);
    const int64_t parts = ceil_div(e.cols, kChunk), part = u - e.first_unit;
    const int64_t row = part / parts, begin = part % parts * kChunk, offset = row * e.cols + begin;
    const int64_t n = begin + kChunk < e.cols ? kChunk : e.cols - begin;
    const T* rows = batch.work + e.row_work + row;
    const T* columns = batch.work + e.column_work + e.column_start + begin;
    Segment<T> segment{T(1), T(0), T(INFINITY), nullptr, nullptr};
    if (e.moments != Moments::row) segment.profile = columns;
    if (e.moments == Moments::column) {
      segment.column_B = columns + batch.plane;
    } else {
      segment.A = rows[0];
      segment.B = rows[batch.plane];
    }
    if (e.moments == Moments::factored) segment.limit = rows[2 * batch.plane];
    update_segment(static_cast<P*>(e.param) + offset, static_cast<const G*>(e.grad) + offset, e.momentum + offset, n,
                   segment, e.k, lane_id(), kWarp);
  }
}

// ---- step ---------------------------------------------------------------------------------------

// From the lanes' sums of squares to the coefficients of the row, in every lane. One lane touches the state.
template <int kLanes, class T>
__device__ Coefs<T> row_coefficients(const Entry<T>& e, int64_t row, int lane, T sum) {
  __shared__ Coefs<T> shared;
  T v = 0, b = 0;
  if (lane == 0) {  // asked for before the sum, so that the wait is over when it is there
    v = e.row_moment[row];
    b = e.decay[row];
  }
  if constexpr (kLanes == kWarp) sum = warp_sum(sum);
  if constexpr (kLanes == kThreads) sum = cta_sum(sum);
  Coefs<T> c{0, 0};
  if (lane == 0) {
    const T G = sum / e.row_count;
    v = next_moment(v, G, e.k);
    c = coefficients(G, v, b, e.k);
    e.row_moment[row] = v;
    e.decay[row] = b;
  }
  if constexpr (kLanes == kWarp) c = {__shfl_sync(kAllLanes, c.A, 0), __shfl_sync(kAllLanes, c.B, 0)};
  if constexpr (kLanes == kThreads) {
    if (lane == 0) shared = c;
    __syncthreads();  // the next row's cta_sum has another, between this read and the next write
    c = shared;
  }
  return c;
}

// `row` with complete rows: one pass. A thread (for rows of one element), a warp or a CTA takes a row: kLanes threads.
// The second read of the gradient comes from L1 or L2.
template <int kLanes, class T, class P, class G>
__global__ void __launch_bounds__(kThreads) row_step(__grid_constant__ const Batch<T> batch) {
  constexpr int kRows = kThreads / kLanes;  // at a time
  const int lane = threadIdx.x % kLanes;
  for (int64_t u = blockIdx.x * int64_t(kRows) + threadIdx.x / kLanes; u < batch.units;
       u += gridDim.x * int64_t(kRows)) {
    const Entry<T>& e = find(batch, u);
    const int64_t row = u - e.first_unit, offset = row * e.cols;
    const G* g = static_cast<const G*>(e.grad) + offset;
    P* theta = static_cast<P*>(e.param) + offset;
    T sum;
    if constexpr (kLanes == 1) {
      sum = square<T>(__ldg(g), e.k.clip);
    } else {
      sum = sum_squares(g, e.cols, e.k.clip, lane, kLanes);
    }
    const Coefs<T> c = row_coefficients<kLanes>(e, row, lane, sum);
    const Segment<T> segment{c.A, c.B, T(INFINITY), nullptr, nullptr};
    if constexpr (kLanes == 1) {
      update_vector<1>(theta, g, e.momentum + offset, 0, segment, e.k);
    } else {
      update_segment(theta, g, e.momentum + offset, e.cols, segment, e.k, lane, kLanes);
    }
  }
}

}  // namespace amos::cuda
