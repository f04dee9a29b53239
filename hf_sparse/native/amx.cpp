// Kernels for processors with matrix extensions (AMX-BF16). They have AVX-512 with VBMI2 as well, which expands the weights.
#include "kernels.h"

#if defined(HF_SPARSE_AMX) && defined(__x86_64__)

#include "avx512.h"
#include "tiles.h"

namespace hf_sparse {
namespace {

constexpr int64_t tile_tokens = 16;
constexpr int64_t tile_pairs = 16;
constexpr int64_t tile_numbers = 512;  // of 16 bits: 16 rows of 64 bytes
constexpr int64_t sums_stride = group_rows * static_cast<int64_t>(sizeof(float));

static int64_t token_tiles(const Job& job) { return (job.tokens + tile_tokens - 1) / tile_tokens; }

static int64_t bytes(const Job& job) { return token_tiles(job) * tile_tokens * job.pairs * 2 * 2; }

// Sixteen tokens after one another; of them, first their first 32 inputs, then the next. What is missing is zero.
static void arrange(const Job& job, int64_t tile) {
  const int64_t start = tile * tile_tokens;
  const int64_t tokens = smaller(tile_tokens, job.tokens - start);
  const uint16_t* from = static_cast<const uint16_t*>(job.inputs) + start * job.columns;
  uint16_t* to = static_cast<uint16_t*>(job.arranged) + start * job.pairs * 2;
  for (int64_t column = 0; column < job.pairs * 2; column += padded_inputs, to += tile_numbers) {
    const int64_t columns = smaller(padded_inputs, job.columns - column);
    std::memset(to, 0, tile_numbers * sizeof(uint16_t));
    for (int64_t token = 0; token < tokens; ++token) {
      std::memcpy(to + token * padded_inputs, from + token * job.columns + column, columns * sizeof(uint16_t));
    }
  }
}

// Tiles 0-3 hold sums, 4 and 5 inputs, 6 and 7 weights. With at most 16 tokens the rows are as many as the tokens.
static void enter(const Job& job) {
  TileConfiguration configuration{};
  configuration.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.row_bytes[tile] = 64;
    configuration.rows[tile] = static_cast<uint8_t>(tile < 6 ? smaller(tile_tokens, job.tokens) : tile_pairs);
  }
  tile_configure(configuration);
}

static void leave() { tile_release(); }

struct Amx {
  using Weight = uint16_t;
  using Element = uint16_t;
  static constexpr int64_t depth = 256;  // four stripes of this depth are 64 KiB: the panel stays in the second cache

  static const uint16_t* expand(const uint32_t* masks, int64_t pairs, const uint16_t* values, uint16_t* panel) {
    return expand_piece(masks, pairs, values, panel);
  }
  static const uint16_t* dense(const uint16_t* values, int64_t, uint16_t*) { return values; }

  // 32 tokens x 32 outputs.
  static void square(const uint16_t* inputs, int64_t inputs_stride, const uint16_t* left, const uint16_t* right, int64_t pairs,
                     float* sums, bool first) {
    float* below = sums + tile_tokens * group_rows;
    if (first) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
    } else {
      TILE_LOAD(0, sums, sums_stride);
      TILE_LOAD(1, sums + stripe_rows, sums_stride);
      TILE_LOAD(2, below, sums_stride);
      TILE_LOAD(3, below + stripe_rows, sums_stride);
    }
    for (int64_t pair = 0; pair < pairs; pair += tile_pairs) {
      TILE_LOAD(4, inputs + 2 * tile_tokens * pair, 64);
      TILE_LOAD(6, left + pair_weights * pair, 64);
      TILE_LOAD(7, right + pair_weights * pair, 64);
      TILE_LOAD(5, inputs + inputs_stride + 2 * tile_tokens * pair, 64);
      TILE_PRODUCTS(0, 4, 6);
      TILE_PRODUCTS(1, 4, 7);
      TILE_PRODUCTS(2, 5, 6);
      TILE_PRODUCTS(3, 5, 7);
    }
    TILE_STORE(0, sums, sums_stride);
    TILE_STORE(1, sums + stripe_rows, sums_stride);
    TILE_STORE(2, below, sums_stride);
    TILE_STORE(3, below + stripe_rows, sums_stride);
  }

  // 16 tokens x 64 outputs.
  static void row(const uint16_t* inputs, const uint16_t* const* pieces, int64_t pairs, float* sums, bool first) {
    if (first) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
    } else {
      TILE_LOAD(0, sums, sums_stride);
      TILE_LOAD(1, sums + stripe_rows, sums_stride);
      TILE_LOAD(2, sums + 2 * stripe_rows, sums_stride);
      TILE_LOAD(3, sums + 3 * stripe_rows, sums_stride);
    }
    for (int64_t pair = 0; pair < pairs; pair += tile_pairs) {
      TILE_LOAD(4, inputs + 2 * tile_tokens * pair, 64);
      TILE_LOAD(6, pieces[0] + pair_weights * pair, 64);
      TILE_LOAD(7, pieces[1] + pair_weights * pair, 64);
      TILE_PRODUCTS(0, 4, 6);
      TILE_PRODUCTS(1, 4, 7);
      TILE_LOAD(6, pieces[2] + pair_weights * pair, 64);
      TILE_LOAD(7, pieces[3] + pair_weights * pair, 64);
      TILE_PRODUCTS(2, 4, 6);
      TILE_PRODUCTS(3, 4, 7);
    }
    TILE_STORE(0, sums, sums_stride);
    TILE_STORE(1, sums + stripe_rows, sums_stride);
    TILE_STORE(2, sums + 2 * stripe_rows, sums_stride);
    TILE_STORE(3, sums + 3 * stripe_rows, sums_stride);
  }

  static void multiply(const Job& job, const uint16_t* const* pieces, int64_t pair, int64_t pairs, float* sums) {
    const int64_t tile = 2 * tile_tokens * job.pairs;  // arranged numbers of 16 tokens
    const uint16_t* inputs = static_cast<const uint16_t*>(job.arranged) + 2 * tile_tokens * pair;
    const int64_t tiles = token_tiles(job);
    for (int64_t i = 0; i + 1 < tiles; i += 2) {
      float* to = sums + i * tile_tokens * group_rows;
      square(inputs + i * tile, tile, pieces[0], pieces[1], pairs, to, pair == 0);
      square(inputs + i * tile, tile, pieces[2], pieces[3], pairs, to + 2 * stripe_rows, pair == 0);
    }
    if (tiles % 2 != 0) {
      row(inputs + (tiles - 1) * tile, pieces, pairs, sums + (tiles - 1) * tile_tokens * group_rows, pair == 0);
    }
  }
};

// At most 16 tokens: a tile is expanded just before it is used, so that expanding the next runs beside the products.
static void run_small(const Job& job, int64_t index, uint16_t* panel, float* sums) {
  const Group group = group_of(job, index);
  const uint16_t* inputs = static_cast<const uint16_t*>(job.arranged);
  const uint32_t* masks[group_stripes];
  const uint16_t* values[group_stripes];
  for (int s = 0; s < group_stripes; ++s) {
    masks[s] = job.masks + group.stripe[s] * job.pairs;
    values[s] = job.values + job.offsets[group.stripe[s]];
  }
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t pair = 0; pair < job.pairs; pair += tile_pairs, inputs += tile_numbers) {
    uint16_t* place = panel + (pair / tile_pairs % 2) * group_stripes * tile_numbers;
    for (int s = 0; s < group_stripes; ++s) {
      values[s] = expand_piece(masks[s] + pair, tile_pairs, values[s], place + s * tile_numbers);
    }
    TILE_LOAD(4, inputs, 64);
    TILE_LOAD(6, place, 64);
    TILE_LOAD(7, place + tile_numbers, 64);
    TILE_PRODUCTS(0, 4, 6);
    TILE_PRODUCTS(1, 4, 7);
    TILE_LOAD(6, place + 2 * tile_numbers, 64);
    TILE_LOAD(7, place + 3 * tile_numbers, 64);
    TILE_PRODUCTS(2, 4, 6);
    TILE_PRODUCTS(3, 4, 7);
  }
  TILE_STORE(0, sums, sums_stride);
  TILE_STORE(1, sums + stripe_rows, sums_stride);
  TILE_STORE(2, sums + 2 * stripe_rows, sums_stride);
  TILE_STORE(3, sums + 3 * stripe_rows, sums_stride);
  finish<uint16_t>(job, group, sums, 0, job.tokens);
}

static void run(const Job& job, int64_t index, void* scratch) {
  if (!job.masks || job.tokens > tile_tokens) return run_panel<Amx>(job, index, scratch);
  uint16_t* panel = static_cast<uint16_t*>(scratch);
  run_small(job, index, panel, reinterpret_cast<float*>(panel + 2 * group_stripes * tile_numbers));
}

// Sums are stored for whole tiles of tokens.
static int64_t scratch_bytes(const Job& job) {
  Job whole = job;
  whole.tokens = token_tiles(job) * tile_tokens;
  return panel_scratch<Amx>(whole);
}

constexpr Kernels table{"amx", 512, bytes, token_tiles, arrange, scratch_bytes, enter, leave, run};

}  // namespace

const Kernels* amx_kernels() { return &table; }

}  // namespace hf_sparse

#else

namespace hf_sparse {

const Kernels* amx_kernels() { return nullptr; }

}  // namespace hf_sparse

#endif
