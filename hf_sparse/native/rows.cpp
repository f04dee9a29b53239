#include "rows.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "gather.h"
#include "threads.h"

namespace hf_sparse {
namespace {

constexpr int64_t rows_together = 32;  // a line of memory of a matrix that is read column after column

// Calls `each(row, word, weights, count)` for the words of the rows of a group, whose columns need not be neighbours in memory.
template <class Each>
void for_words(const Matrix& matrix, int64_t first, int64_t last, int64_t columns, const Each& each) {
  uint16_t block[rows_together][word_columns];
  for (int64_t word = 0; word < words_of(columns); ++word) {
    const int64_t start = word * word_columns, count = std::min(word_columns, columns - start);
    const uint16_t* from = matrix.weights + first * matrix.row_stride + start * matrix.column_stride;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t row = 0; row < last - first; ++row) block[row][i] = from[row * matrix.row_stride + i * matrix.column_stride];
    }
    for (int64_t row = first; row < last; ++row) each(row, word, block[row - first], count);
  }
}

template <class Each>
void for_row_groups(int64_t rows, int threads, const Each& each) {
  for_stripes((rows + rows_together - 1) / rows_together, threads,
              [&](int64_t group) { each(group * rows_together, std::min((group + 1) * rows_together, rows)); });
}

// Calls `each(column, value)` for the non-zeros of a row.
template <class Each>
void for_non_zeros(const PackedRows& packed, int64_t row, int64_t first, int64_t last, int64_t words, const Each& each) {
  const uint32_t* masks = packed.masks + row * words;
  const uint16_t* values = packed.values + packed.starts[row];
  for (int64_t word = 0; word < first / word_columns; ++word) values += count_bits(masks[word]);
  for (int64_t word = first / word_columns; word < words_of(last); ++word) {
    for (uint32_t mask = masks[word]; mask != 0; mask &= mask - 1) each(word * word_columns + lowest_bit(mask), *values++);
  }
}

template <class Number>
struct Portable {
  static float wide(uint16_t number) { return widen(number); }
  static float wide(float number) { return number; }
  static Number put(float sum, uint16_t*) { return narrow(sum); }
  static Number put(float sum, float*) { return sum; }

  static float bias(const Gather& gather, int64_t index) {
    return gather.bias ? wide(static_cast<const Number*>(gather.bias)[index]) : 0.0f;
  }

  static void dots(const Gather& gather, int64_t token, int64_t first, int64_t last) {
    const Number* x = static_cast<const Number*>(gather.inputs) + token * gather.columns;
    const PackedRows packed{gather.masks, gather.starts, static_cast<const uint16_t*>(gather.weights)};
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = gather.selected[token * gather.count + i];
      float sum = bias(gather, row);
      for_non_zeros(packed, row, 0, gather.columns, words_of(gather.columns),
                    [&](int64_t column, uint16_t value) { sum += widen(value) * wide(x[column]); });
      Number* to = static_cast<Number*>(gather.outputs) + token * gather.count + i;
      *to = put(sum, to);
    }
  }

  // `first` is a multiple of 32.
  static void sums(const Gather& gather, int64_t token, int64_t first, int64_t last) {
    float sum[most_columns];
    for (int64_t i = 0; i < last - first; ++i) sum[i] = bias(gather, first + i);
    const PackedRows packed{gather.masks, gather.starts, static_cast<const uint16_t*>(gather.weights)};
    for (int64_t i = 0; i < gather.count; ++i) {
      const float x = wide(static_cast<const Number*>(gather.inputs)[token * gather.count + i]);
      const int64_t row = gather.selected[token * gather.count + i];
      for_non_zeros(packed, row, first, last, words_of(gather.columns),
                    [&](int64_t column, uint16_t value) { sum[column - first] += x * widen(value); });
    }
    Number* to = static_cast<Number*>(gather.outputs) + token * gather.columns + first;
    for (int64_t i = 0; i < last - first; ++i) to[i] = put(sum[i], to);
  }
};

}  // namespace

Gathering portable_packed_gathering(bool single_precision) {
  if (single_precision) return {Portable<float>::dots, Portable<float>::sums};
  return {Portable<uint16_t>::dots, Portable<uint16_t>::sums};
}

void measure_rows(const Matrix& matrix, int64_t rows, int64_t columns, int64_t* starts, int threads) {
  for_row_groups(rows, threads, [&](int64_t first, int64_t last) {
    int64_t found[rows_together] = {};
    for_words(matrix, first, last, columns, [&](int64_t row, int64_t, const uint16_t* weights, int64_t count) {
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) kept += is_zero(weights[i]) ? 0 : 1;
      found[row - first] += kept;
    });
    for (int64_t row = first; row < last; ++row) starts[row + 1] = found[row - first];
  });
  starts[0] = 0;
  for (int64_t row = 0; row < rows; ++row) starts[row + 1] += starts[row];
}

bool fill_rows(const Matrix& matrix, int64_t rows, int64_t columns, uint32_t* masks, const int64_t* starts, uint16_t* values,
               int threads) {
  std::atomic<bool> same{true};
  const int64_t words = words_of(columns);
  for_row_groups(rows, threads, [&](int64_t first, int64_t last) {
    int64_t cursor[rows_together];
    for (int64_t row = first; row < last; ++row) cursor[row - first] = starts[row];
    for_words(matrix, first, last, columns, [&](int64_t row, int64_t word, const uint16_t* weights, int64_t count) {
      uint16_t kept[word_columns];
      uint32_t mask = 0;
      int64_t found = 0;
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t bit = is_zero(weights[i]) ? 0 : 1;
        kept[found] = weights[i];
        mask |= bit << i;
        found += bit;
      }
      int64_t& at = cursor[row - first];
      const int64_t room = std::min(found, starts[row + 1] - at);
      std::memcpy(values + at, kept, static_cast<size_t>(room) * sizeof *kept);
      masks[row * words + word] = mask;
      at += room;
      if (room != found) same = false;
    });
    for (int64_t row = first; row < last; ++row) {
      if (cursor[row - first] != starts[row + 1]) same = false;
    }
  });
  std::memset(values + starts[rows], 0, slack_values * sizeof *values);
  return same;
}

void unpack_rows(const PackedRows& packed, int64_t rows, int64_t columns, uint16_t* weights, int threads) {
  for_row_groups(rows, threads, [&](int64_t first, int64_t last) {
    std::memset(weights + first * columns, 0, static_cast<size_t>((last - first) * columns) * sizeof *weights);
    for (int64_t row = first; row < last; ++row) {
      for_non_zeros(packed, row, 0, columns, words_of(columns),
                    [&](int64_t column, uint16_t value) { weights[row * columns + column] = value; });
    }
  });
}

std::string trouble_in_rows(const PackedRows& packed, int64_t rows, int64_t columns, int64_t values, int threads) {
  const int64_t words = words_of(columns), rest = columns % word_columns;
  const uint32_t outside = rest ? ~((uint32_t{1} << rest) - 1) : 0;
  if (packed.starts[0] != 0) return "the first row starts at " + std::to_string(packed.starts[0]) + ", not 0";
  for (int64_t row = 0; row < rows; ++row) {
    if (packed.starts[row + 1] < packed.starts[row] || packed.starts[row + 1] > values - slack_values) {
      return "row " + std::to_string(row) + " has values from " + std::to_string(packed.starts[row]) + " to " +
             std::to_string(packed.starts[row + 1]) + ", of " + std::to_string(values) + " of which the last " +
             std::to_string(slack_values) + " are spare";
    }
  }
  std::atomic<int64_t> wrong{-1};
  for_row_groups(rows, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const uint32_t* masks = packed.masks + row * words;
      int64_t marked = 0;
      for (int64_t word = 0; word < words; ++word) marked += count_bits(masks[word]);
      if (marked != packed.starts[row + 1] - packed.starts[row] || (masks[words - 1] & outside)) wrong = row;
    }
  });
  if (wrong < 0) return "";
  return "the masks of row " + std::to_string(wrong) + " do not mark as many weights as it has values, or mark some outside the matrix";
}

}  // namespace hf_sparse
