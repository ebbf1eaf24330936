// The row passes in this file's instruction set: see row_passes.h.
#include "row_passes_body.h"

namespace fastvq {

const RowPasses row_passes_generic = {gather, backward, sum, sum_pulls, subtract, add_up};

}  // namespace fastvq
