// Kernels for processors with AVX-512 and its bfloat16 products (AVX512-F, -BW, -VL, -VBMI2, -BF16).
#include "kernels.h"

#if defined(HF_SPARSE_AVX512) && (defined(__x86_64__) || defined(_M_X64))

#include "avx512.h"

#if defined(__GNUC__) || defined(__clang__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

namespace hf_sparse {
namespace {

// Tokens in a tile. Of the 32 registers, 4 stripes x 6 tokens or 2 stripes x 14 tokens take 24 or 28 for sums.
constexpr int64_t dense_tile = 6;
constexpr int64_t sparse_tile = 14;
constexpr int64_t least_tokens = 4;  // of a tile that is not the only one

static Tiles tiles_of(const Job& job) {
  if (!job.masks) return tiles_of(job.tokens, dense_tile);
  if (job.tokens <= sparse_tile) return tiles_of(job.tokens, sparse_tile);
  // The first tile expands the weights, which takes as long as the products of ten tokens: it gets as many as it can.
  return tiles_of(job.tokens, sparse_tile, smaller(sparse_tile, job.tokens - least_tokens));
}

static INLINE __m512i spread(const uint16_t* pair) {
  int32_t both;
  std::memcpy(&both, pair, sizeof both);
  return _mm512_set1_epi32(both);
}

static INLINE __m512 add_products(__m512 sum, __m512i weights, __m512i inputs) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)inputs);
}

template <int tokens, int stripes>
struct Sums {
  __m512 of[tokens][stripes];

  INLINE void start() {
    UNROLL for (int t = 0; t < tokens; ++t) {
      UNROLL for (int s = 0; s < stripes; ++s) of[t][s] = _mm512_setzero_ps();
    }
  }
  INLINE void read(const float* from) {
    UNROLL for (int t = 0; t < tokens; ++t) {
      UNROLL for (int s = 0; s < stripes; ++s) of[t][s] = _mm512_loadu_ps(from + t * group_rows + s * stripe_rows);
    }
  }
  INLINE void write(float* to) const {
    UNROLL for (int t = 0; t < tokens; ++t) {
      UNROLL for (int s = 0; s < stripes; ++s) _mm512_storeu_ps(to + t * group_rows + s * stripe_rows, of[t][s]);
    }
  }
  INLINE void add(const Sums& other) {
    UNROLL for (int t = 0; t < tokens; ++t) {
      UNROLL for (int s = 0; s < stripes; ++s) of[t][s] = _mm512_add_ps(of[t][s], other.of[t][s]);
    }
  }
  INLINE void add(const __m512i* weights, const uint16_t* inputs) {
    UNROLL for (int t = 0; t < tokens; ++t) {
      const __m512i input = spread(inputs + 2 * t);
      UNROLL for (int s = 0; s < stripes; ++s) of[t][s] = add_products(of[t][s], weights[s], input);
    }
  }
  template <class Input>
  INLINE void add_piece(const uint16_t* const* piece, int64_t pair, const Input* inputs) {
    __m512i weights[stripes];
    UNROLL for (int s = 0; s < stripes; ++s) weights[s] = _mm512_loadu_si512(piece[s] + pair * pair_weights);
    add(weights, inputs + 2 * tokens * pair);
  }
  INLINE void add(const __m512i* weights, const float* inputs) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    UNROLL for (int s = 0; s < stripes; ++s) {
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(weights[s], 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(weights[s], high));
      UNROLL for (int t = 0; t < tokens; ++t) {
        of[t][s] = _mm512_fmadd_ps(even, _mm512_set1_ps(inputs[2 * t]), of[t][s]);
        of[t][s] = _mm512_fmadd_ps(odd, _mm512_set1_ps(inputs[2 * t + 1]), of[t][s]);
      }
    }
  }
};

constexpr int64_t depth = 128;  // pairs in a piece: two stripes of them are 16 KiB, which stay in the first cache
constexpr int64_t panel_weights = 2 * depth * pair_weights;

template <int tokens, class Input>
static void multiply_dense(const Input* inputs, const uint16_t* const* pieces, int64_t pairs, float* sums, bool first,
                           const uint16_t* ahead) {
  Sums<tokens, group_stripes> total;
  first ? total.start() : total.read(sums);
  const uint16_t* piece[group_stripes] = {pieces[0], pieces[1], pieces[2], pieces[3]};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (ahead) fetch(ahead + pair * pair_weights);
    total.add_piece(piece, pair, inputs);
  }
  total.write(sums);
}

// The dense control: the same products, with the weights where they lie.
template <class Input>
static void run_dense(const Job& job, int64_t index, float* sums) {
  const Group group = group_of(job, index);
  const Tiles tiles = tiles_of(job);
  for (int64_t pair = 0; pair < job.pairs; pair += depth) {
    const int64_t pairs = smaller(depth, job.pairs - pair);
    const uint16_t* pieces[group_stripes];
    for (int64_t s = 0; s < group_stripes; ++s) pieces[s] = job.values + (group.stripe[s] * job.pairs + pair) * pair_weights;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t start = tile_start(tiles, tile);
      const Input* inputs = static_cast<const Input*>(job.arranged) + arranged_place(job, pair, pairs, start);
      float* to = sums + start * group_rows;
      // With several tiles, each of the first four asks for the next piece of one stripe.
      const uint16_t* ahead = tiles.count > 1 && tile < group_stripes ? pieces[tile] + pairs * pair_weights : nullptr;
      switch (tile_start(tiles, tile + 1) - start) {
        case 1: multiply_dense<1>(inputs, pieces, pairs, to, pair == 0, ahead); break;
        case 2: multiply_dense<2>(inputs, pieces, pairs, to, pair == 0, ahead); break;
        case 3: multiply_dense<3>(inputs, pieces, pairs, to, pair == 0, ahead); break;
        case 4: multiply_dense<4>(inputs, pieces, pairs, to, pair == 0, ahead); break;
        case 5: multiply_dense<5>(inputs, pieces, pairs, to, pair == 0, ahead); break;
        default: multiply_dense<6>(inputs, pieces, pairs, to, pair == 0, ahead); break;
      }
    }
  }
  finish<Input>(job, group, sums, 0, job.tokens);
}

// Two stripes that are read from their beginning to their end.
struct Cursors {
  const uint32_t* masks[2];
  const uint16_t* values[2];
};

// One piece of two stripes, times one tile of tokens. The first tile expands the weights and leaves them in the panel for the
// others: waiting for the expansion and waiting for the products then coincide.
template <int tokens, bool expands, class Input>
static void multiply_piece(const Input* inputs, Cursors& cursors, uint16_t* panel, int64_t pairs, float* sums, bool first) {
  // A product waits for the one before it on the same sum: with few sums, every second pair of inputs has its own.
  constexpr int copies = 2 * tokens < 14 ? 2 : 1;
  Sums<tokens, 2> total[copies];
  total[copies - 1].start();
  first ? total[0].start() : total[0].read(sums);
  Cursors at = cursors;
  for (int64_t pair = 0; pair < pairs; pair += 2) {
    if (expands) {
      UNROLL for (int s = 0; s < 2; ++s) fetch(at.values[s] + values_ahead);
      if (pair % 16 == 0) {
        UNROLL for (int s = 0; s < 2; ++s) fetch(at.masks[s] + pair + masks_ahead);
      }
    }
    UNROLL for (int i = 0; i < 2; ++i, inputs += 2 * tokens, panel += 2 * pair_weights) {
      __m512i weights[2];
      UNROLL for (int s = 0; s < 2; ++s) {
        if (expands) {
          const uint32_t mask = at.masks[s][pair + i];
          weights[s] = expand_pair(mask, at.values[s]);
          at.values[s] += bits_of(mask);
          _mm512_storeu_si512(panel + s * pair_weights, weights[s]);
        } else {
          weights[s] = _mm512_loadu_si512(panel + s * pair_weights);
        }
      }
      total[i % copies].add(weights, inputs);
    }
  }
  if (copies == 2) total[0].add(total[copies - 1]);
  if (expands) cursors = {{at.masks[0] + pairs, at.masks[1] + pairs}, {at.values[0], at.values[1]}};
  total[0].write(sums);
}

template <bool expands, class Input>
static void multiply_tile(int64_t tokens, const Input* inputs, Cursors& cursors, uint16_t* panel, int64_t pairs, float* sums,
                          bool first) {
  switch (tokens) {
    case 4: return multiply_piece<4, expands>(inputs, cursors, panel, pairs, sums, first);
    case 5: return multiply_piece<5, expands>(inputs, cursors, panel, pairs, sums, first);
    case 6: return multiply_piece<6, expands>(inputs, cursors, panel, pairs, sums, first);
    case 7: return multiply_piece<7, expands>(inputs, cursors, panel, pairs, sums, first);
    case 8: return multiply_piece<8, expands>(inputs, cursors, panel, pairs, sums, first);
    case 9: return multiply_piece<9, expands>(inputs, cursors, panel, pairs, sums, first);
    case 10: return multiply_piece<10, expands>(inputs, cursors, panel, pairs, sums, first);
    case 11: return multiply_piece<11, expands>(inputs, cursors, panel, pairs, sums, first);
    case 12: return multiply_piece<12, expands>(inputs, cursors, panel, pairs, sums, first);
    case 13: return multiply_piece<13, expands>(inputs, cursors, panel, pairs, sums, first);
    default: return multiply_piece<14, expands>(inputs, cursors, panel, pairs, sums, first);
  }
}

// More tokens than one tile has.
template <class Input>
static void run_tiles(const Job& job, int64_t index, void* scratch) {
  const Group group = group_of(job, index);
  const Tiles tiles = tiles_of(job);
  uint16_t* panel = static_cast<uint16_t*>(scratch);
  float* sums = reinterpret_cast<float*>(panel + panel_weights);
  Cursors cursors[group_stripes / 2];
  for (int s = 0; s < group_stripes; ++s) {
    cursors[s / 2].masks[s % 2] = job.masks + group.stripe[s] * job.pairs;
    cursors[s / 2].values[s % 2] = job.values + job.offsets[group.stripe[s]];
  }
  for (int64_t pair = 0; pair < job.pairs; pair += depth) {
    const int64_t pairs = smaller(depth, job.pairs - pair);
    for (int64_t both = 0; both < (group.count + 1) / 2; ++both) {
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t start = tile_start(tiles, tile), tokens = tile_start(tiles, tile + 1) - start;
        const Input* inputs = static_cast<const Input*>(job.arranged) + arranged_place(job, pair, pairs, start);
        float* to = sums + start * group_rows + 2 * both * stripe_rows;
        if (tile == 0) {
          multiply_tile<true>(tokens, inputs, cursors[both], panel, pairs, to, pair == 0);
        } else {
          multiply_tile<false>(tokens, inputs, cursors[both], panel, pairs, to, pair == 0);
        }
      }
    }
  }
  finish<Input>(job, group, sums, 0, job.tokens);
}

template <class Input>
static int64_t scratch_bytes(const Job& job) {
  return panel_weights * 2 + job.tokens * group_rows * static_cast<int64_t>(sizeof(float));
}

// Few tokens: what is expanded goes straight into the products and never to memory. As many stripes are done at a time as there
// are registers for their sums.
template <class Input, int tokens, int stripes>
static void run_direct(const Job& job, int64_t index, float* sums) {
  const Group group = group_of(job, index);
  const Group next = group_of(job, smaller(index + 1, (job.stripes - 1) / group_stripes));
  for (int64_t first = 0; first < group.count; first += stripes) {
    const Input* inputs = static_cast<const Input*>(job.arranged);
    const uint32_t *masks[stripes], *later_masks[stripes];
    const uint16_t *values[stripes], *later_values[stripes];
    const bool inside = first + stripes < group_stripes;  // what comes later is in this group
    for (int s = 0; s < stripes; ++s) {
      const int64_t stripe = group.stripe[first + s], later = inside ? group.stripe[first + stripes + s] : next.stripe[s];
      masks[s] = job.masks + stripe * job.pairs;
      values[s] = job.values + job.offsets[stripe];
      later_masks[s] = job.masks + later * job.pairs;
      later_values[s] = job.values + job.offsets[later];
    }
    Sums<tokens, stripes> total;
    total.start();
    for (int64_t pair = 0; pair < job.pairs; pair += 2) {
      UNROLL for (int s = 0; s < stripes; ++s) fetch(values[s] + values_ahead);
      if (pair % 16 == 0) {
        UNROLL for (int s = 0; s < stripes; ++s) fetch(masks[s] + pair + masks_ahead);
        if (pair < masks_ahead) {  // the beginning of the next stripes, a line at a time
          UNROLL for (int s = 0; s < stripes; ++s) fetch(later_masks[s] + pair);
          UNROLL for (int s = 0; s < stripes; ++s) fetch(later_values[s] + 4 * pair);
          UNROLL for (int s = 0; s < stripes; ++s) fetch(later_values[s] + 4 * pair + 32);
        }
      }
      UNROLL for (int i = 0; i < 2; ++i, inputs += 2 * tokens) {
        __m512i weights[stripes];
        UNROLL for (int s = 0; s < stripes; ++s) {
          const uint32_t mask = masks[s][pair + i];
          weights[s] = expand_pair(mask, values[s]);
          values[s] += bits_of(mask);
        }
        total.add(weights, inputs);
      }
    }
    total.write(sums + first * stripe_rows);
  }
  finish<Input>(job, group, sums, 0, tokens);
}

template <class Input>
static void run(const Job& job, int64_t index, void* scratch) {
  float* sums = static_cast<float*>(scratch);
  if (!job.masks) return run_dense<Input>(job, index, sums);
  switch (job.tokens) {
    case 1: return run_direct<Input, 1, 4>(job, index, sums);
    case 2: return run_direct<Input, 2, 4>(job, index, sums);
    case 3: return run_direct<Input, 3, 4>(job, index, sums);
    case 4: return run_direct<Input, 4, 4>(job, index, sums);
    case 5: return run_direct<Input, 5, 4>(job, index, sums);
    case 6: return run_direct<Input, 6, 4>(job, index, sums);
    case 7: return run_direct<Input, 7, 2>(job, index, sums);
    case 8: return run_direct<Input, 8, 2>(job, index, sums);
    case 9: return run_direct<Input, 9, 2>(job, index, sums);
    case 10: return run_direct<Input, 10, 2>(job, index, sums);
    case 11: return run_direct<Input, 11, 2>(job, index, sums);
    case 12: return run_direct<Input, 12, 2>(job, index, sums);
    case 13: return run_direct<Input, 13, 2>(job, index, sums);
    case 14: return run_direct<Input, 14, 2>(job, index, sums);
    default: return run_tiles<Input>(job, index, scratch);
  }
}

static int64_t arranged_tiles(const Job& job) { return tiles_of(job).count; }

template <class Input>
static void arrange(const Job& job, int64_t tile) {
  arrange_pairs<Input, depth>(job, tiles_of(job), tile);
}

template <class Input>
constexpr Kernels table{"avx512", 256, group_size, arranged_bytes<Input>, arranged_tiles, arrange<Input>,
                        scratch_bytes<Input>, nullptr, nullptr, run<Input>};

}  // namespace

const Kernels* avx512_kernels(bool single_precision) { return single_precision ? &table<float> : &table<uint16_t>; }

}  // namespace hf_sparse

#else

namespace hf_sparse {

const Kernels* avx512_kernels(bool) { return nullptr; }

}  // namespace hf_sparse

#endif
