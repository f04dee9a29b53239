// Products with some rows of a dense matrix, with AVX-512.
#include "gather.h"

#if defined(HF_SPARSE_AVX512) && (defined(__x86_64__) || defined(_M_X64))

#include "avx512.h"

namespace hf_sparse {
namespace {

constexpr int64_t together = 4;  // rows that share what is read of the inputs, or of the sums
constexpr int64_t ahead = 2048;  // bytes: several rows at once are more streams than the processor follows by itself

static INLINE uint32_t lowest(int64_t count) { return count >= 32 ? 0xffffffffu : (uint32_t{1} << count) - 1; }

// Numbers of one kind, 32 or 16 at a time in one register.
struct Bfloat16 {
  using Number = uint16_t;
  static constexpr int64_t width = 32;
  static INLINE __m512i read(const Number* from, int64_t count) { return _mm512_maskz_loadu_epi16(lowest(count), from); }
  static INLINE __m512i read(const Number* from) { return _mm512_loadu_si512(from); }
  static INLINE __m512 add_products(__m512 sum, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
  static INLINE __m512 first_half(__m512i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(numbers)), 16));
  }
  static INLINE __m512 second_half(__m512i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(numbers, 1)), 16));
  }
  static INLINE float number(Number given) { return widen(given); }
  static INLINE Number rounded(float sum) { return narrow(sum); }
};

struct Float32 {
  using Number = float;
  static constexpr int64_t width = 16;
  static INLINE __m512i read(const Number* from, int64_t count) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lowest(count)), from));
  }
  static INLINE __m512i read(const Number* from) { return _mm512_loadu_si512(from); }
  static INLINE __m512 add_products(__m512 sum, __m512i left, __m512i right) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
  }
  static INLINE __m512 first_half(__m512i numbers) { return _mm512_castsi512_ps(numbers); }
  static INLINE float number(Number given) { return given; }
  static INLINE Number rounded(float sum) { return sum; }
};

// Where to prefetch from while rows are read: a little ahead in the same row, and towards its end from the start of the row that comes
// in its place, so that nothing is fetched that was not chosen. Both pointers are moved by what is read, in bytes.
struct Streams {
  const char* here[together];
  const char* next[together];
  int64_t split;  // bytes of the row after which `next` begins
};

template <class Number>
static INLINE Streams streams(const Number* base, const Gather& gather, const int64_t* selected, int64_t at, int64_t length) {
  Streams found;
  const int64_t bytes = length * static_cast<int64_t>(sizeof(Number));
  found.split = bytes > ahead ? bytes - ahead : 0;
  for (int64_t r = 0; r < together; ++r) {  // where there are fewer rows, the last stands in for the missing ones
    const int64_t now = smaller(at + r, gather.count - 1), then = smaller(at + together + r, gather.count - 1);
    found.here[r] = reinterpret_cast<const char*>(base + selected[now] * gather.columns) + ahead;
    found.next[r] = reinterpret_cast<const char*>(base + selected[then] * gather.columns) - found.split;
  }
  return found;
}

template <class Kind>
static INLINE void add_dots(const typename Kind::Number* const* w, const typename Kind::Number* x, int64_t from, int64_t to,
                            const char* const* stream, __m512* sum) {
  for (int64_t column = from; column < to; column += Kind::width) {
    const __m512i inputs = Kind::read(x + column);
    for (int64_t r = 0; r < together; ++r) {
      fetch(stream[r] + column * static_cast<int64_t>(sizeof(*x)));
      sum[r] = Kind::add_products(sum[r], Kind::read(w[r] + column), inputs);
    }
  }
}

template <class Kind>
static void dots(const Gather& gather, int64_t token, int64_t first, int64_t last) {
  using Number = typename Kind::Number;
  const Number* base = static_cast<const Number*>(gather.weights);
  const Number* x = static_cast<const Number*>(gather.inputs) + token * gather.columns;
  const int64_t* selected = gather.selected + token * gather.count;
  const int64_t whole = gather.columns / Kind::width * Kind::width;
  for (int64_t start = first; start < last; start += together) {
    const Number* w[together];
    __m512 sum[together];
    for (int64_t r = 0; r < together; ++r) {
      w[r] = base + selected[smaller(start + r, last - 1)] * gather.columns;
      sum[r] = _mm512_setzero_ps();
    }
    const Streams stream = streams(base, gather, selected, start, whole);
    const int64_t split = stream.split / static_cast<int64_t>(sizeof(Number)) / Kind::width * Kind::width;
    add_dots<Kind>(w, x, 0, split, stream.here, sum);
    add_dots<Kind>(w, x, split, whole, stream.next, sum);
    if (whole < gather.columns) {
      const int64_t rest = gather.columns - whole;
      for (int64_t r = 0; r < together; ++r) {
        sum[r] = Kind::add_products(sum[r], Kind::read(w[r] + whole, rest), Kind::read(x + whole, rest));
      }
    }
    for (int64_t r = 0; r < together && start + r < last; ++r) {
      const Number* bias = static_cast<const Number*>(gather.bias);
      const float all = _mm512_reduce_add_ps(sum[r]) + (bias ? Kind::number(bias[selected[start + r]]) : 0.0f);
      static_cast<Number*>(gather.outputs)[token * gather.count + start + r] = Kind::rounded(all);
    }
  }
}

// Adds `rows` rows, each times its number, to sums in memory that stay in the first cache.
template <class Kind, int rows>
static INLINE void add_rows(const typename Kind::Number* const* w, const float* numbers, int64_t from, int64_t to, int64_t columns,
                            const char* const* stream, float* sums) {
  __m512 x[rows];
  for (int r = 0; r < rows; ++r) x[r] = _mm512_set1_ps(numbers[r]);
  for (int64_t column = from; column < to; column += Kind::width) {
    const int64_t rest = columns - column;
    __m512 low = _mm512_loadu_ps(sums + column), high = _mm512_setzero_ps();
    if constexpr (Kind::width == 32) high = _mm512_loadu_ps(sums + column + 16);
    for (int r = 0; r < rows; ++r) {
      fetch(stream[r] + column * static_cast<int64_t>(sizeof(**w)));
      const __m512i weights = rest >= Kind::width ? Kind::read(w[r] + column) : Kind::read(w[r] + column, rest);
      low = _mm512_fmadd_ps(x[r], Kind::first_half(weights), low);
      if constexpr (Kind::width == 32) high = _mm512_fmadd_ps(x[r], Kind::second_half(weights), high);
    }
    _mm512_storeu_ps(sums + column, low);
    if constexpr (Kind::width == 32) _mm512_storeu_ps(sums + column + 16, high);
  }
}

template <class Kind>
static void sums(const Gather& gather, int64_t token, int64_t first, int64_t last) {
  using Number = typename Kind::Number;
  alignas(64) float sum[most_columns + 32];
  const int64_t columns = last - first;
  const Number* bias = static_cast<const Number*>(gather.bias);
  for (int64_t i = 0; i < columns + 32; ++i) sum[i] = bias && i < columns ? Kind::number(bias[first + i]) : 0.0f;
  const int64_t* selected = gather.selected + token * gather.count;
  const Number* x = static_cast<const Number*>(gather.inputs) + token * gather.count;
  const Number* base = static_cast<const Number*>(gather.weights) + first;
  for (int64_t i = 0; i < gather.count; i += together) {
    const Number* w[together];
    float numbers[together];
    const int64_t rows = smaller(together, gather.count - i);
    for (int64_t r = 0; r < together; ++r) {
      w[r] = base + selected[smaller(i + r, gather.count - 1)] * gather.columns;
      numbers[r] = r < rows ? Kind::number(x[i + r]) : 0.0f;
    }
    const Streams stream = streams(base, gather, selected, i, columns);
    if (rows == together) {
      const int64_t split = stream.split / static_cast<int64_t>(sizeof(Number)) / Kind::width * Kind::width;
      add_rows<Kind, together>(w, numbers, 0, split, columns, stream.here, sum);
      add_rows<Kind, together>(w, numbers, split, columns, columns, stream.next, sum);
    } else {
      for (int64_t r = 0; r < rows; ++r) add_rows<Kind, 1>(w + r, numbers + r, 0, columns, columns, stream.next + r, sum);
    }
  }
  Number* to = static_cast<Number*>(gather.outputs) + token * gather.columns + first;
  for (int64_t i = 0; i < columns; ++i) to[i] = Kind::rounded(sum[i]);
}

}  // namespace

Gathering avx512_gathering(bool single_precision) {
  if (single_precision) return {dots<Float32>, sums<Float32>};
  return {dots<Bfloat16>, sums<Bfloat16>};
}

}  // namespace hf_sparse

#else

namespace hf_sparse {

Gathering avx512_gathering(bool single_precision) { return portable_gathering(single_precision); }

}  // namespace hf_sparse

#endif
