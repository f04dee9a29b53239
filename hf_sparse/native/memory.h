// Large pages for packed weights.
#pragma once

#include <cstdint>

namespace hf_sparse {

void advise_large_pages(void* memory, int64_t bytes);  // best before the memory is first written

}  // namespace hf_sparse
