// Divides a product among threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"
#include "layout.h"
#include "threads.h"

namespace hf_sparse {
namespace {

constexpr int64_t work_of_a_thread = 1 << 18;  // products; less is done sooner than another thread is woken

// Memory that stays with its thread from one product to the next.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  void* reserve(int64_t bytes) {  // null where there is not enough; aligned to 64 bytes
    if (bytes > size_) {
      std::free(memory_);
      memory_ = std::malloc(static_cast<size_t>(bytes) + 64);
      size_ = memory_ ? bytes : 0;
    }
    if (!memory_) return nullptr;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

thread_local Scratch arranged_inputs, panels;

// What one thread does: arranges inputs, waits for the others, then takes groups of stripes as long as there are any.
void work(const Kernels& kernels, const Job& job, int64_t groups, int64_t at_a_time, Shared& shared) {
  void* scratch = panels.reserve(kernels.scratch_bytes(job));
  if (!scratch) shared.failed = true;
  const int64_t tiles = kernels.arranged_tiles(job);
  for (int64_t tile = shared.next_tile++; tile < tiles; tile = shared.next_tile++) kernels.arrange(job, tile);
  wait_for_all(shared);
  if (!scratch) return;
  if (kernels.enter) kernels.enter(job);
  for (int64_t first = shared.next_group.fetch_add(at_a_time); first < groups;
       first = shared.next_group.fetch_add(at_a_time)) {
    for (int64_t group = first; group < std::min(first + at_a_time, groups); ++group) kernels.run(job, group, scratch);
  }
  if (kernels.leave) kernels.leave();
}

}  // namespace

void multiply(const Kernels& kernels, Job job, bool single_precision, int threads) {
  const int64_t bytes = single_precision ? 4 : 2;
  const int64_t tokens = job.tokens;
  const int64_t rounds = (tokens + kernels.most_tokens - 1) / kernels.most_tokens;
  const char* inputs = static_cast<const char*>(job.inputs);
  char* outputs = static_cast<char*>(job.outputs);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t start = tokens * round / rounds;
    job.tokens = tokens * (round + 1) / rounds - start;
    job.inputs = inputs + start * job.columns * bytes;
    job.outputs = outputs + start * job.output_stride * bytes;
    job.arranged = arranged_inputs.reserve(kernels.arranged_bytes(job));
    if (!job.arranged) throw std::bad_alloc();
    const int64_t groups = (job.stripes + kernels.group_size(job) - 1) / kernels.group_size(job);
    const int64_t products = job.stripes * stripe_rows * job.pairs * 2 * std::min<int64_t>(job.tokens, 16);
    const int64_t useful = std::min(groups, products / work_of_a_thread + 1);
    const int team = static_cast<int>(std::min<int64_t>(allowed_threads(threads), useful));
    // A few portions for each thread: one that is held up leaves the rest to the others.
    const int64_t at_a_time = std::max<int64_t>(1, groups / (team * 8));
    Shared shared;
    on_threads(shared, team, [&] { work(kernels, job, groups, at_a_time, shared); });
    if (shared.failed) throw std::bad_alloc();
  }
}

}  // namespace hf_sparse
