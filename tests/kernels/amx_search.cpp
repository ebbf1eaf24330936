// nearest_code by the AMX search and float64 alone, as a plain C function for ctypes. Compiled by
// test_cpu_amx.py with nearest_code_amx.cpp over emulated tiles.
#include "nearest_code.h"

namespace {
int64_t rows_left;

// The AMX search, counting the rows that it leaves to float64.
int64_t counted(const fastvq::NearestCodeProblem& problem, const void* panels, const int64_t* rows,
                int64_t first_row, int64_t count, void* scratch) {
  const int64_t places =
      fastvq::nearest_code_int8_amx.search(problem, panels, rows, first_row, count, scratch);
  for (int64_t i = 0; i < count; ++i) {
    rows_left += problem.indices[rows ? rows[i] : first_row + i] == fastvq::kHardRow;
  }
  return places;
}
}  // namespace

// Returns how many rows the AMX search did not settle.
extern "C" __attribute__((visibility("default"))) int64_t
amx_search(const void* x, int x_dtype, const void* codebook, int codebook_dtype, int64_t* indices,
           float* distance, int64_t N, int64_t K, int64_t D, int metric) {
  fastvq::NearestCodeSearch amx = fastvq::nearest_code_int8_amx;
  amx.search = counted;
  rows_left = 0;
  const fastvq::NearestCodeKernel kernel = {&amx, nullptr, nullptr,
                                            &fastvq::nearest_code_generic_float64};
  fastvq::nearest_code(kernel, x, x_dtype, codebook, codebook_dtype, indices, distance, N, K, D,
                       metric, 1, fastvq::kAllSearches);
  return rows_left;
}
