// The choice itself, compiled once per instruction set: the compiler turns its loops into vector instructions.
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

static inline int64_t count_from(const int32_t* keys, int64_t units, int32_t least) {
  int32_t found = 0;  // a row has fewer than 2^31 units
  for (int64_t i = 0; i < units; ++i) found += keys[i] >= least ? 1 : 0;
  return found;
}

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
    const int64_t reach = count_from(job.keys, job.units, middle);
    if (reach >= job.count) {
      low = middle;
      if (reach == job.count) break;
    } else {
      high = middle - 1;
    }
  }
  int64_t equal = job.count - (low == INT32_MAX ? 0 : count_from(job.keys, job.units, low + 1));
  int64_t* to = job.chosen + row * job.count * job.size;
  const int64_t* end = to + job.count * job.size;
  for (int64_t i = 0; i < job.units && to < end; ++i) {
    const bool same = job.keys[i] == low;
    const bool taken = job.keys[i] > low || (same && equal > 0);
    equal -= same ? 1 : 0;
    if (job.size == 1) {
      *to = i;  // overwritten where it is not taken
      to += taken ? 1 : 0;
    } else if (taken) {
      for (int64_t n = 0; n < job.size; ++n) *to++ = i * job.size + n;
    }
  }
}

}  // namespace
}  // namespace hf_sparse
