// The functions that Python sees. Addresses and lengths come from tensors whose dtype, layout and length the Python side has
// checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "gather.h"
#include "kernels.h"
#include "largest.h"
#include "memory.h"
#include "pack.h"
#include "rows.h"
#include "stored.h"

namespace nb = nanobind;
using namespace hf_sparse;

namespace {

using Address = uintptr_t;

template <class Number>
Number* at(Address address) {
  return reinterpret_cast<Number*>(address);
}

Shape checked_shape(int64_t rows, int64_t columns) {
  if (rows < 1 || columns < 1 || rows > largest_side || columns > largest_side) {
    throw std::invalid_argument("the shape is (" + std::to_string(rows) + ", " + std::to_string(columns) +
                                "); each side must be from 1 to " + std::to_string(largest_side));
  }
  return shape_of(rows, columns);
}

std::atomic<Set> current_set{Set::portable};

// An empty name is the best set there is.
std::string choose(const std::string& name) {
  current_set = chosen_set(name.c_str());
  return set_name(current_set);
}

bool has(const std::string& name) {
  for (const Set set : {Set::portable, Set::avx512, Set::amx}) {
    if (name == set_name(set)) return processor_has(set);
  }
  return false;
}

void measure_matrix(Address weights, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Address offsets,
                    int threads) {
  measure(Matrix{at<uint16_t>(weights), row_stride, column_stride}, checked_shape(rows, columns), at<int64_t>(offsets), threads);
}

bool fill_matrix(Address weights, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Address masks,
                 Address offsets, Address values, int threads) {
  return fill(Matrix{at<uint16_t>(weights), row_stride, column_stride}, checked_shape(rows, columns),
              NewParts{at<uint32_t>(masks), at<int64_t>(offsets), at<uint16_t>(values)}, threads);
}

void rows_of_stored(Address bits, int64_t bits_per_row, int64_t rows, int64_t columns, Address row_starts) {
  find_rows(at<uint8_t>(bits), bits_per_row, checked_shape(rows, columns), at<int64_t>(row_starts));
}

void measure_stored(Address values, Address bits, int64_t bits_per_row, Address row_starts, int64_t rows, int64_t columns,
                    Address offsets, int threads) {
  measure(Stored{at<uint16_t>(values), at<uint8_t>(bits), bits_per_row, at<int64_t>(row_starts)}, checked_shape(rows, columns),
          at<int64_t>(offsets), threads);
}

bool fill_stored(Address values, Address bits, int64_t bits_per_row, Address row_starts, int64_t rows, int64_t columns,
                 Address masks, Address offsets, Address packed, int threads) {
  return fill(Stored{at<uint16_t>(values), at<uint8_t>(bits), bits_per_row, at<int64_t>(row_starts)},
              checked_shape(rows, columns), NewParts{at<uint32_t>(masks), at<int64_t>(offsets), at<uint16_t>(packed)}, threads);
}

void unpack_matrix(Address masks, Address offsets, Address values, int64_t rows, int64_t columns, Address weights, int threads) {
  unpack(Parts{at<uint32_t>(masks), at<int64_t>(offsets), at<uint16_t>(values)}, checked_shape(rows, columns),
         at<uint16_t>(weights), threads);
}

void arrange_matrix(Address weights, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Address values,
                    int threads) {
  arrange_dense(Matrix{at<uint16_t>(weights), row_stride, column_stride}, checked_shape(rows, columns), at<uint16_t>(values),
                threads);
}

std::string check(Address masks, Address offsets, int64_t values, int64_t rows, int64_t columns, int threads) {
  return trouble(at<uint32_t>(masks), at<int64_t>(offsets), checked_shape(rows, columns), values, threads);
}

// `selected` is the address of stripe indices or 0; `selected_count` says how many there are.
void product(Address masks, Address offsets, Address values, int64_t rows, int64_t columns, Address selected,
             int64_t selected_count, Address inputs, int64_t tokens, Address bias, Address outputs, bool single_precision,
             int threads) {
  const Shape shape = checked_shape(rows, columns);
  Job job{at<uint32_t>(masks), at<int64_t>(offsets), at<uint16_t>(values), shape.rows, shape.columns, shape.stripes, shape.pairs,
          at<int64_t>(selected), at<void>(inputs), at<void>(bias), at<void>(outputs), tokens, shape.rows, nullptr};
  if (selected) {
    job.stripes = selected_count;
    job.output_stride = selected_count * stripe_rows;
    for (int64_t i = 0; i < selected_count; ++i) {
      if (job.selected[i] < 0 || job.selected[i] >= shape.stripes) {
        throw std::invalid_argument("stripe " + std::to_string(job.selected[i]) + " was selected; there are those from 0 to " +
                                    std::to_string(shape.stripes - 1));
      }
    }
  }
  if (tokens > 0 && job.stripes > 0) multiply(*kernels_of(current_set, single_precision), job, single_precision, threads);
}

void check_rows(const Gather& gather, int64_t rows) {
  for (int64_t i = 0; i < gather.tokens * gather.count; ++i) {
    if (gather.selected[i] < 0 || gather.selected[i] >= rows) {
      throw std::invalid_argument("row " + std::to_string(gather.selected[i]) + " was selected; there are those from 0 to " +
                                  std::to_string(rows - 1));
    }
  }
}

// `masks` and `starts` are those of packed rows, or 0.
template <void (*gathered)(const Gather&, Set, bool, int)>
void gather(Address weights, Address masks, Address starts, int64_t rows, int64_t columns, Address selected, int64_t count,
            int64_t tokens, Address inputs, Address bias, Address outputs, bool single_precision, int threads) {
  const Gather all{at<void>(weights), columns,          at<int64_t>(selected), count,        tokens, at<void>(inputs),
                   at<void>(bias),    at<void>(outputs), at<uint32_t>(masks), at<int64_t>(starts)};
  check_rows(all, rows);
  gathered(all, current_set, single_precision, threads);
}

void measure_packed_rows(Address weights, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Address starts,
                         int threads) {
  checked_shape(rows, columns);
  measure_rows(Matrix{at<uint16_t>(weights), row_stride, column_stride}, rows, columns, at<int64_t>(starts), threads);
}

bool fill_packed_rows(Address weights, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Address masks,
                      Address starts, Address values, int threads) {
  checked_shape(rows, columns);
  return fill_rows(Matrix{at<uint16_t>(weights), row_stride, column_stride}, rows, columns, at<uint32_t>(masks), at<int64_t>(starts),
                   at<uint16_t>(values), threads);
}

void unpack_packed_rows(Address masks, Address starts, Address values, int64_t rows, int64_t columns, Address weights, int threads) {
  checked_shape(rows, columns);
  unpack_rows(PackedRows{at<uint32_t>(masks), at<int64_t>(starts), at<uint16_t>(values)}, rows, columns, at<uint16_t>(weights), threads);
}

std::string check_packed_rows(Address masks, Address starts, int64_t values, int64_t rows, int64_t columns, int threads) {
  checked_shape(rows, columns);
  return trouble_in_rows(PackedRows{at<uint32_t>(masks), at<int64_t>(starts), nullptr}, rows, columns, values, threads);
}

// The lengths are those of `Largest`; `count` is at least 1 and at most `units`.
void largest(Address scores, int64_t rows, int64_t units, int64_t count, int64_t size, Address chosen) {
  thread_local std::vector<int32_t> keys;
  if (keys.size() < static_cast<size_t>(units)) keys.resize(static_cast<size_t>(units));
  const Largest job{at<float>(scores), rows, units, count, size, keys.data(), at<int64_t>(chosen)};
  current_set != Set::portable && processor_has(Set::avx512) ? largest_avx512(job) : largest_portable(job);
}

}  // namespace

NB_MODULE(_kernels, module) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  module.attr("SLACK") = slack_values;
  module.def("choose", &choose);
  module.def("chosen", [] { return std::string(set_name(current_set)); });
  module.def("has", &has);
  module.def("measure_matrix", &measure_matrix, Unlocked());
  module.def("fill_matrix", &fill_matrix, Unlocked());
  module.def("rows_of_stored", &rows_of_stored, Unlocked());
  module.def("measure_stored", &measure_stored, Unlocked());
  module.def("fill_stored", &fill_stored, Unlocked());
  module.def("unpack_matrix", &unpack_matrix, Unlocked());
  module.def("arrange_matrix", &arrange_matrix, Unlocked());
  module.def("check", &check, Unlocked());
  module.def("product", &product, Unlocked());
  module.def("spread_bits", [](Address values, Address bits, int64_t size, int width, Address row, int64_t value_count) {
    spread_bits(at<void>(values), value_count, at<uint8_t>(bits), size, width, at<void>(row));
  }, Unlocked());
  module.def("gather_bits", [](Address row, Address bits, int64_t size, int width, Address values, int64_t value_count) {
    gather_bits(at<void>(row), at<uint8_t>(bits), size, width, at<void>(values), value_count);
  }, Unlocked());
  module.def("gather_dots", &gather<gather_dots>, Unlocked());
  module.def("gather_sums", &gather<gather_sums>, Unlocked());
  module.def("measure_packed_rows", &measure_packed_rows, Unlocked());
  module.def("fill_packed_rows", &fill_packed_rows, Unlocked());
  module.def("unpack_packed_rows", &unpack_packed_rows, Unlocked());
  module.def("check_packed_rows", &check_packed_rows, Unlocked());
  module.def("largest", &largest, Unlocked());
  module.def("advise_large_pages", [](Address memory, int64_t bytes) { advise_large_pages(at<void>(memory), bytes); });
}
