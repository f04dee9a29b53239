// Products with some packed rows, with AVX-512.
#include "gather.h"

#if defined(HF_SPARSE_AVX512) && (defined(__x86_64__) || defined(_M_X64))

#include "avx512.h"

namespace hf_sparse {
namespace {

constexpr int64_t together = 4;       // rows that share what is read of the inputs, or of the sums
constexpr int64_t word_columns = 32;  // of one mask

static INLINE uint32_t lowest(int64_t count) { return count >= 32 ? 0xffffffffu : (uint32_t{1} << count) - 1; }

static INLINE __m512 first_half(__m512i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(numbers)), 16));
}

static INLINE __m512 second_half(__m512i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(numbers, 1)), 16));
}

// Inputs of 32 columns, of which `count` are there; weights beyond them are not marked.
struct Bfloat16 {
  using Number = uint16_t;
  __m512i all;
  INLINE void read(const Number* from, int64_t count) { all = _mm512_maskz_loadu_epi16(lowest(count), from); }
  INLINE __m512 products(__m512 sum, __m512i weights) const { return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)all); }
  static INLINE float number(Number given) { return widen(given); }
  static INLINE Number rounded(float sum) { return narrow(sum); }
};

struct Float32 {
  using Number = float;
  __m512 low, high;
  INLINE void read(const Number* from, int64_t count) {
    low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lowest(count)), from);
    high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lowest(count) >> 16), from + 16);
  }
  INLINE __m512 products(__m512 sum, __m512i weights) const {
    return _mm512_fmadd_ps(second_half(weights), high, _mm512_fmadd_ps(first_half(weights), low, sum));
  }
  static INLINE float number(Number given) { return given; }
  static INLINE Number rounded(float sum) { return sum; }
};

// Rows that are read side by side, and how far ahead of each the row lies that comes in its place, which is fetched meanwhile: all of
// it, and nothing that was not chosen.
struct Rows {
  const uint32_t* masks[together];
  const uint16_t* values[together];
  int64_t next_masks[together], next_values[together];
};

static INLINE Rows rows_of(const Gather& gather, const int64_t* selected, int64_t at, int64_t words) {
  Rows found;
  for (int64_t r = 0; r < together; ++r) {  // where there are fewer rows, the last stands in for the missing ones
    const int64_t now = selected[smaller(at + r, gather.count - 1)], then = selected[smaller(at + together + r, gather.count - 1)];
    found.masks[r] = gather.masks + now * words;
    found.values[r] = static_cast<const uint16_t*>(gather.weights) + gather.starts[now];
    found.next_masks[r] = (then - now) * words;
    found.next_values[r] = gather.starts[then] - gather.starts[now];
  }
  return found;
}

static INLINE void skip(Rows& rows, int64_t words) {
  for (int64_t r = 0; r < together; ++r) {
    for (int64_t word = 0; word < words; ++word) rows.values[r] += bits_of(rows.masks[r][word]);
  }
}

static INLINE __m512i next_weights(Rows& rows, int64_t r, int64_t word) {
  fetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(rows.values[r]) + rows.next_values[r] * sizeof(uint16_t)));
  if (word % 16 == 0) fetch(rows.masks[r] + rows.next_masks[r] + word);
  const uint32_t mask = rows.masks[r][word];
  const __m512i weights = expand_pair(mask, rows.values[r]);
  rows.values[r] += bits_of(mask);
  return weights;
}

template <class Kind>
static void dots(const Gather& gather, int64_t token, int64_t first, int64_t last) {
  using Number = typename Kind::Number;
  const Number* x = static_cast<const Number*>(gather.inputs) + token * gather.columns;
  const Number* bias = static_cast<const Number*>(gather.bias);
  const int64_t* selected = gather.selected + token * gather.count;
  const int64_t words = (gather.columns + word_columns - 1) / word_columns;
  for (int64_t start = first; start < last; start += together) {
    Rows rows = rows_of(gather, selected, start, words);
    __m512 sum[together];
    for (int64_t r = 0; r < together; ++r) sum[r] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; ++word) {
      Kind inputs;
      inputs.read(x + word * word_columns, gather.columns - word * word_columns);
      for (int64_t r = 0; r < together; ++r) sum[r] = inputs.products(sum[r], next_weights(rows, r, word));
    }
    for (int64_t r = 0; r < together && start + r < last; ++r) {
      const float all = _mm512_reduce_add_ps(sum[r]) + (bias ? Kind::number(bias[selected[start + r]]) : 0.0f);
      static_cast<Number*>(gather.outputs)[token * gather.count + start + r] = Kind::rounded(all);
    }
  }
}

template <class Kind>
static void sums(const Gather& gather, int64_t token, int64_t first, int64_t last) {
  using Number = typename Kind::Number;
  alignas(64) float sum[most_columns + word_columns];
  const int64_t columns = last - first, words = (gather.columns + word_columns - 1) / word_columns;
  const Number* bias = static_cast<const Number*>(gather.bias);
  for (int64_t i = 0; i < columns + word_columns; ++i) sum[i] = bias && i < columns ? Kind::number(bias[first + i]) : 0.0f;
  const int64_t* selected = gather.selected + token * gather.count;
  const Number* x = static_cast<const Number*>(gather.inputs) + token * gather.count;
  for (int64_t i = 0; i < gather.count; i += together) {
    Rows rows = rows_of(gather, selected, i, words);
    skip(rows, first / word_columns);
    __m512 factor[together];
    for (int64_t r = 0; r < together; ++r) factor[r] = _mm512_set1_ps(i + r < gather.count ? Kind::number(x[i + r]) : 0.0f);
    const int64_t there = smaller(together, gather.count - i);
    for (int64_t column = 0; column < columns; column += word_columns) {
      __m512 low = _mm512_loadu_ps(sum + column), high = _mm512_loadu_ps(sum + column + 16);
      for (int64_t r = 0; r < together; ++r) {
        if (r >= there) break;  // a row that stands in for a missing one could hold what is no number
        const __m512i weights = next_weights(rows, r, (first + column) / word_columns);
        low = _mm512_fmadd_ps(factor[r], first_half(weights), low);
        high = _mm512_fmadd_ps(factor[r], second_half(weights), high);
      }
      _mm512_storeu_ps(sum + column, low);
      _mm512_storeu_ps(sum + column + 16, high);
    }
  }
  Number* to = static_cast<Number*>(gather.outputs) + token * gather.columns + first;
  for (int64_t i = 0; i < columns; ++i) to[i] = Kind::rounded(sum[i]);
}

}  // namespace

Gathering avx512_packed_gathering(bool single_precision) {
  if (single_precision) return {dots<Float32>, sums<Float32>};
  return {dots<Bfloat16>, sums<Bfloat16>};
}

}  // namespace hf_sparse

#else

namespace hf_sparse {

Gathering avx512_packed_gathering(bool single_precision) { return portable_packed_gathering(single_precision); }

}  // namespace hf_sparse

#endif
