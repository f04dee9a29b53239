// Packed rows: the non-zeros of a bfloat16 matrix row after row, so that single rows can be read. Next to the layout of stripes this is
// what a choice of single rows needs; in stripes a row's weights lie among those of 15 others.
//
// Every 32 columns of a row have a 32-bit mask, the lowest bit first; the values that it marks follow one another. One number per row
// says where its values begin. The last word of a row marks nothing beyond the last column.
#pragma once

#include <cstdint>
#include <string>

#include "pack.h"

namespace hf_sparse {

constexpr int64_t word_columns = 32;

static inline int64_t words_of(int64_t columns) { return (columns + word_columns - 1) / word_columns; }

struct PackedRows {
  const uint32_t* masks;   // (rows, words)
  const int64_t* starts;   // (rows + 1)
  const uint16_t* values;  // and slack_values spare ones
};

// `starts` gets where the values of each row begin: (rows + 1) numbers.
void measure_rows(const Matrix& matrix, int64_t rows, int64_t columns, int64_t* starts, int threads);

// False where the weights are no longer those that were measured.
bool fill_rows(const Matrix& matrix, int64_t rows, int64_t columns, uint32_t* masks, const int64_t* starts, uint16_t* values, int threads);

void unpack_rows(const PackedRows& packed, int64_t rows, int64_t columns, uint16_t* weights, int threads);  // contiguous

// Empty where masks and starts agree with one another and with the shape, else what is wrong.
std::string trouble_in_rows(const PackedRows& packed, int64_t rows, int64_t columns, int64_t values, int threads);

}  // namespace hf_sparse
