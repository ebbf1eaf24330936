// Worker threads of one call: PyTorch's own, where its OpenMP runtime is in the process. That one
// keeps its threads spinning for a while after each parallel operation, so threads of our own would
// share the processors with them: on two cores a training step between PyTorch's operations took
// twice as long. Elsewhere, and after fork(), threads are started for each call. Calls from several
// Python threads at once are safe either way.
#pragma once

#include <cstdint>

namespace fastvq {

// Threads worth starting for `operations` (multiply-adds, or elements moved): starting one costs
// some 20 µs, in which one core does about 2^20 of them.
inline int useful_threads(int requested, double operations) {
  const double worth = 1.0 + operations / static_cast<double>(int64_t{1} << 20);
  return worth < requested ? static_cast<int>(worth) : requested;
}

// The same for one pass over N rows of D elements. Measured on a 2-core Zen 4: memory and what each
// row costs make an element of such a pass as slow as some 8 multiply-adds.
inline int threads_for_rows(int requested, int64_t N, int64_t D) {
  return useful_threads(requested, 8.0 * static_cast<double>(N) * static_cast<double>(D + 16));
}

// Calls body(state, worker) for worker = 0 … workers-1, in the caller's floating-point environment.
using WorkerBody = void (*)(const void* state, int worker);
void run_workers(int workers, WorkerBody body, const void* state);

// The same for any callable. body must not throw.
template <class Body>
void run_workers(int workers, const Body& body) {
  run_workers(
      workers, [](const void* state, int worker) { (*static_cast<const Body*>(state))(worker); },
      &body);
}

// Calls pass(first, last) with equal ranges of N rows of D elements.
template <class Pass>
void over_rows(int64_t N, int64_t D, int num_threads, const Pass& pass) {
  const int workers = threads_for_rows(num_threads, N, D);
  run_workers(workers, [&](int worker) { pass(N * worker / workers, N * (worker + 1) / workers); });
}

}  // namespace fastvq
