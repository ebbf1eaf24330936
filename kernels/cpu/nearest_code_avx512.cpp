// nearest_code in AVX-512 (F, BW, DQ, VL) with FMA: 32 registers hold a tile of 6 rows × 4 vectors,
// the 4 vectors of codes and one broadcast element.
#include "nearest_code.h"
#include "nearest_code_search.h"
#include "nearest_code_vec512.h"

namespace fastvq {
const NearestCodeSearch nearest_code_avx512_float32 = Search<Floats>::table(1);
const NearestCodeSearch nearest_code_avx512_float64 = Search<Doubles>::table(2);
}  // namespace fastvq
