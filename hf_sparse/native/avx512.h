// Vector operations on bfloat16 weights, for the files that are compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "panel.h"

// A call inside a loop would put every sum into memory and take it out again.
#if defined(_MSC_VER)
#define INLINE __forceinline
#else
#define INLINE inline __attribute__((always_inline))
#endif

namespace hf_sparse {
namespace {

static INLINE __m512i expand_pair(uint32_t mask, const uint16_t* values) {
  return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}

static INLINE int64_t bits_of(uint32_t mask) {
#if defined(_MSC_VER)
  return static_cast<int64_t>(__popcnt(mask));
#else
  return static_cast<int64_t>(__builtin_popcount(mask));
#endif
}

static INLINE void fetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

// How far ahead the next values and masks of a stripe are asked for, in their own units: 2 KiB and 1 KiB. Several stripes are read
// at once, which are more streams than processors follow by themselves; without this the kernels wait for memory most of the time.
constexpr int64_t values_ahead = 1024;
constexpr int64_t masks_ahead = 256;

// The number of pairs is a multiple of 16.
static inline const uint16_t* expand_piece(const uint32_t* masks, int64_t pairs, const uint16_t* values, uint16_t* panel) {
  for (int64_t pair = 0; pair < pairs; pair += 2) {
    fetch(values + values_ahead);
    if (pair % 16 == 0) fetch(masks + pair + masks_ahead);
    for (int64_t i = pair; i < pair + 2; ++i) {
      const uint32_t mask = masks[i];
      _mm512_storeu_si512(panel + i * pair_weights, expand_pair(mask, values));
      values += bits_of(mask);
    }
  }
  return values;
}

}  // namespace
}  // namespace hf_sparse
