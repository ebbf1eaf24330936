// The codes of the quantised search: ordered by length, cut into chunks, rounded and packed. What
// the names mean, and why the search over them is exact, is in nearest_code_quantized.h.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "nearest_code.h"
#include "nearest_code_vec512.h"

namespace fastvq {
namespace {

// Hands out aligned pieces of a block of memory; with null, only adds up their sizes.
struct Carver {
  char* at;
  size_t used;
  template <class T>
  T* take(int64_t count) {
    T* piece = at ? reinterpret_cast<T*>(at + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

template <class Engine>
struct QuantizedCodes {
  using Element = typename Engine::Element;
  static constexpr bool kBytes = sizeof(Element) == 1;
  static constexpr int64_t kPerWord = 4 / sizeof(Element);  // channels in 32 bits
  static constexpr int64_t kLanes = 16, kPanel = 64, kMaxWidth = 8192;
  static constexpr int64_t kMaxChunkPanels = 32;
  // Largest quantised value, and for 16 bits largest quantised length: (22000 + √D/2)² < 2^29.
  static constexpr float kLargest = kBytes ? 127.0f : 22000.0f;

  struct Chunk {
    int64_t first_panel, num_panels;
    double scale, residual, longest;  // b, ρe, C
    double base, spread;              // o*, the greatest o_k; how far below it the least lies
    const float* center;              // what its codes and the rows are taken from
    double moved;                     // |its center - the common one|, 0 for the common one
  };

  struct Packed {
    int64_t num_chunks, num_panels, words;  // words: 32-bit words per row and per code
    int32_t exponent;
    double longest, center_norm;  // greatest |e_k|; |center|, both times 2^exponent
    float* center;
    int32_t* order;      // position -> kept code; -1 for the last panel's spare ones
    float* own_centers;  // of chunks that have one, padded_width(D) per chunk
    float* starts;       // (o_k - o*)/b²
    Chunk* chunks;
    char* panels;  // per panel and word, 64 codes' words
  };

  static int64_t words_of(int64_t D) { return (D + kPerWord - 1) / kPerWord; }
  static int64_t num_panels(const NearestCodeProblem& p) {
    return (p.num_codes + kPanel - 1) / kPanel;
  }
  static int64_t chunk_panels(const NearestCodeProblem& p) {
    return num_panels(p) < kMaxChunkPanels ? num_panels(p) : kMaxChunkPanels;
  }

  static Packed* carve(const NearestCodeProblem& p, Carver& memory) {
    const int64_t panels = num_panels(p), words = words_of(p.D);
    Packed* packed = memory.take<Packed>(1);
    float* center = memory.take<float>(padded_width(p.D));
    int32_t* order = memory.take<int32_t>(panels * kPanel);
    float* own_centers = memory.take<float>(panels * padded_width(p.D));
    float* starts = memory.take<float>(panels * kPanel);
    Chunk* chunks = memory.take<Chunk>(panels);
    char* codes = memory.take<char>(panels * words * kPanel * 4);
    if (packed == nullptr) return nullptr;
    *packed = {0, panels, words, 0, 0.0, 0.0, center, order, own_centers, starts, chunks, codes};
    return packed;
  }

  static size_t panel_bytes(const NearestCodeProblem& p) {
    Carver memory{nullptr, 0};
    carve(p, memory);
    memory.take<Measure>(p.num_codes);
    memory.take<float>(p.num_codes);
    return memory.used;
  }

  // ---- packing -------------------------------------------------------------------------------

  static __m512 scaled(__m512 value, __m512 exponent, __m512 center) {
    return _mm512_sub_ps(_mm512_scalef_ps(value, exponent), center);
  }

  static __m512 abs(__m512 value) { return _mm512_abs_ps(value); }

  struct Size {
    float squares, largest;
  };

  // out = row·2^p - center, with its size.
  static Size center_row(const float* row, const float* center, float exponent, int64_t width,
                         float* out) {
    const __m512 power = _mm512_set1_ps(exponent);
    __m512 squares = _mm512_setzero_ps(), largest = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += kLanes) {
      const __m512 value = scaled(_mm512_loadu_ps(row + d), power, _mm512_loadu_ps(center + d));
      _mm512_storeu_ps(out + d, value);
      squares = _mm512_fmadd_ps(value, value, squares);
      largest = _mm512_max_ps(largest, abs(value));
    }
    return {_mm512_reduce_add_ps(squares), _mm512_reduce_max_ps(largest)};
  }

  // Upper bound of a length from a float sum of D squares: 1.01 covers the sum's rounding for
  // D ≤ 2^17, the rest its underflow.
  static double length_of(float squares, int64_t D) {
    return sqrt(1.01 * static_cast<double>(squares) + 0x1p-126 * static_cast<double>(D));
  }

  // out = value/scale rounded, as Elements; returns the squares of the residuals' sum and adds the
  // quantised values up.
  static float quantise_row(const float* value, float scale, int64_t width, Element* out,
                            int32_t* total) {
    const __m512 inverse = _mm512_set1_ps(1.0f / scale), step = _mm512_set1_ps(scale);
    __m512 squares = _mm512_setzero_ps();
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < width; d += kLanes) {
      const __m512 exact = _mm512_loadu_ps(value + d);
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(exact, inverse));
      const __m512 residual = _mm512_fnmadd_ps(step, _mm512_cvtepi32_ps(whole), exact);
      squares = _mm512_fmadd_ps(residual, residual, squares);
      sum = _mm512_add_epi32(sum, whole);
      if (kBytes) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d), _mm512_cvtsepi32_epi8(whole));
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), _mm512_cvtsepi32_epi16(whole));
      }
    }
    *total = _mm512_reduce_add_epi32(sum);
    return _mm512_reduce_add_ps(squares);
  }

  // The power of two that puts the codes' lengths around 1.
  static int choose_exponent(const NearestCodeProblem& p) {
    if (!(p.max_norm > 0)) return 0;
    const double least = p.min_norm > p.max_norm * 0x1p-100 ? p.min_norm : p.max_norm * 0x1p-100;
    return -(ilogb(p.max_norm) + ilogb(least)) / 2;
  }

  // Counting sort by the leading bits of the length: exponent and 3 bits.
  static void sort_by_length(const float* squares, int64_t count, int32_t* order) {
    constexpr int kBuckets = 2048, kShift = 20;
    int32_t starts[kBuckets + 1];
    memset(starts, 0, sizeof starts);
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(squares);
    for (int64_t k = 0; k < count; ++k) ++starts[(bits[k] >> kShift) + 1];
    for (int b = 0; b < kBuckets; ++b) starts[b + 1] += starts[b];
    for (int64_t k = 0; k < count; ++k) {
      order[starts[bits[k] >> kShift]++] = static_cast<int32_t>(k);
    }
  }

  // A panel of lengths that differ more than 8 times stands alone: its short codes lie elsewhere.
  // Panels that join the chunk that begins at `first`: while it is small, whatever their length up
  // to 8 times; then up to twice.
  static int64_t chunk_end(const Packed& q, const float* squares, int64_t count, int64_t first) {
    const auto last_of = [&](int64_t panel) {
      const int64_t at = (panel + 1) * kPanel < count ? (panel + 1) * kPanel : count;
      return squares[q.order[at - 1]];
    };
    const float base = last_of(first);
    int64_t panel = first + 1;
    if (squares[q.order[first * kPanel]] < base / 64) return panel;
    for (; panel < q.num_panels && panel - first < kMaxChunkPanels; ++panel) {
      const float limit = panel - first < 8 ? 64 * base : 4 * base;
      if (last_of(panel) > limit) break;
    }
    return panel;
  }

  // What is known of a code: o_k in float64, squares and largest element of e_k.
  struct Measure {
    double offset;
    float squares, largest;
  };

  // A chunk of codes near each other but far from the common center gets one of them as its own
  // center, which keeps its bounds as narrow as its codes are close.
  static void choose_center_of(const NearestCodeProblem& p, const Packed& q, Chunk& chunk,
                               Measure* measures, float* row) {
    chunk.center = q.center;
    chunk.moved = 0.0;
    if (p.metric != kL2) return;
    const int64_t width = padded_width(p.D), first = chunk.first_panel * kPanel;
    const int64_t panels_end = (chunk.first_panel + chunk.num_panels) * kPanel;
    const int64_t end = panels_end < p.num_codes ? panels_end : p.num_codes;
    const float exponent = static_cast<float>(q.exponent);
    float* own = q.own_centers + chunk.first_panel * width;
    const int32_t middle = q.order[(first + end) / 2];
    for (int64_t d = 0; d < width; ++d) own[d] = ldexpf(p.codes[middle * width + d], q.exponent);
    const float limit = measures[q.order[first]].squares / 16;
    const auto far = [&](int64_t at) {
      return !(center_row(p.codes + q.order[at] * width, own, exponent, width, row).squares <
               limit);
    };
    if (far(end - 1)) return;
    for (int64_t at = first; at < end; ++at) {
      if (far(at)) return;
    }
    for (int64_t at = first; at < end; ++at) {
      const int32_t k = q.order[at];
      const Size size = center_row(p.codes + k * width, own, exponent, width, row);
      const double squares = scaled_squares(p.codes + k * width, own, q.exponent, width);
      measures[k] = {-squares / 2, size.squares, size.largest};
    }
    chunk.center = own;
    chunk.moved = 1.0001 * sqrt(scaled_squares(q.center, own, 0, width));
  }

  // |row·2^p - center|² in float64.
  static double scaled_squares(const float* row, const float* center, int exponent, int64_t width) {
    const __m512d power = _mm512_set1_pd(exponent);
    Doubles squares = Doubles::broadcast(0.0);
    for (int64_t d = 0; d < width; d += Doubles::kLanes) {
      const Doubles value = {_mm512_scalef_pd(Doubles::load_floats(row + d).v, power)};
      const Doubles difference = Doubles::sub(value, Doubles::load_floats(center + d));
      squares = Doubles::fma(difference, difference, squares);
    }
    return squares.reduce_add();
  }

  static void set_base(const Packed& q, Chunk& chunk, const Measure* measures) {
    const int64_t first = chunk.first_panel * kPanel;
    const int64_t end = (chunk.first_panel + chunk.num_panels) * kPanel;
    double greatest = -static_cast<double>(INFINITY), least = static_cast<double>(INFINITY);
    for (int64_t at = first; at < end && q.order[at] >= 0; ++at) {
      const double offset = measures[q.order[at]].offset;
      greatest = fmax(greatest, offset);
      least = fmin(least, offset);
    }
    chunk.base = greatest;
    chunk.spread = greatest - least;
  }

  static void pack_chunk(const NearestCodeProblem& p, Packed& q, Chunk& chunk, Measure* measures,
                         float* row, Element* quantised) {
    choose_center_of(p, q, chunk, measures, row);
    const int64_t width = padded_width(p.D), first = chunk.first_panel * kPanel;
    const int64_t end = (chunk.first_panel + chunk.num_panels) * kPanel;
    float length = 0.0f, most = 0.0f;
    for (int64_t at = first; at < end && q.order[at] >= 0; ++at) {
      length = fmaxf(length, measures[q.order[at]].squares);
      most = fmaxf(most, measures[q.order[at]].largest);
    }
    chunk.longest = length_of(length, p.D);
    float scale = kBytes ? most / kLargest : static_cast<float>(chunk.longest) / kLargest;
    if (!(scale > 0x1p-110f)) scale = 0x1p-110f;
    set_base(q, chunk, measures);
    const double inverse = 1.0 / static_cast<double>(scale);
    float residual = 0.0f;
    for (int64_t at = first; at < end; ++at) {
      const int64_t k = q.order[at];
      char* out = q.panels + at / kPanel * q.words * kPanel * 4 + at % kPanel * 4;
      int32_t total;
      if (k >= 0) {
        center_row(p.codes + k * width, chunk.center, static_cast<float>(q.exponent), width, row);
        residual = fmaxf(residual, quantise_row(row, scale, width, quantised, &total));
      } else {
        memset(quantised, 0, static_cast<size_t>(width) * sizeof(Element));
      }
      for (int64_t w = 0; w < q.words; ++w) {
        uint32_t word = 0;
        if (w * kPerWord < width) memcpy(&word, quantised + w * kPerWord, sizeof word);
        if (kBytes) word ^= 0x80808080u;  // 128 added to each
        memcpy(out + w * kPanel * 4, &word, sizeof word);
      }
      q.starts[at] =
          k < 0 ? -INFINITY
                : static_cast<float>((measures[k].offset - chunk.base) * inverse * inverse);
    }
    chunk.scale = static_cast<double>(scale);
    chunk.residual = length_of(residual, p.D) + 0x1.02p-24 * chunk.longest + 0x1p-140;
  }

  static void pack(const NearestCodeProblem& p, void* memory) {
    const int64_t width = padded_width(p.D);
    Carver carver{static_cast<char*>(memory), 0};
    Packed& q = *carve(p, carver);
    Measure* measures = carver.take<Measure>(p.num_codes);
    float* squares = carver.take<float>(p.num_codes);
    q.exponent = choose_exponent(p);
    const float exponent = static_cast<float>(q.exponent);
    double center_squares = 0.0;
    for (int64_t d = 0; d < width; ++d) {
      q.center[d] = ldexpf(p.center[d], q.exponent);
      center_squares += static_cast<double>(q.center[d]) * static_cast<double>(q.center[d]);
    }
    q.center_norm = 1.01 * sqrt(center_squares);
    float row[kMaxWidth];
    Element quantised[kMaxWidth];
    float longest = 0.0f;
    for (int64_t k = 0; k < p.num_codes; ++k) {
      const Size size = center_row(p.codes + k * width, q.center, exponent, width, row);
      squares[k] = size.squares;
      measures[k] = {ldexp(p.offsets[k], 2 * q.exponent), size.squares, size.largest};
      longest = fmaxf(longest, size.squares);
    }
    q.longest = length_of(longest, p.D);
    sort_by_length(squares, p.num_codes, q.order);
    for (int64_t at = p.num_codes; at < q.num_panels * kPanel; ++at) q.order[at] = -1;
    for (int64_t panel = 0; panel < q.num_panels;) {
      Chunk& chunk = q.chunks[q.num_chunks++];
      const int64_t end = chunk_end(q, squares, p.num_codes, panel);
      chunk = {panel, end - panel, 0.0, 0.0, 0.0, 0.0, 0.0, nullptr, 0.0};
      pack_chunk(p, q, chunk, measures, row, quantised);
      panel = end;
    }
  }
};

}  // namespace
}  // namespace fastvq
