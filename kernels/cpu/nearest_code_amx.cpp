// nearest_code in AMX: tiles of 16 rows × 16 codes, sums of 64 products of 8 bits per instruction.
// Scheme, packing and bound are nearest_code_quantized.h's; only the products differ. A tile of
// sums starts from one vector of n_k, read 16 times over by a load of stride zero, as the 16 rows
// share their scale; four tiles, one panel, are then folded into 16 maxima per row.
//
// Proved by values alone: tests/kernels/test_cpu_amx.py compiles this file with the tile
// instructions emulated. Its speed has not been measured on a processor that has them.
#include "nearest_code.h"

#if defined(FASTVQ_EMULATED_TILES)
#include FASTVQ_EMULATED_TILES
#endif

#if (defined(__AMX_TILE__) && defined(__AMX_INT8__)) || defined(FASTVQ_EMULATED_TILES)
#include <immintrin.h>

#include "nearest_code_quantized.h"

namespace fastvq {
namespace {

// Operand of ldtilecfg (Intel SDM vol. 1, 18.4): shapes of the tile registers.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Amx {
  using Element = int8_t;
  static constexpr int64_t kTileRows = 16, kWordStep = 1;
  static constexpr int64_t kDepth = 16;  // words that one instruction takes in

  // Makes the compiler write memory out first: GCC's tile loads do not say that they read it.
  static void publish(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

  // Tiles 0-3: sums of one panel. 4 and 6: 16 words of rows and of codes. 5 and 7: the words left.
  static void begin(int64_t words) {
    TileShapes shapes;
    const int64_t left = words % kDepth == 0 ? kDepth : words % kDepth;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.rows[tile] = static_cast<uint8_t>(tile == 7 ? left : 16);
      shapes.row_bytes[tile] = static_cast<uint16_t>(tile == 5 ? 4 * left : 64);
    }
    publish(&shapes);
    _tile_loadconfig(&shapes);
  }
  static void end() { _tile_release(); }

  static void add_products(const char* panel, const char* rows, int64_t row_bytes, int64_t words) {
    int64_t w = 0;
    for (; w + kDepth <= words; w += kDepth) {
      const char* codes = panel + w * 256;
      _tile_loadd(4, rows + w * 4, row_bytes);
      _tile_loadd(6, codes, 256);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(6, codes + 64, 256);
      _tile_dpbsud(1, 4, 6);
      _tile_loadd(6, codes + 128, 256);
      _tile_dpbsud(2, 4, 6);
      _tile_loadd(6, codes + 192, 256);
      _tile_dpbsud(3, 4, 6);
    }
    if (w == words) return;
    const char* codes = panel + w * 256;
    _tile_loadd(5, rows + w * 4, row_bytes);
    _tile_loadd(7, codes, 256);
    _tile_dpbsud(0, 5, 7);
    _tile_loadd(7, codes + 64, 256);
    _tile_dpbsud(1, 5, 7);
    _tile_loadd(7, codes + 128, 256);
    _tile_dpbsud(2, 5, 7);
    _tile_loadd(7, codes + 192, 256);
    _tile_dpbsud(3, 5, 7);
  }

  static void score(const char* panel, int64_t words, const float* starts, const float* factors,
                    const int8_t* rows, int64_t row_words, int64_t tiles, int32_t* slots,
                    int64_t slot_stride) {
    alignas(64) int32_t first[64], sums[4][16][16];
    const __m512 least = _mm512_set1_ps(-0x1p30f);
    for (int64_t t = 0; t < tiles; ++t) {
      const __m512 scale = _mm512_set1_ps(factors[t]);
      for (int64_t v = 0; v < 4; ++v) {
        const __m512 start = _mm512_mul_ps(_mm512_loadu_ps(starts + 16 * v), scale);
        _mm512_store_si512(first + 16 * v, _mm512_cvtps_epi32(_mm512_max_ps(start, least)));
      }
      publish(first);
      _tile_loadd(0, first, 0);
      _tile_loadd(1, first + 16, 0);
      _tile_loadd(2, first + 32, 0);
      _tile_loadd(3, first + 48, 0);
      add_products(panel, reinterpret_cast<const char*>(rows) + t * kTileRows * row_words * 4,
                   row_words * 4, words);
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const __m512i low =
            _mm512_max_epi32(_mm512_load_si512(sums[0][r]), _mm512_load_si512(sums[1][r]));
        const __m512i high =
            _mm512_max_epi32(_mm512_load_si512(sums[2][r]), _mm512_load_si512(sums[3][r]));
        _mm512_store_si512(slots + (t * kTileRows + r) * slot_stride, _mm512_max_epi32(low, high));
      }
    }
  }
};

}  // namespace

// 1/32: 1024 products a cycle, half of them for the loads; from the instruction tables alone.
const NearestCodeSearch nearest_code_int8_amx = Quantized<Amx>::table(1.0 / 32);
}  // namespace fastvq
#else
namespace fastvq {
const NearestCodeSearch nearest_code_int8_amx = {};
}  // namespace fastvq
#endif
