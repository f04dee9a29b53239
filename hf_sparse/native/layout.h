// The packed layout: how the non-zeros of a bfloat16 matrix (out, in) lie in memory.
//
// A stripe is 16 consecutive output rows. Two neighbouring inputs of a stripe are 32 weights, ordered row by row and within a row
// input by input: one vector register of 16-bit numbers, and one row of a tile of the matrix extensions. Each such pair of inputs
// has a 32-bit mask; the non-zeros that it marks follow one another, pair after pair and stripe after stripe. One offset per
// stripe says where its values begin, so that stripes can be worked on in any order and any selection of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace hf_sparse {

constexpr int64_t stripe_rows = 16;
constexpr int64_t pair_weights = 32;     // 16 rows of 2 inputs
constexpr int64_t padded_inputs = 32;    // the number of inputs is rounded up to this: 16 pairs, the depth of one tile
constexpr int64_t slack_values = 32;     // vector loads read one whole register from wherever the next value lies
constexpr int64_t largest_side = int64_t{1} << 30;  // no product of two padded sides and a width in bytes overflows

// Sizes that follow from the shape.
struct Shape {
  int64_t rows, columns, stripes, pairs;
};

static inline Shape shape_of(int64_t rows, int64_t columns) {
  return {rows, columns, (rows + stripe_rows - 1) / stripe_rows,
          (columns + padded_inputs - 1) / padded_inputs * (padded_inputs / 2)};
}

static inline int count_bits(uint32_t word) {  // portable; the files for special processors use their own instruction
  word = word - ((word >> 1) & 0x55555555u);
  word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  return static_cast<int>((((word + (word >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}

static inline int lowest_bit(uint32_t word) { return count_bits((word & (~word + 1)) - 1); }

static inline bool is_zero(uint16_t weight) { return (weight & 0x7fff) == 0; }  // both signs

static inline float widen(uint16_t number) {
  const uint32_t bits = static_cast<uint32_t>(number) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
static inline uint16_t narrow(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

}  // namespace hf_sparse
