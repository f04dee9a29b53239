#include "largest_row.h"

namespace hf_sparse {
namespace {

struct Portable {
  static int64_t count_from(const int32_t* keys, int64_t units, int32_t least) {
    int32_t found = 0;  // a row has fewer than 2^31 units
    for (int64_t i = 0; i < units; ++i) found += keys[i] >= least ? 1 : 0;
    return found;
  }

  static void take(const Largest& job, int32_t least, int64_t equal, int64_t* to) {
    for (int64_t i = 0; i < job.units; ++i) {
      const bool same = job.keys[i] == least;
      if (job.keys[i] > least || (same && equal > 0)) to = take_one(i, job.size, to);
      equal -= same ? 1 : 0;
    }
  }
};

}  // namespace

void largest_portable(const Largest& job) {
  for (int64_t row = 0; row < job.rows; ++row) choose_row<Portable>(job, row);
}

}  // namespace hf_sparse
