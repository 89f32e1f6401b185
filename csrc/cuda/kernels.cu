// The launchers: blocks into a table, the table onto the device, one launch for each kernel however many blocks there
// are. See block.h for what the phases mean.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "rows.cuh"
#include "runs.cuh"
#include "sums.cuh"

#ifndef AMOS_CUDA_ARCHS
#define AMOS_CUDA_ARCHS "unknown"
#endif

namespace amos::cuda {
namespace {

// Threads of a grid for each SM: more than are resident with their many registers, so that SMs that finish early get
// more; not many more, as each CTA begins with a search.
constexpr int64_t kThreadsPerSm = 2048;

// How `step` treats a block.
enum class Way { phases, thread, warp, cta, long_rows };

// scale: of momentum in 8 bits, which takes the phases, but for rows of one element.
template <class T>
Way way(Moments moments, int64_t rows, int64_t cols, const float* scale) {
  if (moments != Moments::row) return Way::phases;
  if (cols == 1) return Way::thread;
  if (scale) return Way::phases;
  if (cols <= kWarpCols<T>) return Way::warp;
  if (cols <= kCtaCols<T>) return Way::cta;
  return rows < kFewRows ? Way::phases : Way::long_rows;
}

template <class T>
int cta_threads(int64_t cols) {
  int threads = kCtaLeast;
  while (threads * kHeld<T> < cols) threads *= 2;
  return threads;
}

bool empty(const Block& b) { return b.rows <= 0 || b.cols <= 0; }

// ---- scratch memory: sums of column moments, partial sums, and the table behind them ----------------------

constexpr int64_t kMostPasses = 16;
constexpr int64_t round_up(int64_t bytes) { return ceil_div(bytes, 16) * 16; }  // to whole pieces of an upload

template <class T>
struct Place {
  int64_t moment_sums = 0, norm_parts = 0, values = 0;

  void add(const Block& b) {
    if (empty(b)) return;
    if (b.moments == Moments::factored) moment_sums += ceil_div(b.columns, kThreads);
    if (b.norms) norm_parts += 2 * most_units(b);
    values += own_values(b) + rows_values(b);
  }
  // The most units of work that any kernel which updates it makes of a block.
  static int64_t most_units(const Block& b) {
    constexpr int kMostLeastLanes = kLeastLanes<__half>;
    if (b.scale) return ceil_div(b.rows * b.cols, kRun);
    const int64_t phases = ceil_div(b.rows, kWarp / lanes_for(b.cols)) * ceil_div(b.cols, kChunk);
    switch (way<T>(b.moments, b.rows, b.cols, b.scale)) {
      case Way::warp:
        return std::max(phases, ceil_div(b.rows, kWarp / lanes_for(b.cols, kMostLeastLanes)));
      case Way::cta:
      case Way::long_rows:
        return std::max(phases, b.rows);
      default:
        return phases;
    }
  }
  static int64_t own_values(const Block& b) { return partials(b.moments, b.rows, b.cols); }
  // `step` keeps A and B of few long rows here: rows of `row` have no place in its workspace.
  static int64_t rows_values(const Block& b) {
    return b.moments == Moments::row && way<T>(b.moments, b.rows, b.cols, b.scale) == Way::phases ? 2 * b.rows : 0;
  }
  int64_t doubles_bytes() const { return round_up((moment_sums + norm_parts) * int64_t(sizeof(double))); }
  int64_t bytes() const { return doubles_bytes() + round_up(values * int64_t(sizeof(T))); }
};

template <class T>
int64_t scratch_bytes_in(const Block* blocks, int64_t n, Hypers hypers) {
  Place<T> end;
  for (int64_t i = 0; i < n; ++i) end.add(blocks[i]);
  return end.bytes() + round_up(n * kMostPasses * int64_t(sizeof(int64_t))) + round_up(n * int64_t(sizeof(Entry<T>))) +
         round_up(hypers.count * int64_t(sizeof(Consts<T>)));
}

int attribute(cudaDeviceAttr which, int otherwise) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : otherwise;
}

// ---- one call of one phase ------------------------------------------------------------------------

template <class T>
class Call {
 public:
  // `one_pass`: this is `step`.
  Call(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream,
       bool one_pass)
      : hypers_(hypers), scratch_(static_cast<char*>(scratch)), stream_(static_cast<cudaStream_t>(stream)) {
    one_pass_ = one_pass;
    args_.plane = work.plane;
    args_.bf16_momentum = types.momentum == Dtype::bf16;
    args_.one_pass = one_pass;
    args_.assign_columns = one_pass;
    read(blocks, n, work);
  }

  template <class G>
  void sums() {
    add({row_sums<T, G>, kWarps}, [&](const Entry<T>& e) {
      return e.moments != Moments::row || taken(e) ? 0 : row_units(e, row_parts(e.moments, e.cols));
    });
    add({tile_sums<T, G>, 1}, [&](const Entry<T>& e) {
      return e.moments == Moments::row ? 0 : column_parts(e.rows, e.cols) * ceil_div(e.cols, kTileCols);
    });
    add({finish_sums<T>, 1}, [&](const Entry<T>& e) {
      return taken(e) ? 0 : finish_row_units(e.moments, e.rows, e.cols) + ceil_div(e.all_columns, kWarp);
    });
  }

  void slots() {
    add({slot_step<T>, 1}, [&](const Entry<T>& e) {
      if (taken(e)) return int64_t(0);
      return (e.moments == Moments::column ? 0 : ceil_div(e.rows, kThreads)) +
             (e.moments == Moments::row ? 0 : ceil_div(e.columns, kThreads));
    });
    add({profiles<T>, 1},
        [&](const Entry<T>& e) { return e.moments == Moments::factored ? ceil_div(e.columns, kThreads) : 0; });
  }

  template <class P, class G>
  void update() {
    if (by_runs_) {
      if constexpr (std::is_same_v<T, float>) {
        add_update({asked_ ? run_step<P, G, true> : run_step<P, G, false>, kWarps},
                   [](const Entry<T>& e) { return ceil_div(e.rows * e.cols, kRun); });
      }
    } else {
      add_update({asked_ ? update_step<T, P, G, true> : update_step<T, P, G, false>, kWarps},
                 [&](const Entry<T>& e) { return taken(e) ? 0 : row_units(e, ceil_div(e.cols, kChunk)); });
    }
    if (asked_) add({finish_norms<T>, 1}, [](const Entry<T>& e) { return int64_t(e.norm_blocks > 0); });
  }

  template <class P, class G>
  void step() {
    if (!by_runs_) step_rows<P, G>();
    sums<G>();
    slots();
    update<P, G>();
  }

  // What takes one pass.
  template <class P, class G>
  void step_rows() {
    for (Entry<T>& e : entries_) e.row_lanes = lanes_for(e.cols, kLeastLanes<P>, std::min(kHeld<T>, kLaneCols));
    add_update({asked_ ? thread_rows<T, P, G, true> : thread_rows<T, P, G, false>, kWarps},
               [&](const Entry<T>& e) { return way_of(e) == Way::thread ? ceil_div(e.rows, kThreadRows * kWarp) : 0; });
    const auto held = asked_ ? held_rows<T, P, G, true> : held_rows<T, P, G, false>;
    add_update({held, kWarps},
               [&](const Entry<T>& e) { return way_of(e) == Way::warp ? ceil_div(e.rows, kWarp / e.row_lanes) : 0; });
    for (int threads = kCtaLeast; threads <= kCtaMost; threads *= 2) {
      add_update({held, 1, threads}, [&](const Entry<T>& e) {
        return way_of(e) == Way::cta && cta_threads<T>(e.cols) == threads ? e.rows : 0;
      });
    }
    int64_t longest = 0;
    for (const Entry<T>& e : entries_) {
      if (way_of(e) == Way::long_rows) longest = std::max(longest, e.cols);
    }
    if (longest > 0) {
      const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 * 1024) - 1024;  // less static ones
      const int shared_bytes = static_cast<int>(std::min(round_up(longest * int64_t(sizeof(G))), most));
      const auto kernel = asked_ ? long_rows<T, P, G, true> : long_rows<T, P, G, false>;
      note(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
      add_update({kernel, 1, kThreads, shared_bytes},
                 [&](const Entry<T>& e) { return way_of(e) == Way::long_rows ? e.rows : 0; });
    }
  }

  // Uploads the table and launches what was added, in that order. Returns the first error; nothing is launched after.
  int run() {
    if (passes_.empty()) return error_;
    upload();
    for (const Pass& pass : passes_) {
      args_.first_unit = reinterpret_cast<const int64_t*>(table_ + pass.first_unit * sizeof(int64_t));
      args_.units = pass.units;
      args_.shared_bytes = pass.shape.shared_bytes;
      args_.row_for_cta = pass.shape.units_per_cta == 1;  // what held_rows asks
      const int64_t most = sms_ * kThreadsPerSm / pass.shape.threads;
      launch(pass.shape.kernel, std::min(ceil_div(pass.units, pass.shape.units_per_cta), most), pass.shape.threads,
             pass.shape.shared_bytes, args_);
    }
    return error_;
  }

 private:
  struct Shape {
    void (*kernel)(Args<T>);
    int units_per_cta;
    int threads = kThreads, shared_bytes = 0;
  };
  struct Pass {
    Shape shape;
    int64_t units;
    size_t first_unit;  // where in first_units_
  };

  Way way_of(const Entry<T>& e) const { return way<T>(e.moments, e.rows, e.cols, e.scale); }
  bool taken(const Entry<T>& e) const { return one_pass_ && way_of(e) != Way::phases; }

  // Units of warps that take narrow rows several at a time.
  static int64_t row_units(const Entry<T>& e, int64_t parts) { return ceil_div(e.rows, kWarp / e.lanes) * parts; }

  void read(const Block* blocks, int64_t n, Work work) {
    Place<T> place, end;
    for (int64_t i = 0; i < n; ++i) end.add(blocks[i]);
    table_ = scratch_ + end.bytes();
    auto* const values = reinterpret_cast<T*>(scratch_ + end.doubles_bytes());
    auto* const doubles = reinterpret_cast<double*>(scratch_);  // sums of column moments, then norms
    bool new_parameter = true;
    size_t leader = 0;       // the first block of the parameter that is not empty
    size_t norm_leader = 0;  // the first whose norms go to the same place
    for (int64_t i = 0; i < n; ++i) {
      const Block& b = blocks[i];
      new_parameter = new_parameter || b.columns > 0 || b.moments == Moments::row;
      if (empty(b)) continue;
      Entry<T> e{};
      e.param = b.param;
      e.grad = b.grad;
      e.momentum = b.momentum;
      e.scale = b.scale;
      by_runs_ = b.scale;
      e.low_param = b.low_param;
      e.row_moment = static_cast<T*>(b.row_moment);
      e.column_moment = static_cast<T*>(b.column_moment);
      e.decay = static_cast<T*>(b.decay);
      e.row_work = static_cast<T*>(work.data) + b.row_work;
      e.row_plane = work.plane;
      e.column_work = static_cast<T*>(work.data) + b.column_work;
      e.partial = values + place.values;
      if (one_pass_ && b.moments == Moments::row) {
        e.row_work = e.partial + place.own_values(b);
        e.row_plane = b.rows;
      }
      e.moment_sums = doubles + place.moment_sums;
      e.norms = b.norms;
      e.norm_parts = doubles + end.moment_sums + place.norm_parts;
      e.norm_blocks = 1;
      asked_ = b.norms;
      if (!entries_.empty() && entries_[norm_leader].norms == b.norms) {
        e.norm_blocks = 0;
        ++entries_[norm_leader].norm_blocks;
      } else {
        norm_leader = entries_.size();
      }
      e.rows = b.rows;
      e.cols = b.cols;
      e.row_count = b.row_count;
      e.column_count = b.column_count;
      e.column_start = b.column_start;
      e.columns = b.columns;
      e.first = b.first;
      e.hyper = static_cast<int32_t>(b.hyper);
      e.lanes = lanes_for(b.cols);
      e.moments = b.moments;
      place.add(b);
      if (new_parameter) {
        leader = entries_.size();
      } else {
        ++entries_[leader].followers;
      }
      new_parameter = false;
      entries_.push_back(e);
      if (b.moments != Moments::row) {
        int64_t& all = entries_[leader].all_columns;
        all = std::max(all, b.column_start + b.cols);
      }
    }
    args_.n = static_cast<int32_t>(entries_.size());
  }

  // Notes a launch of `shape` over all entries; units(entry): its units of work, 0 to leave it out.
  template <class Units>
  void add(Shape shape, const Units& units) {
    Pass pass{shape, 0, first_units_.size()};
    for (const Entry<T>& e : entries_) {
      first_units_.push_back(pass.units);
      pass.units += units(e);
    }
    if (pass.units > 0) {
      passes_.push_back(pass);
    } else {
      first_units_.resize(pass.first_unit);
    }
  }

  // The same for a kernel that updates: each unit leaves its norms, if they are asked for.
  template <class Units>
  void add_update(Shape shape, const Units& units) {
    for (Entry<T>& e : entries_) e.norm_units += units(e);
    add(shape, units);
  }

  template <class Item>
  char* append(std::vector<char>& bytes, const std::vector<Item>& items) {
    const size_t at = bytes.size();
    const auto* const begin = reinterpret_cast<const char*>(items.data());
    bytes.insert(bytes.end(), begin, begin + items.size() * sizeof(Item));
    bytes.resize(round_up(bytes.size()));
    return table_ + at;
  }

  void upload() {
    std::vector<char> bytes;
    append(bytes, first_units_);
    args_.entries = reinterpret_cast<Entry<T>*>(append(bytes, entries_));
    std::vector<Consts<T>> consts;
    for (int64_t i = 0; !hypers_.on_device && i < hypers_.count; ++i) consts.push_back(make_consts<T>(hypers_.rows[i]));
    auto* const device_consts = reinterpret_cast<Consts<T>*>(append(bytes, consts));
    args_.consts = device_consts;
    for (size_t at = 0; at < bytes.size();) {
      at += bytes.size() - at > sizeof(Upload<4096>) ? upload<32752>(bytes, at) : upload<4096>(bytes, at);
    }
    if (hypers_.on_device) {
      launch(work_out_consts<T>, ceil_div(hypers_.count, kUploadThreads), kUploadThreads, 0, hypers_.rows,
             device_consts, hypers_.count);
    }
  }

  template <int kBytes>
  size_t upload(const std::vector<char>& bytes, size_t at) {
    Upload<kBytes> piece;
    static_assert(sizeof(piece) <= 32764, "kernel parameters end here");
    const size_t size = std::min(bytes.size() - at, sizeof(piece.data));
    piece.to = reinterpret_cast<uint4*>(table_ + at);
    piece.count = static_cast<int32_t>(size / sizeof(uint4));
    std::memcpy(piece.data, bytes.data() + at, size);
    launch(upload_table<kBytes>, ceil_div(piece.count, kUploadThreads), kUploadThreads, 0, piece);
    return size;
  }

  // cudaLaunchKernelEx is an ordinary function, so this file is ordinary C++, which tests build for the CPU.
  template <class... Params, class... Given>
  void launch(void (*kernel)(Params...), int64_t ctas, int threads, int shared_bytes, const Given&... given) {
    if (error_ || ctas == 0) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(ctas));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    note(cudaLaunchKernelEx(&config, kernel, Params(given)...));
  }

  void note(int code) {
    const int last = cudaGetLastError();  // also clears it: the caller hears of it from us alone
    if (!error_) error_ = code ? code : last;
  }

  Hypers hypers_;
  char *scratch_, *table_ = nullptr;
  cudaStream_t stream_;
  bool one_pass_, asked_ = false, by_runs_ = false;
  int error_ = cudaSuccess;  // the first one
  int64_t sms_ = attribute(cudaDevAttrMultiProcessorCount, 1);
  Args<T> args_ = {};
  std::vector<Entry<T>> entries_;
  std::vector<int64_t> first_units_;  // of all entries for the first pass, then for the second, ...
  std::vector<Pass> passes_;
};

// ---- from Types to types ------------------------------------------------------------------------

// A type as a value.
template <class T>
struct Type {
  using type = T;
};

// f(compute, param, grad) with the C++ types.
template <class F>
int with_types(Types types, const F& f) {
  const auto is = [&](Dtype param, Dtype grad) { return types.param == param && types.grad == grad; };
  if (is(Dtype::f64, Dtype::f64)) return f(Type<double>{}, Type<double>{}, Type<double>{});
  if (is(Dtype::f32, Dtype::f32)) return f(Type<float>{}, Type<float>{}, Type<float>{});
  if (is(Dtype::f32, Dtype::bf16)) return f(Type<float>{}, Type<float>{}, Type<__nv_bfloat16>{});
  if (is(Dtype::f32, Dtype::f16)) return f(Type<float>{}, Type<float>{}, Type<__half>{});
  if (is(Dtype::bf16, Dtype::bf16)) return f(Type<float>{}, Type<__nv_bfloat16>{}, Type<__nv_bfloat16>{});
  if (is(Dtype::f16, Dtype::f16)) return f(Type<float>{}, Type<__half>{}, Type<__half>{});
  return cudaErrorInvalidValue;
}

// f(call, param, grad) in the types of the call; returns the call's error.
template <class F>
int run(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream,
        bool one_pass, const F& f) {
  return with_types(types, [&](auto t, auto p, auto g) -> int {
    using T = typename decltype(t)::type;
    Call<T> call(blocks, n, types, hypers, work, scratch, stream, one_pass);
    f(call, p, g);
    return call.run();
  });
}

}  // namespace

int sums(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream) {
  return run(blocks, n, types, hypers, work, scratch, stream, false,
             [](auto& call, auto, auto g) { call.template sums<typename decltype(g)::type>(); });
}

int slots(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream) {
  return run(blocks, n, types, hypers, work, scratch, stream, false, [](auto& call, auto, auto) { call.slots(); });
}

int update(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream) {
  return run(blocks, n, types, hypers, work, scratch, stream, false, [](auto& call, auto p, auto g) {
    call.template update<typename decltype(p)::type, typename decltype(g)::type>();
  });
}

int step(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream) {
  return run(blocks, n, types, hypers, work, scratch, stream, true, [](auto& call, auto p, auto g) {
    call.template step<typename decltype(p)::type, typename decltype(g)::type>();
  });
}

int64_t scratch_bytes(const Block* blocks, int64_t n, Types types, Hypers hypers) {
  return types.param == Dtype::f64 ? scratch_bytes_in<double>(blocks, n, hypers)
                                   : scratch_bytes_in<float>(blocks, n, hypers);
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char* architectures() { return AMOS_CUDA_ARCHS; }

}  // namespace amos::cuda
