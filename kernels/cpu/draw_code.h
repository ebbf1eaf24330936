// Drawing a code from logits by the Gumbel-max rule, or saying that rounding could flip the draw.
// The rule, the noise and the proof are fastvq/sampling's (`draw`, `noise`); this is the same in
// C++.
#pragma once

#include <cstdint>
#include <vector>

namespace fastvq {

struct DrawRule {
  double temperature;  // 0: greedy
  int64_t top_k;       // 0: no limit
  double top_p;        // 1: no limit
  uint64_t seed;
  int64_t level;
};

// Scratch of one thread.
class CodeDrawer {
 public:
  CodeDrawer(const DrawRule& rule, int64_t K);

  // The code, or −1 where it is in doubt or a logit is not finite. `sample` and `position` key the
  // noise.
  int64_t draw(const float* logits, int64_t sample, int64_t position);

 private:
  int64_t greedy(const float* logits, double delta) const;
  int64_t unfiltered(const float* logits, double delta, float largest);
  int64_t filtered(const float* logits, double delta);
  void bounds(double delta);
  double gumbel(int64_t code) const;

  DrawRule rule_;
  int64_t K_;
  uint64_t state_ = 0;  // of the noise, before the code enters
  std::vector<float> least_;
  std::vector<double> scaled_, weights_, sums_;
  std::vector<int64_t> order_;
  std::vector<uint8_t> certain_, possible_;  // by rank
};

}  // namespace fastvq
