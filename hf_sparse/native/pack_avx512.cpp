// Packing with AVX-512: 16 rows x 32 inputs at a time, turned within registers into the order of the layout.
#include "kernels.h"
#include "pack.h"

#if defined(HF_SPARSE_AVX512) && (defined(__x86_64__) || defined(_M_X64))

#include "avx512.h"

namespace hf_sparse {
namespace {

constexpr int64_t block_pairs = padded_inputs / 2;

static INLINE uint32_t lowest(int64_t count) { return count >= 32 ? 0xffffffffu : (uint32_t{1} << count) - 1; }

// 16 registers of 16 numbers of 32 bits (here two weights each): what were rows become columns.
static INLINE void transpose(__m512i* rows) {
  __m512i half[16];
  for (int i = 0; i < 8; ++i) {
    half[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    half[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(half[4 * i], half[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(half[4 * i], half[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(half[4 * i + 1], half[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(half[4 * i + 1], half[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
    half[4 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
    half[8 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    half[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(half[i], half[8 + i], 0x88);
    rows[4 + i] = _mm512_shuffle_i32x4(half[4 + i], half[12 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(half[i], half[8 + i], 0xdd);
    rows[12 + i] = _mm512_shuffle_i32x4(half[4 + i], half[12 + i], 0xdd);
  }
}

// Writes the non-zeros of one pair of inputs, never beyond `end`; null where they do not fit.
static INLINE uint16_t* write_pair(__m512i weights, uint16_t* to, uint16_t* end, uint32_t& mask) {
  mask = _mm512_test_epi16_mask(weights, _mm512_set1_epi16(0x7fff));
  const __m512i kept = _mm512_maskz_compress_epi16(mask, weights);
  const int64_t count = bits_of(mask), room = end - to;
  if (room >= pair_weights) {
    _mm512_storeu_si512(to, kept);
  } else {
    if (count > room) return nullptr;
    _mm512_mask_storeu_epi16(to, lowest(count), kept);
  }
  return to + count;
}

struct MatrixRows {
  const uint16_t* at;
  int64_t stride;

  MatrixRows(const Matrix& matrix, const Shape&, int64_t row) : at(matrix.weights + row * matrix.row_stride), stride(matrix.row_stride) {}

  INLINE bool read(int64_t row, int64_t column, int64_t columns, __m512i& weights) {
    weights = _mm512_maskz_loadu_epi16(lowest(columns), at + row * stride + column);
    return true;
  }
};

struct StoredRows {
  const Stored& stored;
  const uint8_t* end;
  int64_t first;
  int64_t cursor[stripe_rows];

  StoredRows(const Stored& all, const Shape& shape, int64_t row) : stored(all), first(row) {
    end = all.bits + ((shape.rows - 1) * all.bits_per_row + shape.columns + 7) / 8;
    for (int64_t i = 0; i < stripe_rows && row + i < shape.rows; ++i) cursor[i] = all.row_starts[row + i];
  }

  // At most 32 bits from any place; nothing is read beyond the last byte that holds one.
  INLINE uint32_t bits_at(int64_t place, int64_t count) const {
    const uint8_t* from = stored.bits + place / 8;
    uint64_t word = 0;
    if (end - from >= 8) {
      std::memcpy(&word, from, sizeof word);
    } else {
      for (int64_t i = 0; from + i < end; ++i) word |= static_cast<uint64_t>(from[i]) << (8 * i);
    }
    return static_cast<uint32_t>(word >> (place % 8)) & lowest(count);
  }

  INLINE bool read(int64_t row, int64_t column, int64_t columns, __m512i& weights) {
    const uint32_t word = bits_at((first + row) * stored.bits_per_row + column, columns);
    const int64_t count = bits_of(word);
    if (cursor[row] + count > stored.row_starts[first + row + 1]) return false;
    weights = _mm512_maskz_expand_epi16(word, _mm512_maskz_loadu_epi16(lowest(count), stored.values + cursor[row]));
    cursor[row] += count;
    return true;
  }
};

template <class Rows, class Source>
static bool fill_stripe(const Source& source, const Shape& shape, const NewParts& parts, int64_t stripe) {
  Rows from(source, shape, stripe * stripe_rows);
  const int64_t rows = smaller(stripe_rows, shape.rows - stripe * stripe_rows);
  uint32_t* masks = parts.masks + stripe * shape.pairs;
  uint16_t* to = parts.values + parts.offsets[stripe];
  uint16_t* const end = parts.values + parts.offsets[stripe + 1];
  for (int64_t pair = 0; pair < shape.pairs; pair += block_pairs, masks += block_pairs) {
    __m512i block[stripe_rows];
    const int64_t columns = smaller(padded_inputs, shape.columns - 2 * pair);
    for (int64_t row = 0; row < stripe_rows; ++row) {
      block[row] = _mm512_setzero_si512();
      if (row < rows && !from.read(row, 2 * pair, columns, block[row])) return false;
    }
    transpose(block);
    for (int64_t i = 0; i < block_pairs; ++i) {
      to = write_pair(block[i], to, end, masks[i]);
      if (!to) return false;
    }
  }
  return to == end;
}

}  // namespace

bool has_avx512_packing() { return processor_has(Set::avx512); }

bool fill_stripe_avx512(const Matrix& matrix, const Shape& shape, const NewParts& to, int64_t stripe) {
  return fill_stripe<MatrixRows>(matrix, shape, to, stripe);
}

bool fill_stripe_avx512(const Stored& stored, const Shape& shape, const NewParts& to, int64_t stripe) {
  return fill_stripe<StoredRows>(stored, shape, to, stripe);
}

}  // namespace hf_sparse

#else

namespace hf_sparse {

bool has_avx512_packing() { return false; }
bool fill_stripe_avx512(const Matrix&, const Shape&, const NewParts&, int64_t) { return false; }
bool fill_stripe_avx512(const Stored&, const Shape&, const NewParts&, int64_t) { return false; }

}  // namespace hf_sparse

#endif
