// Packing and unpacking. Weights pass through blocks of 16 rows x 32 inputs, already in the order of the layout.
#include "pack.h"

#include <algorithm>
#include <atomic>

#include "threads.h"

namespace hf_sparse {
namespace {

constexpr int64_t block_pairs = padded_inputs / 2;

struct Block {
  uint16_t weights[block_pairs * pair_weights];  // pair after pair
};

int64_t place(int64_t row, int64_t column) { return column / 2 * pair_weights + 2 * row + column % 2; }

// Gives the blocks of a stripe from left to right.
class MatrixBlocks {
 public:
  MatrixBlocks(const Matrix& matrix, const Shape& shape, int64_t stripe)
      : matrix_(matrix), columns_(shape.columns), first_row_(stripe * stripe_rows),
        rows_(std::min(stripe_rows, shape.rows - first_row_)) {}

  void next(Block& block) {
    const int64_t columns = std::min(padded_inputs, columns_ - column_);
    if (rows_ < stripe_rows || columns < padded_inputs) std::memset(&block, 0, sizeof block);
    const uint16_t* from = matrix_.weights + first_row_ * matrix_.row_stride + column_ * matrix_.column_stride;
    if (matrix_.column_stride == 1) {
      for (int64_t row = 0; row < rows_; ++row) {
        const uint16_t* line = from + row * matrix_.row_stride;
        for (int64_t i = 0; i < columns; ++i) block.weights[place(row, i)] = line[i];
      }
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        const uint16_t* column = from + i * matrix_.column_stride;
        for (int64_t row = 0; row < rows_; ++row) block.weights[place(row, i)] = column[row * matrix_.row_stride];
      }
    }
    column_ += padded_inputs;
  }

 private:
  Matrix matrix_;
  int64_t columns_, first_row_, rows_, column_ = 0;
};

class StoredBlocks {
 public:
  StoredBlocks(const Stored& stored, const Shape& shape, int64_t stripe)
      : stored_(stored), columns_(shape.columns), first_row_(stripe * stripe_rows),
        rows_(std::min(stripe_rows, shape.rows - first_row_)) {
    for (int64_t row = 0; row < rows_; ++row) cursor_[row] = stored.row_starts[first_row_ + row];
  }

  void next(Block& block) {
    std::memset(&block, 0, sizeof block);
    const int64_t columns = std::min(padded_inputs, columns_ - column_);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t end = stored_.row_starts[first_row_ + row + 1];
      for (uint32_t word = bits_at((first_row_ + row) * stored_.bits_per_row + column_, columns); word != 0; word &= word - 1) {
        const int64_t i = lowest_bit(word);
        if (cursor_[row] < end) block.weights[place(row, i)] = stored_.values[cursor_[row]++];
      }
    }
    column_ += padded_inputs;
  }

 private:
  // At most 32 bits from any place; only bytes that hold one of them are read.
  uint32_t bits_at(int64_t place, int64_t count) const {
    const uint8_t* first = stored_.bits + place / 8;
    const int64_t shift = place % 8;
    const int64_t bytes = (shift + count + 7) / 8;
    uint64_t word = 0;
    for (int64_t i = 0; i < bytes; ++i) word |= static_cast<uint64_t>(first[i]) << (8 * i);
    return static_cast<uint32_t>((word >> shift) & ((uint64_t{1} << count) - 1));
  }

  Stored stored_;
  int64_t columns_, first_row_, rows_, column_ = 0;
  int64_t cursor_[stripe_rows] = {};
};

void add_up(const Shape& shape, int64_t* offsets) {
  offsets[0] = 0;
  for (int64_t stripe = 0; stripe < shape.stripes; ++stripe) offsets[stripe + 1] += offsets[stripe];
}

// How many of the weights in a row of memory are not zero.
int64_t non_zeros(const uint16_t* weights, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += is_zero(weights[i]) ? 0 : 1;
  return found;
}

// Writes the non-zeros of one pair of inputs, never beyond `end`; null where they do not fit.
uint16_t* write_pair(const uint16_t* weights, uint16_t* to, uint16_t* end, uint32_t& mask) {
  mask = 0;
  if (end - to >= pair_weights) {  // without a branch for each weight: what is not kept is overwritten by the next
    for (int64_t i = 0; i < pair_weights; ++i) {
      const uint32_t kept = is_zero(weights[i]) ? 0 : 1;
      *to = weights[i];
      to += kept;
      mask |= kept << i;
    }
    return to;
  }
  for (int64_t i = 0; i < pair_weights; ++i) {
    if (is_zero(weights[i])) continue;
    if (to == end) return nullptr;
    *to++ = weights[i];
    mask |= uint32_t{1} << i;
  }
  return to;
}

template <class Blocks, class Source>
bool fill_stripe(const Source& source, const Shape& shape, const NewParts& parts, int64_t stripe) {
  Blocks blocks(source, shape, stripe);
  Block block;
  uint32_t* masks = parts.masks + stripe * shape.pairs;
  uint16_t* to = parts.values + parts.offsets[stripe];
  uint16_t* const end = parts.values + parts.offsets[stripe + 1];
  for (int64_t pair = 0; pair < shape.pairs; ++pair) {
    if (pair % block_pairs == 0) blocks.next(block);
    to = write_pair(block.weights + pair % block_pairs * pair_weights, to, end, masks[pair]);
    if (!to) return false;
  }
  return to == end;
}

template <class Blocks, class Source>
bool fill_stripes(const Source& source, const Shape& shape, const NewParts& parts, int threads, bool wide) {
  std::atomic<bool> same{true};
  for_stripes(shape.stripes, threads, [&](int64_t stripe) {
    const bool done = wide ? fill_stripe_avx512(source, shape, parts, stripe) : fill_stripe<Blocks>(source, shape, parts, stripe);
    if (!done) same = false;
  });
  std::memset(parts.values + parts.offsets[shape.stripes], 0, slack_values * sizeof(uint16_t));
  return same;
}

}  // namespace

void measure(const Matrix& matrix, const Shape& shape, int64_t* offsets, int threads) {
  for_stripes(shape.stripes, threads, [&](int64_t stripe) {
    int64_t count = 0;
    if (matrix.column_stride == 1) {
      const int64_t end = std::min((stripe + 1) * stripe_rows, shape.rows);
      for (int64_t row = stripe * stripe_rows; row < end; ++row) {
        count += non_zeros(matrix.weights + row * matrix.row_stride, shape.columns);
      }
    } else {
      MatrixBlocks blocks(matrix, shape, stripe);
      Block block;
      for (int64_t pair = 0; pair < shape.pairs; pair += block_pairs) {
        blocks.next(block);
        count += non_zeros(block.weights, block_pairs * pair_weights);
      }
    }
    offsets[stripe + 1] = count;
  });
  add_up(shape, offsets);
}

// The values of a stripe lie together, because its rows do.
void measure(const Stored& stored, const Shape& shape, int64_t* offsets, int threads) {
  for_stripes(shape.stripes, threads, [&](int64_t stripe) {
    const int64_t start = stored.row_starts[stripe * stripe_rows];
    const int64_t end = stored.row_starts[std::min((stripe + 1) * stripe_rows, shape.rows)];
    offsets[stripe + 1] = non_zeros(stored.values + start, end - start);
  });
  add_up(shape, offsets);
}

bool fill(const Matrix& matrix, const Shape& shape, const NewParts& to, int threads) {
  return fill_stripes<MatrixBlocks>(matrix, shape, to, threads, matrix.column_stride == 1 && has_avx512_packing());
}

bool fill(const Stored& stored, const Shape& shape, const NewParts& to, int threads) {
  return fill_stripes<StoredBlocks>(stored, shape, to, threads, has_avx512_packing());
}

void find_rows(const uint8_t* bits, int64_t bits_per_row, const Shape& shape, int64_t* row_starts) {
  row_starts[0] = 0;
  for (int64_t row = 0; row < shape.rows; ++row) {
    int64_t place = row * bits_per_row, count = 0;
    const int64_t end = place + shape.columns;
    for (; place < end && place % 8 != 0; ++place) count += (bits[place / 8] >> (place % 8)) & 1;
    for (; place + 32 <= end; place += 32) {
      uint32_t word;
      std::memcpy(&word, bits + place / 8, sizeof word);
      count += count_bits(word);
    }
    for (; place < end; ++place) count += (bits[place / 8] >> (place % 8)) & 1;
    row_starts[row + 1] = row_starts[row] + count;
  }
}

void unpack(const Parts& parts, const Shape& shape, uint16_t* weights, int threads) {
  for_stripes(shape.stripes, threads, [&](int64_t stripe) {
    const int64_t first_row = stripe * stripe_rows;
    const int64_t rows = std::min(stripe_rows, shape.rows - first_row);
    uint16_t* to = weights + first_row * shape.columns;
    std::memset(to, 0, static_cast<size_t>(rows * shape.columns) * sizeof(uint16_t));
    const uint16_t* from = parts.values + parts.offsets[stripe];
    for (int64_t pair = 0; pair < shape.pairs; ++pair) {
      for (uint32_t mask = parts.masks[stripe * shape.pairs + pair]; mask != 0; mask &= mask - 1) {
        const int64_t bit = lowest_bit(mask);
        const int64_t row = bit / 2, column = 2 * pair + bit % 2;
        if (row < rows && column < shape.columns) to[row * shape.columns + column] = *from;
        ++from;
      }
    }
  });
}

void arrange_dense(const Matrix& matrix, const Shape& shape, uint16_t* values, int threads) {
  for_stripes(shape.stripes, threads, [&](int64_t stripe) {
    MatrixBlocks blocks(matrix, shape, stripe);
    Block block;
    for (int64_t pair = 0; pair < shape.pairs; pair += block_pairs) {
      blocks.next(block);
      std::memcpy(values + (stripe * shape.pairs + pair) * pair_weights, &block, sizeof block);
    }
  });
}

std::string trouble(const uint32_t* masks, const int64_t* offsets, const Shape& shape, int64_t values, int threads) {
  if (offsets[0] != 0) return "the first offset is " + std::to_string(offsets[0]) + ", not 0";
  for (int64_t stripe = 0; stripe < shape.stripes; ++stripe) {
    if (offsets[stripe + 1] < offsets[stripe] || offsets[stripe + 1] > values - slack_values) {
      return "offset " + std::to_string(stripe + 1) + " is " + std::to_string(offsets[stripe + 1]) + " after " +
             std::to_string(offsets[stripe]) + ", with " + std::to_string(values) + " values of which the last " +
             std::to_string(slack_values) + " are spare";
    }
  }
  std::atomic<int64_t> wrong{-1};
  for_stripes(shape.stripes, threads, [&](int64_t stripe) {
    const int64_t rows = std::min(stripe_rows, shape.rows - stripe * stripe_rows);
    const uint32_t inside = rows == stripe_rows ? 0xffffffffu : (uint32_t{1} << (2 * rows)) - 1;
    int64_t count = 0;
    bool outside = false;
    for (int64_t pair = 0; pair < shape.pairs; ++pair) {
      const uint32_t mask = masks[stripe * shape.pairs + pair];
      const int64_t columns = std::max<int64_t>(0, std::min<int64_t>(2, shape.columns - 2 * pair));
      const uint32_t allowed = inside & (columns == 2 ? 0xffffffffu : columns == 1 ? 0x55555555u : 0u);
      outside = outside || (mask & ~allowed) != 0;
      count += count_bits(mask);
    }
    if (outside || count != offsets[stripe + 1] - offsets[stripe]) wrong = stripe;
  });
  if (wrong < 0) return "";
  return "the masks of stripe " + std::to_string(wrong) + 
         " do not mark as many weights as it has values, or mark some outside the matrix";
}

}  // namespace hf_sparse
