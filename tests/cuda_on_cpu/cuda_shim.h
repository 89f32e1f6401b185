// CUDA's execution model on the CPU, for tests: with this folder's include/ in front, g++ builds a .cu file unchanged.
//
// A CTA runs at a time, each of its threads as a fiber that runs until a barrier or a warp exchange. What a GPU leaves
// undefined ends the program or shows in the results here: shared memory is NaN before each CTA, and a wrong shuffle
// mask, a misaligned access through the cache intrinsics, a barrier that some threads never reach abort. Sanitizers see
// fibers as threads. What this cannot see: races between CTAs, coalescing, occupancy, the GPU's rounding of special
// functions.
//
// SHIM_ORDER=rev or a number runs threads and CTAs in reverse or in a shuffled order; SHIM_SMS is the number of SMs,
// SHIM_SHARED the dynamic shared memory that a CTA may ask for, in bytes.
#pragma once
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SHIM_ASAN 1
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
extern "C" void __asan_poison_memory_region(const volatile void* address, size_t size);
extern "C" void __asan_unpoison_memory_region(const volatile void* address, size_t size);
#else
#define SHIM_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__)
#define SHIM_TSAN 1
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#else
#define SHIM_TSAN 0
#endif

// The shim's own bookkeeping is no part of what the sanitizers check.
#define SHIM_RUNTIME __attribute__((noinline, no_sanitize("thread", "address")))

// ---- the language -------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// thread_local, because that is one segment whose bounds are known (see poison_shared), in templates too; g++ ignores
// section attributes there. All fibers are one thread to the system and share it. In a function this is static; with
// `extern` it is the dynamic shared memory, which is defined below by its name.
#define __shared__ thread_local

struct uint2 {
  alignas(8) unsigned x;
  unsigned y;
};
struct uint3 {
  unsigned x, y, z;
};
struct uint4 {
  alignas(16) unsigned x;
  unsigned y, z, w;
};
struct float2 {
  alignas(8) float x;
  float y;
};
struct float4 {
  alignas(16) float x;
  float y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim;
inline uint3 blockIdx;

namespace shim {
constexpr size_t kMostDynamic = 64 * 1024;
}
namespace amos::cuda {
alignas(16) inline thread_local uint4 dynamic_shared_memory[shim::kMostDynamic / sizeof(uint4)];
}

// ---- the machine --------------------------------------------------------------------------------

namespace shim {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;

[[noreturn]] inline void die(const char* message) {
  std::fprintf(stderr, "cuda_shim: %s\n", message);
  std::abort();
}

enum class State { ready, at_barrier, in_warp_exchange, done };

// A context to switch to. __builtin_setjmp makes no system call, which swapcontext does.
struct Context {
  void* jump[5];
  ucontext_t start;
  bool started = false;
  void* tsan = nullptr;
  void* fake_stack = nullptr;  // ASan's
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint3 thread;
  unsigned lane, warp;
  State state;
};

struct Warp {
  uint64_t slots[2][kWarp];  // two sets: a fast lane may begin an exchange while a slow one reads from the last
  unsigned live, arrived, mask, exchanges;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Warp warps[kWarp];  // no vector: TSan would see it change its size
  unsigned warp_count = 0;
  Context scheduler;
  Fiber* current = nullptr;
  unsigned live = 0;
  std::function<void()> kernel;
  char cta_start, cta_end, barrier;  // addresses by which TSan knows what happens before what
};
inline Machine machine;

SHIM_RUNTIME inline Fiber& self() { return *machine.current; }

inline void happens_before(void* address) {
#if SHIM_TSAN
  __tsan_release(address);
#endif
  (void)address;
}

inline void happens_after(void* address) {
#if SHIM_TSAN
  __tsan_acquire(address);
#endif
  (void)address;
}

[[noreturn]] SHIM_RUNTIME inline void resume(Context& to) {
  if (to.started) __builtin_longjmp(to.jump, 1);
  to.started = true;
  setcontext(&to.start);
  die("setcontext failed");
}

SHIM_RUNTIME inline void switch_context(Context& from, Context& to, const char* stack) {
#if SHIM_TSAN
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: switching by itself orders nothing
#endif
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, stack, stack ? kStack : 0);
#endif
  (void)stack;
  if (__builtin_setjmp(from.jump) == 0) resume(to);
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

#if SHIM_ASAN
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
#endif

SHIM_RUNTIME inline void leave(State state) {
  Fiber& fiber = self();
  fiber.state = state;
#if SHIM_TSAN
  __tsan_switch_to_fiber(machine.scheduler.tsan, 1);
#endif
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(&fiber.context.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  if (__builtin_setjmp(fiber.context.jump) == 0) resume(machine.scheduler);
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(fiber.context.fake_stack, nullptr, nullptr);
#endif
}

// A fiber lives as long as the machine and runs the same thread of every CTA.
SHIM_RUNTIME inline void fiber_main() {
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  for (;;) {
    happens_after(&machine.cta_start);
    machine.kernel();
    happens_before(&machine.cta_end);
    Fiber& fiber = self();
    --machine.live;
    machine.warps[fiber.warp].live &= ~(1u << fiber.lane);
    leave(State::done);
  }
}

SHIM_RUNTIME inline void barrier() {
  happens_before(&machine.barrier);
  leave(State::at_barrier);
  happens_after(&machine.barrier);
}

// All lanes of the mask meet here.
SHIM_RUNTIME inline void meet(unsigned mask) {
  Fiber& fiber = self();
  Warp& warp = machine.warps[fiber.warp];
  if (!(mask >> fiber.lane & 1)) die("warp primitive: the calling lane is not in its own mask");
  if (mask & ~warp.live) die("warp primitive: the mask names a lane that has exited or does not exist");
  if (warp.arrived == 0) warp.mask = mask;
  if (warp.mask != mask) die("warp primitive: lanes came with different masks");
  warp.arrived |= 1u << fiber.lane;
  happens_before(&warp);
  leave(State::in_warp_exchange);
  happens_after(&warp);
}

// Gives every lane of the mask the value of lane `source`; a source outside the mask gives NaN.
template <class T>
SHIM_RUNTIME T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "type of a shuffle");
  Fiber& fiber = self();
  Warp& warp = machine.warps[fiber.warp];
  uint64_t* slots = warp.slots[warp.exchanges & 1];
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  slots[fiber.lane] = bits;
  meet(mask);
  bits = mask >> source & 1 ? slots[source] : ~uint64_t(0);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// Bit `lane` of the result is that lane's predicate.
SHIM_RUNTIME inline unsigned ballot(unsigned mask, bool predicate) {
  Fiber& fiber = self();
  Warp& warp = machine.warps[fiber.warp];
  uint64_t* slots = warp.slots[warp.exchanges & 1];
  slots[fiber.lane] = predicate;
  meet(mask);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) bits |= mask >> lane & 1 ? unsigned(slots[lane]) << lane : 0;
  return bits;
}

struct SharedBounds {
  char* begin = nullptr;
  size_t size = 0;
};

// The thread-local segment of this program or library. Nothing else is in it.
inline SharedBounds shared_bounds() {
  static thread_local char probe;
  SharedBounds bounds;
  struct Search {
    char* probe;
    SharedBounds* bounds;
  } search{&probe, &bounds};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& search = *static_cast<Search*>(data);
        char* begin = static_cast<char*>(info->dlpi_tls_data);
        for (int i = 0; begin && i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type == PT_TLS && search.probe >= begin && search.probe < begin + segment.p_memsz) {
            *search.bounds = {begin, segment.p_memsz};
          }
        }
        return 0;
      },
      &search);
  if (!bounds.begin) die("shared memory not found");
  return bounds;
}

inline size_t dynamic_bytes = 0;  // of the launch

SHIM_RUNTIME inline void fill(char* begin, const char* end) {
  for (; begin < end; ++begin) *static_cast<volatile char*>(begin) = char(0xff);
}

SHIM_RUNTIME inline void poison_shared() {
  static const SharedBounds bounds = shared_bounds();
  char* const dynamic = reinterpret_cast<char*>(amos::cuda::dynamic_shared_memory);
  fill(bounds.begin, dynamic + dynamic_bytes);
  fill(dynamic + kMostDynamic, bounds.begin + bounds.size);
}

// What a launch did not ask for is out of bounds.
inline void set_dynamic_shared(size_t bytes) {
  dynamic_bytes = bytes;
#if SHIM_ASAN
  char* const dynamic = reinterpret_cast<char*>(amos::cuda::dynamic_shared_memory);
  __asan_unpoison_memory_region(dynamic, bytes);
  __asan_poison_memory_region(dynamic + bytes, kMostDynamic - bytes);
#endif
}

SHIM_RUNTIME inline void create_fibers(unsigned n) {
#if SHIM_TSAN
  machine.scheduler.tsan = __tsan_get_current_fiber();
#endif
  machine.scheduler.started = true;
  while (machine.fibers.size() < n) {
    machine.fibers.emplace_back(new Fiber);
    Fiber& fiber = *machine.fibers.back();
    getcontext(&fiber.context.start);
    fiber.context.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.start.uc_stack.ss_size = kStack;
    fiber.context.start.uc_link = nullptr;
    makecontext(&fiber.context.start, fiber_main, 0);
#if SHIM_TSAN
    fiber.context.tsan = __tsan_create_fiber(0);
#endif
  }
}

// Lets threads go on that have met whom they waited for; false if there are none.
SHIM_RUNTIME inline bool release(unsigned threads) {
  bool any = false;
  for (unsigned w = 0; w < machine.warp_count; ++w) {
    Warp& warp = machine.warps[w];
    if (!warp.arrived || warp.arrived != warp.mask) continue;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (warp.mask >> lane & 1) machine.fibers[w * kWarp + lane]->state = State::ready;
    }
    warp.arrived = 0;
    ++warp.exchanges;
    any = true;
  }
  unsigned waiting = 0;
  for (unsigned i = 0; i < threads; ++i) waiting += machine.fibers[i]->state == State::at_barrier;
  if (waiting == 0 || waiting != machine.live) return any;
  for (unsigned i = 0; i < threads; ++i) {
    if (machine.fibers[i]->state == State::at_barrier) machine.fibers[i]->state = State::ready;
  }
  return true;
}

SHIM_RUNTIME inline void run_cta(const std::vector<unsigned>& order) {
  const unsigned n = static_cast<unsigned>(order.size());
  poison_shared();
  machine.live = n;
  machine.warp_count = (n + kWarp - 1) / kWarp;
  for (unsigned w = 0; w < machine.warp_count; ++w) machine.warps[w] = Warp{};
  for (unsigned i = 0; i < n; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.lane = i % kWarp;
    fiber.warp = i / kWarp;
    fiber.state = State::ready;
    machine.warps[fiber.warp].live |= 1u << fiber.lane;
  }
  happens_before(&machine.cta_start);
  while (machine.live) {
    bool progress = false;
    for (unsigned i : order) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.state != State::ready) continue;
      progress = true;
      machine.current = &fiber;
      switch_context(machine.scheduler, fiber.context, fiber.stack.get());
    }
    progress |= release(n);
    if (!progress && machine.live) die("deadlock: some threads wait at a barrier that others never reach");
  }
  happens_after(&machine.cta_end);
}

inline std::vector<unsigned> make_order(unsigned n) {
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) order[i] = i;
  const char* wanted = std::getenv("SHIM_ORDER");
  if (!wanted || !*wanted || !std::strcmp(wanted, "fwd")) return order;
  if (!std::strcmp(wanted, "rev")) {
    std::reverse(order.begin(), order.end());
  } else {
    std::mt19937 random(static_cast<unsigned>(std::atoi(wanted)));
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

}  // namespace shim

#define threadIdx (shim::self().thread)

// ---- intrinsics ---------------------------------------------------------------------------------

inline void __syncthreads() { shim::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::exchange(mask, 0, shim::self().lane); }

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  const int lane = static_cast<int>(shim::self().lane);
  return shim::exchange(mask, x, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32) {
  const unsigned lane = shim::self().lane;
  return shim::exchange(mask, x, lane % width + delta < unsigned(width) ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32) {
  const unsigned lane = shim::self().lane;
  return shim::exchange(mask, x, lane % width >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
  const unsigned lane = shim::self().lane, source = lane ^ bits;
  return shim::exchange(mask, x, source / width <= lane / width ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return shim::ballot(mask, predicate != 0); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }

template <class T>
T checked_load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) shim::die("misaligned load");
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return checked_load(p);
}
template <class T>
T __ldcs(const T* p) {
  return checked_load(p);
}
template <class T>
void __stcs(T* p, T x) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) shim::die("misaligned store");
  *p = x;
}

// ---- small floats -------------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, sizeof(h));
  return static_cast<float>(h);
}
inline __half __float2half(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  __half x;
  std::memcpy(&x.bits, &h, sizeof(h));
  return x;
}

// ---- runtime ------------------------------------------------------------------------------------

using cudaStream_t = struct shim_stream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const bool sms = which == cudaDevAttrMultiProcessorCount;
  const char* wanted = std::getenv(sms ? "SHIM_SMS" : "SHIM_SHARED");
  *value = wanted ? std::atoi(wanted) : sms ? 1 : int(shim::kMostDynamic);
  return cudaSuccess;
}

namespace shim {
inline int64_t launches = 0;                           // since the program began
inline std::map<const void*, size_t> dynamic_allowed;  // by kernel; 48 KB without asking
}  // namespace shim

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > shim::kMostDynamic) return cudaErrorInvalidValue;
  shim::dynamic_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const unsigned threads = config->blockDim.x * config->blockDim.y * config->blockDim.z;
  const dim3& grid = config->gridDim;
  const auto allowed = shim::dynamic_allowed.find(reinterpret_cast<const void*>(kernel));
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      config->dynamicSmemBytes > (allowed == shim::dynamic_allowed.end() ? 48 * 1024 : allowed->second)) {
    return cudaErrorInvalidConfiguration;
  }
  ++shim::launches;
  gridDim = grid;
  blockDim = config->blockDim;
  shim::set_dynamic_shared(config->dynamicSmemBytes);
  shim::machine.kernel = [&] { kernel(static_cast<const Params&>(args)...); };
  shim::create_fibers(threads);
  const std::vector<unsigned> order = shim::make_order(threads);
  for (unsigned cta : shim::make_order(grid.x * grid.y * grid.z)) {
    blockIdx = {cta % grid.x, cta / grid.x % grid.y, cta / (grid.x * grid.y)};
    shim::run_cta(order);
  }
  return cudaSuccess;
}
