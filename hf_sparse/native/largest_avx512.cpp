#include "largest_row.h"

#if defined(HF_SPARSE_AVX512) && (defined(__x86_64__) || defined(_M_X64))

#include "avx512.h"

namespace hf_sparse {
namespace {

constexpr int64_t together = 16;

static INLINE __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= together ? 0xffffu : (1u << count) - 1);
}

struct Avx512 {
  static INLINE int64_t count_from(const int32_t* keys, int64_t units, int32_t least) {
    const __m512i limit = _mm512_set1_epi32(least);
    int64_t found = 0;
    for (int64_t i = 0; i < units; i += together) {
      const __mmask16 there = first(units - i);
      found += bits_of(_mm512_mask_cmpge_epi32_mask(there, _mm512_maskz_loadu_epi32(there, keys + i), limit));
    }
    return found;
  }

  static INLINE void take(const Largest& job, int32_t least, int64_t equal, int64_t* to) {
    const __m512i limit = _mm512_set1_epi32(least);
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < job.units; i += together, places = _mm512_add_epi32(places, _mm512_set1_epi32(together))) {
      const __mmask16 there = first(job.units - i);
      const __m512i keys = _mm512_maskz_loadu_epi32(there, job.keys + i);
      uint32_t taken = _mm512_mask_cmpgt_epi32_mask(there, keys, limit);
      for (uint32_t same = _mm512_mask_cmpeq_epi32_mask(there, keys, limit); same != 0 && equal > 0; same &= same - 1, --equal) {
        taken |= same & (~same + 1);
      }
      if (job.size > 1) {
        for (; taken != 0; taken &= taken - 1) to = take_one(i + lowest_bit(taken), job.size, to);
        continue;
      }
      const int64_t count = bits_of(taken);
      const __m512i kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(taken), places);
      const uint32_t room = first(count);
      _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(room), _mm512_cvtepi32_epi64(_mm512_castsi512_si256(kept)));
      _mm512_mask_storeu_epi64(to + 8, static_cast<__mmask8>(room >> 8), _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(kept, 1)));
      to += count;
    }
  }
};

}  // namespace

void largest_avx512(const Largest& job) {
  for (int64_t row = 0; row < job.rows; ++row) choose_row<Avx512>(job, row);
}

}  // namespace hf_sparse

#else

namespace hf_sparse {

void largest_avx512(const Largest& job) { largest_portable(job); }

}  // namespace hf_sparse

#endif
