// What the kernels see: rectangles of a parameter's R x C matrix, as plain structs. No torch here.
#pragma once
#include <cstdint>

namespace amos {

enum class Dtype : int32_t { f64 = 0, f32 = 1, bf16 = 2, f16 = 3, i8 = 4 };

// Momentum in 8 bits: so many elements of a block, one after another, share a scale, m = q * scale. The last run of a
// block may be shorter.
constexpr int64_t kRun = 256;

// What one entry of the second moment is shared over. The other two kinds of the public interface are views:
// "scalar" is `row` of a 1 x numel matrix, "full" is `row` of a numel x 1 matrix.
enum class Moments : int32_t { row = 0, column = 1, factored = 2 };

// One parameter's numbers for step t = 1, 2, ..., in double; docs/algorithm.md names them. lr is xi. clip is +inf where
// nothing is clipped. grad_sign is -1 to maximize, else 1. seed: an integer s below 2^32 rounds bfloat16 parameters
// stochastically; -1 - s rounds them to nearest. Momentum in 8 bits is rounded stochastically either way, by s.
struct Hyper {
  double lr, sigma, beta, t, momentum, clip, extra_l2, c_coef, d_coef, eps, grad_sign, seed;
};
constexpr int64_t kHyperFields = 12;

// The numbers of all parameters of a call. On the device only so that a CUDA graph replays with the lr and t of then.
struct Hypers {
  const Hyper* rows;
  int64_t count;
  bool on_device;
};

// A block: `rows` x `cols` elements that lie one after another in memory (row-major, no gap), all of one parameter.
// Its rows may be only segments of the parameter's rows, and its columns only some of them: row_count and
// column_count, by which sums become means, are those of the WHOLE parameter.
//
// The workspace has three planes of equal length (element type: the compute type, double for f64, else float):
//   plane 0: sums of squares; after `slots`: A for rows, P for the columns of `factored`, A for those of `column`
//   plane 1: B for rows, or for the columns of `column`
//   plane 2: for the rows of `factored`: what eps makes of P (amos_math.h: profile_limit)
// row_work says where in each plane this block's first row is, column_work where the PARAMETER's first column is: up to
// three blocks of one parameter (the end of a row, whole rows, the beginning of a row) share its columns. The first of
// them has `columns` > 0 and zeroes and finishes all of these; the others, which follow it directly, have 0.
struct Block {
  void* param;
  const void* grad;
  void* momentum;       // null: none
  float* scale;         // of the momentum's first run; null: it is not in 8 bits
  void* low_param;      // what the new parameter is also written to, rounded to nearest; null: nowhere
  void* row_moment;     // of this block's first row; null for `column`
  void* column_moment;  // of the parameter's first column; null for `row`
  void* decay;          // of this block's first row (`row`, `factored`) or the parameter's first column (`column`)
  double* norms;        // two numbers, to which `update` and `step` add; see below. Null: not asked for
  int64_t rows, cols;
  int64_t row_count;     // elements in one whole row
  int64_t column_count;  // elements in one whole column
  int64_t row_work, column_work;
  int64_t column_start;  // this block's first column among the parameter's
  int64_t columns;       // in the first block of a parameter: how many columns it has here; in the others: 0
  int64_t first;  // number of this block's first element among the parameter's, row-major: what random numbers count by
  int64_t hyper;  // its row of Hypers
  Moments moments;
};

// `norms`, for a monitor: the sum of squares of Delta, of what is taken from the parameter, momentum and all, before it
// is rounded; then that of the parameter before the step (the master, where there is one). Added up in an order that
// follows from the shapes alone, in the compute type for some thousand elements at a time, then in double. All blocks
// of a call ask for them or none does, and those that add to the same place follow each other.

// The types of all blocks in one call. `momentum` may be the compute type, bf16 or i8. low_param has the type of the
// gradient, which is bf16 or f16 then, and the parameter is f32.
struct Types {
  Dtype param, grad, momentum;
};

struct Work {
  void* data;  // three planes of `plane` elements each, of the compute type
  int64_t plane;
};

// The four phases, for one device each. `sums` assigns rows and ADDS to columns (the caller zeroes those);
// `slots` turns sums into the state's next value and into A, B, P; `update` changes the parameters;
// `step` is all three for blocks whose rows and columns are complete in this process. Each returns 0 or an error code
// of the device's runtime (CUDA).
namespace cpu {
void sums(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work);
void slots(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work);
void update(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work);
void step(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work);
const char* instruction_set();   // the one chosen on this machine
const char* instruction_sets();  // those compiled, separated by ';'
}  // namespace cpu

namespace cuda {
int sums(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream);
int slots(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream);
int update(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream);
int step(const Block* blocks, int64_t n, Types types, Hypers hypers, Work work, void* scratch, void* stream);
// Device memory that one of the four needs from its first launch to its last.
int64_t scratch_bytes(const Block* blocks, int64_t n, Types types, Hypers hypers);
const char* error_string(int code);
const char* architectures();
}  // namespace cuda

}  // namespace amos
