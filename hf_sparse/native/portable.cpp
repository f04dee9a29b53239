// Kernels in plain C++: right on every processor, and fast where the compiler turns the inner loops into vector instructions.
#include "panel.h"

namespace hf_sparse {
namespace {

constexpr int64_t largest_tile = 4;

// The panel holds single precision numbers: for each pair of inputs first the 16 rows of the one, then those of the other.
template <class Input>
struct Portable {
  using Weight = float;
  using Element = Input;
  static constexpr int64_t depth = 64;

  static float number(uint16_t input) { return widen(input); }
  static float number(float input) { return input; }

  static const uint16_t* expand(const uint32_t* masks, int64_t pairs, const uint16_t* values, float* panel) {
    for (int64_t pair = 0; pair < pairs; ++pair, panel += pair_weights) {
      for (int64_t i = 0; i < pair_weights; ++i) panel[i] = 0.0f;
      for (uint32_t mask = masks[pair]; mask != 0; mask &= mask - 1) {
        const int bit = lowest_bit(mask);
        panel[(bit & 1) * stripe_rows + (bit >> 1)] = widen(*values++);
      }
    }
    return values;
  }

  static const float* dense(const uint16_t* values, int64_t pairs, float* panel) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      for (int64_t i = 0; i < stripe_rows; ++i) {
        panel[pair * pair_weights + i] = widen(values[pair * pair_weights + 2 * i]);
        panel[pair * pair_weights + stripe_rows + i] = widen(values[pair * pair_weights + 2 * i + 1]);
      }
    }
    return panel;
  }

  template <int tokens>
  static void tile(const Input* inputs, const float* piece, int64_t pairs, float* sums, bool first) {
    float sum[tokens][stripe_rows];
    for (int t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < stripe_rows; ++i) sum[t][i] = first ? 0.0f : sums[t * group_rows + i];
    }
    for (int64_t pair = 0; pair < pairs; ++pair, piece += pair_weights, inputs += 2 * tokens) {
      for (int t = 0; t < tokens; ++t) {
        const float even = number(inputs[2 * t]), odd = number(inputs[2 * t + 1]);
        for (int64_t i = 0; i < stripe_rows; ++i) sum[t][i] += even * piece[i] + odd * piece[stripe_rows + i];
      }
    }
    for (int t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < stripe_rows; ++i) sums[t * group_rows + i] = sum[t][i];
    }
  }

  static void multiply(const Job& job, const float* const* pieces, int64_t pair, int64_t pairs, float* sums) {
    const Tiles tiles = tiles_of(job.tokens, largest_tile);
    for (int64_t index = 0; index < tiles.count; ++index) {
      const int64_t start = tile_start(tiles, index);
      const int64_t tokens = tile_start(tiles, index + 1) - start;
      const Input* inputs = static_cast<const Input*>(job.arranged) + arranged_place(job, pair, pairs, start);
      for (int64_t i = 0; i < group_stripes; ++i) {
        float* to = sums + start * group_rows + i * stripe_rows;
        switch (tokens) {
          case 1: tile<1>(inputs, pieces[i], pairs, to, pair == 0); break;
          case 2: tile<2>(inputs, pieces[i], pairs, to, pair == 0); break;
          case 3: tile<3>(inputs, pieces[i], pairs, to, pair == 0); break;
          default: tile<4>(inputs, pieces[i], pairs, to, pair == 0); break;
        }
      }
    }
  }
};

static int64_t arranged_tiles(const Job& job) { return tiles_of(job.tokens, largest_tile).count; }

template <class Input>
static void arrange(const Job& job, int64_t tile) {
  arrange_pairs<Input, Portable<Input>::depth>(job, tiles_of(job.tokens, largest_tile), tile);
}

template <class Input>
constexpr Kernels table{"portable", 256, group_size, arranged_bytes<Input>, arranged_tiles, arrange<Input>,
                        panel_scratch<Portable<Input>>, nullptr, nullptr, run_panel<Portable<Input>>};

}  // namespace

const Kernels* portable_kernels(bool single_precision) {
  return single_precision ? &table<float> : &table<uint16_t>;
}

}  // namespace hf_sparse
