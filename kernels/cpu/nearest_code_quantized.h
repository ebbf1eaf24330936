// The quantised first pass: scores in whole numbers, exact as such, whose distance from the true
// score is known from the rounding residuals. Compiled by the files that have an instruction for
// it (nearest_code_vnni.cpp, nearest_code_amx.cpp); internal linkage, nothing of the C++ standard
// library, as in nearest_code_search.h.
//
// A call owns up to kBlockRows rows. In registers: a tile of rows by one panel of 64 codes. In the
// caches: the rows, one panel, and for each row and panel of a chunk 16 maxima ("slots", each over
// 4 codes). Never written: the rows × codes scores.
//
// Codes are ordered by |e_k|, e_k = c_k - center, and cut into chunks of similar length; each has
// its own scale b. Rows are ordered by size within the block, and the rows of a tile share a scale
// a. All of it on x and c times a power of two 2^p that puts typical codes near 1: nothing below
// depends on the data's magnitude.
//
//   ŷ = round(y/a), y = x - center (dot: x)       ρy = |y - aŷ|, measured
//   ê_k = round(e_k/b)                            ρe = max |e_k - bê_k| over the chunk, measured
//   n_k = round((o_k - o*)/(ab)), o_k = -|e_k|²/2 (L2) or 0 (dot), o* the chunk's greatest: codes
//         of nearly one length are told apart by what tells them apart, not by rounded lengths
//   S_k = n_k + Σ ŷ_d ê_kd, exact: |Σ| ≤ 2^29 (by the largest values for 8 bits, by
//         Cauchy-Schwarz for 16) and n_k ≥ -2^30
//
// The bound. With s_k = y·e_k + o_k as in nearest_code_search.h, C = max |e_k| over the chunk,
// u = 2^-24:
//   y·e = (aŷ + r_y)·(bê + r_e), so |y·e - ab ŷ·ê| ≤ ρy·C + (|y| + ρy)·ρe;
//   y and e_k themselves are rounded to float: u·|y| and u·C join ρy and ρe (and √D·2^-149, where
//     the scaling by 2^p lost bits);
//   o_k is a float64 sum of D squares: (D+4)·2^-53·C²/2; o_k - o* becomes a float and meets two
//     more roundings: 3u·max|o_k - o*|, + 2^-50·C² for underflow there and for float64's roundings
//     below; n_k: ab/2.
//   E = their sum; |ab·S_k + o* - s_k| ≤ E.
// A chunk with a center of its own, Δ away from the common one, counts y and e from there. Its s is
// s_k + y·Δ - |Δ|²/2, y from the common center, the last two in float64:
//   E grows by 1.01·(D+16)·2^-53·(|y| + 2|Δ|)·|Δ|, roundings of the sums below included.
// With F from nearest_code_search.h (c), L = max over chunks of (ab·max S + o* - E - F) is a lower
// bound of the winner's s, so only codes with S_k ≥ (L - E - o*)/(ab) can win.
// n_k is clamped at -2^30: such a code's S_k is too large, never too small, so it may only not
// serve for L: chunks whose greatest S lies below -2^29 do not.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "nearest_code.h"
#include "nearest_code_quantized_codes.h"
#include "nearest_code_rescore.h"
#include "nearest_code_vec512.h"
#include "rows.h"

namespace fastvq {
namespace {

// Engine: Element (int8_t or int16_t), kTileRows, and
//   score(panel, words, starts, factors, rows, row_words, tiles, slots, slot_stride)
// which writes, for each of tiles × kTileRows rows, 16 slots: lane l holds the greatest S of codes
// l, 16+l, 32+l and 48+l of the panel (8 bits: S plus 128 Σ ŷ_d, the codes being stored with 128
// added).
template <class Engine>
struct Quantized : QuantizedCodes<Engine> {
  using Codes = QuantizedCodes<Engine>;
  using Codes::center_row;
  using Codes::chunk_panels;
  using Codes::kBytes;
  using Codes::kLanes;
  using Codes::kLargest;
  using Codes::kMaxWidth;
  using Codes::kPanel;
  using Codes::kPerWord;
  using Codes::length_of;
  using Codes::pack;
  using Codes::panel_bytes;
  using Codes::quantise_row;
  using Codes::words_of;
  using typename Codes::Chunk;
  using typename Codes::Element;
  using typename Codes::Packed;
  using typename Codes::Size;
  static constexpr int64_t kTileRows = Engine::kTileRows;
  static constexpr int64_t kTileBlock = (kBlockRows + kTileRows - 1) / kTileRows * kTileRows;
  static constexpr int64_t kMaxEntries = 256;      // slots remembered per row
  static constexpr int64_t kMaxCandidates = 1024;  // 4 codes per slot

  // ---- one block of rows ---------------------------------------------------------------------

  // A slot whose greatest score may be the winner's: position of its first code, and the greatest
  // s its codes may have.
  struct Entry {
    double above;
    int64_t position;
  };

  struct Block {
    float* raw;      // a row of x
    float* values;   // y of each row, in the order of reading
    Element* rows;   // ŷ, in the order of size
    int32_t* slots;  // of one chunk: per row, 16 per panel
    Entry* entries;  // kMaxEntries per row
    float* scores;   // kMaxCandidates
    int64_t slot_stride, row_words, limit;
    // In the order of size:
    int64_t place[kTileBlock], source[kTileBlock];  // in the block, and of x
    double shift[kTileBlock];                       // y·Δ - |Δ|²/2
    double norm[kTileBlock], residual[kTileBlock], scale[kTileBlock], lower[kTileBlock];
    double slack[kTileBlock], unit[kTileBlock];  // E and ab for the chunk at hand
    int32_t sum[kTileBlock];                     // what S has on top: 128 Σ ŷ_d for 8 bits
    int32_t greatest[kTileBlock], threshold[kTileBlock];
    int32_t count[kTileBlock];  // entries, -1 for too many, or a RowKind below
    float factors[kTileBlock];  // b/a, per tile
    Size sizes[kTileBlock];
    int64_t kept[kTileBlock];
    // In the order of reading, while the order of size changes with the center:
    double old_lower[kTileBlock];
    int32_t old_count[kTileBlock];
  };
  static constexpr int32_t kTooMany = -1, kBroken = -2;

  static Block* carve_block(const NearestCodeProblem& p, Carver& memory) {
    const int64_t width = padded_width(p.D);
    Block* b = memory.take<Block>(1);
    float* raw = memory.take<float>(distance_floats(p.D));
    float* values = memory.take<float>(kTileBlock * width);
    Element* rows = memory.take<Element>(kTileBlock * (words_of(p.D) * kPerWord + width));
    const int64_t stride = (chunk_panels(p) + 1) * kLanes;
    int32_t* slots = memory.take<int32_t>(kTileBlock * stride);
    Entry* entries = memory.take<Entry>(kTileBlock * kMaxEntries);
    float* scores = memory.take<float>(kMaxCandidates + 4);
    if (b == nullptr) return nullptr;
    b->raw = raw;
    b->values = values;
    b->rows = rows;
    b->slots = slots;
    b->entries = entries;
    b->scores = scores;
    b->slot_stride = stride;
    b->row_words = words_of(p.D);
    return b;
  }

  static size_t scratch_bytes(const NearestCodeProblem& p) {
    Carver memory{nullptr, 0};
    carve_block(p, memory);
    return memory.used;
  }

  static bool all_finite(const float* row, int64_t D) {
    for (int64_t d = 0; d < D; ++d) {
      if (!is_finite(row[d])) return false;
    }
    return true;
  }

  // Places of the block in ascending order of size: a row's place is the number of smaller ones.
  // The sizes' last 7 bits make way for the place, so that no two are equal.
  static void order_rows(Block& b, int64_t count) {
    int32_t keys[kTileBlock + kLanes];
    for (int64_t i = 0; i < count; ++i) {
      memcpy(&keys[i], &b.sizes[i].largest, sizeof keys[i]);
      keys[i] =
          static_cast<int32_t>((static_cast<uint32_t>(keys[i]) & ~127u) | static_cast<uint32_t>(i));
    }
    for (int64_t i = count; i < count + kLanes; ++i) keys[i] = INT32_MAX;
    for (int64_t i = 0; i < count; ++i) {
      const __m512i own = _mm512_set1_epi32(keys[i]);
      int smaller = 0;
      for (int64_t j = 0; j < count; j += kLanes) {
        const __mmask16 less = _mm512_cmplt_epi32_mask(_mm512_loadu_si512(keys + j), own);
        smaller += __builtin_popcount(less);
      }
      b.place[smaller] = i;
    }
  }

  // Row n of x as float32, zeros after its end.
  static void load_row(const NearestCodeProblem& p, int64_t n, float* out) {
    for (int64_t d = 0; d < p.D; d += kLanes) {
      const int64_t left = p.D - d, at = n * p.D + d;
      const __mmask16 mask = static_cast<__mmask16>(left < kLanes ? (1u << left) - 1 : 0xffffu);
      const auto half = [&] {
        return _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p.x) + at);
      };
      __m512 value;
      if (p.x_dtype == kFloat32) {
        value = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p.x) + at);
      } else if (p.x_dtype == kFloat16) {
        value = _mm512_cvtph_ps(half());
      } else {
        value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half()), 16));
      }
      _mm512_storeu_ps(out + d, value);
    }
  }

  // Row i's y·Δ - |Δ|²/2 for the center at hand, from b.raw.
  static double shift_of(const Packed& q, const float* raw, const float* center, int64_t width) {
    const __m512d power = _mm512_set1_pd(q.exponent);
    Doubles sum = Doubles::broadcast(0.0);
    for (int64_t d = 0; d < width; d += Doubles::kLanes) {
      const Doubles value = {_mm512_scalef_pd(Doubles::load_floats(raw + d).v, power)};
      const Doubles common = Doubles::load_floats(q.center + d);
      const Doubles move = Doubles::sub(Doubles::load_floats(center + d), common);
      const Doubles half = Doubles::mul(move, Doubles::broadcast(0.5));
      sum = Doubles::fma(Doubles::sub(Doubles::sub(value, common), half), move, sum);
    }
    return sum.reduce_add();
  }

  // Rounds the rows as the chunk wants them; what is known of them stays theirs.
  static void load_rows(const NearestCodeProblem& p, const Packed& q, const Chunk& chunk,
                        const int64_t* rows, int64_t first_row, int64_t count, Block& b) {
    const int64_t width = padded_width(p.D);
    const float exponent = static_cast<float>(q.exponent);
    static const float kZeros[kMaxWidth] = {};
    const float* center = p.metric == kL2 ? chunk.center : kZeros;
    double shifts[kTileBlock];
    for (int64_t i = 0; i < count; ++i) {
      load_row(p, rows ? rows[i] : first_row + i, b.raw);
      float* value = b.values + i * width;
      b.sizes[i] = center_row(b.raw, center, exponent, width, value);
      shifts[i] = chunk.moved > 0 ? shift_of(q, b.raw, center, width) : 0.0;
      b.kept[i] = 0;
      if (!(b.sizes[i].squares < 0x1p120f)) {
        b.kept[i] = all_finite(b.raw, p.D) ? kTooMany : kBroken;
        b.sizes[i] = {0.0f, 0.0f};
        memset(value, 0, static_cast<size_t>(width) * sizeof(float));
      }
    }
    order_rows(b, count);
    // So small a scale would put more of n_k than the winner's neighbours below -2^30.
    const double floor = fmax(chunk.longest * (kBytes ? 0x1p-36 : 0x1p-30), 0x1p-100);
    const int64_t row_elements = b.row_words * kPerWord;
    for (int64_t first = 0; first < count; first += kTileRows) {
      const int64_t end = first + kTileRows < count ? first + kTileRows : count;
      double size = 0.0;
      for (int64_t i = first; i < end; ++i) {
        const Size& of = b.sizes[b.place[i]];
        if (b.kept[b.place[i]] != 0) continue;
        size = fmax(size, kBytes ? static_cast<double>(of.largest) : length_of(of.squares, p.D));
      }
      const float scale = static_cast<float>(fmax(size / static_cast<double>(kLargest), floor));
      for (int64_t i = first; i < end; ++i) {
        const int64_t from = b.place[i];
        Element* out = b.rows + i * row_elements;
        const float squares = quantise_row(b.values + from * width, scale, width, out, &b.sum[i]);
        for (int64_t d = width; d < row_elements; ++d) out[d] = 0;
        b.sum[i] = kBytes ? 128 * b.sum[i] : 0;
        b.scale[i] = static_cast<double>(scale);
        b.norm[i] = length_of(b.sizes[from].squares, p.D);
        b.residual[i] = length_of(squares, p.D) + 0x1.02p-24 * b.norm[i] + 0x1p-140;
        b.shift[i] = shifts[from];
        b.lower[i] = b.old_lower[from];
        const bool lost = b.old_count[from] >= 0 && b.kept[from] != 0;
        b.count[i] = lost ? static_cast<int32_t>(b.kept[from]) : b.old_count[from];
        b.source[i] = rows ? rows[from] : first_row + from;
      }
    }
    const int64_t tiles_end = (count + kTileRows - 1) / kTileRows * kTileRows;
    memset(b.rows + count * row_elements, 0,
           static_cast<size_t>((tiles_end - count) * row_elements) * sizeof(Element));
  }

  // What is known of the rows, back to the order of reading.
  static void put_back(int64_t count, Block& b) {
    for (int64_t i = 0; i < count; ++i) {
      b.old_lower[b.place[i]] = b.lower[i];
      b.old_count[b.place[i]] = b.count[i];
    }
  }

  static void score_chunk(const Packed& q, const Chunk& chunk, int64_t count, Block& b) {
    const int64_t panel_size = q.words * kPanel * 4;
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < tiles; ++t) {
      b.factors[t] = static_cast<float>(fmin(chunk.scale / b.scale[t * kTileRows], 0x1p100));
    }
    for (int64_t panel = 0; panel < chunk.num_panels; ++panel) {
      const int64_t at = chunk.first_panel + panel;
      Engine::score(q.panels + at * panel_size, q.words, q.starts + at * kPanel, b.factors, b.rows,
                    b.row_words, tiles, b.slots + panel * kLanes, b.slot_stride);
    }
  }

  // E, ab, L and the threshold of every row for this chunk, 8 rows at a time.
  static void bound_chunk(const NearestCodeProblem& p, const Packed& q, const Chunk& chunk,
                          int64_t count, Block& b) {
    const bool l2 = p.metric == kL2;
    const double D = static_cast<double>(p.D), C = chunk.longest;
    const double of_norms = l2 ? 3.01 * 0x1p-24 * chunk.spread + D * 0x1p-126 +
                                     (1.01 * (D + 4) * 0x1p-54 + 0x1p-50) * C * C
                               : 0.0;
    const double of_move = 1.01 * (D + 16) * 0x1p-53 * chunk.moved;
    const double delta = 1.01 * (D + 4) * 0x1p-53, reach = q.longest + q.center_norm;
    const Doubles longest = Doubles::broadcast(C), safety = Doubles::broadcast(1.0001);
    for (int64_t i = 0; i < count; i += Doubles::kLanes) {
      const Doubles y = Doubles::load(b.norm + i), rho = Doubles::load(b.residual + i);
      const Doubles unit =
          Doubles::mul(Doubles::load(b.scale + i), Doubles::broadcast(chunk.scale));
      Doubles slack = Doubles::fma(unit, Doubles::broadcast(0.501), Doubles::broadcast(of_norms));
      slack = Doubles::fma(rho, longest, slack);
      slack = Doubles::fma(Doubles::add(y, rho), Doubles::broadcast(chunk.residual), slack);
      const Doubles way = Doubles::add(y, Doubles::broadcast(3 * chunk.moved));
      slack = Doubles::fma(way, Doubles::broadcast(of_move), slack);
      slack = Doubles::mul(slack, safety);
      const Doubles far = Doubles::add(y, longest);
      const Doubles canonical = l2 ? Doubles::mul(Doubles::mul(far, far), Doubles::broadcast(delta))
                                   : Doubles::mul(y, Doubles::broadcast(2 * delta * reach));
      const Doubles base = Doubles::add(Doubles::load(b.shift + i), Doubles::broadcast(chunk.base));
      const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b.sum + i));
      const __m256i greatest = _mm256_sub_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b.greatest + i)), sum);
      const __mmask8 counts = _mm256_cmpge_epi32_mask(greatest, _mm256_set1_epi32(-(1 << 29)));
      Doubles below = Doubles::fma(unit, {_mm512_cvtepi32_pd(greatest)}, base);
      below = Doubles::sub(Doubles::sub(below, slack), canonical);
      const __m512d lower = _mm512_loadu_pd(b.lower + i);
      const Doubles raised = {_mm512_mask_max_pd(lower, counts, lower, below.v)};
      __m512d least = _mm512_div_pd(Doubles::sub(Doubles::sub(raised, slack), base).v, unit.v);
      least = _mm512_sub_pd(_mm512_floor_pd(least), _mm512_set1_pd(1.0));
      least = _mm512_add_pd(least, _mm512_cvtepi32_pd(sum));
      least = _mm512_max_pd(_mm512_min_pd(least, _mm512_set1_pd(2147483647.0)),
                            _mm512_set1_pd(-2147483648.0));
      raised.store(b.lower + i);
      slack.store(b.slack + i);
      unit.store(b.unit + i);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(b.threshold + i), _mm512_cvtpd_epi32(least));
    }
  }

  // Drops the entries that the row's lower bound has overtaken.
  static int32_t drop_entries(Entry* entries, int32_t count, double lower) {
    int32_t left = 0;
    for (int32_t e = 0; e < count; ++e) {
      const bool stays = entries[e].above >= lower;
      entries[left] = entries[e];
      left += stays;
    }
    return left;
  }

  static void collect_row(const Chunk& chunk, int64_t i, Block& b) {
    const int32_t* slots = b.slots + i * b.slot_stride;
    Entry* entries = b.entries + b.place[i] * kMaxEntries;
    const __m512i least = _mm512_set1_epi32(b.threshold[i]);
    // First the panels, without a branch for each: which one it is cannot be predicted.
    uint32_t panels = 0;
    for (int64_t panel = 0; panel < chunk.num_panels; ++panel) {
      const __m512i slot = _mm512_load_si512(slots + panel * kLanes);
      panels |= static_cast<uint32_t>(_mm512_cmpge_epi32_mask(slot, least) != 0) << panel;
    }
    for (; panels != 0; panels &= panels - 1) {
      const int64_t panel = __builtin_ctz(panels);
      const int32_t* slot = slots + panel * kLanes;
      uint32_t lanes = _mm512_cmpge_epi32_mask(_mm512_load_si512(slot), least);
      for (; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        if (b.count[i] == b.limit) {
          b.count[i] = drop_entries(entries, b.count[i], b.lower[i]);
          if (b.count[i] == b.limit) {
            b.count[i] = kTooMany;
            return;
          }
        }
        // One unit on top: the threshold is rounded.
        const double s = b.unit[i] * (static_cast<double>(slot[lane]) - b.sum[i] + 1);
        entries[b.count[i]++] = {s + (b.shift[i] + chunk.base) + 1.0001 * b.slack[i],
                                 (chunk.first_panel + panel) * kPanel + lane};
      }
    }
  }

  static void collect_chunk(const NearestCodeProblem& p, const Packed& q, const Chunk& chunk,
                            int64_t count, Block& b) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* slots = b.slots + i * b.slot_stride;
      __m512i most = _mm512_load_si512(slots);
      for (int64_t panel = 1; panel < chunk.num_panels; ++panel) {
        most = _mm512_max_epi32(most, _mm512_load_si512(slots + panel * kLanes));
      }
      b.greatest[i] = _mm512_reduce_max_epi32(most);
    }
    bound_chunk(p, q, chunk, count, b);
    for (int64_t i = 0; i < count; ++i) {
      if (b.count[i] >= 0 && b.greatest[i] >= b.threshold[i]) collect_row(chunk, i, b);
    }
  }

  // Slots worth looking into before another search is cheaper: as long as rescoring them takes
  // (about 3 cycles per 16 channels and 15 more, per code) no longer than a pass in float32.
  static int64_t entry_limit(const NearestCodeProblem& p) {
    const double width = static_cast<double>(padded_width(p.D));
    const double pass = static_cast<double>(p.num_codes) * static_cast<double>(p.D) / 16;
    const double limit = pass / (4 * (width * 3 / 16 + 15));
    return static_cast<int64_t>(fmax(16.0, fmin(limit, static_cast<double>(kMaxEntries))));
  }

  // The winner of row i, or kHardRow.
  static int64_t settle(const NearestCodeProblem& p, const Packed& q, int64_t i, Block& b) {
    Entry* entries = b.entries + b.place[i] * kMaxEntries;
    const int32_t left = drop_entries(entries, b.count[i], b.lower[i]);
    int64_t found[kMaxCandidates];
    int64_t count = 0;
    for (int32_t e = 0; e < left; ++e) {
      for (int64_t v = 0; v < 4; ++v) {
        const int32_t k = q.order[entries[e].position + v * kLanes];
        found[count] = k;
        count += k >= 0;
      }
    }
    load_row(p, b.source[i], b.raw);
    // Canonical scores cost about as much as 1/32 of the codes would in another search.
    const int64_t limit = p.num_codes / 32 < 32 ? 32 : p.num_codes / 32;
    const double reach =
        p.metric == kL2 ? 0.0
                        : ldexp(1.01 * b.norm[i] * (q.longest + q.center_norm), -2 * q.exponent);
    return settle_candidates<Floats>(p, b.raw, reach, found, count, limit, b.scores);
  }

  static int64_t search(const NearestCodeProblem& p, const void* memory, const int64_t* rows,
                        int64_t first_row, int64_t count, void* scratch) {
    const Packed& q = *static_cast<const Packed*>(memory);
    Carver carver{static_cast<char*>(scratch), 0};
    Block& b = *carve_block(p, carver);
    b.limit = entry_limit(p);
    for (int64_t i = 0; i < count; ++i) {
      b.old_lower[i] = -static_cast<double>(INFINITY);
      b.old_count[i] = 0;
    }
    Engine::begin(q.words);
    for (int64_t c = 0; c < q.num_chunks; ++c) {
      if (c == 0 || q.chunks[c].center != q.chunks[c - 1].center) {
        if (c > 0) put_back(count, b);
        load_rows(p, q, q.chunks[c], rows, first_row, count, b);
      }
      score_chunk(q, q.chunks[c], count, b);
      collect_chunk(p, q, q.chunks[c], count, b);
    }
    Engine::end();
    int64_t looked_into = 0;
    for (int64_t i = 0; i < count; ++i) {
      looked_into += b.count[i] >= 0 ? b.count[i] : b.count[i] == kTooMany ? b.limit : 0;
      const bool settled = b.count[i] > 0;
      const int64_t k = settled ? settle(p, q, i, b) : b.count[i] == kBroken ? -1 : kHardRow;
      b.kept[i] = k;
      p.indices[b.source[i]] = k >= 0 ? p.code_ids[k] : k;
    }
    if (p.distance != nullptr) write_distances(p, b.source, b.kept, count, b.raw);
    return looked_into;
  }

  // Within its widths, and with nothing near overflow once scaled: every sum of squares is finite.
  static bool fits(const NearestCodeProblem& p) {
    const int exponent = Codes::choose_exponent(p);
    return p.D <= kMaxWidth && p.num_codes < (int64_t{1} << 31) - kPanel &&
           ldexp(p.center_norm, exponent) < 0x1p55 && ldexp(p.max_norm, exponent) < 0x1p55;
  }

  static constexpr NearestCodeSearch table(double cycles) {
    return {cycles, fits, panel_bytes, scratch_bytes, pack, search};
  }
};

}  // namespace
}  // namespace fastvq
