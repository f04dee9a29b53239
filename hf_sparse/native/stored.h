// Values and bits of a compressed checkpoint: spread out into the dense row that they stand for, and gathered from one.
#pragma once

#include <cstdint>

namespace hf_sparse {

// `width` is 1, 2, 4 or 8 bytes. There are as many values as bits set, and no bits beyond `size`: the caller has counted them.
void spread_bits(const void* values, int64_t value_count, const uint8_t* bits, int64_t size, int width, void* row);

// The same for the part of a row that whole words of 32 bits cover, with AVX-512: how many elements were done, and their values.
struct Spread {
  int64_t elements, values;
};
Spread spread_words_avx512(const void* values, int64_t value_count, const uint8_t* bits, int64_t size, int width, void* row);

// The way back: the elements of a row whose bits are set, one after another. There is room for as many as bits are set.
void gather_bits(const void* row, const uint8_t* bits, int64_t size, int width, void* values, int64_t value_count);
Spread gather_words_avx512(const void* row, const uint8_t* bits, int64_t size, int width, void* values, int64_t value_count);

}  // namespace hf_sparse
