#include "largest_row.h"

namespace hf_sparse {

void largest_portable(const Largest& job) {
  for (int64_t row = 0; row < job.rows; ++row) choose_row(job, row);
}

}  // namespace hf_sparse
