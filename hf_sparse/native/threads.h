// A team of threads: OpenMP's, which torch uses as well, or none where the compiler has no OpenMP.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hf_sparse {

struct Shared {
  int team = 1;
  std::atomic<int64_t> next_tile{0}, next_group{0};
  std::atomic<bool> failed{false};
};

// One inside a parallel region: teams within teams would be more threads than were allowed.
inline int allowed_threads(int wanted) {
#if defined(_OPENMP)
  return omp_in_parallel() || wanted < 1 ? 1 : wanted;
#else
  (void)wanted;
  return 1;
#endif
}

// The team is asked for, not omp_get_num_threads(): a lone caller inside somebody else's team must not wait for that.
inline void wait_for_all(const Shared& shared) {
#if defined(_OPENMP)
  if (shared.team > 1) {
#pragma omp barrier
  }
#endif
  (void)shared;
}

template <class Work>
void on_threads(Shared& shared, int threads, const Work& work) {
#if defined(_OPENMP)
  shared.team = threads;
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work();
    return;
  }
#endif
  (void)shared, (void)threads;
  work();
}

// Calls `each(stripe)` for all stripes; it must not throw.
template <class Each>
void for_stripes(int64_t stripes, int threads, const Each& each) {
  Shared shared;
  const int64_t at_a_time = 4;
  const int64_t useful = stripes / at_a_time + 1;
  const int team = allowed_threads(static_cast<int>(threads < useful ? threads : useful));
  on_threads(shared, team, [&] {
    for (int64_t first = shared.next_group.fetch_add(at_a_time); first < stripes;
         first = shared.next_group.fetch_add(at_a_time)) {
      for (int64_t stripe = first; stripe < first + at_a_time && stripe < stripes; ++stripe) each(stripe);
    }
  });
}

}  // namespace hf_sparse
