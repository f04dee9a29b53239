// What the instruction sets share: groups of stripes, tiles of tokens, and an order of work in which a group of stripes is expanded
// piece by piece into a panel that stays in the cache, and each piece is multiplied with all tokens while the sums of the group stay
// in the cache as well.
//
// This file is compiled once per instruction set, with that set's compiler flags. Everything in it has internal linkage and uses
// nothing of the standard library: the linker keeps one copy of a shared inline function, and that copy could hold instructions
// that other processors do not have.
#pragma once

#include "kernels.h"
#include "layout.h"

namespace hf_sparse {
namespace {

constexpr int64_t group_stripes = 4;  // worked on together: 64 outputs
constexpr int64_t group_rows = group_stripes * stripe_rows;

static inline int64_t group_size(const Job&) { return group_stripes; }

static inline int64_t smaller(int64_t first, int64_t second) { return first < second ? first : second; }

// The stripes of one group. Where there are fewer than four, the last stands in for the missing ones, whose sums are dropped.
struct Group {
  int64_t first, count;
  int64_t stripe[group_stripes];
};

static inline Group group_of(const Job& job, int64_t index) {
  Group group{index * group_stripes, smaller(group_stripes, job.stripes - index * group_stripes), {}};
  for (int64_t i = 0; i < group_stripes; ++i) {
    const int64_t place = group.first + smaller(i, group.count - 1);
    group.stripe[i] = job.selected ? job.selected[place] : place;
  }
  return group;
}

template <class Element>
struct Outputs;

template <>
struct Outputs<uint16_t> {
  static inline float bias(const void* all, int64_t row) { return widen(static_cast<const uint16_t*>(all)[row]); }
  static inline uint16_t value(float sum) { return narrow(sum); }
};

template <>
struct Outputs<float> {
  static inline float bias(const void* all, int64_t row) { return static_cast<const float*>(all)[row]; }
  static inline float value(float sum) { return sum; }
};

// Adds the bias, rounds once and stores. `sums` holds 64 numbers per token. With a selection every row of a stripe has a place.
template <class Element>
static void finish(const Job& job, const Group& group, const float* sums, int64_t first_token, int64_t tokens) {
  const int64_t start = group.first * stripe_rows;
  const int64_t end = job.selected ? start + group.count * stripe_rows : smaller(start + group_rows, job.rows);
  float bias[group_rows] = {};
  if (job.bias) {
    for (int64_t row = start; row < end; ++row) bias[row - start] = Outputs<Element>::bias(job.bias, row);
  }
  for (int64_t token = 0; token < tokens; ++token) {
    Element* to = static_cast<Element*>(job.outputs) + (first_token + token) * job.output_stride + start;
    const float* from = sums + token * group_rows;
    for (int64_t i = 0; i < end - start; ++i) to[i] = Outputs<Element>::value(from[i] + bias[i]);
  }
}

// A piece of the panel is `Kernel::depth` pairs deep. Kernel::expand fills a piece of one stripe and moves the cursor on;
// Kernel::dense gives a piece of a dense stripe, converted into the same place or where it lies. Kernel::tiles multiplies.
template <class Kernel>
static void run_panel(const Job& job, int64_t index, void* scratch) {
  using Weight = typename Kernel::Weight;
  const Group group = group_of(job, index);
  Weight* panel = static_cast<Weight*>(scratch);
  const int64_t panel_weights = Kernel::depth * pair_weights;
  float* sums = reinterpret_cast<float*>(panel + group_stripes * panel_weights);
  const uint16_t* cursor[group_stripes];
  for (int64_t i = 0; i < group_stripes; ++i) {
    cursor[i] = job.masks ? job.values + job.offsets[group.stripe[i]] : nullptr;
  }
  for (int64_t pair = 0; pair < job.pairs; pair += Kernel::depth) {
    const int64_t pairs = smaller(Kernel::depth, job.pairs - pair);
    const Weight* pieces[group_stripes];
    for (int64_t i = 0; i < group_stripes; ++i) {
      if (i >= group.count) {
        pieces[i] = pieces[i - 1];
        continue;
      }
      const int64_t begin = group.stripe[i] * job.pairs + pair;
      Weight* piece = panel + i * panel_weights;
      if (job.masks) {
        cursor[i] = Kernel::expand(job.masks + begin, pairs, cursor[i], piece);
        pieces[i] = piece;
      } else {
        pieces[i] = Kernel::dense(job.values + begin * pair_weights, pairs, piece);
      }
    }
    Kernel::multiply(job, pieces, pair, pairs, sums);
  }
  finish<typename Kernel::Element>(job, group, sums, 0, job.tokens);
}

template <class Kernel>
static int64_t panel_scratch(const Job& job) {
  return group_stripes * Kernel::depth * pair_weights * static_cast<int64_t>(sizeof(typename Kernel::Weight)) +
         job.tokens * group_rows * static_cast<int64_t>(sizeof(float));
}

// Tokens are taken in tiles of nearly equal size, so that none is left with very few. The first may have another size.
struct Tiles {
  int64_t count, first, small, larger;  // after the first, `larger` tiles have small + 1 tokens and the others `small`
};

static inline Tiles tiles_of(int64_t tokens, int64_t largest, int64_t first) {
  const int64_t others = (tokens - first + largest - 1) / largest;
  if (others == 0) return {1, first, 0, 0};
  return {others + 1, first, (tokens - first) / others, (tokens - first) % others};
}

static inline Tiles tiles_of(int64_t tokens, int64_t largest) {
  const int64_t count = (tokens + largest - 1) / largest;
  return tiles_of(tokens, largest, (tokens + count - 1) / count);
}

static inline int64_t tile_start(const Tiles& tiles, int64_t tile) {
  return tile == 0 ? 0 : tiles.first + (tile - 1) * tiles.small + smaller(tile - 1, tiles.larger);
}

// Where the inputs of a tile lie for the piece that begins with a pair. Pieces follow one another, in a piece the tiles, and in a
// tile the pairs, each with its tokens: the order in which they are read.
static inline int64_t arranged_place(const Job& job, int64_t pair, int64_t pairs, int64_t token) {
  return 2 * (pair * job.tokens + token * pairs);
}

// Arranges a tile. Inputs beyond the last column are zero.
template <class Element, int64_t depth>
static void arrange_pairs(const Job& job, const Tiles& tiles, int64_t tile) {
  const int64_t start = tile_start(tiles, tile);
  const int64_t tokens = tile_start(tiles, tile + 1) - start;
  const Element* from = static_cast<const Element*>(job.inputs) + start * job.columns;
  for (int64_t piece = 0; piece < job.pairs; piece += depth) {
    const int64_t pairs = smaller(depth, job.pairs - piece);
    Element* to = static_cast<Element*>(job.arranged) + arranged_place(job, piece, pairs, start);
    for (int64_t pair = piece; pair < piece + pairs; ++pair) {
      for (int64_t token = 0; token < tokens; ++token, to += 2) {
        const Element* here = from + token * job.columns + 2 * pair;
        if (2 * pair + 1 < job.columns) {
          std::memcpy(to, here, 2 * sizeof(Element));
        } else {
          to[0] = 2 * pair < job.columns ? *here : Element{};
          to[1] = Element{};
        }
      }
    }
  }
}

template <class Element>
static int64_t arranged_bytes(const Job& job) {
  return job.tokens * job.pairs * 2 * static_cast<int64_t>(sizeof(Element));
}

}  // namespace
}  // namespace hf_sparse
