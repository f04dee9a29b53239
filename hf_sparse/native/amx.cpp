// Kernels for processors with matrix extensions (AMX-BF16). They have AVX-512 with VBMI2 as well, which expands the weights.
#include "kernels.h"

#if defined(HF_SPARSE_AMX) && defined(__x86_64__)

#include "avx512.h"
#include "tiles.h"

namespace hf_sparse {
namespace {

constexpr int64_t most_rows = 16;      // of a tile
constexpr int64_t tile_pairs = 16;     // the depth of one product of tiles
constexpr int64_t tile_numbers = 512;  // of 16 bits: 16 rows of 64 bytes
constexpr int64_t block_tiles = 2;     // of tokens: with two stripes, four tiles of sums
constexpr int64_t depth = 128;         // pairs in a piece: two stripes of them are 16 KiB, which stay in the first cache
constexpr int64_t wide_stripes = 8;    // of a group for many tokens: they share each piece of the inputs while it is in the caches

// Tokens are taken in tiles of equal size: a product takes as long as its tile has rows.
struct Tokens {
  int64_t tiles, rows, blocks;
};

static Tokens tokens_of(const Job& job) {
  const int64_t tiles = (job.tokens + most_rows - 1) / most_rows;
  return {tiles, (job.tokens + tiles - 1) / tiles, (tiles + block_tiles - 1) / block_tiles};
}

static int64_t token_tiles(const Job& job) { return tokens_of(job).tiles; }

// For few tokens two stripes are read from beginning to end with their sums in the tiles.
static int64_t stripes_at_once(const Job& job) { return tokens_of(job).blocks > 1 ? wide_stripes : 2; }

static int64_t arranged_bytes(const Job& job) {
  const Tokens tokens = tokens_of(job);
  return tokens.tiles * tokens.rows * job.pairs * 2 * 2;
}

// Where a tile's first inputs lie, and how far it is from 32 inputs to the next 32: the tiles of a block take turns.
static int64_t arranged_start(const Job& job, const Tokens& tokens, int64_t tile) {
  const int64_t place = tile % block_tiles;
  return (tile - place) * tokens.rows * job.pairs * 2 + place * tokens.rows * padded_inputs;
}

static int64_t arranged_step(const Tokens& tokens, int64_t tile) {
  return smaller(block_tiles, tokens.tiles - tile / block_tiles * block_tiles) * tokens.rows * padded_inputs;
}

// Inputs and tokens that are missing are zero.
static void arrange(const Job& job, int64_t tile) {
  const Tokens tokens = tokens_of(job);
  const int64_t first = tile * tokens.rows, step = arranged_step(tokens, tile);
  uint16_t* to = static_cast<uint16_t*>(job.arranged) + arranged_start(job, tokens, tile);
  for (int64_t row = 0; row < tokens.rows; ++row, to += padded_inputs) {
    const bool missing = first + row >= job.tokens;
    const uint16_t* from = static_cast<const uint16_t*>(job.inputs) + (missing ? 0 : (first + row) * job.columns);
    for (int64_t column = 0; column < 2 * job.pairs; column += padded_inputs) {
      const int64_t columns = missing ? 0 : smaller(padded_inputs, job.columns - column);
      const __mmask32 there = _bzhi_u32(~0u, static_cast<uint32_t>(columns));
      _mm512_storeu_si512(to + column / padded_inputs * step, _mm512_maskz_loadu_epi16(there, from + column));
    }
  }
}

// Tiles 0-3 hold sums, 4 and 5 inputs, 6 and 7 weights.
static void enter(const Job& job) {
  TileConfiguration configuration{};
  configuration.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.row_bytes[tile] = 64;
    configuration.rows[tile] = static_cast<uint8_t>(tile < 6 ? tokens_of(job).rows : tile_pairs);
  }
  tile_configure(configuration);
}

static void leave() { tile_release(); }

// Two stripes, read from beginning to end. Dense ones have no masks.
struct Stripes {
  const uint32_t* masks[2];
  const uint16_t* values[2];
};

static Stripes stripes_of(const Job& job, int64_t place) {
  Stripes stripes{};
  for (int s = 0; s < 2; ++s) {
    const int64_t there = smaller(place + s, job.stripes - 1);  // the last stands in for a missing one
    const int64_t stripe = job.selected ? job.selected[there] : there;
    if (job.masks) stripes.masks[s] = job.masks + stripe * job.pairs;
    stripes.values[s] = job.values + (job.masks ? job.offsets[stripe] : stripe * job.pairs * pair_weights);
  }
  return stripes;
}

// What memory is asked for while the caches hold all that is worked on: from this pair on, so many lines of values of each stripe
// for each tile of weights.
struct Ahead {
  Stripes stripes;
  int64_t lines, from;
};

static INLINE void fetch_tile(Ahead& ahead) {
  for (int s = 0; s < 2; ++s) {
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.stripes.values[s] += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead.stripes.values[s]), _MM_HINT_T1);
    }
    if (!ahead.stripes.masks[s]) continue;
    _mm_prefetch(reinterpret_cast<const char*>(ahead.stripes.masks[s]), _MM_HINT_T1);
    ahead.stripes.masks[s] += tile_pairs;
  }
}

// A piece of two stripes, and the place where it is expanded. `around` is the last pair before places are used again.
struct Piece {
  int64_t pair, pairs, around;
  uint16_t* panel[2];
  const uint16_t* weights[2];
};

// A block of tokens: its inputs that belong to the piece, and its sums with the two stripes.
struct Block {
  const uint16_t* inputs;
  float* sums;
  int64_t rows;
};

// Where the weights of a piece are: packed, dense in memory, or where the first block of tokens has brought them.
enum class From { packed, memory, cache };

static INLINE void expand_tile(Stripes& stripes, int s, uint16_t* to) {
  stripes.values[s] = expand_piece(stripes.masks[s], tile_pairs, stripes.values[s], to);
  stripes.masks[s] += tile_pairs;
}

template <int tiles>
static INLINE void start_sums(const Block& block, bool first) {
  const int64_t tile = block.rows * stripe_rows;
  if (first) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (tiles == 2) TILE_ZERO(2);
    if (tiles == 2) TILE_ZERO(3);
  } else {
    TILE_LOAD(0, block.sums, 64);
    TILE_LOAD(1, block.sums + tile, 64);
    if (tiles == 2) TILE_LOAD(2, block.sums + 2 * tile, 64);
    if (tiles == 2) TILE_LOAD(3, block.sums + 3 * tile, 64);
  }
}

template <int tiles>
static INLINE void store_sums(const Block& block) {
  const int64_t tile = block.rows * stripe_rows;
  TILE_STORE(0, block.sums, 64);
  TILE_STORE(1, block.sums + tile, 64);
  if (tiles == 2) TILE_STORE(2, block.sums + 2 * tile, 64);
  if (tiles == 2) TILE_STORE(3, block.sums + 3 * tile, 64);
}

// Tiles are expanded one step before they are multiplied, in two halves between the products: so both go on at once.
template <int tiles, From from>
static void multiply_piece(const Block& block, const Piece& piece, Stripes& stripes, Ahead& ahead) {
  const int64_t tile = block.rows * padded_inputs;
  const uint16_t* inputs = block.inputs;
  start_sums<tiles>(block, piece.pair == 0);
  if (from == From::packed) {
    for (int s = 0; s < 2; ++s) expand_tile(stripes, s, piece.panel[s]);
  }
  for (int64_t pair = 0; pair < piece.pairs; pair += tile_pairs, inputs += tiles * tile) {
    const int64_t place = (pair & piece.around) * pair_weights;
    const int64_t next = ((pair + tile_pairs) & piece.around) * pair_weights;
    const bool expand = from == From::packed && pair + tile_pairs < piece.pairs;
    if (from == From::memory) {
      for (int64_t i = 0; i < tile_numbers; i += 32) {
        fetch(piece.weights[0] + place + i + values_ahead);
        fetch(piece.weights[1] + place + i + values_ahead);
      }
    }
    if (pair >= ahead.from) fetch_tile(ahead);
    TILE_LOAD(4, inputs, 64);
    TILE_LOAD(6, piece.weights[0] + place, 64);
    TILE_PRODUCTS(0, 4, 6);
    if (tiles == 2) TILE_LOAD(5, inputs + tile, 64);
    if (tiles == 2) TILE_PRODUCTS(2, 5, 6);
    if (expand) expand_tile(stripes, 0, piece.panel[0] + next);
    TILE_LOAD(7, piece.weights[1] + place, 64);
    TILE_PRODUCTS(1, 4, 7);
    if (tiles == 2) TILE_PRODUCTS(3, 5, 7);
    if (expand) expand_tile(stripes, 1, piece.panel[1] + next);
  }
  store_sums<tiles>(block);
}

template <From from>
static void multiply_block(const Job& job, const Tokens& tokens, int64_t index, const Piece& piece, Stripes& stripes, float* sums,
                           Ahead& ahead) {
  const int64_t tile = index * block_tiles;
  const uint16_t* inputs = static_cast<const uint16_t*>(job.arranged) + arranged_start(job, tokens, tile) +
                           piece.pair / tile_pairs * arranged_step(tokens, tile);
  const Block block{inputs, sums + tile * 2 * tokens.rows * stripe_rows, tokens.rows};
  if (tile + 1 < tokens.tiles) {
    multiply_piece<2, from>(block, piece, stripes, ahead);
  } else {
    multiply_piece<1, from>(block, piece, stripes, ahead);
  }
}

// The first block of tokens reads the weights from memory; meanwhile the last steps of a lone block, and all steps of the others,
// ask for those that are read next.
static void multiply_stripes(const Job& job, const Tokens& tokens, Piece piece, Stripes& stripes, const Stripes& next,
                             float* sums) {
  constexpr int64_t lines = 4, last = values_ahead / 32 / lines * tile_pairs;
  const Stripes before = stripes;
  Ahead ahead{next, lines, tokens.blocks == 1 ? piece.pairs - last : piece.pairs};
  if (job.masks) {
    multiply_block<From::packed>(job, tokens, 0, piece, stripes, sums, ahead);
  } else {
    for (int s = 0; s < 2; ++s) piece.weights[s] = stripes.values[s];
    multiply_block<From::memory>(job, tokens, 0, piece, stripes, sums, ahead);
    for (int s = 0; s < 2; ++s) stripes.values[s] += piece.pairs * pair_weights;
  }
  if (tokens.blocks == 1) return;
  const int64_t steps = piece.pairs / tile_pairs * (tokens.blocks - 1);
  ahead = {piece.pair + piece.pairs < job.pairs ? stripes : next, (stripes.values[0] - before.values[0]) / 32 / steps + 1, 0};
  for (int64_t block = 1; block < tokens.blocks; ++block) {
    multiply_block<From::cache>(job, tokens, block, piece, stripes, sums, ahead);
  }
}

static __m512 bias_of(const Job& job, int64_t row, int64_t rows) {
  if (!job.bias || rows <= 0) return _mm512_setzero_ps();
  const __mmask16 there = static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<uint32_t>(rows)));
  const __m256i numbers = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(job.bias) + row);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// Adds the bias, rounds once and stores the outputs of two stripes. With a selection every row of a stripe has a place.
static void finish_stripes(const Job& job, const Tokens& tokens, int64_t place, const float* sums) {
  const int64_t start = place * stripe_rows;
  const int64_t rows = (job.selected ? job.stripes * stripe_rows : job.rows) - start;
  const __mmask32 there = _bzhi_u32(~0u, static_cast<uint32_t>(smaller(rows, 2 * stripe_rows)));
  const __m512 left = bias_of(job, start, smaller(rows, stripe_rows));
  const __m512 right = bias_of(job, start + stripe_rows, smaller(rows - stripe_rows, stripe_rows));
  uint16_t* to = static_cast<uint16_t*>(job.outputs) + start;
  for (int64_t token = 0; token < job.tokens; ++token, to += job.output_stride) {
    const float* from = sums + (token / tokens.rows * 2 * tokens.rows + token % tokens.rows) * stripe_rows;
    const __m512 low = _mm512_add_ps(_mm512_loadu_ps(from), left);
    const __m512 high = _mm512_add_ps(_mm512_loadu_ps(from + tokens.rows * stripe_rows), right);
    _mm512_mask_storeu_epi16(to, there, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

constexpr int64_t panel_numbers = 2 * depth * pair_weights;

static int64_t stripes_sums(const Tokens& tokens) { return 2 * tokens.tiles * tokens.rows * stripe_rows; }

static int64_t scratch_bytes(const Job& job) {
  return panel_numbers * 2 + stripes_at_once(job) / 2 * stripes_sums(tokens_of(job)) * static_cast<int64_t>(sizeof(float));
}

static void run(const Job& job, int64_t index, void* scratch) {
  const Tokens tokens = tokens_of(job);
  const bool alone = tokens.blocks == 1;  // the panel then is a ring of two steps
  const int64_t size = stripes_at_once(job), first = index * size, end = smaller(first + size, job.stripes);
  uint16_t* panel = static_cast<uint16_t*>(scratch);
  uint16_t* half = panel + panel_numbers / 2;
  float* sums = reinterpret_cast<float*>(panel + panel_numbers);
  Stripes stripes[wide_stripes / 2];
  for (int64_t both = 0; first + 2 * both < end; ++both) stripes[both] = stripes_of(job, first + 2 * both);
  const int64_t step = alone ? job.pairs : depth, around = !job.masks ? -1 : alone ? 2 * tile_pairs - 1 : depth - 1;
  for (int64_t pair = 0; pair < job.pairs; pair += step) {
    const Piece piece{pair, smaller(step, job.pairs - pair), around, {panel, half}, {panel, half}};
    for (int64_t both = 0; first + 2 * both < end; ++both) {
      const Stripes next = stripes_of(job, first + 2 * both + size);
      multiply_stripes(job, tokens, piece, stripes[both], next, sums + both * stripes_sums(tokens));
    }
  }
  for (int64_t both = 0; first + 2 * both < end; ++both) {
    finish_stripes(job, tokens, first + 2 * both, sums + both * stripes_sums(tokens));
  }
}

constexpr Kernels table{"amx", 512, stripes_at_once, arranged_bytes, token_tiles, arrange, scratch_bytes, enter, leave, run};

}  // namespace

const Kernels* amx_kernels() { return &table; }

}  // namespace hf_sparse

#else

namespace hf_sparse {

const Kernels* amx_kernels() { return nullptr; }

}  // namespace hf_sparse

#endif
