// The formulas of Amos, for one entry of the state and for one element: their only copy, for host and device.
// Tian & Parikh 2022 (arXiv 2210.11693), algorithm 1; letters as in docs/algorithm.md. T is float or double.
#pragma once
#include <math.h>  // not <cmath>: it puts the float overloads of sqrt in the global namespace
#include <string.h>

#include "block.h"

#if defined(__CUDACC__)
#define AMOS_FN __host__ __device__ __forceinline__
#else
#define AMOS_FN inline __attribute__((always_inline))
#endif

namespace amos {

// Hyper in the compute type, with what does not change from entry to entry worked out once, in double.
template <class T>
struct Consts {
  T beta, one_minus_beta, bias, lr2, lr_sigma, c_scale, d_scale, extra_l2, eps, inv_sqrt_eps;
  T clip, momentum, one_minus_momentum;
  uint32_t key, salt;  // of this parameter's random numbers at this step
  int32_t stochastic;
};

// A bijection of 32-bit numbers that spreads a change of one bit over all (lowbias32 of C. Wellons's hash prospector).
// U is uint32_t or a vector of them; with a salt, streams of different keys are not shifts of each other.
template <class U>
AMOS_FN U mixed(U x, uint32_t salt) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= salt;
  x ^= x >> 15;
  x *= 0xd35a2d97u;
  return x ^ (x >> 15);
}

template <class T>
AMOS_FN Consts<T> make_consts(const Hyper& h) {
  Consts<T> k;
  k.beta = T(h.beta);
  k.one_minus_beta = T(1.0 - h.beta);
  k.bias = T(1.0 - pow(h.beta, h.t));
  k.lr2 = T(h.lr * h.lr);
  k.lr_sigma = T(h.grad_sign * h.lr * h.sigma);  // the sign rides on A: no work for each element
  k.c_scale = T(h.c_coef * sqrt(h.lr));
  k.d_scale = T(h.d_coef * sqrt(h.lr * h.sigma));
  k.extra_l2 = T(h.extra_l2);
  k.eps = T(h.eps);
  k.inv_sqrt_eps = T(1.0 / sqrt(h.eps));
  k.clip = T(h.clip);
  k.momentum = T(h.momentum);
  k.one_minus_momentum = T(1.0 - h.momentum);
  k.stochastic = h.seed >= 0;
  k.key = mixed(uint32_t(k.stochastic ? h.seed : -1 - h.seed), uint32_t(int64_t(h.t)));
  k.salt = mixed(k.key, 0x9e3779b9u);
  return k;
}

// Random bits for the element number 2^32 high + low of a parameter: the same in every layout, on every device and in
// every run.
template <class T>
AMOS_FN uint32_t stream_key(uint32_t high, const Consts<T>& k) {
  return k.key + high * 0x9e3779b1u;
}
template <class T>
AMOS_FN uint32_t random_bits(uint32_t low, uint32_t high, const Consts<T>& k) {
  return mixed(low ^ stream_key(high, k), k.salt);
}

// The bits of a float, rounded to those of a bfloat16 (in the upper half's place below): up with a probability of the
// part that is cut off. A NaN must be dealt with before. U as above.
template <class U>
AMOS_FN U rounded_stochastically(U bits, U random) {
  return (bits + (random >> 16)) >> 16;
}

template <class T>
struct Coefs {
  T A, B;
};

// v <- beta v + (1 - beta) G
template <class T>
AMOS_FN T next_moment(T v, T G, const Consts<T>& k) {
  return k.beta * v + k.one_minus_beta * G;
}

template <class T>
AMOS_FN T floored(T v, T eps) {
  return v < eps ? eps : v;  // a NaN stays a NaN
}

// G = the mean square of the gradient over this entry. v must hold the NEW moment; b is moved on to its next value.
template <class T>
AMOS_FN Coefs<T> coefficients(T G, T v, T& b, const Consts<T>& k) {
  const T inv_v = k.bias / floored(v, k.eps);                           // 1 / v_hat
  const T gamma = k.lr2 * (inv_v * G) / T(sqrt(T(1) + k.c_scale * b));  // c xi^2 G / v_hat, with the old b
  const T d = T(1) / (T(1) + k.d_scale * b);                            // with the old b
  b += gamma * (T(1) + b);
  return {d * k.lr_sigma * T(sqrt(inv_v)), d * (T(0.5) * gamma + k.extra_l2)};  // A, B
}

// `factored`: P of a column, from its moment C and the mean of all C: 1 / sqrt(w), w = C / mean(C). An all-zero
// matrix has w = 1; a column of zeros has P = inf, which `limited` brings back. A NaN stays a NaN.
template <class T>
AMOS_FN T column_profile(T column_moment, T mean) {
  return mean == T(0) ? T(1) : T(1) / T(sqrt(column_moment / mean));
}

// `factored`: eps floors R w, but A has R floored already. This number of a row tells `limited` what to make of P so
// that A P = scale / sqrt(max(R w, eps)): where R >= eps, the largest P; else minus the factor that takes eps back to
// R.
template <class T>
AMOS_FN T profile_limit(T row_moment, const Consts<T>& k) {
  return row_moment < k.eps ? -T(sqrt(k.eps / row_moment)) : T(sqrt(row_moment)) * k.inv_sqrt_eps;
}

template <class T>
AMOS_FN T limited(T P, T limit) {
  const T factor = limit < T(0) ? -limit : T(1), most = limit < T(0) ? T(1) : limit;
  return factor * P > most ? most : factor * P;
}

template <class T>
AMOS_FN T clipped(T g, T clip) {
  return g > clip ? clip : (g < -clip ? -clip : g);  // a NaN stays a NaN
}

// Delta, for one element.
template <class T>
AMOS_FN T delta(T A, T g, T B, T theta) {
  return A * g + B * theta;
}

// m <- mu m + (1 - mu) Delta
template <class T>
AMOS_FN T next_momentum(T m, T step, const Consts<T>& k) {
  return k.momentum * m + k.one_minus_momentum * step;
}

// ---- momentum in 8 bits: m = q * scale, q from -127 to 127 --------------------------------------------------------

struct RunScale {
  float scale, inverse;
};

AMOS_FN float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
AMOS_FN uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Of a run, from the bits of the largest |m| in it (as integers they are in the same order, with infinity and NaN at
// the end). The scale has 16 bits, so that q * scale is exact, and is a little below a 127th, so that the largest is
// not rounded below 127: then what was widened can be narrowed again, to the bit. A run below 2^-100 is zero; one that
// is not finite becomes NaN.
AMOS_FN RunScale run_scale(uint32_t largest) {
  if (largest >= 0x7f800000u) return {float_of(0x7fc00000u), 0.0f};
  if (largest < 27u << 23) return {0.0f, 0.0f};
  const float scale = float_of((bits_of(float_of(largest) * float(1.0 / 127)) - 16u) & 0xffffff00u);
  return {scale, 1.0f / scale};
}

// 128 + a number from 0 to 1 by chance, from bits that rounding to bfloat16 does not use. U as above.
template <class U>
AMOS_FN U chance_bits(U random) {
  return (random & 0xffffu) + (1u << 23);
}
constexpr float kChanceUnit = 1.0f / 65536;

}  // namespace amos
