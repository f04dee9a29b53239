// Spreading out and gathering compressed rows with AVX-512, for numbers of 16 and 32 bits.
#include "stored.h"

#if defined(HF_SPARSE_AVX512) && (defined(__x86_64__) || defined(_M_X64))

#include <cstring>

#include "avx512.h"

namespace hf_sparse {

Spread spread_words_avx512(const void* values, int64_t value_count, const uint8_t* bits, int64_t size, int width, void* row) {
  if (width != 2 && width != 4) return {0, 0};
  const uint16_t* from = static_cast<const uint16_t*>(values);
  uint16_t* to = static_cast<uint16_t*>(row);
  const int64_t halves = width / 2;
  Spread done{0, 0};
  // A whole register is read from wherever the next value lies: the last values are left to others.
  for (; done.elements + 32 <= size && done.values + 32 <= value_count; done.elements += 32) {
    uint32_t mask;
    std::memcpy(&mask, bits + done.elements / 8, sizeof mask);
    if (halves == 1) {
      _mm512_storeu_si512(to + done.elements, expand_pair(mask, from + done.values));
      done.values += bits_of(mask);
    } else {
      for (int part = 0; part < 2; ++part) {
        const __mmask16 half = static_cast<__mmask16>(mask >> (16 * part));
        const __m512i next = _mm512_loadu_si512(from + 2 * done.values);
        _mm512_storeu_si512(to + 2 * (done.elements + 16 * part), _mm512_maskz_expand_epi32(half, next));
        done.values += bits_of(half);
      }
    }
  }
  return done;
}

Spread gather_words_avx512(const void* row, const uint8_t* bits, int64_t size, int width, void* values, int64_t value_count) {
  if (width != 2 && width != 4) return {0, 0};
  const uint16_t* from = static_cast<const uint16_t*>(row);
  uint16_t* to = static_cast<uint16_t*>(values);
  const int64_t halves = width / 2;
  Spread done{0, 0};
  // Whole registers are written, of which the next overwrites what is not kept: the last values are left to others.
  for (; done.elements + 32 <= size && done.values + 32 <= value_count; done.elements += 32) {
    uint32_t mask;
    std::memcpy(&mask, bits + done.elements / 8, sizeof mask);
    if (halves == 1) {
      const __m512i kept = _mm512_maskz_compress_epi16(mask, _mm512_loadu_si512(from + done.elements));
      _mm512_storeu_si512(to + done.values, kept);
      done.values += bits_of(mask);
    } else {
      for (int part = 0; part < 2; ++part) {
        const __mmask16 half = static_cast<__mmask16>(mask >> (16 * part));
        const __m512i next = _mm512_loadu_si512(from + 2 * (done.elements + 16 * part));
        _mm512_storeu_si512(to + 2 * done.values, _mm512_maskz_compress_epi32(half, next));
        done.values += bits_of(half);
      }
    }
  }
  return done;
}

}  // namespace hf_sparse

#else

namespace hf_sparse {

Spread spread_words_avx512(const void*, int64_t, const uint8_t*, int64_t, int, void*) { return {0, 0}; }
Spread gather_words_avx512(const void*, const uint8_t*, int64_t, int, void*, int64_t) { return {0, 0}; }

}  // namespace hf_sparse

#endif
