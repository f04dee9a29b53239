// What a product is made of, and the table of functions that each instruction set fills in.
#pragma once

#include <cstdint>

namespace hf_sparse {

// One product y = x W^T (+ bias), as the kernels see it. `masks` and `offsets` are null for a dense weight, whose values are in
// the same order with nothing left out.
struct Job {
  const uint32_t* masks;
  const int64_t* offsets;
  const uint16_t* values;
  int64_t rows, columns, stripes, pairs;
  const int64_t* selected;  // indices of stripes, or null for all; `stripes` is how many there are to do
  const void* inputs;       // (tokens, columns), contiguous
  const void* bias;         // (rows), or null
  void* outputs;            // (tokens, output_stride)
  int64_t tokens, output_stride;
  void* arranged;           // the inputs in the order in which a kernel reads them
};

struct Kernels {
  const char* name;
  int64_t most_tokens;  // at a time: the inputs and the sums of a group should stay in the caches
  int64_t (*group_size)(const Job&);                                   // stripes that are worked on together
  int64_t (*arranged_bytes)(const Job&);
  int64_t (*arranged_tiles)(const Job&);                               // parts of the inputs that can be arranged apart
  void (*arrange)(const Job&, int64_t tile);
  int64_t (*scratch_bytes)(const Job&);                                // for each thread
  void (*enter)(const Job&);                                           // at the start of each thread's work, or null
  void (*leave)();
  void (*run)(const Job&, int64_t group, void* scratch);               // one group of stripes
};

enum class Set { portable, avx512, amx };

// Null where this build has no such kernels.
const Kernels* portable_kernels(bool single_precision);
const Kernels* avx512_kernels(bool single_precision);
const Kernels* amx_kernels();

const char* set_name(Set set);
bool processor_has(Set set);        // built in, and run by this processor and operating system
Set chosen_set(const char* wanted);  // null or empty: the best there is; throws std::invalid_argument

const Kernels* kernels_of(Set set, bool single_precision);

void multiply(const Kernels& kernels, Job job, bool single_precision, int threads);

}  // namespace hf_sparse
