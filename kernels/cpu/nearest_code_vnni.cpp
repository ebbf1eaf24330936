// nearest_code in AVX-512 VNNI: whole-number products of 4 × 8 or 2 × 16 bits, added into 32. 32
// registers hold a tile of 6 rows × 64 codes, 4 vectors of codes and one broadcast word.
#include "nearest_code.h"

#if defined(__AVX512VNNI__)
#include "nearest_code_quantized.h"

namespace fastvq {
namespace {

template <class Number>
struct Vnni {
  using Element = Number;
  static constexpr int64_t kTileRows = 6, kWordStep = 1;

  static void begin(int64_t) {}
  static void end() {}

  static int32_t load_word(const char* at) {
    int32_t word;
    memcpy(&word, at, sizeof word);
    return word;
  }

  // Written in assembly: GCC 12 keeps the sums of the intrinsics in memory.
  static __m512i products(__m512i sum, __m512i codes, __m512i row) {
    if (sizeof(Number) == 1) {
      __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(row));
    } else {
      __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(row));
    }
    return sum;
  }

  // One tile of rows.
  static void score_tile(const char* panel, int64_t words, const float* starts, float factor,
                         const char* rows, int64_t row_words, int32_t* slots, int64_t slot_stride) {
    const __m512 scale = _mm512_set1_ps(factor), least = _mm512_set1_ps(-0x1p30f);
    __m512i sum[kTileRows][4];
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      const __m512 start = _mm512_mul_ps(_mm512_loadu_ps(starts + 16 * v), scale);
      const __m512i whole = _mm512_cvtps_epi32(_mm512_max_ps(start, least));
#pragma GCC unroll 6
      for (int64_t r = 0; r < kTileRows; ++r) sum[r][v] = whole;
    }
    for (int64_t w = 0; w < words; ++w) {
      __m512i codes[4];
#pragma GCC unroll 4
      for (int64_t v = 0; v < 4; ++v) codes[v] = _mm512_load_si512(panel + w * 256 + 64 * v);
#pragma GCC unroll 6
      for (int64_t r = 0; r < kTileRows; ++r) {
        const __m512i row = _mm512_set1_epi32(load_word(rows + (r * row_words + w) * 4));
#pragma GCC unroll 4
        for (int64_t v = 0; v < 4; ++v) sum[r][v] = products(sum[r][v], codes[v], row);
      }
    }
#pragma GCC unroll 6
    for (int64_t r = 0; r < kTileRows; ++r) {
      const __m512i low = _mm512_max_epi32(sum[r][0], sum[r][1]);
      const __m512i high = _mm512_max_epi32(sum[r][2], sum[r][3]);
      _mm512_store_si512(slots + r * slot_stride, _mm512_max_epi32(low, high));
    }
  }

  static void score(const char* panel, int64_t words, const float* starts, const float* factors,
                    const Number* rows, int64_t row_words, int64_t tiles, int32_t* slots,
                    int64_t slot_stride) {
    const char* bytes = reinterpret_cast<const char*>(rows);
    for (int64_t t = 0; t < tiles; ++t) {
      score_tile(panel, words, starts, factors[t], bytes + t * kTileRows * row_words * 4, row_words,
                 slots + t * kTileRows * slot_stride, slot_stride);
    }
  }
};

}  // namespace

const NearestCodeSearch nearest_code_int8_vnni = Quantized<Vnni<int8_t>>::table(0.25);
const NearestCodeSearch nearest_code_int16_vnni = Quantized<Vnni<int16_t>>::table(0.5);
}  // namespace fastvq
#else
namespace fastvq {
const NearestCodeSearch nearest_code_int8_vnni = {}, nearest_code_int16_vnni = {};
}  // namespace fastvq
#endif
