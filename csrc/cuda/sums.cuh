// Sums of squares: of parts of rows and columns into the scratch memory, and from there into the workspace. Grids are
// bounded and loop over units, so that many small tensors cost what one large one does.
#pragma once
#include "table.cuh"

namespace amos::cuda {

// `row`: a warp sums one chunk of a row, or several narrow rows. Rows of several chunks are finished by finish_sums.
template <class T, class G>
__global__ void __launch_bounds__(kThreads) row_sums(__grid_constant__ const Args<T> args) {
  Cursor<T> cursor;
  for (int64_t u = blockIdx.x * int64_t(kWarps) + warp_id(); u < args.units; u += gridDim.x * int64_t(kWarps)) {
    const Entry<T>& e = cursor.at(args, u);
    const int lanes = e.lanes, groups = kWarp / lanes, lane = lane_id() % lanes;
    const int64_t parts = row_parts(Moments::row, e.cols), unit = u - cursor.begin;  // [row][part]
    const int64_t row = unit / parts * groups + lane_id() / lanes, begin = unit % parts * kChunk;
    const int64_t left = row < e.rows ? e.cols - begin : 0, n = left < kChunk ? left : kChunk;
    const G* g = static_cast<const G*>(e.grad) + row * e.cols + begin;
    const T sum = warp_sum(sum_squares(g, n, args.consts[e.hyper].clip, lane, lanes), lanes);
    if (lane == 0 && n > 0) (parts > 1 ? e.partial : e.row_work)[parts > 1 ? unit : row] = sum;
  }
}

// The 16 columns of a tile that a lane sums, as vectors or, where rows are not aligned, one by one. The lanes' accesses
// lie side by side either way.
template <class G>
struct LaneColumns {
  static constexpr int V = 16 / sizeof(G), kVectors = kLaneCols / V;
  int lane, lanes;
  bool vectors;
  int count;  // vectors or columns of this lane that lie in the matrix

  __device__ LaneColumns(int lane, int lanes, int width, bool vectors) : lane(lane), lanes(lanes), vectors(vectors) {
    const int unit = vectors ? V : 1;
    count = (width / unit - lane + lanes - 1) / lanes;
  }

  __device__ int column(int i, int j) const {
    return vectors ? (i * lanes + lane) * V + j : (i * V + j) * lanes + lane;
  }

  __device__ void load_row(const G* g, bool there, Raw<V, G> (&x)[kVectors]) const {
    const int mine = there ? count : 0;
    g += column(0, 0);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) x[i] = {};
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (i < mine) x[i] = load<Cache::keep, V>(g + i * lanes * V);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      G s[V] = {};
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (i * V + j < mine) s[j] = __ldg(g);
        g += lanes;  // 16 addresses at a time would take too many registers
      }
      memcpy(x[i].pieces, s, sizeof(s));
    }
  }
};

// `column` and `factored`: a CTA reads a tile of the gradient once. A lane keeps the sums of its columns in registers,
// and the warps' sums meet in shared memory. A tile of a narrow matrix is narrower and has more rows.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, 2) tile_sums(__grid_constant__ const Args<T> args) {
  using Columns = LaneColumns<G>;
  constexpr int V = Columns::V, kVectors = Columns::kVectors, kAhead = 8 / sizeof(G);  // rows in flight
  constexpr int kSteps = kTileRows / kWarps;
  __shared__ T columns[kWarps][kTileCols];
  Cursor<T> cursor;
  for (int64_t u = blockIdx.x; u < args.units; u += gridDim.x) {
    const Entry<T>& e = cursor.at(args, u);
    const int lanes = e.lanes, groups = kWarp / lanes, group = warp_id() * groups + lane_id() / lanes;
    const int64_t across = ceil_div(e.cols, kTileCols), down = (u - cursor.begin) / across;
    const int64_t part = (u - cursor.begin) % across, begin = part * kTileCols;
    const int64_t first_row = down * tile_rows(lanes) + group;
    const int stride = kWarps * groups;
    const int rows = e.rows - first_row < kTileRows * kWarp ? static_cast<int>(e.rows - first_row) : kTileRows * kWarp;
    const int tile_cols = lanes * kLaneCols;
    const int width = static_cast<int>(e.cols - begin < tile_cols ? e.cols - begin : tile_cols);
    const G* g = static_cast<const G*>(e.grad) + begin;
    const bool vectors = aligned<V>(g) && e.cols % V == 0;  // then every row of the tile is aligned
    const Columns mine{lane_id() % lanes, lanes, width, vectors};
    g += first_row * e.cols;
    const int64_t next = stride * e.cols;
    const T clip = args.consts[e.hyper].clip;
    const bool with_rows = e.moments == Moments::factored;
    T* const row_out = (across > 1 ? e.partial : e.row_work) + first_row * across + part;
    T sums[kVectors][V] = {};
#pragma unroll 1
    for (int step = 0; step < kSteps; step += kAhead) {
      if (step * stride - group >= rows) break;
      Raw<V, G> x[kAhead][kVectors];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {  // all loads before any use
        mine.load_row(g, (step + k) * stride < rows, x[k]);
        g += next;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        T squares[V] = {};
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          T xs[V];
          x[k][i].widen_to(xs);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const T xx = square(xs[j], clip);
            sums[i][j] += xx;
            squares[j] += xx;
          }
        }
        if (!with_rows) continue;
        const T sum = warp_sum(total(squares), lanes);
        if (mine.lane == 0 && (step + k) * stride < rows) row_out[(step + k) * stride * across] = sum;
      }
    }
    for (int distance = lanes; distance < kWarp; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) sums[i][j] += __shfl_xor_sync(kAllLanes, sums[i][j], distance);
      }
    }
    if (lane_id() < lanes) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) columns[warp_id()][mine.column(i, j)] = sums[i][j];
      }
    }
    __syncthreads();
    T* out = e.partial + row_partials(e.moments, e.rows, e.cols) + down * e.cols + begin;
    for (int column = threadIdx.x; column < width; column += kThreads) {
      T sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += columns[w][column];
      out[column] = sum;
    }
    __syncthreads();  // the next tile overwrites `columns`
  }
}

// ---- finish_sums: from parts to sums, in double because there may be many thousands ----

constexpr int64_t kWarpParts = 32;  // of more parts a CTA takes care

// Lanes that add up the parts of one row, and rows that a CTA finishes at a time.
__host__ __device__ constexpr int part_lanes(int64_t parts) {
  int lanes = 1;
  while (lanes < kWarp && lanes < parts) lanes *= 2;
  return lanes;
}
__host__ __device__ constexpr int64_t finished_rows(int64_t parts) {
  return parts > kWarpParts ? 1 : kWarps * (kWarp / part_lanes(parts));
}
__host__ __device__ constexpr int64_t finish_row_units(Moments moments, int64_t rows, int64_t cols) {
  const int64_t parts = row_parts(moments, cols);
  return parts > 1 ? ceil_div(rows, finished_rows(parts)) : 0;
}

template <class T>
__device__ void finish_rows(const Entry<T>& e, int64_t unit, double (&part)[2][kWarp], int& turn) {
  const int64_t parts = row_parts(e.moments, e.cols);
  const bool whole_cta = parts > kWarpParts;
  const int lanes = whole_cta ? kThreads : part_lanes(parts), lane = threadIdx.x % lanes;
  const int64_t row = unit * finished_rows(parts) + threadIdx.x / lanes;
  double sum = 0;
  if (row < e.rows) {
#pragma unroll 8
    for (int64_t i = lane; i < parts; i += lanes) sum += e.partial[row * parts + i];
  }
  sum = whole_cta ? cta_sum(sum, part[turn ^= 1]) : warp_sum(sum, lanes);
  if (lane == 0 && row < e.rows) e.row_work[row] = T(sum);
}

// 32 columns: a lane for each, a warp for every eighth part. A parameter's blocks are added one after another, so that
// the order is fixed where they share columns.
template <class T>
__device__ void finish_columns(const Args<T>& args, const Entry<T>* e, int64_t unit, double (&part)[kWarps][kWarp]) {
  const int64_t column = unit * kWarp + lane_id();
  const Entry<T>* const last = e + e->followers;
  T* const out = e->column_work + column;
  double sum = 0;
  bool any = false;
  for (; e <= last; ++e) {
    const int64_t mine = column - e->column_start, cols = e->cols, parts = column_parts(e->rows, cols);
    if (mine < 0 || mine >= cols) continue;
    const T* partial = e->partial + row_partials(e->moments, e->rows, cols) + mine;
#pragma unroll 8
    for (int64_t i = warp_id(); i < parts; i += kWarps) sum += partial[i * cols];
    any = true;
  }
  part[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() == 0 && any) {
    sum = args.assign_columns ? 0.0 : double(*out);
    for (int w = 0; w < kWarps; ++w) sum += part[w][lane_id()];
    *out = T(sum);
  }
}

// Units of rows come first, then those of columns.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_sums(__grid_constant__ const Args<T> args) {
  __shared__ double row_part[2][kWarp], column_part[2][kWarps][kWarp];  // in turns: see cta_sum
  Cursor<T> cursor;
  int turn = 0;  // changes with every barrier, and with nothing else
  for (int64_t u = blockIdx.x; u < args.units; u += gridDim.x) {
    const Entry<T>& e = cursor.at(args, u);
    const int64_t unit = u - cursor.begin, row_units = finish_row_units(e.moments, e.rows, e.cols);
    if (unit < row_units) {
      finish_rows(e, unit, row_part, turn);
    } else {
      finish_columns(args, &e, unit - row_units, column_part[turn ^= 1]);
    }
  }
}

}  // namespace amos::cuda
