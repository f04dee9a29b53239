// The choice itself, compiled once per instruction set, for the counting and the taking of which `Way` has its own.
#pragma once

#include <cstring>

#include "largest.h"

namespace hf_sparse {
namespace {

// A whole number that is in the same order as the scores.
static inline int32_t key_of(float score) {
  int32_t bits;
  score += 0.0f;  // makes -0 the same as 0
  std::memcpy(&bits, &score, sizeof bits);
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return score != score ? INT32_MAX : ordered;
}

static inline int64_t* take_one(int64_t place, int64_t size, int64_t* to) {
  for (int64_t n = 0; n < size; ++n) *to++ = place * size + n;
  return to;
}

template <class Way>
static inline void choose_row(const Largest& job, int64_t row) {
  const float* scores = job.scores + row * job.units;
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < job.units; ++i) {
    const int32_t key = key_of(scores[i]);
    job.keys[i] = key;
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  // The largest number that enough keys reach: halving where it can be is a few passes over what lies in the first cache.
  while (low < high) {
    const int32_t middle = static_cast<int32_t>((static_cast<int64_t>(low) + high + 1) >> 1);
    const int64_t reach = Way::count_from(job.keys, job.units, middle);
    if (reach >= job.count) {
      low = middle;
      if (reach == job.count) break;
    } else {
      high = middle - 1;
    }
  }
  const int64_t above = low == INT32_MAX ? 0 : Way::count_from(job.keys, job.units, low + 1);
  Way::take(job, low, job.count - above, job.chosen + row * job.count * job.size);
}

}  // namespace
}  // namespace hf_sparse
