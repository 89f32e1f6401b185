// What the kernels are made of: types, 16-byte accesses, sums in a fixed order.
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

__device__ inline int lane_id() { return threadIdx.x % kWarp; }
__device__ inline int warp_id() { return threadIdx.x / kWarp; }

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

// Element number `index` of a parameter, rounded up or down at random.
__device__ inline __nv_bfloat16 narrow_stochastically(float x, uint64_t index, const Consts<float>& k) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const auto random = random_bits(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), k);
  const auto rounded = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded_stochastically(bits, random));
  __nv_bfloat16 result;
  memcpy(&result, &rounded, sizeof(rounded));
  return result;
}

// ---- vectors ------------------------------------------------------------------------------------

// The widest access that V elements of S allow; the chips move at most 16 bytes for a thread and instruction.
template <int kBytes>
using Access = std::conditional_t<
    kBytes % 16 == 0, uint4,
    std::conditional_t<kBytes % 8 == 0, uint2, std::conditional_t<kBytes % 4 == 0, unsigned, unsigned short>>>;

// V elements as they are in memory: half as many registers as widened ones, if they are 16 bits wide.
template <int V, class S>
struct Raw {
  using A = Access<V * sizeof(S)>;
  static constexpr int kPieces = V * sizeof(S) / sizeof(A);
  A pieces[kPieces];

  template <class T>
  __device__ void widen_to(T (&x)[V]) const {
    S s[V];
    memcpy(s, pieces, sizeof(s));
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = T(widen(s[j]));
  }
};

template <int V, class S>
__device__ bool aligned(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(typename Raw<V, S>::A) == 0;
}

// keep: read again soon, by this kernel or the next (a gradient that is summed first). once: its last use in this step,
// so it is the first to leave L2, where it would push out what is kept.
enum class Cache { keep, once };

template <Cache cache, int V, class S>
__device__ Raw<V, S> load(const S* p) {
  using A = typename Raw<V, S>::A;
  Raw<V, S> raw;
#pragma unroll
  for (int i = 0; i < Raw<V, S>::kPieces; ++i) {
    const A* piece = reinterpret_cast<const A*>(p) + i;
    raw.pieces[i] = cache == Cache::keep ? __ldg(piece) : __ldcs(piece);
  }
  return raw;
}

template <Cache cache, int V, class S, class T>
__device__ void load(const S* p, T (&x)[V]) {
  load<cache, V>(p).widen_to(x);
}

template <int V, class S>
__device__ void store_raw(S* p, const S (&s)[V]) {
  using A = typename Raw<V, S>::A;
  Raw<V, S> raw;
  memcpy(raw.pieces, s, sizeof(s));
#pragma unroll
  for (int i = 0; i < Raw<V, S>::kPieces; ++i) __stcs(reinterpret_cast<A*>(p) + i, raw.pieces[i]);
}

template <int V, class S, class T>
__device__ void store(S* p, const T (&x)[V]) {
  S s[V];
#pragma unroll
  for (int j = 0; j < V; ++j) s[j] = narrow<S>(x[j]);
  store_raw(p, s);
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

// ---- sums: each a fixed tree --------------------------------------------------------------------

// Every lane gets the sum over its group of `lanes` neighbours, a power of two.
template <class T>
__device__ T warp_sum(T x, int lanes = kWarp) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Every thread gets the sum over a CTA of any size. One barrier: calls that follow each other take turns with two
// `part`s, and a part is written again only behind the barrier of the other.
template <class T>
__device__ T cta_sum(T x, T (&part)[kWarp]) {
  x = warp_sum(x);
  if (lane_id() == 0) part[warp_id()] = x;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  return warp_sum(lane_id() < warps ? part[lane_id()] : T(0));
}

template <class T>
__device__ T square(T x, T clip) {
  x = clipped(x, clip);
  return x * x;
}

// Adds each element's square to a sum of its own: several sums, so that an addition need not wait for the one before.
template <int V, class T, class S>
__device__ void add_squares(const Raw<V, S>& raw, T clip, T (&sums)[V]) {
  T x[V];
  raw.widen_to(x);
#pragma unroll
  for (int j = 0; j < V; ++j) sums[j] += square(x[j], clip);
}

template <int V, class T>
__device__ T total(T (&sums)[V]) {
#pragma unroll
  for (int half = V / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// This lane's share of the sum of squares of n elements, which `lanes` threads take together.
template <class T, class G>
__device__ T sum_squares(const G* g, int64_t n, T clip, int lane, int lanes) {
  constexpr int V = 16 / sizeof(G);
  const Split s = split<V>(g, n);
  T sums[V] = {}, ends[1] = {};
  for (int64_t i = lane; i < n - s.body; i += lanes) {  // both ends, in one loop
    add_squares(load<Cache::keep, 1>(g + (i < s.head ? i : i + s.body)), clip, ends);
  }
#pragma unroll 4
  for (int64_t i = s.head + lane * V; i < s.head + s.body; i += lanes * V) {
    add_squares(load<Cache::keep, V>(g + i), clip, sums);
  }
  return total(sums) + ends[0];
}

}  // namespace amos::cuda
