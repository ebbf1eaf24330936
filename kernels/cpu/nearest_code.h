// Index of the nearest code: what callers and the per-instruction-set files share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastvq {

enum Metric : int { kL2 = 0, kDot = 1 };

// What a search reads and writes. The codes are "kept" codes: rows with NaN or Inf and repeats of
// an earlier row are left out, in ascending order, so the first of equal scores is the lowest
// index.
struct NearestCodeProblem {
  const void* x;  // (N, D) contiguous, of x_dtype (rows.h)
  int x_dtype;
  int metric;
  int64_t D;
  int64_t num_codes;        // kept codes
  const int64_t* code_ids;  // kept code -> row of the codebook
  const float* codes;       // kept codes, rows of padded_width(D) floats, the rest zero
  // The fast pass works on c - center, and on x - row_center, both padded_width(D) long: far from
  // the origin that keeps its error small. The dot metric leaves x alone: x·center is constant.
  const float* center;
  const float* row_center;  // center for L2, zeros for dot
  double center_norm;       // upper bound of |center|
  const double* offsets;    // -|c - center|²/2 for L2, 0 for dot
  double min_norm;          // upper bounds of the least and the greatest |c - center|
  double max_norm;
  int64_t* indices;  // (N,)
  float* distance;   // (N,) or null
};

// Row length of `codes` and of the row buffers: whole vectors of every instruction set. Static, as
// everything the per-instruction-set files compile: the linker must not mix their copies.
static inline int64_t padded_width(int64_t D) { return (D + 15) / 16 * 16; }

// Marks, in `indices`, a row that the float32 search could not settle.
constexpr int64_t kHardRow = -2;

// Rows per call of a search: enough that a panel of codes, once in the first-level cache, is used
// for many rows; few enough that their scores stay in the second-level cache.
constexpr int64_t kBlockRows = 96;

// One precision of the search in one instruction set.
struct NearestCodeSearch {
  // Cycles per channel and 16 codes of its products, roughly: for choosing between searches.
  double cycles;
  // Whether it can take the problem at all.
  bool (*fits)(const NearestCodeProblem& problem);
  // Bytes of the packed codes, and of the scratch one search needs.
  size_t (*panel_bytes)(const NearestCodeProblem& problem);
  size_t (*scratch_bytes)(const NearestCodeProblem& problem);
  void (*pack)(const NearestCodeProblem& problem, void* panels);
  // Settles rows[0 … count-1], or first_row … first_row+count-1 where rows is null; count is at
  // most kBlockRows. panels and scratch are aligned to 64 bytes. Rows it cannot settle get
  // kHardRow. Returns how many places it looked into for candidates.
  int64_t (*search)(const NearestCodeProblem& problem, const void* panels, const int64_t* rows,
                    int64_t first_row, int64_t count, void* scratch);
};

// Which of the searches below float64 a call may use: all of them, unless a test wants one.
enum SearchMask : int { kInt8Search = 1, kInt16Search = 2, kFloat32Search = 4, kAllSearches = 7 };

// The searches of one instruction set from the coarsest to the finest; null members are skipped.
// float64 settles every row, the others leave some as kHardRow.
struct NearestCodeKernel {
  const NearestCodeSearch* int8;
  const NearestCodeSearch* int16;
  const NearestCodeSearch* float32;
  const NearestCodeSearch* float64;
};

// A search that the compiler could not make has null pointers for functions.
extern const NearestCodeSearch nearest_code_generic_float32, nearest_code_generic_float64;
extern const NearestCodeSearch nearest_code_avx2_float32, nearest_code_avx2_float64;
extern const NearestCodeSearch nearest_code_avx512_float32, nearest_code_avx512_float64;
extern const NearestCodeSearch nearest_code_int8_vnni, nearest_code_int16_vnni;
extern const NearestCodeSearch nearest_code_int8_amx;

// indices[n] = argmin_k Σ_d (x[n,d] - c[k,d])²  (L2), argmax_k Σ_d x[n,d]·c[k,d]  (dot),
// the score taken in float64, added in the order d = 0 … D-1, every product rounded before it is
// added; equal scores go to the lowest k. -1 where the row holds NaN or Inf, or every code does.
// distance (may be null) is the winner's score rounded to float32, NaN where the index is -1.
// x: (N, D), codebook: (K, D), contiguous. D is at least 1.
void nearest_code(const NearestCodeKernel& kernel, const void* x, int x_dtype, const void* codebook,
                  int codebook_dtype, int64_t* indices, float* distance, int64_t N, int64_t K,
                  int64_t D, int metric, int num_threads, int searches);

}  // namespace fastvq
