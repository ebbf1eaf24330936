// sample_row for one instruction set; included by one file each, which defines FASTVQ_VECTOR_BYTES,
// FASTVQ_TILE_SAMPLES and FASTVQ_TILE_PANELS (how many accumulators the registers hold).
//
// Everything here has internal linkage, and nothing instantiates a template of the standard
// library: a shared function compiled for these instructions could be the one that other files link
// to.
//
// Products: every output is one chain of fused multiply-adds over the inputs in order, whatever the
// number of samples, so a sample's logits do not depend on which others are drawn beside it.
#pragma once

#include <cstring>

#include "sample_row.h"

namespace fastvq {
namespace {

constexpr int64_t kLanes = FASTVQ_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(FASTVQ_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FASTVQ_VECTOR_BYTES)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void copy(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof *to);
}
inline Floats all(float value) { return Floats{} + value; }

// exp(x) to about 2 units in the last place; x is cut to −80 … 80. A NaN stays one.
inline Floats exponential(Floats x) {
  x = x > 80.0f ? all(80.0f) : x;
  x = x < -80.0f ? all(-80.0f) : x;
  const Floats magic = all(12582912.0f);  // 1.5·2²³: adding it rounds to an integer
  const Floats rounded = x * 1.44269504f + magic;
  const Floats n = rounded - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints bits, zero;
  std::memcpy(&bits, &rounded, sizeof bits);
  std::memcpy(&zero, &magic, sizeof zero);
  bits = (bits - zero + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline float positive(float value) { return value < 0.0f ? 0.0f : value; }

// tanh(a)·sigmoid(b). Beyond 10, tanh is 1 in float32.
inline Floats gate(Floats a, Floats b) {
  a = a > 10.0f ? all(10.0f) : a;
  a = a < -10.0f ? all(-10.0f) : a;
  b = b < -40.0f ? all(-40.0f) : b;
  const Floats e = exponential(2.0f * a);
  return (e - 1.0f) / ((e + 1.0f) * (1.0f + exponential(-b)));
}

// One thread's work: the samples first … last − 1.
class RowSampler {
 public:
  RowSampler(const SampleRowProblem& problem, const SampleRowScratch& scratch, int64_t first,
             int64_t last)
      : problem_(problem),
        scratch_(scratch),
        first_(first),
        count_(last - first),
        C_(problem.channels) {}

  int64_t run(CodeDrawer& drawer, int64_t start) {
    for (int64_t column = start; column < problem_.W; ++column) {
      compute_features(column);
      if (!draw_column(drawer, column)) return column;
    }
    return problem_.W;
  }

 private:
  int64_t* code(int64_t sample, int64_t column) const {
    return problem_.codes + (sample * problem_.H + problem_.row) * problem_.W + column;
  }
  float* feature(int64_t s) const { return scratch_.features + s * C_; }
  float* product(int64_t s) const { return scratch_.product + s * scratch_.wide; }

  void compute_features(int64_t column) {
    if (column > 0) {
      for (int64_t s = 0; s < count_; ++s) {
        const int64_t before = *code(first_ + s, column - 1);
        copy(problem_.embedding + before * C_, C_,
             input(problem_.layers[0], first_ + s, column - 1));
      }
    }
    step_gated(problem_.layers[0], column);
    for (int64_t i = 1; i < problem_.num_layers; ++i) {
      const SampleRowLayer& layer = problem_.layers[i];
      if (layer.kind == SampleRowLayer::kAttention) {
        step_attention(layer, problem_.row * problem_.W + column);
        continue;
      }
      for (int64_t s = 0; s < count_; ++s) {
        copy(feature(s), C_, input(layer, first_ + s, column));
      }
      step_gated(layer, column);
    }
  }

  float* input(const SampleRowLayer& layer, int64_t sample, int64_t column) const {
    return layer.inputs + (sample * (layer.reach + problem_.W) + layer.reach + column) * C_;
  }

  void step_gated(const SampleRowLayer& layer, int64_t column) {
    // Tap t reads column − reach + t·dilation.
    multiply(layer.weight, 2 * C_, layer.taps, C_, [&](int64_t s, int64_t tap) {
      return input(layer, first_ + s, column - layer.reach + tap * layer.dilation);
    });
    for (int64_t s = 0; s < count_; ++s) {
      apply_gate(product(s), layer.terms + (column * problem_.n + first_ + s) * 2 * C_,
                 scratch_.hidden + s * C_);
    }
    multiply(layer.out_weight, C_, 1, C_,
             [&](int64_t s, int64_t) { return scratch_.hidden + s * C_; });
    for (int64_t s = 0; s < count_; ++s) {
      const float* old = layer.residual ? input(layer, first_ + s, column) : nullptr;
      finish(s, layer.out_bias, old);
    }
  }

  void apply_gate(const float* product, const float* terms, float* gated) const {
    int64_t c = 0;
    for (; c + kLanes <= C_; c += kLanes) {
      store(gated + c, gate(load(product + c) + load(terms + c),
                            load(product + C_ + c) + load(terms + C_ + c)));
    }
    for (; c < C_; ++c) {
      gated[c] = gate(all(product[c] + terms[c]), all(product[C_ + c] + terms[C_ + c]))[0];
    }
  }

  // Features of sample s: the product, the bias, and the layer's input where it is added.
  void finish(int64_t s, const float* bias, const float* input) {
    const float* sums = product(s);
    float* out = feature(s);
    for (int64_t c = 0; c < C_; ++c) {
      out[c] = sums[c] + bias[c] + (input != nullptr ? input[c] : 0.0f);
    }
  }

  void step_attention(const SampleRowLayer& layer, int64_t position) {
    const int64_t positions = problem_.H * problem_.W, size = C_ / layer.heads;
    multiply(layer.weight, 3 * C_, 1, C_, [&](int64_t s, int64_t) { return feature(s); });
    const float* terms = layer.terms + position * 3 * C_;
    for (int64_t s = 0; s < count_; ++s) {
      float* projected = product(s);
      for (int64_t c = 0; c < 3 * C_; ++c) projected[c] += terms[c];
      for (int64_t head = 0; head < layer.heads; ++head) {
        const int64_t base = ((first_ + s) * layer.heads + head) * size * positions;
        attend(projected + head * size, layer.keys + base, layer.values + base, size, positions,
               position, scratch_.hidden + s * C_ + head * size);
      }
    }
    multiply(layer.out_weight, C_, 1, C_,
             [&](int64_t s, int64_t) { return scratch_.hidden + s * C_; });
    for (int64_t s = 0; s < count_; ++s) finish(s, layer.out_bias, feature(s));
  }

  // One head: appends the key and value at `position`, and lets the query see all up to it. The
  // query, key and value lie C apart.
  void attend(const float* query, float* keys, float* values, int64_t size, int64_t positions,
              int64_t position, float* out) {
    for (int64_t d = 0; d < size; ++d) keys[d * positions + position] = query[C_ + d];
    copy(query + 2 * C_, size, values + position * size);
    const int64_t seen = position + 1;
    float* scores = scratch_.scores;
    for (int64_t p = 0; p < seen; ++p) scores[p] = 0.0f;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    for (int64_t d = 0; d < size; ++d) {
      const float q = query[d] * scale;
      const float* row = keys + d * positions;
      for (int64_t p = 0; p < seen; ++p) scores[p] += q * row[p];
    }
    const float total = soften(scores, seen);
    for (int64_t d = 0; d < size; ++d) out[d] = 0.0f;
    for (int64_t p = 0; p < seen; ++p) {
      const float weight = scores[p];
      for (int64_t d = 0; d < size; ++d) out[d] += weight * values[p * size + d];
    }
    for (int64_t d = 0; d < size; ++d) out[d] /= total;
  }

  // scores ← exp(scores − max); their sum.
  static float soften(float* scores, int64_t count) {
    float most = scores[0];
    for (int64_t p = 1; p < count; ++p) most = scores[p] > most ? scores[p] : most;
    Floats sums = {};
    float total = 0.0f;
    int64_t p = 0;
    for (; p + kLanes <= count; p += kLanes) {
      const Floats weights = exponential(load(scores + p) - most);
      store(scores + p, weights);
      sums += weights;
    }
    for (; p < count; ++p) total += scores[p] = exponential(all(scores[p] - most))[0];
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
    return total;
  }

  // Draws the column's unknown codes; false where one of them is in doubt.
  bool draw_column(CodeDrawer& drawer, int64_t column) {
    bool unknown = false, settled = true;
    for (int64_t s = 0; s < count_; ++s) unknown |= *code(first_ + s, column) < 0;
    if (!unknown) return true;
    compute_logits();
    for (int64_t s = 0; s < count_; ++s) {
      int64_t* here = code(first_ + s, column);
      if (*here >= 0) continue;
      *here = drawer.draw(problem_.logits + (first_ + s) * problem_.K,
                          problem_.noise_samples[first_ + s], problem_.position + column);
      problem_.doubtful[first_ + s] = *here < 0;
      settled &= *here >= 0;
    }
    return settled;
  }

  void compute_logits() {
    const int64_t M = problem_.hidden, K = problem_.K;
    for (int64_t i = 0; i < count_ * C_; ++i) scratch_.features[i] = positive(scratch_.features[i]);
    multiply(problem_.hidden_weight, M, 1, C_, [&](int64_t s, int64_t) { return feature(s); });
    for (int64_t s = 0; s < count_; ++s) {
      const float* sums = product(s);
      float* hidden = scratch_.hidden + s * M;
      for (int64_t m = 0; m < M; ++m) {
        hidden[m] = positive(sums[m] + problem_.hidden_bias[m]);
      }
    }
    multiply(problem_.logit_weight, K, 1, M,
             [&](int64_t s, int64_t) { return scratch_.hidden + s * M; });
    for (int64_t s = 0; s < count_; ++s) {
      const float* sums = product(s);
      float* logits = problem_.logits + (first_ + s) * K;
      for (int64_t k = 0; k < K; ++k) logits[k] = sums[k] + problem_.logit_bias[k];
    }
  }

  // product_[s] ← Σ over segments, inputs of weight[out, (segment, input)] · row(s,
  // segment)[input]. Panels outside, samples inside: a stretch of weights is read from memory once
  // for all samples.
  template <class Row>
  void multiply(const float* weight, int64_t out, int64_t segments, int64_t in, const Row& row) {
    constexpr int64_t kPanels = FASTVQ_TILE_PANELS, kSamples = FASTVQ_TILE_SAMPLES;
    const int64_t panels = (out + kPanel - 1) / kPanel;
    int64_t panel = 0;
    if (count_ == 1) {  // no other sample to hide the additions' latency behind
      for (; panel + kPanels * kSamples / 2 <= panels; panel += kPanels * kSamples / 2) {
        tile<1, kPanels * kSamples / 2>(weight, panel, 0, segments, in, row);
      }
    }
    for (; panel + kPanels <= panels; panel += kPanels) {
      all_samples<kPanels>(weight, panel, segments, in, row);
    }
    for (; panel < panels; ++panel) all_samples<1>(weight, panel, segments, in, row);
  }

  template <int kPanels, class Row>
  void all_samples(const float* weight, int64_t panel, int64_t segments, int64_t in,
                   const Row& row) {
    int64_t s = 0;
    for (; s + FASTVQ_TILE_SAMPLES <= count_; s += FASTVQ_TILE_SAMPLES) {
      tile<FASTVQ_TILE_SAMPLES, kPanels>(weight, panel, s, segments, in, row);
    }
    for (; s < count_; ++s) tile<1, kPanels>(weight, panel, s, segments, in, row);
  }

  template <int kSamples, int kPanels, class Row>
  void tile(const float* weight, int64_t panel, int64_t s, int64_t segments, int64_t in,
            const Row& row) {
    constexpr int kVectors = kPanels * (kPanel / kLanes), kPerPanel = kPanel / kLanes;
    Floats sums[kSamples][kVectors] = {};
    const int64_t panel_size = segments * in * kPanel;
    const float* base = weight + panel * panel_size;
    for (int64_t segment = 0; segment < segments; ++segment) {
      const float* rows[kSamples];
      for (int i = 0; i < kSamples; ++i) rows[i] = row(s + i, segment);
      for (int64_t k = 0; k < in; ++k, base += kPanel) {
        for (int v = 0; v < kVectors; ++v) {
          const Floats w = load(base + (v / kPerPanel) * panel_size + (v % kPerPanel) * kLanes);
          for (int i = 0; i < kSamples; ++i) sums[i][v] += rows[i][k] * w;
        }
      }
    }
    for (int i = 0; i < kSamples; ++i) {
      float* out = product(s + i) + panel * kPanel;
      for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, sums[i][v]);
    }
  }

  const SampleRowProblem& problem_;
  const SampleRowScratch& scratch_;
  int64_t first_, count_, C_;
};

int64_t draw_samples(const SampleRowProblem& problem, const SampleRowScratch& scratch,
                     CodeDrawer& drawer, int64_t first, int64_t last, int64_t start) {
  return RowSampler(problem, scratch, first, last).run(drawer, start);
}

}  // namespace
}  // namespace fastvq
