// What the kernels see: rectangles of a parameter's R x C matrix, as plain structs. No torch here.
#pragma once
#include <cstdint>

namespace amos {

enum class Dtype : int32_t { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

// What one entry of the second moment is shared over. The other two kinds of the public interface are views:
// "scalar" is `row` of a 1 x numel matrix, "full" is `row` of a numel x 1 matrix.
enum class Moments : int32_t { row = 0, column = 1, factored = 2 };

// One parameter's numbers for one step, in double; docs/ALGORITHM names them. lr is xi, bias is 1 - beta^t.
// clip is +inf where nothing is clipped. grad_sign is -1 to maximize, else 1.
struct Hyper {
  double lr, sigma, beta, bias, momentum, clip, extra_l2, c_coef, d_coef, eps, grad_sign;
};
constexpr int64_t kHyperFields = 11;

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
  void* row_moment;     // of this block's first row; null for `column`
  void* column_moment;  // of the parameter's first column; null for `row`
  void* decay;          // of this block's first row (`row`, `factored`) or the parameter's first column (`column`)
  int64_t rows, cols;
  int64_t row_count;     // elements in one whole row
  int64_t column_count;  // elements in one whole column
  int64_t row_work, column_work;
  int64_t column_start;  // this block's first column among the parameter's
  int64_t columns;       // in the first block of a parameter: how many columns it has here; in the others: 0
  Moments moments;
  Hyper hyper;
};

// The types of all blocks in one call. `momentum` may be the compute type or bf16.
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
void sums(const Block* blocks, int64_t n, Types types, Work work);
void slots(const Block* blocks, int64_t n, Types types, Work work);
void update(const Block* blocks, int64_t n, Types types, Work work);
void step(const Block* blocks, int64_t n, Types types, Work work);
const char* instruction_set();   // the one chosen on this machine
const char* instruction_sets();  // those compiled, separated by ';'
}  // namespace cpu

namespace cuda {
int sums(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream);
int slots(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream);
int update(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream);
int step(const Block* blocks, int64_t n, Types types, Work work, void* scratch, void* stream);
int64_t scratch_bytes(const Block* blocks, int64_t n,
                      Types types);  // device memory that the four need between launches
const char* error_string(int code);
const char* architectures();
}  // namespace cuda

}  // namespace amos
