#include "gather.h"

#include <algorithm>

#include "layout.h"
#include "threads.h"

namespace hf_sparse {
namespace {

constexpr int64_t work_of_a_thread = 1 << 17;  // weights; less is done sooner than another thread is woken
constexpr int64_t rows_in_a_part = 32, columns_of_a_line = 32;

template <class Number>
struct Portable {
  static float wide(uint16_t number) { return widen(number); }
  static float wide(float number) { return number; }
  static Number put(float sum, uint16_t*) { return narrow(sum); }
  static Number put(float sum, float*) { return sum; }

  static void dots(const Gather& gather, int64_t token, int64_t first, int64_t last) {
    const Number* x = static_cast<const Number*>(gather.inputs) + token * gather.columns;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = gather.selected[token * gather.count + i];
      const Number* w = static_cast<const Number*>(gather.weights) + row * gather.columns;
      float parts[8] = {};  // the compiler may keep these side by side in a register
      int64_t column = 0;
      for (; column + 8 <= gather.columns; column += 8) {
        for (int64_t p = 0; p < 8; ++p) parts[p] += wide(w[column + p]) * wide(x[column + p]);
      }
      float sum = gather.bias ? wide(static_cast<const Number*>(gather.bias)[row]) : 0.0f;
      for (; column < gather.columns; ++column) sum += wide(w[column]) * wide(x[column]);
      for (int64_t p = 0; p < 8; ++p) sum += parts[p];
      Number* to = static_cast<Number*>(gather.outputs) + token * gather.count + i;
      *to = put(sum, to);
    }
  }

  static void sums(const Gather& gather, int64_t token, int64_t first, int64_t last) {
    float sum[most_columns];
    for (int64_t i = 0; i < last - first; ++i) {
      sum[i] = gather.bias ? wide(static_cast<const Number*>(gather.bias)[first + i]) : 0.0f;
    }
    for (int64_t i = 0; i < gather.count; ++i) {
      const float x = wide(static_cast<const Number*>(gather.inputs)[token * gather.count + i]);
      const int64_t row = gather.selected[token * gather.count + i];
      const Number* w = static_cast<const Number*>(gather.weights) + row * gather.columns + first;
      for (int64_t column = 0; column < last - first; ++column) sum[column] += x * wide(w[column]);
    }
    Number* to = static_cast<Number*>(gather.outputs) + token * gather.columns + first;
    for (int64_t i = 0; i < last - first; ++i) to[i] = put(sum[i], to);
  }
};

Gathering chosen(const Gather& gather, Set set, bool single_precision) {
  if (set == Set::portable || !processor_has(Set::avx512)) {
    return gather.masks ? portable_packed_gathering(single_precision) : portable_gathering(single_precision);
  }
  return gather.masks ? avx512_packed_gathering(single_precision) : avx512_gathering(single_precision);
}

// Divides `size` rows or columns of each token into parts, and those among threads.
template <class Each>
void in_parts(const Gather& gather, int64_t size, int64_t part, int threads, const Each& each) {
  const int64_t parts = (size + part - 1) / part;
  const int64_t useful = gather.tokens * gather.count * gather.columns / work_of_a_thread + 1;
  const int team = allowed_threads(static_cast<int>(std::min<int64_t>({threads, useful, gather.tokens * parts})));
  Shared shared;
  on_threads(shared, team, [&] {
    for (int64_t next = shared.next_group++; next < gather.tokens * parts; next = shared.next_group++) {
      const int64_t first = next % parts * part;
      each(next / parts, first, std::min(first + part, size));
    }
  });
}

}  // namespace

Gathering portable_gathering(bool single_precision) {
  if (single_precision) return {Portable<float>::dots, Portable<float>::sums};
  return {Portable<uint16_t>::dots, Portable<uint16_t>::sums};
}

void gather_dots(const Gather& gather, Set set, bool single_precision, int threads) {
  const Gathering by = chosen(gather, set, single_precision);
  in_parts(gather, gather.count, rows_in_a_part, threads,
           [&](int64_t token, int64_t first, int64_t last) { by.dots(gather, token, first, last); });
}

void gather_sums(const Gather& gather, Set set, bool single_precision, int threads) {
  const Gathering by = chosen(gather, set, single_precision);
  // As few parts as threads, where they fit: a row is best read in one go.
  const int64_t each = (gather.columns + threads - 1) / (threads > 1 ? threads : 1) + columns_of_a_line - 1;
  const int64_t part = std::min(each / columns_of_a_line * columns_of_a_line, most_columns);
  in_parts(gather, gather.columns, part, threads,
           [&](int64_t token, int64_t first, int64_t last) { by.sums(gather, token, first, last); });
}

}  // namespace hf_sparse
