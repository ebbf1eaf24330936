// The gate's passes in this file's instruction set: see gated_activation.h.
#define FASTVQ_VECTOR_BYTES 16
#include "gated_activation_pass.h"

namespace fastvq {
const GatedActivationPasses gated_activation_generic = {gate_forward, gate_backward};
}  // namespace fastvq
