// From sums to the state's next value and to the coefficients of rows and columns.
#pragma once
#include "table.cuh"

namespace amos::cuda {

// Of one row, from its sum of squares; v and b are its state as read before. One thread writes the next state.
template <class T>
__device__ Coefs<T> row_coefficients(const Entry<T>& e, const Consts<T>& k, int64_t row, T sum, T& v, T b,
                                     bool writes) {
  const T G = sum / T(e.row_count);
  v = next_moment(v, G, k);
  const Coefs<T> c = coefficients(G, v, b, k);
  if (writes) {
    e.row_moment[row] = v;
    e.decay[row] = b;
  }
  return c;
}

template <class T>
__device__ void row_slot(const Entry<T>& e, const Consts<T>& k, int64_t row) {
  T *work = e.row_work + row, v = e.row_moment[row];
  const Coefs<T> c = row_coefficients(e, k, row, *work, v, e.decay[row], true);
  work[0] = c.A;
  work[e.row_plane] = c.B;
  if (e.moments == Moments::factored) work[2 * e.row_plane] = profile_limit(v, k);
}

template <class T>
__device__ void column_slot(const Args<T>& args, const Entry<T>& e, const Consts<T>& k, int64_t column) {
  T* work = e.column_work + column;
  const T G = *work / T(e.column_count), v = next_moment(e.column_moment[column], G, k);
  const Coefs<T> c = coefficients(G, v, e.decay[column], k);
  e.column_moment[column] = v;
  work[0] = c.A;
  work[args.plane] = c.B;
}

// A unit is 256 rows, or 256 columns; the rows come first. The columns of `factored` need the mean of all of them, so
// here they only leave their sum, and `profiles` comes next.
template <class T>
__global__ void __launch_bounds__(kThreads) slot_step(__grid_constant__ const Args<T> args) {
  __shared__ double part[2][kWarp];
  Cursor<T> cursor;
  int turn = 0;
  for (int64_t u = blockIdx.x; u < args.units; u += gridDim.x) {
    const Entry<T>& e = cursor.at(args, u);
    const Consts<T>& k = args.consts[e.hyper];
    const int64_t row_units = e.moments == Moments::column ? 0 : ceil_div(e.rows, kThreads);
    const int64_t unit = u - cursor.begin, i = unit * kThreads + threadIdx.x;
    const int64_t column = (unit - row_units) * kThreads + threadIdx.x;
    if (unit < row_units) {
      if (i < e.rows) row_slot(e, k, i);
    } else if (e.moments == Moments::column) {
      if (column < e.columns) column_slot(args, e, k, column);
    } else {
      double v = 0;
      if (column < e.columns) {
        v = next_moment(e.column_moment[column], e.column_work[column] / T(e.column_count), k);
        e.column_moment[column] = T(v);
      }
      const double sum = cta_sum(v, part[turn ^= 1]);
      if (threadIdx.x == 0) e.moment_sums[unit - row_units] = sum;
    }
  }
}

// `factored`: P of 256 columns. Each warp adds up the few sums for itself.
template <class T>
__global__ void __launch_bounds__(kThreads) profiles(__grid_constant__ const Args<T> args) {
  Cursor<T> cursor;
  for (int64_t u = blockIdx.x; u < args.units; u += gridDim.x) {
    const Entry<T>& e = cursor.at(args, u);
    const int64_t column = (u - cursor.begin) * kThreads + threadIdx.x;
    double sum = 0;
    for (int64_t i = lane_id(); i < ceil_div(e.columns, kThreads); i += kWarp) sum += e.moment_sums[i];
    const T mean = T(warp_sum(sum) / double(e.columns));
    if (column < e.columns) e.column_work[column] = column_profile(e.column_moment[column], mean);
  }
}

}  // namespace amos::cuda
