// The vector kernels of momentum in 8 bits. kernels.inl includes this file, once for each instruction set.

typedef int32_t VecI __attribute__((vector_size(AMOS_VECTOR_BYTES)));
typedef int8_t VecB __attribute__((vector_size(AMOS_VECTOR_BYTES / 4), aligned(1), may_alias));

// As load_some and store_some.
AMOS_FN VecB load_levels(const int8_t* p, int64_t n) {
  if (n >= kWidth<float>) return *(const VecB*)p;
  VecB levels = {};
  __builtin_memcpy(&levels, p, n);
  return levels;
}
AMOS_FN void store_levels(int8_t* p, VecB levels, int64_t n) {
  if (n >= kWidth<float>)
    *(VecB*)p = levels;
  else
    __builtin_memcpy(p, &levels, n);
}

// n elements, which begin a run, into m, which has room for whole vectors.
AMOS_FN void widen_runs(const Runs& from, int64_t n, float* m) {
  constexpr int W = kWidth<float>;
  for (int64_t i = 0; i < n; i += W) {
    const VecI levels = __builtin_convertvector(load_levels(from.levels + i, n - i), VecI);
    store(m + i, __builtin_convertvector(levels, VecF) * from.scales[i / kRun]);
  }
}

// And back: a run must be there as a whole before its first element can be written.
AMOS_FN void narrow_run(const float* m, int64_t n, const Runs& to, const Consts<float>& k) {
  constexpr int W = kWidth<float>;
  VecU largest = {};
  for (int64_t i = 0; i < n; i += W) {
    const VecU size = as_bits(load_some<float>(m + i, n - i < W ? n - i : W)) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  uint32_t most = 0;
  for (int lane = 0; lane < W; ++lane) most = largest[lane] > most ? largest[lane] : most;
  const RunScale scale = run_scale(most);
  to.scales[0] = scale.scale;
  for (int64_t i = 0; i < n; i += W) {
    const VecI chance = (VecI)chance_bits(random_lanes(to.index + i, k));
    VecF level = load(m + i) * scale.inverse + __builtin_convertvector(chance, VecF) * kChanceUnit;
    level = level >= 1.0f ? level : VecF{} + 1.0f;  // a NaN, too
    level = level > 255.0f ? VecF{} + 255.0f : level;
    store_levels(to.levels + i, __builtin_convertvector(__builtin_convertvector(level, VecI) - 128, VecB), n - i);
  }
}

// Elements [begin, end) of a block, which begin with a run; sums: of the norms.
template <bool with_norms, Write write, class P, class G>
void update_runs(const Elements<P, G, float>& e, const Runs& runs, int64_t begin, int64_t end, Moments kind,
                 const Planes<float>& planes, const Consts<float>& k, double* sums) {
  alignas(64) float m[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    Norms<with_norms, float> norms;
    const int64_t n = end - first < kChunk ? end - first : kChunk;
    const Runs here = runs.from(first);
    widen_runs(here, n, m);
    for (int64_t i = 0, some; i < n; i += some) {
      const int64_t r = (first + i) / e.cols, c = (first + i) % e.cols;
      some = e.cols - c < n - i ? e.cols - c : n - i;
      Elements<P, G, float> at = e.at(r, c);
      at.m = m + i;
      update_part<write>(at, r, c, some, kind, planes, k, kAhead, norms);
    }
    for (int64_t i = 0; i < n; i += kRun) narrow_run(m + i, n - i < kRun ? n - i : kRun, here.from(i), k);
    if (with_norms) norms.flush(sums);
  }
}
