// Products with only some rows of a matrix, chosen for each token: nothing is copied, the other rows are not read.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hf_sparse {

// Weights (rows, columns), row after row, in bfloat16 or float32, as inputs and outputs are; with masks the non-zeros of packed rows
// (rows.h), in bfloat16 whatever the inputs are.
struct Gather {
  const void* weights;
  int64_t columns;
  const int64_t* selected;  // (tokens, count): rows, which the caller has checked
  int64_t count, tokens;
  const void* inputs;
  const void* bias;  // or null
  void* outputs;
  const uint32_t* masks;  // (rows, words), or null
  const int64_t* starts;  // (rows + 1), with masks
};

constexpr int64_t most_columns = 2048;  // in a part: their sums stay in the first cache

// What one instruction set does. A part is some of a token's selected rows, or some of its columns.
struct Gathering {
  void (*dots)(const Gather&, int64_t token, int64_t first, int64_t last);  // selected rows first..last
  void (*sums)(const Gather&, int64_t token, int64_t first, int64_t last);  // columns first..last
};

Gathering portable_gathering(bool single_precision);
Gathering avx512_gathering(bool single_precision);
Gathering portable_packed_gathering(bool single_precision);
Gathering avx512_packed_gathering(bool single_precision);

// outputs (tokens, count) = the selected rows times inputs (tokens, columns), plus the bias (rows) of those rows
void gather_dots(const Gather& gather, Set set, bool single_precision, int threads);
// outputs (tokens, columns) = the sum of the selected rows, each times its number in inputs (tokens, count), plus the bias (columns)
void gather_sums(const Gather& gather, Set set, bool single_precision, int threads);

}  // namespace hf_sparse
