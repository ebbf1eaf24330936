// nearest_code on any instruction set: prepares the codebook, spreads blocks of rows over threads,
// and sends the rows that float32 cannot settle through the float64 search. The searches themselves
// and their error bound are in nearest_code_search.h.
#include "nearest_code.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace fastvq {
namespace {

// Round to nearest, and subnormals kept, while it lives: the caller's thread may flush them.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    fegetenv(&callers_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { fesetenv(&callers_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
  fenv_t callers_;
};

constexpr size_t kAlignment = 64;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, aligned(bytes)) != 0) throw std::bad_alloc();
  return Memory(memory);
}

// The kept codes: finite, and not a repeat of an earlier one.
struct Codes {
  std::vector<int64_t> ids;
  std::vector<float> rows;                // padded_width(D) each
  std::vector<float> center, row_center;  // see NearestCodeProblem, as for the rest
  std::vector<double> offsets;
  double center_norm = 0.0, min_norm = 0.0, max_norm = 0.0;
};

// Makes a float64 sum of squares' root an upper bound: covers its rounding for any D below 2^39.
constexpr double kSumMargin = 1.0001;

uint64_t hash_of(const char* row, size_t bytes) {
  constexpr size_t kWays = 4;  // side by side: one chain of products would wait for each
  uint64_t ways[kWays] = {0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu, 0x165667b19e3779f9u,
                          0x27d4eb2f165667c5u};
  const auto take_in = [](uint64_t& way, uint64_t word) {
    way = (way ^ word) * 0xff51afd7ed558ccdu;
    way ^= way >> 32;
  };
  size_t at = 0;
  for (; at + 8 * kWays <= bytes; at += 8 * kWays) {
    for (size_t way = 0; way < kWays; ++way) {
      uint64_t word;
      std::memcpy(&word, row + at + 8 * way, sizeof word);
      take_in(ways[way], word);
    }
  }
  for (; at < bytes; at += 2) {  // no number is shorter
    uint16_t word;
    std::memcpy(&word, row + at, sizeof word);
    take_in(ways[0], word);
  }
  for (size_t way = 1; way < kWays; ++way) take_in(ways[0], ways[way]);
  return ways[0];
}

// Open-addressing table of rows by content; rows are `stride` bytes apart, `bytes` long.
class SeenRows {
 public:
  SeenRows(const void* rows, size_t stride, size_t bytes, int64_t capacity)
      : rows_(static_cast<const char*>(rows)), stride_(stride), bytes_(bytes) {
    while (mask_ + 1 < static_cast<uint64_t>(2 * capacity)) mask_ = 2 * mask_ + 1;
    slots_.assign(mask_ + 1, -1);
  }

  // The row equal to row n that was seen before, or n itself, which then counts as seen.
  int64_t first_equal(int64_t n) {
    const char* row = rows_ + static_cast<size_t>(n) * stride_;
    for (uint64_t at = hash_of(row, bytes_) & mask_;; at = (at + 1) & mask_) {
      if (slots_[at] < 0) return slots_[at] = n;
      const char* other = rows_ + static_cast<size_t>(slots_[at]) * stride_;
      if (std::memcmp(other, row, bytes_) == 0) return slots_[at];
    }
  }

 private:
  const char* rows_;
  size_t stride_, bytes_;
  uint64_t mask_ = 1;
  std::vector<int64_t> slots_;
};

// Without an early end, which would keep the compiler from using vectors.
bool all_finite(const float* row, int64_t D) {
  constexpr uint32_t kExponent = 0x7f800000u;
  uint32_t broken = 0;
  for (int64_t d = 0; d < D; ++d) {
    uint32_t bits;
    std::memcpy(&bits, row + d, sizeof bits);
    broken |= (bits & kExponent) == kExponent ? 1u : 0u;
  }
  return broken == 0;
}

// |row - center|² in float64, in four sums side by side: one would wait for each addition.
double centered_squares(const float* row, const float* center, int64_t width) {
  double sums[4] = {};
  for (int64_t d = 0; d < width; d += 4) {
    for (int64_t i = 0; i < 4; ++i) {
      const double element = static_cast<double>(row[d + i]) - static_cast<double>(center[d + i]);
      sums[i] += element * element;
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Fills codes.rows and codes.ids.
void keep_rows(const void* codebook, int dtype, int64_t K, int64_t D, Codes& codes) {
  const int64_t width = padded_width(D);
  codes.rows.assign(static_cast<size_t>(K * width), 0.0f);
  const size_t row_bytes = static_cast<size_t>(D) * sizeof(float);
  SeenRows seen(codes.rows.data(), static_cast<size_t>(width) * sizeof(float), row_bytes, K);
  int64_t kept = 0;
  for (int64_t k = 0; k < K; ++k) {
    float* row = codes.rows.data() + kept * width;
    read_floats(codebook, dtype, k * D, D, row);
    if (!all_finite(row, D)) continue;
    for (int64_t d = 0; d < D; ++d) row[d] += 0.0f;  // -0 and 0 count as equal
    if (seen.first_equal(kept) != kept) continue;
    codes.ids.push_back(k);
    ++kept;
  }
}

// Per channel, the median of a few codes spread over the codebook: near most codes, whatever the
// others hold. Any center is right; a near one makes the fast pass's error small. Zero where the
// median would bring the codes not much nearer: codes far smaller than it would drown in it.
void choose_center(int64_t D, Codes& codes) {
  const int64_t width = padded_width(D), kept = static_cast<int64_t>(codes.ids.size());
  const int64_t samples = std::min<int64_t>(kept, 15);
  codes.center.assign(static_cast<size_t>(width), 0.0f);
  std::vector<float> values(static_cast<size_t>(samples)), sorted;
  std::vector<double> from_zero(static_cast<size_t>(samples), 0.0), from_center = from_zero;
  double squares = 0.0;
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t i = 0; i < samples; ++i) {
      values[static_cast<size_t>(i)] =
          codes.rows[static_cast<size_t>(i * kept / samples * width + d)];
      const double value = static_cast<double>(values[static_cast<size_t>(i)]);
      from_zero[static_cast<size_t>(i)] += value * value;
    }
    sorted = values;
    std::nth_element(sorted.begin(), sorted.begin() + samples / 2, sorted.end());
    const float median = sorted[static_cast<size_t>(samples / 2)];
    codes.center[static_cast<size_t>(d)] = median;
    squares += static_cast<double>(median) * static_cast<double>(median);
    for (int64_t i = 0; i < samples; ++i) {
      const double difference =
          static_cast<double>(values[static_cast<size_t>(i)]) - static_cast<double>(median);
      from_center[static_cast<size_t>(i)] += difference * difference;
    }
  }
  const auto middle = [&](std::vector<double>& of) {
    std::nth_element(of.begin(), of.begin() + samples / 2, of.end());
    return of[static_cast<size_t>(samples / 2)];
  };
  if (middle(from_center) > 0.5 * middle(from_zero)) {
    codes.center.assign(static_cast<size_t>(width), 0.0f);
    squares = 0.0;
  }
  codes.center_norm = kSumMargin * std::sqrt(squares);
}

Codes keep_codes(const void* codebook, int dtype, int64_t K, int64_t D, int metric) {
  Codes codes;
  keep_rows(codebook, dtype, K, D, codes);
  if (codes.ids.empty()) return codes;
  choose_center(D, codes);
  if (metric == kL2) {
    codes.row_center = codes.center;
  } else {
    codes.row_center.assign(codes.center.size(), 0.0f);
  }
  codes.min_norm = std::numeric_limits<double>::infinity();
  const float* row = codes.rows.data();
  for (size_t k = 0; k < codes.ids.size(); ++k, row += padded_width(D)) {
    const double squares = centered_squares(row, codes.center.data(), padded_width(D));
    codes.offsets.push_back(metric == kL2 ? -squares / 2 : 0.0);
    const double norm = kSumMargin * std::sqrt(squares);
    codes.min_norm = std::min(codes.min_norm, norm);
    codes.max_norm = std::max(codes.max_norm, norm);
  }
  return codes;
}

// One search of the ladder, its codes packed at the first use.
class Step {
 public:
  Step(const NearestCodeSearch& search, double pass) : search_(search), pass_(pass) {}

  // What a pass costs per row, candidates aside: cycles, roughly.
  double pass() const { return pass_; }

  // Runs over `count` rows (those listed, or first_row … where rows is null) in blocks taken by
  // whichever thread is free; every row's answer is exact, so who takes it does not matter.
  // Returns how many places were looked into.
  int64_t run(const NearestCodeProblem& problem, const int64_t* rows, int64_t first_row,
              int64_t count, int num_threads) {
    if (!panels_) {
      panels_ = allocate(search_.panel_bytes(problem));
      search_.pack(problem, panels_.get());
    }
    const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
    // In cycles a second thread pays from some 2^18: a search waits for its slower half.
    const double operations = 4 * pass_ * static_cast<double>(count);
    const int workers =
        static_cast<int>(std::min<int64_t>(useful_threads(num_threads, operations), blocks));
    const size_t scratch_bytes = aligned(search_.scratch_bytes(problem));
    const Memory scratch = allocate(scratch_bytes * static_cast<size_t>(workers));
    std::atomic<int64_t> next{0}, places{0};
    run_workers(workers, [&](int worker) {
      const DefaultFloatingPoint environment;
      char* own = static_cast<char*>(scratch.get()) + scratch_bytes * static_cast<size_t>(worker);
      for (int64_t block = next++; block < blocks; block = next++) {
        const int64_t first = block * kBlockRows;
        const int64_t size = std::min(kBlockRows, count - first);
        places += search_.search(problem, panels_.get(), rows ? rows + first : nullptr,
                                 first_row + first, size, own);
      }
    });
    return places;
  }

 private:
  const NearestCodeSearch& search_;
  double pass_;
  Memory panels_;
};

std::vector<int64_t> hard_rows(const int64_t* indices, int64_t first, int64_t last) {
  std::vector<int64_t> hard;
  for (int64_t n = first; n < last; ++n) {
    if (indices[n] == kHardRow) hard.push_back(n);
  }
  return hard;
}

// The searches of the kernel that can take the problem, coarsest first.
std::vector<Step> ladder(const NearestCodeKernel& kernel, const NearestCodeProblem& problem,
                         int searches) {
  const double vectors = static_cast<double>(problem.num_codes) / 16;
  const double D = static_cast<double>(problem.D);
  std::vector<Step> steps;
  const auto add = [&](const NearestCodeSearch* search) {
    if (search == nullptr || search->search == nullptr || !search->fits(problem)) return;
    steps.emplace_back(*search, vectors * (search->cycles * D + 1.5));
  };
  if (searches & kInt8Search) add(kernel.int8);
  if (searches & kInt16Search) add(kernel.int16);
  if (searches & kFloat32Search) add(kernel.float32);
  add(kernel.float64);
  return steps;
}

// Where to begin for data like the first block's: each step is tried on the rows the one before
// left, until one is cheaper than the next alone. Leaves the block settled as far as it came.
size_t first_step(std::vector<Step>& steps, const NearestCodeProblem& problem, int num_threads) {
  // Cycles per place: 4 codes' scores in float32.
  const double place = 4 * (static_cast<double>(padded_width(problem.D)) * 3 / 16 + 15);
  std::vector<int64_t> rows(kBlockRows);
  for (int64_t n = 0; n < kBlockRows; ++n) rows[static_cast<size_t>(n)] = n;
  for (size_t at = 0;; ++at) {
    const double count = static_cast<double>(rows.size());
    const auto places = static_cast<double>(
        steps[at].run(problem, rows.data(), 0, static_cast<int64_t>(rows.size()), num_threads));
    if (at + 1 == steps.size()) return at;
    rows = hard_rows(problem.indices, 0, kBlockRows);
    const double left = static_cast<double>(rows.size()) / count, next = steps[at + 1].pass();
    if (steps[at].pass() + place * places / count + left * next <= next) return at;
    if (rows.empty()) return at + 1;
  }
}

// The last search, once per distinct row: it is slow, and rows that need it are often alike.
void settle_hard(Step& step, const NearestCodeProblem& problem, const std::vector<int64_t>& hard,
                 int num_threads) {
  const int64_t count = static_cast<int64_t>(hard.size()), D = problem.D;
  const size_t bytes = static_cast<size_t>(D) * sizeof(float);
  std::vector<float> rows(static_cast<size_t>(count * D));
  SeenRows seen(rows.data(), bytes, bytes, count);
  std::vector<int64_t> distinct, repeats, originals;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = hard[static_cast<size_t>(i)];
    float* row = rows.data() + i * D;
    read_floats(problem.x, problem.x_dtype, n * D, D, row);
    for (int64_t d = 0; d < D; ++d) row[d] += 0.0f;  // -0 and 0 count as equal
    const int64_t original = seen.first_equal(i);
    if (original == i) {
      distinct.push_back(n);
    } else {
      repeats.push_back(n);
      originals.push_back(hard[static_cast<size_t>(original)]);
    }
  }
  step.run(problem, distinct.data(), 0, static_cast<int64_t>(distinct.size()), num_threads);
  for (size_t i = 0; i < repeats.size(); ++i) {
    problem.indices[repeats[i]] = problem.indices[originals[i]];
    if (problem.distance != nullptr) {
      problem.distance[repeats[i]] = problem.distance[originals[i]];
    }
  }
}

void settle_all(const NearestCodeKernel& kernel, const NearestCodeProblem& problem, int64_t N,
                int num_threads, int searches) {
  std::vector<Step> steps = ladder(kernel, problem, searches);
  const bool try_first = N >= 4 * kBlockRows;
  const int64_t tried = try_first ? kBlockRows : 0;
  size_t at = try_first ? first_step(steps, problem, num_threads) : 0;
  if (at + 1 < steps.size()) {
    steps[at++].run(problem, nullptr, tried, N - tried, num_threads);
  } else {
    std::fill(problem.indices + tried, problem.indices + N, kHardRow);
  }
  for (; at < steps.size(); ++at) {
    const std::vector<int64_t> hard = hard_rows(problem.indices, 0, N);
    if (hard.empty()) return;
    if (at + 1 == steps.size()) {
      settle_hard(steps[at], problem, hard, num_threads);
    } else {
      steps[at].run(problem, hard.data(), 0, static_cast<int64_t>(hard.size()), num_threads);
    }
  }
}

// Whether the call has few enough rows to do without preparing the codebook, and that worked.
// Preparation takes some 12 cycles per number of it; a row 3/16 per number and 8 per code.
bool settle_directly(const NearestCodeKernel& kernel, const NearestCodeCall& call) {
  if (call.metric != kL2 || call.D > (int64_t{1} << 17) || call.K == 0) return false;
  const double per_code = static_cast<double>(padded_width(call.D)) * 3 / 16 + 8;
  if (static_cast<double>(call.N) * per_code > 12.0 * static_cast<double>(call.D)) return false;
  std::vector<float> scratch(static_cast<size_t>(kernel.direct->scratch_floats(call)), 0.0f);
  return kernel.direct->search(call, scratch.data());
}

}  // namespace

void nearest_code(const NearestCodeKernel& kernel, const NearestCodeCall& call, int num_threads,
                  int searches) {
  if (call.N == 0) return;
  const DefaultFloatingPoint environment;
  if ((searches & kDirectSearch) && settle_directly(kernel, call)) return;
  const Codes codes = keep_codes(call.codebook, call.codebook_dtype, call.K, call.D, call.metric);
  if (codes.ids.empty()) {
    std::fill_n(call.indices, call.N, -1);
    if (call.distance != nullptr) {
      std::fill_n(call.distance, call.N, std::numeric_limits<float>::quiet_NaN());
    }
    return;
  }
  NearestCodeProblem problem;
  problem.x = call.x;
  problem.x_dtype = call.x_dtype;
  problem.metric = call.metric;
  problem.D = call.D;
  problem.num_codes = static_cast<int64_t>(codes.ids.size());
  problem.code_ids = codes.ids.data();
  problem.codes = codes.rows.data();
  problem.center = codes.center.data();
  problem.row_center = codes.row_center.data();
  problem.center_norm = codes.center_norm;
  problem.offsets = codes.offsets.data();
  problem.min_norm = codes.min_norm;
  problem.max_norm = codes.max_norm;
  problem.indices = call.indices;
  problem.distance = call.distance;
  settle_all(kernel, problem, call.N, num_threads, searches);
}

}  // namespace fastvq
