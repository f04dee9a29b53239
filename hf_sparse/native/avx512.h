// Vector operations on bfloat16 weights, for the files that are compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "panel.h"

namespace hf_sparse {
namespace {

static inline __m512i expand_pair(uint32_t mask, const uint16_t* values) {
  return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}

static inline int64_t bits_of(uint32_t mask) {
#if defined(_MSC_VER)
  return static_cast<int64_t>(__popcnt(mask));
#else
  return static_cast<int64_t>(__builtin_popcount(mask));
#endif
}

static inline void fetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

static inline const uint16_t* expand_piece(const uint32_t* masks, int64_t pairs, const uint16_t* values, uint16_t* panel) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const uint32_t mask = masks[pair];
    _mm512_storeu_si512(panel + pair * pair_weights, expand_pair(mask, values));
    values += bits_of(mask);
  }
  return values;
}

}  // namespace
}  // namespace hf_sparse
