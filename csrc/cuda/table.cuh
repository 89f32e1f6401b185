// The table of blocks in device memory, how it gets there, and how a warp finds its place in it.
#pragma once
#include "device.cuh"

namespace amos::cuda {

// ---- sizes of work: sums depend on these and on nothing else, so a result is the same on every grid ----

constexpr int64_t kChunk = 4096;  // elements of a row that one warp sums or updates
constexpr int kLaneCols = 16;     // columns of a tile that one lane sums
constexpr int kTileRows = 64;     // rows of a tile as wide as a warp
constexpr int kTileCols = kWarp * kLaneCols;

// Of narrow matrices a warp takes several rows at a time: how many lanes each of them gets, a power of two.
__host__ __device__ constexpr int lanes_for(int64_t cols, int least = 1, int lane_cols = kLaneCols) {
  int lanes = least;
  while (lanes < kWarp && lanes * lane_cols < cols) lanes *= 2;
  return lanes;
}
__host__ __device__ constexpr int tile_rows(int lanes) { return kTileRows * (kWarp / lanes); }

// Parts that a row's sum is made of, and row tiles that a column's sum is made of.
__host__ __device__ constexpr int64_t row_parts(Moments moments, int64_t cols) {
  return moments == Moments::row        ? ceil_div(cols, kChunk)
         : moments == Moments::factored ? ceil_div(cols, kTileCols)
                                        : 0;
}
__host__ __device__ constexpr int64_t column_parts(int64_t rows, int64_t cols) {
  return ceil_div(rows, tile_rows(lanes_for(cols)));
}

// Scratch memory of a block: [row][part] of the rows, if they have more than one part, then [part][column].
__host__ __device__ constexpr int64_t row_partials(Moments moments, int64_t rows, int64_t cols) {
  return row_parts(moments, cols) > 1 ? rows * row_parts(moments, cols) : 0;
}
__host__ __device__ constexpr int64_t partials(Moments moments, int64_t rows, int64_t cols) {
  return row_partials(moments, rows, cols) + (moments == Moments::row ? 0 : column_parts(rows, cols) * cols);
}

// ---- the table ----------------------------------------------------------------------------------

// A Block as the kernels see it.
template <class T>
struct Entry {
  void* param;
  const void* grad;
  void *momentum, *low_param;
  float* scale;  // of momentum in 8 bits: one for each run
  T *row_moment, *column_moment, *decay;
  T *row_work, *column_work;   // in plane 0: its first row, its parameter's first column
  T* partial;                  // its partial sums
  double* moment_sums;         // of its column moments: one for each 256 columns
  double *norms, *norm_parts;  // where norms go, and the two numbers of each unit of work; null: not asked for
  int64_t norm_units;          // how many units it has
  int64_t row_plane;           // from one plane of row_work to the next
  int64_t rows, cols, row_count, column_count, column_start, columns, first;
  int64_t all_columns;  // of the first block of a parameter: the columns that it and its followers reach to
  int32_t followers;    // further blocks of its parameter, right behind it
  int32_t norm_blocks;  // this one and those right behind it whose norms go to the same place; 0: it is behind another
  int32_t hyper;
  int32_t lanes, row_lanes;  // lanes of a row, and in `held_rows`
  Moments moments;
};

// What a kernel gets. A unit of work belongs to one entry and to a warp or a CTA.
template <class T>
struct Args {
  const Entry<T>* entries;
  const int64_t* first_unit;  // of each entry, in this launch; entries without work begin where the next one does
  const Consts<T>* consts;
  int64_t units, plane;
  int32_t n;
  int32_t shared_bytes;  // dynamic ones
  bool bf16_momentum;
  bool one_pass;        // this is `step`
  bool row_for_cta;     // held_rows: a row belongs to a CTA, not to a warp
  bool assign_columns;  // column sums are assigned, not added
};

// A warp's place in the table; it moves rarely, so a search costs little.
template <class T>
class Cursor {
 public:
  int64_t begin = 0;  // the entry's first unit

  // The last entry that begins at or before `unit`. 32 lanes probe at a time: two rounds of loads for 1024 entries.
  __device__ const Entry<T>& at(const Args<T>& args, int64_t unit) {
    if (unit >= begin && unit < end_) return args.entries[index_];
    int low = 0, high = args.n;
    while (high - low > 1) {
      const int stride = (high - low + kWarp - 1) / kWarp, probe = low + lane_id() * stride;
      const bool before = probe < high && args.first_unit[probe] <= unit;
      low += (__popc(__ballot_sync(kAllLanes, before)) - 1) * stride;
      high = low + stride < high ? low + stride : high;
    }
    index_ = low;
    begin = args.first_unit[low];
    end_ = low + 1 < args.n ? args.first_unit[low + 1] : args.units;
    return args.entries[low];
  }

 private:
  int64_t end_ = 0;
  int index_ = 0;
};

// ---- how the table gets there -------------------------------------------------------------------

// A piece of the table in the parameters of a kernel (CUDA 12.1: up to 32,764 bytes). The driver takes them over at the
// launch: no pinned memory, no wait, nothing to keep alive, and a CUDA graph replays them.
template <int kBytes>
struct Upload {
  static constexpr int kCapacity = kBytes / sizeof(uint4) - 1;
  uint4* to;
  int32_t count;
  uint4 data[kCapacity];
};

// Many small CTAs: a warp that reads 32 different parameters does so one after another.
constexpr int kUploadThreads = 64;

template <int kBytes>
__global__ void __launch_bounds__(kUploadThreads) upload_table(__grid_constant__ const Upload<kBytes> upload) {
  const int i = blockIdx.x * kUploadThreads + threadIdx.x;
  if (i < upload.count) upload.to[i] = upload.data[i];
}

// Constants of hyper-parameters that live on the device; others are worked out on the host, where double is cheap.
template <class T>
__global__ void __launch_bounds__(kUploadThreads) work_out_consts(const Hyper* rows, Consts<T>* consts, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(kUploadThreads) + threadIdx.x;
  if (i < count) consts[i] = make_consts<T>(rows[i]);
}

}  // namespace amos::cuda
