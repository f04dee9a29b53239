#include "largest_row.h"

namespace hf_sparse {

#if defined(HF_SPARSE_AVX512) && (defined(__x86_64__) || defined(_M_X64))
void largest_avx512(const Largest& job) {
  for (int64_t row = 0; row < job.rows; ++row) choose_row(job, row);
}
#else
void largest_avx512(const Largest& job) { largest_portable(job); }
#endif

}  // namespace hf_sparse
