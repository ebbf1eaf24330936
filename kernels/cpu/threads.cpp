// See threads.h.
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <system_error>
#include <thread>
#include <vector>

namespace fastvq {
namespace {

struct Job {
  WorkerBody body;
  const void* state;
  int workers;
  fenv_t callers;  // the caller's rounding and its way with subnormals hold for every worker
};

// GNU's OpenMP runtime, by the entry points that compilers call.
struct OpenMp {
  void (*parallel)(void (*region)(void*), void* argument, unsigned threads, unsigned flags);
  int (*thread_number)();
  int (*team_size)();
};

template <class Function>
void look_up(Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

const OpenMp& open_mp() {
  static const OpenMp found = [] {
    OpenMp runtime;
    look_up(runtime.parallel, "GOMP_parallel");
    look_up(runtime.thread_number, "omp_get_thread_num");
    look_up(runtime.team_size, "omp_get_num_threads");
    return runtime;
  }();
  return found;
}

// Its threads do not live on in a forked child, and it would wait for them for ever.
std::atomic<bool> forked{false};
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

bool has_open_mp() {
  const OpenMp& runtime = open_mp();
  return watching == 0 && !forked && runtime.parallel != nullptr &&
         runtime.thread_number != nullptr && runtime.team_size != nullptr;
}

void region(void* argument) {
  const Job& job = *static_cast<const Job*>(argument);
  const int first = open_mp().thread_number(), team = open_mp().team_size();
  fenv_t own;
  fegetenv(&own);
  fesetenv(&job.callers);
  for (int worker = first; worker < job.workers; worker += team) job.body(job.state, worker);
  fesetenv(&own);
}

void run_on_new_threads(const Job& job) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(job.workers));
  int started = 1;
  for (; started < job.workers; ++started) {
    try {
      threads.emplace_back(job.body, job.state, started);
    } catch (const std::system_error&) {
      break;
    }
  }
  job.body(job.state, 0);
  for (int worker = started; worker < job.workers; ++worker) job.body(job.state, worker);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void run_workers(int workers, WorkerBody body, const void* state) {
  Job job = {body, state, workers, {}};
  fegetenv(&job.callers);
  if (workers <= 1) {
    for (int worker = 0; worker < workers; ++worker) body(state, worker);
  } else if (has_open_mp()) {
    open_mp().parallel(region, &job, static_cast<unsigned>(workers), 0);
  } else {
    run_on_new_threads(job);
  }
}

}  // namespace fastvq
