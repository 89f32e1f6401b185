// The phases under names that ctypes can find, and what is needed to see that both sides mean the same structs.
#include <cuda_runtime.h>

#include "../../csrc/block.h"

using namespace amos;

extern "C" {
int amos_phase(int phase, const Block* blocks, int64_t n, const Types* types, const Hypers* hypers, const Work* work,
               void* scratch) {
  using Phase = int (*)(const Block*, int64_t, Types, Hypers, Work, void*, void*);
  const Phase phases[] = {cuda::sums, cuda::slots, cuda::update, cuda::step};
  return phases[phase](blocks, n, *types, *hypers, *work, scratch, nullptr);
}
int64_t amos_scratch_bytes(const Block* blocks, int64_t n, const Types* types, const Hypers* hypers) {
  return cuda::scratch_bytes(blocks, n, *types, *hypers);
}
int64_t amos_block_bytes() { return sizeof(Block); }
int64_t amos_launches() { return shim::launches; }
const char* amos_error_string(int code) { return cuda::error_string(code); }
const char* amos_architectures() { return cuda::architectures(); }
}
