// Asks the operating system for large pages, which save most of the address look-ups of a long scan.
#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hf_sparse {

void advise_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (start < end) (void)madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // a wish: failure costs nothing
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace hf_sparse
