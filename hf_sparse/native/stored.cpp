#include "stored.h"

#include <cstring>

#include "kernels.h"

namespace hf_sparse {
namespace {

template <class Number>
void spread(const Number* values, const uint8_t* bits, int64_t start, int64_t size, Number* row) {
  for (int64_t i = start; i < size; i += 8) {
    const uint8_t byte = bits[i / 8];
    const int64_t end = i + 8 < size ? i + 8 : size;
    if (byte == 0) {
      std::memset(row + i, 0, static_cast<size_t>(end - i) * sizeof(Number));
      continue;
    }
    for (int64_t j = i; j < end; ++j) {
      const bool kept = (byte >> (j - i)) & 1;
      row[j] = kept ? *values : Number{0};
      values += kept ? 1 : 0;
    }
  }
}

template <class Number>
void spread_from(const void* values, const uint8_t* bits, const Spread& done, int64_t size, void* row) {
  spread(static_cast<const Number*>(values) + done.values, bits, done.elements, size, static_cast<Number*>(row));
}

template <class Number>
void gather_from(const void* row, const uint8_t* bits, const Spread& done, int64_t size, void* values) {
  const Number* from = static_cast<const Number*>(row);
  Number* to = static_cast<Number*>(values) + done.values;
  for (int64_t i = done.elements; i < size; ++i) {
    if ((bits[i / 8] >> (i % 8)) & 1) *to++ = from[i];
  }
}

}  // namespace

void gather_bits(const void* row, const uint8_t* bits, int64_t size, int width, void* values, int64_t value_count) {
  const Spread done = processor_has(Set::avx512) ? gather_words_avx512(row, bits, size, width, values, value_count) : Spread{0, 0};
  switch (width) {
    case 1: return gather_from<uint8_t>(row, bits, done, size, values);
    case 2: return gather_from<uint16_t>(row, bits, done, size, values);
    case 4: return gather_from<uint32_t>(row, bits, done, size, values);
    default: return gather_from<uint64_t>(row, bits, done, size, values);
  }
}

void spread_bits(const void* values, int64_t value_count, const uint8_t* bits, int64_t size, int width, void* row) {
  const Spread done = processor_has(Set::avx512) ? spread_words_avx512(values, value_count, bits, size, width, row) : Spread{0, 0};
  switch (width) {
    case 1: return spread_from<uint8_t>(values, bits, done, size, row);
    case 2: return spread_from<uint16_t>(values, bits, done, size, row);
    case 4: return spread_from<uint32_t>(values, bits, done, size, row);
    default: return spread_from<uint64_t>(values, bits, done, size, row);
  }
}

}  // namespace hf_sparse
