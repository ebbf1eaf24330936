// See draw_code.h.
#include "draw_code.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace fastvq {
namespace {

constexpr uint64_t kIncrement = 0x9E3779B97F4A7C15u;
constexpr double kTolerance = 0x1p-14;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// SplitMix64's output function.
uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

uint64_t add_key(uint64_t state, int64_t key) {
  return mix(state + (static_cast<uint64_t>(key) + 1) * kIncrement);
}

// Best and second best of a stream of scores; the first of equal ones stays best.
struct TopTwo {
  double best = -kInfinity, second = -kInfinity;
  int64_t index = -1;

  void add(double score, int64_t k) {
    if (score > best) {
      second = best;
      best = score;
      index = k;
    } else if (score > second) {
      second = score;
    }
  }
  int64_t unless_within(double gap) const { return best - second >= gap ? index : -1; }
};

}  // namespace

CodeDrawer::CodeDrawer(const DrawRule& rule, int64_t K) : rule_(rule), K_(K) {
  const auto size = static_cast<size_t>(K);
  least_.resize(size);
  if (rule.top_k > 0 || rule.top_p < 1) {
    for (auto* values : {&scaled_, &weights_}) values->resize(size);
    sums_.resize(size + 1);
    order_.resize(size);
    for (auto* flags : {&certain_, &possible_}) flags->resize(size);
  }
}

int64_t CodeDrawer::draw(const float* logits, int64_t sample, int64_t position) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t k = 0; k < K_; ++k) {
    const float size = std::fabs(logits[k]);
    finite &= size <= std::numeric_limits<float>::max();
    largest = size > largest ? size : largest;
  }
  if (!finite) return -1;
  if (K_ == 1) return 0;
  const double delta = kTolerance * std::max(1.0, static_cast<double>(largest));
  if (rule_.temperature == 0) return greedy(logits, delta);
  state_ = add_key(0, static_cast<int64_t>(rule_.seed));
  for (int64_t key : {sample, rule_.level, position}) state_ = add_key(state_, key);
  const bool filters = rule_.top_k > 0 || rule_.top_p < 1;
  const double scaled_delta = delta / rule_.temperature;
  return filters ? filtered(logits, scaled_delta) : unfiltered(logits, scaled_delta, largest);
}

int64_t CodeDrawer::greedy(const float* logits, double delta) const {
  TopTwo top;
  for (int64_t k = 0; k < K_; ++k) top.add(logits[k], k);
  return top.unless_within(2 * delta);
}

// −log(−log u), u = (m + ½)·2⁻⁵² with m the top 52 of 64 bits.
double CodeDrawer::gumbel(int64_t code) const {
  const double top = static_cast<double>(add_key(state_, code) >> 12);
  return -std::log(-std::log((top + 0.5) * 0x1p-52));
}

// With z = logit / temperature, e = −log u and Z = max z, the score z − log e falls with
// v = e·exp(Z − z), and e ≥ 1 − u. So (1 − u)·exp(Z − z) bounds v from below, and only codes whose
// bound is not above the best v found, within what decides doubt and rounding here, need
// logarithms.
int64_t CodeDrawer::unfiltered(const float* logits, double delta, float largest) {
  const float inverse = static_cast<float>(1.0 / rule_.temperature);
  const float top = *std::max_element(logits, logits + K_);
  int64_t likely = 0;
  for (int64_t k = 0; k < K_; ++k) {
    const uint64_t bits = add_key(state_, k) >> 12;
    const float rest = (static_cast<float>((uint64_t{1} << 52) - bits) - 0.5f) * 0x1p-52f;
    // Capped: a smaller bound is a bound, and finite.
    least_[k] = rest * std::exp(std::min((top - logits[k]) * inverse, 80.0f));
    if (least_[k] < least_[likely]) likely = k;
  }
  const auto score = [&](int64_t k) { return logits[k] / rule_.temperature + gumbel(k); };
  const double top_scaled = top / rule_.temperature;
  // Each z in float32 is off by at most 2·2⁻²⁴·|z| and half that again in the difference; the
  // factors of the bound by a few 2⁻²⁴.
  const double slack = 2 * delta + 1e-5 + 4 * 0x1p-24 * (2.0 * largest / rule_.temperature);
  const double limit = std::exp(top_scaled - score(likely) + slack);
  TopTwo winner;
  for (int64_t k = 0; k < K_; ++k) {
    if (!(least_[k] > limit)) winner.add(score(k), k);
  }
  return winner.unless_within(2 * delta);
}

int64_t CodeDrawer::filtered(const float* logits, double delta) {
  for (int64_t k = 0; k < K_; ++k) scaled_[k] = logits[k] / rule_.temperature;
  std::iota(order_.begin(), order_.end(), int64_t{0});
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int64_t a, int64_t b) { return scaled_[a] > scaled_[b]; });
  bounds(delta + 1e-12);  // the float64 arithmetic of the bounds themselves
  TopTwo winner;
  int64_t rank_of_best = 0;
  for (int64_t rank = 0; rank < K_ && possible_[rank]; ++rank) {
    const int64_t before = winner.index;
    winner.add(scaled_[order_[rank]] + gumbel(order_[rank]), order_[rank]);
    if (winner.index != before) rank_of_best = rank;
  }
  return certain_[rank_of_best] ? winner.unless_within(2 * delta) : -1;
}

// Which ranks are kept whatever an error of delta does, and which may be; fastvq/sampling/draw.py,
// _bounds.
void CodeDrawer::bounds(double delta) {
  const auto value = [&](int64_t rank) { return scaled_[order_[rank]]; };
  const bool cut = rule_.top_k > 0 && rule_.top_k < K_;
  for (int64_t rank = 0; rank < K_; ++rank) {
    certain_[rank] = !cut || value(rank) > value(rule_.top_k) + 2 * delta;
    possible_[rank] = !cut || value(rank) >= value(rule_.top_k - 1) - 2 * delta;
  }
  if (!(rule_.top_p < 1)) return;
  sums_[0] = 0.0;
  for (int64_t rank = 0; rank < K_; ++rank) {
    weights_[rank] = std::exp(value(rank) - value(0));
    sums_[rank + 1] = sums_[rank] + weights_[rank];
  }
  const int64_t num_certain = std::count(certain_.begin(), certain_.end(), 1);
  const int64_t num_possible = std::count(possible_.begin(), possible_.end(), 1);
  const double spread = std::exp(2 * delta);
  int64_t maybe_before = 0, surely_before = 0;  // ranks; both grow with `rank`
  for (int64_t rank = 0; rank < K_; ++rank) {
    while (maybe_before < K_ && value(maybe_before) >= value(rank) - 2 * delta) ++maybe_before;
    while (surely_before < K_ && value(surely_before) > value(rank) + 2 * delta) ++surely_before;
    const double most = sums_[std::min(maybe_before, num_possible)] - weights_[rank];
    const double least = sums_[std::min(surely_before, num_certain)];
    certain_[rank] &= most * spread < rule_.top_p * sums_[num_certain];
    possible_[rank] &= least <= rule_.top_p * spread * sums_[num_possible];
  }
}

}  // namespace fastvq
