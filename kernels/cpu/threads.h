// Worker threads of one call. Nothing here outlives the call: no pool, so nothing to break after
// fork() and nothing shared between Python threads that call at once.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

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

// Calls body(worker) for worker = 0 … workers-1, worker 0 on the calling thread. A worker that the
// system refuses to start runs on the calling thread instead. body must not throw.
template <class Body>
void run_workers(int workers, const Body& body) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(workers));
  int started = 1;
  for (; started < workers; ++started) {
    try {
      threads.emplace_back(body, started);
    } catch (const std::system_error&) {
      break;
    }
  }
  body(0);
  for (int worker = started; worker < workers; ++worker) body(worker);
  for (std::thread& thread : threads) thread.join();
}

// Calls pass(first, last) with equal ranges of N rows of D elements.
template <class Pass>
void over_rows(int64_t N, int64_t D, int num_threads, const Pass& pass) {
  const int workers = threads_for_rows(num_threads, N, D);
  run_workers(workers, [&](int worker) { pass(N * worker / workers, N * (worker + 1) / workers); });
}

}  // namespace fastvq
