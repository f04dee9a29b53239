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

constexpr int largest_tile = 6;  // 6 tokens x 4 stripes are 24 registers of sums; 4 of weights and some of inputs fit beside them

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

constexpr int64_t most_direct = 16;  // tokens for which nothing is expanded into memory
constexpr int64_t depth = 128;  // pairs in a piece: four stripes of them are 32 KiB

// What a tile does beside its products. Expanding the next piece costs little there: it waits for other units of the processor.
struct Nothing {
  INLINE void step(int64_t) {}
};

template <int stripes>
struct Expand {
  const uint32_t* masks[stripes];
  const uint16_t* values[stripes];
  uint16_t* piece[stripes];

  INLINE void step(int64_t pair) {
    UNROLL for (int s = 0; s < stripes; ++s) {
      const uint32_t mask = masks[s][pair];
      fetch(values[s] + values_ahead);
      if (pair % 16 == 0) fetch(masks[s] + pair + masks_ahead);
      _mm512_storeu_si512(piece[s] + pair * pair_weights, expand_pair(mask, values[s]));
      values[s] += bits_of(mask);
    }
  }
};

struct Fetch {
  const uint16_t* piece;

  INLINE void step(int64_t pair) { fetch(piece + pair * pair_weights); }
};

template <int tokens, class Input, class Side>
static INLINE void multiply_tile(const Input* inputs, const uint16_t* const* pieces, int64_t pairs, float* sums, bool first,
                                 Side& side, int64_t side_pairs) {
  Side own = side;  // a copy stays in registers, while the compiler must suppose that stores change what lies in memory
  Sums<tokens, group_stripes> total;
  first ? total.start() : total.read(sums);
  const uint16_t* piece[group_stripes] = {pieces[0], pieces[1], pieces[2], pieces[3]};
  int64_t pair = 0;
  for (; pair < side_pairs; ++pair) {
    total.add_piece(piece, pair, inputs);
    own.step(pair);
  }
  side = own;
  for (; pair < pairs; ++pair) total.add_piece(piece, pair, inputs);
  total.write(sums);
}

template <class Input, class Side>
static void multiply_some(int64_t tokens, const Input* inputs, const uint16_t* const* pieces, int64_t pairs, float* sums,
                          bool first, Side& side, int64_t side_pairs) {
  switch (tokens) {
    case 1: return multiply_tile<1>(inputs, pieces, pairs, sums, first, side, side_pairs);
    case 2: return multiply_tile<2>(inputs, pieces, pairs, sums, first, side, side_pairs);
    case 3: return multiply_tile<3>(inputs, pieces, pairs, sums, first, side, side_pairs);
    case 4: return multiply_tile<4>(inputs, pieces, pairs, sums, first, side, side_pairs);
    case 5: return multiply_tile<5>(inputs, pieces, pairs, sums, first, side, side_pairs);
    default: return multiply_tile<6>(inputs, pieces, pairs, sums, first, side, side_pairs);
  }
}

// A group of stripes whose next piece is expanded while the present one is multiplied; there are at least two tiles of tokens.
template <class Input>
class Pieces {
 public:
  Pieces(const Job& job, int64_t index, void* scratch)
      : job_(job), group_(group_of(job, index)), tiles_(tiles_of(job.tokens, largest_tile)),
        panel_(static_cast<uint16_t*>(scratch)), sums_(reinterpret_cast<float*>(panel_ + 2 * panel_weights)) {
    for (int64_t s = 0; s < group_.count; ++s) {
      masks_[s] = job.masks + group_.stripe[s] * job.pairs;
      values_[s] = job.values + job.offsets[group_.stripe[s]];
    }
  }

  void run() {
    for (int64_t s = 0; s < group_.count; ++s) values_[s] = expand_piece(masks_[s], smaller(depth, job_.pairs), values_[s], place(0, s));
    for (int64_t pair = 0; pair < job_.pairs; pair += depth) multiply(pair);
    finish<Input>(job_, group_, sums_, 0, job_.tokens);
  }

  static constexpr int64_t panel_weights = group_stripes * depth * pair_weights;

 private:
  uint16_t* place(int64_t piece, int64_t stripe) { return panel_ + (piece % 2) * panel_weights + stripe * depth * pair_weights; }

  void multiply(int64_t pair) {
    const int64_t pairs = smaller(depth, job_.pairs - pair), next = smaller(depth, job_.pairs - pair - pairs);
    const uint16_t* pieces[group_stripes];
    for (int64_t s = 0; s < group_stripes; ++s) pieces[s] = place(pair / depth, smaller(s, group_.count - 1));
    int64_t stripe = 0;  // the first whose next piece is not expanded yet
    for (int64_t tile = 0; tile < tiles_.count; ++tile) {
      const int64_t start = tile_start(tiles_, tile), tokens = tile_start(tiles_, tile + 1) - start;
      const Input* inputs = static_cast<const Input*>(job_.arranged) + arranged_place(job_, pair, pairs, start);
      const int64_t left = next > 0 ? group_.count - stripe : 0;
      const auto beside = [&](auto side) {
        multiply_some(tokens, inputs, pieces, pairs, sums_ + start * group_rows, pair == 0, side, next);
        return side;
      };
      if (left > tiles_.count - tile) {
        const auto side = beside(Expand<2>{{masks_[stripe] + pair + pairs, masks_[stripe + 1] + pair + pairs},
                                           {values_[stripe], values_[stripe + 1]},
                                           {place(pair / depth + 1, stripe), place(pair / depth + 1, stripe + 1)}});
        values_[stripe++] = side.values[0];
        values_[stripe++] = side.values[1];
      } else if (left > 0) {
        const auto side = beside(Expand<1>{{masks_[stripe] + pair + pairs}, {values_[stripe]}, {place(pair / depth + 1, stripe)}});
        values_[stripe++] = side.values[0];
      } else {
        Nothing nothing;
        multiply_some(tokens, inputs, pieces, pairs, sums_ + start * group_rows, pair == 0, nothing, 0);
      }
    }
  }

  const Job& job_;
  const Group group_;
  const Tiles tiles_;
  uint16_t* panel_;
  float* sums_;
  const uint32_t* masks_[group_stripes] = {};
  const uint16_t* values_[group_stripes] = {};
};

// The dense control: the same products, with the weights where they lie.
template <class Input>
static void run_dense(const Job& job, int64_t index, float* sums) {
  const Group group = group_of(job, index);
  const Tiles tiles = tiles_of(job.tokens, largest_tile);
  for (int64_t pair = 0; pair < job.pairs; pair += depth) {
    const int64_t pairs = smaller(depth, job.pairs - pair), next = smaller(depth, job.pairs - pair - pairs);
    const uint16_t* pieces[group_stripes];
    for (int64_t s = 0; s < group_stripes; ++s) pieces[s] = job.values + (group.stripe[s] * job.pairs + pair) * pair_weights;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t start = tile_start(tiles, tile), tokens = tile_start(tiles, tile + 1) - start;
      const Input* inputs = static_cast<const Input*>(job.arranged) + arranged_place(job, pair, pairs, start);
      Fetch fetch_next{pieces[smaller(tile, group_stripes - 1)] + pairs * pair_weights};
      multiply_some(tokens, inputs, pieces, pairs, sums + start * group_rows, pair == 0, fetch_next,
                    tiles.count > 1 && tile < group_stripes ? next : 0);
    }
  }
  finish<Input>(job, group, sums, 0, job.tokens);
}

template <class Input>
static int64_t scratch_bytes(const Job& job) {
  return 2 * Pieces<Input>::panel_weights * 2 + job.tokens * group_rows * static_cast<int64_t>(sizeof(float));
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
    case 15: return run_direct<Input, 15, 1>(job, index, sums);
    case 16: return run_direct<Input, 16, 1>(job, index, sums);
    default: return Pieces<Input>(job, index, scratch).run();
  }
}

static bool is_direct(const Job& job) { return job.masks && job.tokens <= most_direct; }

static int64_t arranged_parts(const Job& job) { return is_direct(job) ? 1 : tiles_of(job.tokens, largest_tile).count; }

template <class Input>
static void arrange(const Job& job, int64_t tile) {
  is_direct(job) ? arrange_pairs<Input, most_direct, depth>(job, tile) : arrange_pairs<Input, largest_tile, depth>(job, tile);
}

template <class Input>
constexpr Kernels table{"avx512", arranged_bytes<Input>, arranged_parts, arrange<Input>, scratch_bytes<Input>, nullptr, nullptr, run<Input>};

}  // namespace

const Kernels* avx512_kernels(bool single_precision) { return single_precision ? &table<float> : &table<uint16_t>; }

}  // namespace hf_sparse

#else

namespace hf_sparse {

const Kernels* avx512_kernels(bool) { return nullptr; }

}  // namespace hf_sparse

#endif
