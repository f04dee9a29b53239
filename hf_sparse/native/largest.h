// Which of many scores are the largest, without sorting them.
#pragma once

#include <cstdint>

namespace hf_sparse {

// Scores (rows, units). `chosen` gets the places of the `count` largest of each row in ascending order; of equal ones the first are taken,
// and what is no number counts as larger than all. Each place stands for `size` neighbours: (rows, count * size). `keys` is room for one
// row.
struct Largest {
  const float* scores;
  int64_t rows, units, count, size;
  int32_t* keys;
  int64_t* chosen;
};

void largest_portable(const Largest& job);
void largest_avx512(const Largest& job);  // where this build has none, the portable one

}  // namespace hf_sparse
