// The phases under names that ctypes can find, and what is needed to see that both sides mean the same structs.
#include "../../csrc/block.h"

using namespace amos;

extern "C" {
int amos_phase(int phase, const Block* blocks, int64_t n, const Types* types, const Work* work, void* scratch) {
  using Phase = int (*)(const Block*, int64_t, Types, Work, void*, void*);
  const Phase phases[] = {cuda::sums, cuda::slots, cuda::update, cuda::step};
  return phases[phase](blocks, n, *types, *work, scratch, nullptr);
}
int64_t amos_scratch_bytes(const Block* blocks, int64_t n, const Types* types) {
  return cuda::scratch_bytes(blocks, n, *types);
}
int64_t amos_block_bytes() { return sizeof(Block); }
const char* amos_error_string(int code) { return cuda::error_string(code); }
const char* amos_architectures() { return cuda::architectures(); }
}
