// Kernels for processors with AVX-512 and its bfloat16 products (AVX512-F, -BW, -VL, -VBMI2, -BF16).
#include "kernels.h"

#if defined(HF_SPARSE_AVX512) && (defined(__x86_64__) || defined(_M_X64))

#include "avx512.h"

#if defined(__GNUC__) || defined(__clang__)
#define UNROLL _Pragma("GCC unroll 8")
#else
#define UNROLL
#endif

namespace hf_sparse {
namespace {

constexpr int largest_tile = 6;  // 6 tokens x 4 stripes are 24 registers of sums; 4 of weights and some of inputs fit beside them

static inline __m512i spread(const uint16_t* pair) {
  int32_t both;
  std::memcpy(&both, pair, sizeof both);
  return _mm512_set1_epi32(both);
}

static inline __m512 add_products(__m512 sum, __m512i weights, __m512i inputs) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)inputs);
}

template <int tokens>
struct Sums {
  __m512 of[tokens][group_stripes];

  inline void start() {
    UNROLL for (int t = 0; t < tokens; ++t) {
      UNROLL for (int s = 0; s < group_stripes; ++s) of[t][s] = _mm512_setzero_ps();
    }
  }
  inline void read(const float* from) {
    UNROLL for (int t = 0; t < tokens; ++t) {
      UNROLL for (int s = 0; s < group_stripes; ++s) of[t][s] = _mm512_loadu_ps(from + t * group_rows + s * stripe_rows);
    }
  }
  inline void write(float* to) const {
    UNROLL for (int t = 0; t < tokens; ++t) {
      UNROLL for (int s = 0; s < group_stripes; ++s) _mm512_storeu_ps(to + t * group_rows + s * stripe_rows, of[t][s]);
    }
  }
  inline void add(const __m512i* weights, const uint16_t* inputs) {
    UNROLL for (int t = 0; t < tokens; ++t) {
      const __m512i input = spread(inputs + 2 * t);
      UNROLL for (int s = 0; s < group_stripes; ++s) of[t][s] = add_products(of[t][s], weights[s], input);
    }
  }
  inline void add(const __m512i* weights, const float* inputs) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    UNROLL for (int s = 0; s < group_stripes; ++s) {
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(weights[s], 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(weights[s], high));
      UNROLL for (int t = 0; t < tokens; ++t) {
        of[t][s] = _mm512_fmadd_ps(even, _mm512_set1_ps(inputs[2 * t]), of[t][s]);
        of[t][s] = _mm512_fmadd_ps(odd, _mm512_set1_ps(inputs[2 * t + 1]), of[t][s]);
      }
    }
  }
};

template <class Input>
struct Avx512 {
  using Weight = uint16_t;
  using Element = Input;
  static constexpr int64_t depth = 128;  // four stripes of this depth are 32 KiB: the panel stays in the first cache

  static const uint16_t* expand(const uint32_t* masks, int64_t pairs, const uint16_t* values, uint16_t* panel) {
    return expand_piece(masks, pairs, values, panel);
  }
  static const uint16_t* dense(const uint16_t* values, int64_t, uint16_t*) { return values; }

  template <int tokens>
  static void tile(const Input* inputs, const uint16_t* const* pieces, int64_t pairs, float* sums, bool first) {
    Sums<tokens> total;
    first ? total.start() : total.read(sums);
    for (int64_t pair = 0; pair < pairs; ++pair, inputs += 2 * tokens) {
      __m512i weights[group_stripes];
      UNROLL for (int s = 0; s < group_stripes; ++s) weights[s] = _mm512_loadu_si512(pieces[s] + pair * pair_weights);
      total.add(weights, inputs);
    }
    total.write(sums);
  }

  static void multiply(const Job& job, const uint16_t* const* pieces, int64_t pair, int64_t pairs, float* sums) {
    const Tiles tiles = tiles_of(job.tokens, largest_tile);
    for (int64_t index = 0; index < tiles.count; ++index) {
      const int64_t start = tile_start(tiles, index);
      const int64_t tokens = tile_start(tiles, index + 1) - start;
      const Input* inputs = static_cast<const Input*>(job.arranged) + 2 * (start * job.pairs + pair * tokens);
      float* to = sums + start * group_rows;
      switch (tokens) {
        case 1: tile<1>(inputs, pieces, pairs, to, pair == 0); break;
        case 2: tile<2>(inputs, pieces, pairs, to, pair == 0); break;
        case 3: tile<3>(inputs, pieces, pairs, to, pair == 0); break;
        case 4: tile<4>(inputs, pieces, pairs, to, pair == 0); break;
        case 5: tile<5>(inputs, pieces, pairs, to, pair == 0); break;
        default: tile<6>(inputs, pieces, pairs, to, pair == 0); break;
      }
    }
  }
};

// Few tokens: what is expanded goes straight into the products and never to memory.
template <class Input, int tokens>
static void run_direct(const Job& job, int64_t index, float* sums) {
  const Group group = group_of(job, index);
  const Input* inputs = static_cast<const Input*>(job.arranged);
  const uint32_t* masks[group_stripes];
  const uint16_t* values[group_stripes];
  for (int s = 0; s < group_stripes; ++s) {
    masks[s] = job.masks + group.stripe[s] * job.pairs;
    values[s] = job.values + job.offsets[group.stripe[s]];
  }
  Sums<tokens> total;
  total.start();
  for (int64_t pair = 0; pair < job.pairs; ++pair, inputs += 2 * tokens) {
    __m512i weights[group_stripes];
    UNROLL for (int s = 0; s < group_stripes; ++s) {
      const uint32_t mask = masks[s][pair];
      weights[s] = expand_pair(mask, values[s]);
      values[s] += bits_of(mask);
    }
    total.add(weights, inputs);
  }
  total.write(sums);
  finish<Input>(job, group, sums, 0, tokens);
}

template <class Input>
static void run(const Job& job, int64_t index, void* scratch) {
  float* sums = static_cast<float*>(scratch);
  if (!job.masks) return run_panel<Avx512<Input>>(job, index, scratch);
  switch (job.tokens) {
    case 1: return run_direct<Input, 1>(job, index, sums);
    case 2: return run_direct<Input, 2>(job, index, sums);
    case 3: return run_direct<Input, 3>(job, index, sums);
    case 4: return run_direct<Input, 4>(job, index, sums);
    case 5: return run_direct<Input, 5>(job, index, sums);
    case 6: return run_direct<Input, 6>(job, index, sums);
    default: return run_panel<Avx512<Input>>(job, index, scratch);
  }
}

template <class Input>
constexpr Kernels table{"avx512", arranged_bytes<Input>, arranged_tiles<largest_tile>, arrange_pairs<Input, largest_tile>,
                        panel_scratch<Avx512<Input>>, nullptr, nullptr, run<Input>};

}  // namespace

const Kernels* avx512_kernels(bool single_precision) { return single_precision ? &table<float> : &table<uint16_t>; }

}  // namespace hf_sparse

#else

namespace hf_sparse {

const Kernels* avx512_kernels(bool) { return nullptr; }

}  // namespace hf_sparse

#endif
