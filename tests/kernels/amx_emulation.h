// The tile instructions that nearest_code_amx.cpp uses, in plain C++, from their description in the
// Intel SDM vol. 2: for tests on machines without them. Replaces the compiler's header of the same
// names.
#pragma once

#include <immintrin.h>  // first: its definitions are replaced below

#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
  int rows, row_bytes;
  unsigned char data[16][64];
};

inline Tile (&tiles())[8] {
  static thread_local Tile registers[8];
  return registers;
}

inline void load_config(const void* memory) {
  const unsigned char* config = static_cast<const unsigned char*>(memory);
  for (int t = 0; t < 8; ++t) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * t, sizeof row_bytes);
    tiles()[t] = {config[48 + t], row_bytes, {}};
  }
}

inline void load(int t, const void* memory, long stride) {
  Tile& tile = tiles()[t];
  std::memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(tile.data[r], static_cast<const char*>(memory) + r * stride, tile.row_bytes);
  }
}

inline void store(int t, void* memory, long stride) {
  const Tile& tile = tiles()[t];
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(static_cast<char*>(memory) + r * stride, tile.data[r], tile.row_bytes);
  }
}

// c[m][n] += Σ_k Σ_i a[m][4k+i] (signed) · b[k][4n+i] (unsigned)
inline void dpbsud(int c, int a, int b) {
  Tile &sums = tiles()[c], &left = tiles()[a], &right = tiles()[b];
  for (int m = 0; m < sums.rows; ++m) {
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      std::int32_t sum;
      std::memcpy(&sum, sums.data[m] + 4 * n, sizeof sum);
      for (int k = 0; k < left.row_bytes / 4; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += static_cast<signed char>(left.data[m][4 * k + i]) * right.data[k][4 * n + i];
        }
      }
      std::memcpy(sums.data[m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig(memory) emulated::load_config(memory)
#define _tile_release() static_cast<void>(0)
#define _tile_loadd(tile, memory, stride) emulated::load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) emulated::store(tile, memory, stride)
#define _tile_dpbsud(sums, left, right) emulated::dpbsud(sums, left, right)
