// Between the packed layout and the forms in which weights arrive: a matrix in memory, or the packed rows of a checkpoint.
#pragma once

#include <cstdint>
#include <string>

#include "layout.h"

namespace hf_sparse {

// A matrix in memory, of any strides (in numbers).
struct Matrix {
  const uint16_t* weights;
  int64_t row_stride, column_stride;
};

// Non-zeros row after row, and one bit per weight in little-endian order. A row's bits begin `bits_per_row` after the last one's.
struct Stored {
  const uint16_t* values;
  const uint8_t* bits;
  int64_t bits_per_row;
  const int64_t* row_starts;  // (rows + 1)
};

struct Parts {
  const uint32_t* masks;
  const int64_t* offsets;
  const uint16_t* values;
};

struct NewParts {
  uint32_t* masks;
  const int64_t* offsets;
  uint16_t* values;
};

// `offsets` gets what each stripe needs, added up: (stripes + 1) numbers.
void measure(const Matrix& matrix, const Shape& shape, int64_t* offsets, int threads);
void measure(const Stored& stored, const Shape& shape, int64_t* offsets, int threads);

// False where the weights are no longer those that were measured.
bool fill(const Matrix& matrix, const Shape& shape, const NewParts& to, int threads);
bool fill(const Stored& stored, const Shape& shape, const NewParts& to, int threads);

// One stripe at a time with AVX-512, the matrix with neighbouring inputs side by side. False as with `fill`.
bool has_avx512_packing();
bool fill_stripe_avx512(const Matrix& matrix, const Shape& shape, const NewParts& to, int64_t stripe);
bool fill_stripe_avx512(const Stored& stored, const Shape& shape, const NewParts& to, int64_t stripe);

// Where the values of each row begin, from the bits alone: (rows + 1) numbers.
void find_rows(const uint8_t* bits, int64_t bits_per_row, const Shape& shape, int64_t* row_starts);

void unpack(const Parts& parts, const Shape& shape, uint16_t* weights, int threads);  // (rows, columns), contiguous
void arrange_dense(const Matrix& matrix, const Shape& shape, uint16_t* values, int threads);

// Empty where masks and offsets agree with one another and with the shape, else what is wrong.
std::string trouble(const uint32_t* masks, const int64_t* offsets, const Shape& shape, int64_t values, int threads);

}  // namespace hf_sparse
