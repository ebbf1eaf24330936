// See gated_activation.h.
#include "gated_activation.h"

#include "threads.h"

namespace fastvq {

void gated_activation(const GatedActivationPasses& passes, const GatedActivation& call, void* gated,
                      int num_threads) {
  over_rows(call.B * call.P, 2 * call.C, num_threads,
            [&](int64_t first, int64_t last) { passes.forward(call, gated, first, last); });
}

void gated_activation_backward(const GatedActivationPasses& passes, const GatedActivation& call,
                               const void* grad, void* grad_features, float* sums, void* gated,
                               int num_threads) {
  const int64_t units = call.B * sums_per_picture(call.P);
  over_rows(units, kPixelsPerSum * 2 * call.C, num_threads, [&](int64_t first, int64_t last) {
    passes.backward(call, grad, grad_features, sums, gated, first, last);
  });
}

}  // namespace fastvq
