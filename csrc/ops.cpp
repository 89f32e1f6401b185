// The operators torch.ops.amos_dist.*: schemas, the checks at the door, and the way to the CPU or the CUDA kernels.
// LibTorch's stable ABI only, so that one file serves torch 2.11 and later, CPU and CUDA builds, Python 3.10 and later.
//
// Arguments that all four share:
//   param, grad, momentum, low_param: one entry for each tensor (a whole parameter or a flat partition of many);
//       momentum and low_param may be empty lists.
//   state: one vector with the second moments and decays of all tensors, in the compute type.
//   work: 3 x n, see block.h.
//   blocks: int64 [blocks, 17], on the CPU; the fields of a row are those of read_block below.
//   hyper: float64 [parameters, 12], see block.h; on the CPU, or, so that a CUDA graph can change it, on the device.
//   norms: float64 [parameters, 2], a row for each of hyper's, on the device of the workspace: see block.h; may be left
//       out.
//   scale: float32, one vector for each tensor whose momentum is int8: a number for each run of kRun elements of each
//       of its blocks, see block.h; else left out.
//   names: uint8, on the CPU: UTF-8, one line for each tensor, for messages. Not a string: torch's stable ABI (2.13)
//       leaks each that it hands over.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "block.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

namespace amos {
namespace {

constexpr int64_t kBlockFields = 17;

const char* type_name(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Char:
      return "int8";
    default:
      return "another dtype";
  }
}

std::string_view text_of(const Tensor& names) {
  STD_TORCH_CHECK(names.scalar_type() == ScalarType::Byte && names.is_contiguous() && names.is_cpu(),
                  "names: expected a contiguous uint8 CPU tensor");
  return {static_cast<const char*>(names.data_ptr()), size_t(names.numel())};
}

// "param[3] 'wte.weight'"
std::string called(const char* list, int64_t index, std::string_view names) {
  size_t begin = 0;
  for (int64_t i = 0; i < index && begin != std::string::npos; ++i) {
    begin = names.find('\n', begin);
    if (begin != std::string::npos) ++begin;
  }
  std::string text = std::string(list) + "[" + std::to_string(index) + "]";
  if (begin != std::string::npos && begin < names.size())
    text += " '" + std::string(names.substr(begin, names.find('\n', begin) - begin)) + "'";
  return text;
}

ScalarType compute_type(ScalarType param) {
  return param == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Dtype dtype_of(const Tensor& t, const char* list, int64_t index, std::string_view names) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, called(list, index, names), ": expected float64, float32, bfloat16 or float16, got ",
                      type_name(t.scalar_type()));
      return Dtype::f32;
  }
}

int64_t size_of(Dtype type) { return type == Dtype::f64 ? 8 : type == Dtype::f32 ? 4 : type == Dtype::i8 ? 1 : 2; }

struct Lists {
  const Tensors *param = nullptr, *grad = nullptr, *momentum = nullptr, *low_param = nullptr;
  const Tensor *state = nullptr, *norms = nullptr;
  const Tensors* scale = nullptr;
};

struct Call {
  std::vector<Block> blocks;
  Types types{Dtype::f32, Dtype::f32, Dtype::f32};
  Hypers hypers{};
  Work work{};
  Tensor device_tensor;
};

bool given(const Tensors* list) { return list && !list->empty(); }

// As many entries as there are tensors, each contiguous, of one dtype and on the device of the workspace.
void check(const Tensors* list, const char* name, size_t count, ScalarType type, const Tensor& work,
           std::string_view names) {
  if (!given(list)) return;
  STD_TORCH_CHECK(list->size() == count, name, ": expected ", count, " tensors, got ", list->size());
  const auto device = work.device();
  for (size_t i = 0; i < count; ++i) {
    const Tensor& t = (*list)[i];
    STD_TORCH_CHECK(t.device() == device, called(name, int64_t(i), names),
                    ": expected it on the device of the workspace");
    STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), called(name, int64_t(i), names),
                    ": expected contiguous ", type_name(type), ", got ", t.is_contiguous() ? "" : "non-contiguous ",
                    type_name(t.scalar_type()));
  }
}

// Where `count` elements from number `offset` on lie; null where no tensor has such a list.
char* at(const Tensors* list, int64_t index, int64_t offset, int64_t count, Dtype type, const char* name,
         std::string_view names) {
  if (!given(list)) return nullptr;
  const Tensor& t = (*list)[index];
  const int64_t numel = t.numel();
  // Compared without adding: an offset near 2^63 must not wrap around.
  STD_TORCH_CHECK(offset >= 0 && count >= 0 && offset <= numel && count <= numel - offset, called(name, index, names),
                  ": expected at least ", count, " elements from number ", offset, " on, got ", numel);
  return static_cast<char*>(t.data_ptr()) + offset * size_of(type);
}

// The same for the buffer of the state.
char* state_at(const Tensor& state, int64_t offset, int64_t count, int64_t i) {
  STD_TORCH_CHECK(offset >= 0 && count >= 0 && offset <= state.numel() && count <= state.numel() - offset, "blocks[", i,
                  "]: expected ", count, " elements of state from number ", offset, " on, got ", state.numel());
  return static_cast<char*>(state.data_ptr()) + offset * state.element_size();
}

Types read_types(const Lists& lists, size_t count, const Tensor& work, std::string_view names) {
  const ScalarType compute = work.scalar_type();
  STD_TORCH_CHECK(compute == ScalarType::Float || compute == ScalarType::Double,
                  "work: expected float32 or float64, got ", type_name(compute));
  const Dtype wide = compute == ScalarType::Double ? Dtype::f64 : Dtype::f32;
  Types types{wide, wide, wide};
  if (given(lists.param)) {
    const ScalarType type = (*lists.param)[0].scalar_type();
    types.param = types.grad = dtype_of((*lists.param)[0], "param", 0, names);
    STD_TORCH_CHECK(compute_type(type) == compute, called("param", 0, names), ": expected a dtype that is computed in ",
                    type_name(compute), ", got ", type_name(type));
    check(lists.param, "param", count, type, work, names);
  }
  if (given(lists.grad)) {
    const ScalarType type = (*lists.grad)[0].scalar_type();
    types.grad = dtype_of((*lists.grad)[0], "grad", 0, names);
    // `sums_` sees no parameters: a gradient in half precision is as good there.
    const bool low = types.param == Dtype::f32 && types.grad != Dtype::f64;
    STD_TORCH_CHECK(types.grad == types.param || low, called("grad", 0, names),
                    ": expected the parameter's dtype (float32 parameters also take bfloat16 and float16), got ",
                    type_name(type));
    check(lists.grad, "grad", count, type, work, names);
  }
  if (given(lists.momentum)) {
    const ScalarType type = (*lists.momentum)[0].scalar_type();
    const bool narrow = type == ScalarType::BFloat16 || type == ScalarType::Char;
    STD_TORCH_CHECK(type == compute || (narrow && compute == ScalarType::Float), called("momentum", 0, names),
                    ": expected ", type_name(compute), " or, with float32, bfloat16 or int8, got ", type_name(type));
    types.momentum = type == ScalarType::Char ? Dtype::i8 : dtype_of((*lists.momentum)[0], "momentum", 0, names);
    check(lists.momentum, "momentum", count, type, work, names);
  }
  STD_TORCH_CHECK(given(lists.scale) == (types.momentum == Dtype::i8), "scale: expected ",
                  types.momentum == Dtype::i8 ? count : 0, " tensors, got ", lists.scale ? lists.scale->size() : 0);
  check(lists.scale, "scale", count, ScalarType::Float, work, names);
  if (given(lists.low_param)) {
    const ScalarType type = given(lists.grad) ? (*lists.grad)[0].scalar_type() : compute;
    STD_TORCH_CHECK(types.param == Dtype::f32 && (types.grad == Dtype::bf16 || types.grad == Dtype::f16),
                    called("low_param", 0, names), ": expected float32 parameters with bfloat16 or float16 gradients");
    check(lists.low_param, "low_param", count, type, work, names);
  }
  if (lists.state)
    STD_TORCH_CHECK(lists.state->device() == work.device() && lists.state->scalar_type() == compute &&
                        lists.state->is_contiguous() && lists.state->dim() == 1,
                    "state: expected a contiguous vector of ", type_name(compute), " on the device of the workspace");
  return types;
}

Block read_block(const int64_t* f, int64_t i, const Lists& lists, size_t count, Types types, int64_t hypers,
                 int64_t plane, std::string_view names) {
  const int64_t tensor = f[0], offset = f[1], rows = f[2], cols = f[3], hyper = f[14], first = f[15];
  STD_TORCH_CHECK(tensor >= 0 && (tensor < int64_t(count) || !lists.grad) && rows >= 0 && cols >= 0 && f[4] >= 0 &&
                      f[4] <= 2 && f[5] > 0 && f[6] > 0 && hyper >= 0 && hyper < hypers && first >= 0,
                  "blocks[", i, "]: a field is out of range");
  const auto moments = static_cast<Moments>(f[4]);
  const bool has_rows = moments != Moments::column, has_columns = moments != Moments::row;
  const int64_t row_work = has_rows ? f[10] : 0, column_work = has_columns ? f[11] : 0,
                column_start = has_columns ? f[12] : 0, columns = has_columns ? f[13] : 0;
  for (int64_t place : {row_work, column_work, column_start, columns})  // so that their sums below cannot wrap around
    STD_TORCH_CHECK(place >= 0 && place <= plane, "blocks[", i, "]: reaches beyond the workspace of ", plane,
                    " elements");
  STD_TORCH_CHECK(rows == 0 || cols <= std::numeric_limits<int64_t>::max() / 2 / rows, "blocks[", i, "]: too large");
  // Only rows that a phase writes need a place in the workspace: `step` keeps those of `row` moments on chip.
  STD_TORCH_CHECK((!has_rows || moments == Moments::row || rows <= plane - row_work) &&
                      (!has_columns || cols <= plane - column_work - column_start) && columns <= plane - column_work,
                  "blocks[", i, "]: reaches beyond the workspace of ", plane, " elements");
  Block b{};
  b.param = at(lists.param, tensor, offset, rows * cols, types.param, "param", names);
  b.grad = at(lists.grad, tensor, offset, rows * cols, types.grad, "grad", names);
  b.momentum = at(lists.momentum, tensor, offset, rows * cols, types.momentum, "momentum", names);
  b.scale = reinterpret_cast<float*>(
      at(lists.scale, tensor, f[16], rows * cols / kRun + (rows * cols % kRun > 0), Dtype::f32, "scale", names));
  b.low_param = at(lists.low_param, tensor, offset, rows * cols, types.grad, "low_param", names);
  if (lists.state) {
    if (has_rows) b.row_moment = state_at(*lists.state, f[7], rows, i);
    if (has_columns) b.column_moment = state_at(*lists.state, f[8], columns, i);
    b.decay = state_at(*lists.state, f[9], has_rows ? rows : columns, i);
  }
  b.rows = rows;
  b.cols = cols;
  if (lists.norms) b.norms = static_cast<double*>(lists.norms->data_ptr()) + 2 * hyper;
  b.row_count = f[5];
  b.column_count = f[6];
  b.row_work = row_work;
  b.column_work = column_work;
  b.column_start = column_start;
  b.columns = columns;
  b.first = first;
  b.hyper = hyper;
  b.moments = moments;
  return b;
}

Call read(const Lists& lists, const Tensor& work, const Tensor& blocks, const Tensor& hyper, std::string_view names) {
  Call call{{}, {}, {}, {}, work};
  const size_t count = lists.grad ? lists.grad->size() : 0;
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Long && blocks.is_contiguous() && blocks.dim() == 2 &&
                      blocks.size(1) == kBlockFields && blocks.is_cpu(),
                  "blocks: expected a contiguous int64 CPU tensor of shape [n, ", kBlockFields, "]");
  STD_TORCH_CHECK(hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous() && hyper.dim() == 2 &&
                      hyper.size(1) == kHyperFields && (hyper.is_cpu() || hyper.device() == work.device()),
                  "hyper: expected a contiguous float64 tensor of shape [n, ", kHyperFields,
                  "] on the CPU or on the device of the workspace");
  STD_TORCH_CHECK(work.dim() == 2 && work.size(0) == 3 && work.is_contiguous(),
                  "work: expected a contiguous tensor of shape [3, n]");
  if (lists.norms)
    STD_TORCH_CHECK(lists.norms->scalar_type() == ScalarType::Double && lists.norms->is_contiguous() &&
                        lists.norms->dim() == 2 && lists.norms->size(0) == hyper.size(0) && lists.norms->size(1) == 2 &&
                        lists.norms->device() == work.device(),
                    "norms: expected a contiguous float64 tensor of shape [", hyper.size(0),
                    ", 2] on the device of the workspace");
  if (blocks.size(0) == 0) return call;
  STD_TORCH_CHECK(!lists.param || !lists.param->empty(), "param: expected ", count, " tensors, got 0");
  call.types = read_types(lists, count, work, names);
  call.hypers = {static_cast<const Hyper*>(hyper.data_ptr()), hyper.size(0), !hyper.is_cpu()};
  call.work = {work.data_ptr(), work.size(1)};
  const auto* fields = static_cast<const int64_t*>(blocks.data_ptr());
  call.blocks.reserve(blocks.size(0));
  for (int64_t i = 0; i < blocks.size(0); ++i)
    call.blocks.push_back(
        read_block(fields + i * kBlockFields, i, lists, count, call.types, call.hypers.count, call.work.plane, names));
  return call;
}

// Rows of `row` moments that go through the workspace (all phases but `step`) must have their place in it.
void expect_row_work(const Call& call) {
  for (const Block& b : call.blocks)
    STD_TORCH_CHECK(b.moments != Moments::row || b.rows <= call.work.plane - b.row_work,
                    "blocks: rows reach beyond the workspace of ", call.work.plane, " elements");
}

// `step` works a parameter's rows and columns out alone, so a parameter must be one block; and a row too long for one
// pass (moments = "scalar") needs its place in the workspace.
void expect_whole(const Call& call) {
  for (const Block& b : call.blocks) {
    STD_TORCH_CHECK(b.moments == Moments::row || (b.column_start == 0 && b.columns == b.cols),
                    "blocks: step_ takes parameters of one block; use sums_, slots_ and update_ for others");
    STD_TORCH_CHECK(b.moments != Moments::row || b.rows != 1 || b.row_work + 1 <= call.work.plane,
                    "blocks: a row reaches beyond the workspace of ", call.work.plane, " elements");
  }
}

using CpuPhase = void (*)(const Block*, int64_t, Types, Hypers, Work);
void run_cpu(CpuPhase phase, const Call& call) {
  phase(call.blocks.data(), int64_t(call.blocks.size()), call.types, call.hypers, call.work);
}

#ifdef AMOS_WITH_CUDA
extern "C"
    __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);  // not in CPU builds of torch

using CudaPhase = int (*)(const Block*, int64_t, Types, Hypers, Work, void*, void*);
void run_cuda(CudaPhase phase, const Call& call) {
  if (call.blocks.empty()) return;
  const int32_t device = call.device_tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "amos_dist: this build of torch has no CUDA stream; install a CUDA build of torch");
  const int64_t n = int64_t(call.blocks.size());
  const int64_t bytes = cuda::scratch_bytes(call.blocks.data(), n, call.types, call.hypers);
  Tensor scratch = torch::stable::new_empty(call.device_tensor, {bytes}, ScalarType::Byte);
  const int code = phase(call.blocks.data(), n, call.types, call.hypers, call.work, scratch.data_ptr(), stream);
  STD_TORCH_CHECK(code == 0, "amos_dist: CUDA error ", code, ": ", cuda::error_string(code));
}
#endif

#define AMOS_OPS(NAME, RUN, SPACE)                                                                                 \
  void sums_##NAME(const Tensors& grad, const Tensor& work, const Tensor& blocks, const Tensor& hyper,             \
                   const Tensor& names) {                                                                          \
    const Call call = read({.grad = &grad}, work, blocks, hyper, text_of(names));                                  \
    expect_row_work(call);                                                                                         \
    RUN(&SPACE::sums, call);                                                                                       \
  }                                                                                                                \
  void slots_##NAME(const Tensor& state, const Tensor& work, const Tensor& blocks, const Tensor& hyper,            \
                    const Tensor& names) {                                                                         \
    const Call call = read({.state = &state}, work, blocks, hyper, text_of(names));                                \
    expect_row_work(call);                                                                                         \
    RUN(&SPACE::slots, call);                                                                                      \
  }                                                                                                                \
  void update_##NAME(const Tensors& param, const Tensors& grad, const Tensors& momentum, const Tensors& low_param, \
                     const Tensor& work, const Tensor& blocks, const Tensor& hyper, const Tensor& names,           \
                     const std::optional<Tensor>& norms, const std::optional<Tensors>& scale) {                    \
    const Lists lists{                                                                                             \
        &param, &grad, &momentum, &low_param, nullptr, norms ? &*norms : nullptr, scale ? &*scale : nullptr};      \
    const Call call = read(lists, work, blocks, hyper, text_of(names));                                            \
    expect_row_work(call);                                                                                         \
    RUN(&SPACE::update, call);                                                                                     \
  }                                                                                                                \
  void step_##NAME(const Tensors& param, const Tensors& grad, const Tensors& momentum, const Tensors& low_param,   \
                   const Tensor& state, const Tensor& work, const Tensor& blocks, const Tensor& hyper,             \
                   const Tensor& names, const std::optional<Tensor>& norms, const std::optional<Tensors>& scale) { \
    const Lists lists{                                                                                             \
        &param, &grad, &momentum, &low_param, &state, norms ? &*norms : nullptr, scale ? &*scale : nullptr};       \
    const Call call = read(lists, work, blocks, hyper, text_of(names));                                            \
    expect_whole(call);                                                                                            \
    RUN(&SPACE::step, call);                                                                                       \
  }

AMOS_OPS(cpu, run_cpu, cpu)
#ifdef AMOS_WITH_CUDA
AMOS_OPS(cuda, run_cuda, cuda)
#endif

}  // namespace
}  // namespace amos

STABLE_TORCH_LIBRARY(amos_dist, m) {
  m.def("sums_(Tensor[] grad, Tensor(a!) work, Tensor blocks, Tensor hyper, Tensor names) -> ()");
  m.def("slots_(Tensor(a!) state, Tensor(b!) work, Tensor blocks, Tensor hyper, Tensor names) -> ()");
  m.def(
      "update_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] momentum, Tensor(c!)[] low_param, Tensor work, "
      "Tensor blocks, Tensor hyper, Tensor names, Tensor(d!)? norms=None, Tensor(e!)[]? scale=None) -> ()");
  m.def(
      "step_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] momentum, Tensor(c!)[] low_param, Tensor(d!) state, "
      "Tensor(e!) work, Tensor blocks, Tensor hyper, Tensor names, Tensor(f!)? norms=None, "
      "Tensor(g!)[]? scale=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(amos_dist, CPU, m) {
  m.impl("sums_", TORCH_BOX(&amos::sums_cpu));
  m.impl("slots_", TORCH_BOX(&amos::slots_cpu));
  m.impl("update_", TORCH_BOX(&amos::update_cpu));
  m.impl("step_", TORCH_BOX(&amos::step_cpu));
}

#ifdef AMOS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(amos_dist, CUDA, m) {
  m.impl("sums_", TORCH_BOX(&amos::sums_cuda));
  m.impl("slots_", TORCH_BOX(&amos::slots_cuda));
  m.impl("update_", TORCH_BOX(&amos::update_cuda));
  m.impl("step_", TORCH_BOX(&amos::step_cuda));
}
#endif

// The module itself only carries facts about the build; importing it registers the operators.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
#ifdef AMOS_WITH_CUDA
  const char* archs = amos::cuda::architectures();
#else
  const char* archs = "";
#endif
  PyModule_AddStringConstant(module, "version", AMOS_VERSION);
  PyModule_AddStringConstant(module, "cuda_archs", archs);
  PyModule_AddStringConstant(module, "cpu_isa", amos::cpu::instruction_set());
  PyModule_AddStringConstant(module, "cpu_isas", amos::cpu::instruction_sets());
  PyModule_AddStringConstant(module, "torch_built", AMOS_TORCH_BUILT);
  PyModule_AddStringConstant(module, "no_cuda_reason", AMOS_NO_CUDA_REASON);
  return module;
}
