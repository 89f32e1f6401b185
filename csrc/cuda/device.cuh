// What the kernels are made of: types, 16-byte loads, sums in a fixed order, and the batch of blocks that a launch
// carries.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../amos_math.h"
#include "../block.h"

namespace amos::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sizes of work. Sums depend on these and on nothing else, so a result is the same on every grid.
constexpr int64_t kChunk = 4096;  // elements of a row that one warp sums or updates
constexpr int kTileRows = 64;     // the tile from which a CTA takes row and column sums in one read
constexpr int kTileCols = 512;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- types: storage to compute type and back ----------------------------------------------------

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class S, class T>
__device__ S narrow(T x) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16(static_cast<float>(x));
  } else if constexpr (std::is_same_v<S, __half>) {
    return __float2half(static_cast<float>(x));
  } else {
    return static_cast<S>(x);
  }
}

// ---- vectors ------------------------------------------------------------------------------------

// The widest access that V elements of S allow; the chips move at most 16 bytes for a thread and instruction.
template <int kBytes>
using Access = std::conditional_t<
    kBytes % 16 == 0, uint4,
    std::conditional_t<kBytes % 8 == 0, uint2, std::conditional_t<kBytes % 4 == 0, unsigned, unsigned short>>>;

template <int V, class S>
__device__ bool aligned(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Access<V * sizeof(S)>) == 0;
}

// Gradients are read-only (__ldg) and worth a place in L1: the fused step reads them twice. Parameters and momentum are
// read once, so they pass by L1 (__ldcg).
enum class Cache { keep, once };

template <Cache cache, class S>
__device__ S fetch(const S* p) {
  return cache == Cache::keep ? __ldg(p) : __ldcg(p);
}

template <Cache cache, int V, class S, class T>
__device__ void load(const S* p, T (&x)[V]) {
  using A = Access<V * sizeof(S)>;
  constexpr int kPieces = V * sizeof(S) / sizeof(A);
  A raw[kPieces];
  S s[V];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) raw[i] = fetch<cache>(reinterpret_cast<const A*>(p) + i);
  memcpy(s, raw, sizeof(s));
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = widen(s[i]);
}

template <int V, class S, class T>
__device__ void store(S* p, const T (&x)[V]) {
  using A = Access<V * sizeof(S)>;
  constexpr int kPieces = V * sizeof(S) / sizeof(A);
  A raw[kPieces];
  S s[V];
#pragma unroll
  for (int i = 0; i < V; ++i) s[i] = narrow<S>(x[i]);
  memcpy(raw, s, sizeof(s));
#pragma unroll
  for (int i = 0; i < kPieces; ++i) reinterpret_cast<A*>(p)[i] = raw[i];
}

// How n elements split: `head` up to the first 16-byte border of p, then `body` in whole vectors, then the rest.
struct Split {
  int64_t head, body;
};

template <int V, class S>
__device__ Split split(const S* p, int64_t n) {
  static_assert(V * sizeof(S) == 16, "p decides where vectors of 16 bytes begin");
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(S));
  const int64_t head = past ? V - past : 0;
  return head < n ? Split{head, (n - head) / V * V} : Split{n, 0};
}

// Momentum in the compute type or in bf16: all threads branch alike, and half as many kernels are built.
template <class T>
struct Momentum {
  void* data;  // null: none
  bool bf16;

  __device__ explicit operator bool() const { return data; }
  __device__ T* wide() const { return static_cast<T*>(data); }
  __device__ __nv_bfloat16* narrow() const { return static_cast<__nv_bfloat16*>(data); }

  __device__ Momentum operator+(int64_t i) const {
    return {!data ? nullptr : bf16 ? static_cast<void*>(narrow() + i) : wide() + i, bf16};
  }
  template <int V>
  __device__ bool fits() const {
    return !data || (bf16 ? aligned<V>(narrow()) : aligned<V>(wide()));
  }
  template <int V>
  __device__ void load(T (&x)[V]) const {
    if (!data) return;
    if (bf16) {
      cuda::load<Cache::once>(narrow(), x);
    } else {
      cuda::load<Cache::once>(wide(), x);
    }
  }
  template <int V>
  __device__ void store(const T (&x)[V]) const {
    if (!data) return;
    if (bf16) {
      cuda::store(narrow(), x);
    } else {
      cuda::store(wide(), x);
    }
  }
};

// ---- sums: each a fixed tree --------------------------------------------------------------------

// Every lane gets the sum.
template <class T>
__device__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// Thread 0 gets the sum. Callers put a __syncthreads between two calls: the second would overwrite what the first
// reads.
template <class T>
__device__ T cta_sum(T x) {
  __shared__ T part[kWarps];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) sum += part[w];
  }
  return sum;
}

// ---- batches ------------------------------------------------------------------------------------

// A Block as the kernels see it: typed state, and constants worked out on the host, where double is cheap.
template <class T>
struct Entry {
  void* param;
  const void* grad;
  Momentum<T> momentum;
  T *row_moment, *column_moment, *decay;
  int64_t rows, cols, row_work, column_work, column_start, columns;
  int64_t first_unit;  // units of work of this launch that lie before this block
  int64_t partial;     // where its partial sums begin in the scratch memory
  T row_count, column_count;
  Moments moments;
  Consts<T> k;
};

// Kernel parameters, up to 32,764 bytes of them (CUDA 12.1, sm_70): no table to allocate, copy or keep alive.
template <class T>
struct Batch {
  static constexpr int kCapacity = (32764 - 64) / sizeof(Entry<T>);
  T* work;
  int64_t plane;
  T* scratch;
  int64_t units;
  int32_t size;
  int32_t assign_columns;  // 1: column sums are assigned, not added
  Entry<T> entries[kCapacity];
};

// The block that a unit of work belongs to: the last one that begins at or before it.
template <class T>
__device__ const Entry<T>& find(const Batch<T>& batch, int64_t unit) {
  int low = 0, high = batch.size - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.entries[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return batch.entries[low];
}

// Parts that a row's sum is made of, and row tiles that a column's sum is made of.
__host__ __device__ constexpr int64_t row_parts(Moments moments, int64_t cols) {
  return moments == Moments::row        ? ceil_div(cols, kChunk)
         : moments == Moments::factored ? ceil_div(cols, kTileCols)
                                        : 0;
}
__host__ __device__ constexpr int64_t column_parts(int64_t rows) { return ceil_div(rows, kTileRows); }

// Scratch memory: [row][part] of the rows, if they have more than one part, then [part][column] of the columns.
__host__ __device__ constexpr int64_t row_partials(Moments moments, int64_t rows, int64_t cols) {
  return row_parts(moments, cols) > 1 ? rows * row_parts(moments, cols) : 0;
}
__host__ __device__ constexpr int64_t partials(Moments moments, int64_t rows, int64_t cols) {
  return row_partials(moments, rows, cols) + (moments == Moments::row ? 0 : column_parts(rows) * cols);
}

}  // namespace amos::cuda
