// The new parameters where momentum is in 8 bits: by runs of 256 elements, whichever rows they are of.
#pragma once
#include "slots.cuh"
#include "update.cuh"

namespace amos::cuda {

// Elements of a run that a lane has: every 32nd, so that accesses lie side by side wherever it begins.
constexpr int kRunEach = kRun / kWarp;

// Where element i of a run is: a run may go on from row to row.
struct RunPlace {
  int64_t row, column;

  __device__ RunPlace(int64_t begin, int64_t cols) : row(begin / cols), column(begin % cols) {}
  __device__ RunPlace(RunPlace from, int i, int64_t cols) : row(from.row), column(from.column + i) {
    if (column < cols) return;
    if (cols >= kRun) {  // one row further at the most
      ++row;
      column -= cols;
    } else {
      const auto at = static_cast<unsigned>(column), width = static_cast<unsigned>(cols);
      row += at / width;
      column = at % width;
    }
  }
};

// A and B of an element.
__device__ inline Coefs<float> coefficients_at(const Entry<float>& e, RunPlace p, int64_t plane) {
  const float* const columns = e.column_work + e.column_start + p.column;
  if (e.moments == Moments::column) return {columns[0], columns[plane]};
  const float* const rows = e.row_work + p.row;
  Coefs<float> c{rows[0], rows[e.row_plane]};
  if (e.moments == Moments::factored) c.A *= limited(columns[0], rows[2 * e.row_plane]);
  return c;
}

// The largest of all lanes.
__device__ inline uint32_t warp_max(uint32_t x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// A whole multiple of the scale, up or down by chance. Both operations are rounded, as on a CPU.
__device__ inline int8_t level_of(float m, float inverse, uint32_t random) {
  float level = __fadd_rn(__fmul_rn(m, inverse), static_cast<float>(chance_bits(random)) * kChanceUnit);
  level = level >= 1.0f ? level : 1.0f;  // a NaN, too
  level = level > 255.0f ? 255.0f : level;
  return static_cast<int8_t>(static_cast<int>(level) - 128);
}

// A warp takes a run: all of it must be there before its scale is known. In `step`, rows of one element have no place
// in the workspace: their coefficients are worked out here.
template <class P, class G, bool asked>
__global__ void __launch_bounds__(kThreads, 2) run_step(__grid_constant__ const Args<float> args) {
  Cursor<float> cursor;
  for (int64_t i = blockIdx.x * int64_t(kWarps) + warp_id(); i < args.units; i += gridDim.x * int64_t(kWarps)) {
    const int64_t u = args.units - 1 - i;
    const Entry<float>& e = cursor.at(args, u);
    const int64_t unit = u - cursor.begin, begin = unit * kRun, left = e.rows * e.cols - begin;
    const int n = left < kRun ? static_cast<int>(left) : static_cast<int>(kRun), lane = lane_id();
    const Consts<float>& consts = args.consts[e.hyper];
    const Consts<float> k = element_consts(consts);
    const bool alone = args.one_pass && e.moments == Moments::row && e.cols == 1;
    const RunPlace first(begin, e.cols);
    Arrays<float, P, G> arrays(args, e, 0, begin);
    int8_t* const levels = static_cast<int8_t*>(e.momentum) + begin;
    Raw<1, G> g[kRunEach] = {};
    Raw<1, P> theta[kRunEach] = {};
    float m[kRunEach] = {};
#pragma unroll
    for (int j = 0; j < kRunEach; ++j) {  // all loads before any use
      const int at = j * kWarp + lane;
      if (at >= n) continue;
      g[j] = load<Cache::once, 1>(arrays.g + at);
      theta[j] = load<Cache::once, 1>(arrays.theta + at);
      m[j] = levels[at];
    }
    const float old_scale = e.scale[unit];
    Norms<float, asked> norms;
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kRunEach; ++j) {
      const int at = j * kWarp + lane;
      if (at >= n) continue;
      const RunPlace p(first, at, e.cols);
      float x[1], gs[1];
      theta[j].widen_to(x);
      g[j].widen_to(gs);
      Coefs<float> c;
      if (alone) {
        float v = e.row_moment[p.row];
        c = row_coefficients(e, consts, p.row, square(gs[0], k.clip), v, e.decay[p.row], true);
      } else {
        c = coefficients_at(e, p, args.plane);
      }
      const float step = next_momentum(m[j] * old_scale, delta(c.A, clipped(gs[0], k.clip), c.B, x[0]), k);
      m[j] = step;
      const uint32_t size = bits_of(step) & 0x7fffffffu;
      largest = size > largest ? size : largest;
      norms.add(step * step, x[0] * x[0]);
      x[0] -= step;
      // The number of the element among the parameter's, where rows are only parts of the parameter's.
      arrays.first = e.first + begin + p.row * (e.row_count - e.cols);
      arrays.store_param(at, x, k);
    }
    const RunScale scale = run_scale(warp_max(largest));  // behind this all have read the old one
    if (lane == 0) e.scale[unit] = scale.scale;
#pragma unroll
    for (int j = 0; j < kRunEach; ++j) {
      const int at = j * kWarp + lane;
      if (at >= n) continue;
      const uint64_t index = e.first + begin + at;
      const auto random = random_bits(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), k);
      levels[at] = level_of(m[j], scale.inverse, random);
    }
    norms.leave(e, unit);
  }
}

}  // namespace amos::cuda
