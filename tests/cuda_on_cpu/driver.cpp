// Replays calls from a file, for the sanitizers and the mutants: driver INPUT OUTPUT. Every array gets memory of
// exactly its size, so that AddressSanitizer sees the first byte outside. cuda_on_cpu.py writes INPUT and reads OUTPUT.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <type_traits>
#include <vector>

#include "../../csrc/block.h"

using namespace amos;

namespace {

struct Array {
  std::unique_ptr<char[]> memory;
  int64_t size, offset;
  void* begin() const { return memory.get() + offset; }
};

template <class T>
T read(std::ifstream& in) {
  T value;
  in.read(reinterpret_cast<char*>(&value), sizeof(value));
  return value;
}

// An array in the file: its size and its offset in bytes, then its bytes. The offset is memory that nothing may touch.
Array read_array(std::ifstream& in) {
  const auto size = read<int64_t>(in), offset = read<int64_t>(in);
  Array array{std::unique_ptr<char[]>(new char[size + offset]), size, offset};
  in.read(static_cast<char*>(array.begin()), size);
  return array;
}

int check(int code) {
  if (code) std::fprintf(stderr, "driver: %s\n", cuda::error_string(code));
  return code;
}

// One call: types, phases or step, the blocks with indices in place of pointers, the hyper-parameters and whether they
// count as the device's, the arrays, the workspace.
int replay(std::ifstream& in, std::ofstream& out) {
  const auto types = read<Types>(in);
  const auto phases = read<int32_t>(in);
  const auto n = read<int64_t>(in), count = read<int64_t>(in), plane = read<int64_t>(in);
  const auto hyper_count = read<int64_t>(in), on_device = read<int64_t>(in);
  std::vector<Block> blocks(n);
  std::vector<Hyper> hyper(hyper_count);
  std::vector<Array> arrays;
  in.read(reinterpret_cast<char*>(blocks.data()), n * sizeof(Block));
  in.read(reinterpret_cast<char*>(hyper.data()), hyper_count * sizeof(Hyper));
  for (int64_t i = 0; i < count; ++i) arrays.push_back(read_array(in));
  // A pointer in the file is 0, or the number of the array in the high half, from 1, and bytes into it in the low half.
  const auto place = [&](auto& pointer) {
    const auto code = reinterpret_cast<uintptr_t>(pointer);
    void* const at = code ? static_cast<char*>(arrays[(code >> 32) - 1].begin()) + (code & 0xffffffff) : nullptr;
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(at);
  };
  for (Block& b : blocks) {
    place(b.param), place(b.grad), place(b.momentum), place(b.scale), place(b.low_param);
    place(b.row_moment), place(b.column_moment), place(b.decay), place(b.norms);
  }
  const Array work = read_array(in);
  const Hypers hypers{hyper.data(), hyper_count, on_device != 0};
  const int64_t bytes = cuda::scratch_bytes(blocks.data(), n, types, hypers);
  const std::unique_ptr<char[]> scratch(new char[bytes]);
  for (int64_t i = 0; i < bytes; ++i) scratch[i] = char(0xff);

  const Work w{work.begin(), plane};
  const auto run = [&](auto phase) { return check(phase(blocks.data(), n, types, hypers, w, scratch.get(), nullptr)); };
  const int code = phases ? run(cuda::sums) || run(cuda::slots) || run(cuda::update) : run(cuda::step);
  for (const Array& array : arrays) out.write(static_cast<char*>(array.begin()), array.size);
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  while (in.peek() != std::ifstream::traits_type::eof()) {
    if (replay(in, out)) return 1;
  }
}
