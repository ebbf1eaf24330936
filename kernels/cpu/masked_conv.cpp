// See masked_conv.h. Here: which block or sum a thread works on, and the layout of the weights.
#include "masked_conv.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <vector>

#include "masked_conv_blocks.h"
#include "masked_conv_winograd.h"
#include "rows.h"

namespace fastvq {
namespace {

// Pixels of a block, where there is one plane: its words and its sums fill half of a 1 MiB L2
// cache. With more planes the words of all of them must fit. On a 2-core Zen 4.
constexpr int64_t kPixelsOfSums = 1024;
// The same for the weight gradient, which takes planes pair by pair.
constexpr int64_t kPixelsOfProducts = 512;
// Words of one round of the weight gradient: 4 MiB, which the last-level cache keeps while every
// job reads them.
constexpr int64_t kWordsOfRound = int64_t{1} << 20;

ConvReach reach_of(const ConvProblem& problem) {
  ConvReach reach = {0, 0, 0, 0};
  for (int64_t i = 0; i < problem.num_taps; ++i) {
    const ConvTap& tap = problem.taps[i];
    reach.above = std::max(reach.above, -tap.dy);
    reach.below = std::max(reach.below, tap.dy);
    reach.left = std::max(reach.left, -tap.dx);
    reach.right = std::max(reach.right, tap.dx);
  }
  return reach;
}

// A weight that a tap reads, else zero: what lies elsewhere is never loaded.
template <class Element>
float weight_at(const ConvProblem& problem, int64_t o, int64_t c, const ConvTap& tap) {
  if (c < tap.first || c >= tap.last) return 0.0f;
  return to_float(static_cast<const Element*>(
      problem.weight)[o * problem.stride_o + c * problem.stride_c + tap.weight_offset]);
}

// Packs the weights of output plane `plane` and input word `word`, for all taps.
template <class Element>
void pack_weight(const ConvProblem& problem, int64_t per_word, int64_t plane, int64_t word,
                 float* packed) {
  const int64_t inputs = std::max<int64_t>(planes_of(words_of(problem.C, per_word)), 1);
  float* to = packed + (plane * inputs + word / kPlane) * problem.num_taps * kPlane * kPlane +
              word % kPlane * kPlane;
  const int64_t count = std::min(problem.O - plane * kPlane, kPlane);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t o = plane * kPlane + i, c = word * per_word;
    for (int64_t t = 0; t < problem.num_taps; ++t) {
      float value = weight_at<Element>(problem, o, c, problem.taps[t]);
      if (per_word == 2) {
        const float next = weight_at<Element>(problem, o, c + 1, problem.taps[t]);
        value = float_of_bits(bits_of_float(value) >> 16 | (bits_of_float(next) & 0xffff0000u));
      }
      to[t * kPlane * kPlane + i] = value;
    }
  }
  for (int64_t t = 0; t < problem.num_taps; ++t) {
    std::fill(to + t * kPlane * kPlane + count, to + t * kPlane * kPlane + kPlane, 0.0f);
  }
}

void pack_weights(const ConvProblem& problem, int64_t per_word, int workers, float* packed) {
  const int64_t words = words_of(problem.C, per_word);
  over_tasks(planes_of(problem.O) * words, workers, [&](int, int64_t task) {
    const int64_t plane = task / words, word = task % words;
    if (problem.dtype == kFloat32) pack_weight<float>(problem, per_word, plane, word, packed);
    if (problem.dtype == kFloat16) pack_weight<Half>(problem, per_word, plane, word, packed);
    if (problem.dtype == kBFloat16) pack_weight<BFloat>(problem, per_word, plane, word, packed);
  });
}

// Writes the live taps' sums for one output plane and one input channel.
template <class Element>
void store_weight(const ConvProblem& problem, int64_t plane, int64_t c, const float* sums) {
  const int64_t inputs = planes_of(problem.C);
  const float* from =
      sums + ((plane * inputs + c / kPlane) * problem.num_taps * kPlane + c % kPlane) * kPlane;
  const int64_t count = std::min(problem.O - plane * kPlane, kPlane);
  for (int64_t i = 0; i < count; ++i) {
    Element* to = static_cast<Element*>(problem.weight) + (plane * kPlane + i) * problem.stride_o +
                  c * problem.stride_c;
    for (int64_t t = 0; t < problem.num_taps; ++t) {
      const ConvTap& tap = problem.taps[t];
      if (c < tap.first || c >= tap.last) continue;
      to[tap.weight_offset] = rounded<Element>(from[t * kPlane * kPlane + i]);
    }
  }
}

template <class Element>
void store_weights(const ConvProblem& problem, const float* sums, const float* bias_sums,
                   int workers, void* grad_bias) {
  over_tasks(planes_of(problem.O) * problem.C, workers, [&](int, int64_t task) {
    store_weight<Element>(problem, task / problem.C, task % problem.C, sums);
  });
  if (grad_bias == nullptr) return;
  for (int64_t o = 0; o < problem.O; ++o) {
    static_cast<Element*>(grad_bias)[o] = rounded<Element>(bias_sums[o]);
  }
}

// Words that pair channels mix what a tap sees with what it does not where its channels begin or
// end inside a pair.
bool may_pair_channels(const ConvProblem& problem) {
  return std::all_of(problem.taps, problem.taps + problem.num_taps, [&](const ConvTap& tap) {
    return tap.first % 2 == 0 && (tap.last % 2 == 0 || tap.last == problem.C);
  });
}

// The jobs of sum_products: one tile of input channels, tap, input plane and output plane.
struct Jobs {
  int64_t of_planes, tiles, biases;  // of one pair of planes, of all, and the planes of biases
  int64_t count() const { return tiles + biases; }
};

// One task of one round: its jobs over all blocks, pair of planes by pair of planes, so that what a
// block brings into the cache serves many jobs.
void sum_jobs(const ConvKernel& kernel, const ConvProblem& problem, const ConvReach& reach,
              const std::vector<ConvProducts>& blocks, const Jobs& jobs, int64_t first,
              int64_t last, float* sums, float* bias_sums) {
  while (first < std::min(last, jobs.tiles)) {
    const int64_t planes_end = (first / jobs.of_planes + 1) * jobs.of_planes;
    const int64_t end = std::min({last, jobs.tiles, planes_end});
    for (const ConvProducts& block : blocks) {
      kernel.sum_products(problem, reach, block, first, end, sums);
    }
    first = end;
  }
  for (; first < last; ++first) {
    const int64_t plane = first - jobs.tiles;
    for (const ConvProducts& block : blocks) {
      kernel.sum_gradients(problem, block, plane, bias_sums + plane * kPlane);
    }
  }
}

// The taps that reach a pixel of the picture from some other.
std::vector<ConvTap> taps_within(const ConvProblem& problem) {
  std::vector<ConvTap> taps;
  std::copy_if(problem.taps, problem.taps + problem.num_taps, std::back_inserter(taps),
               [&](const ConvTap& tap) {
                 return std::abs(tap.dy) < problem.H && std::abs(tap.dx) < problem.W;
               });
  return taps;
}

// Adds the products of all blocks, a round of them at a time. Rounds depend on the problem alone,
// so that every sum is one fixed order of additions.
void sum_all_products(const ConvKernel& kernel, const ConvProblem& problem, int workers,
                      float* sums, float* bias_sums, int64_t biases) {
  const ConvReach reach = reach_of(problem);
  const ConvBlocks blocks(problem.B, problem.H, problem.W, kPixelsOfProducts);
  const ConvBlock largest = blocks.largest();
  const int64_t inputs = planes_of(problem.C), outputs = planes_of(problem.O);
  const int64_t x_words = inputs * kernel.pixels_per_word * plane_of_x(reach, largest);
  const int64_t of_block = x_words + outputs * plane_of_grad(largest, kernel.pixels_per_word);
  const int64_t in_round = std::min(blocks.count(), std::max<int64_t>(kWordsOfRound / of_block, 1));
  const int64_t of_planes = problem.num_taps * kernel.tiles_of_plane;
  const Jobs jobs = {of_planes, outputs * inputs * of_planes, biases};
  const int64_t tasks = std::min(jobs.count(), workers == 1 ? 1 : workers * kTasksOfWorker);

  const int64_t row = pitch_of(reach, largest);
  const ConvScratch scratch(workers * row + in_round * of_block);
  std::vector<ConvProducts> round;
  for (int64_t first = 0; first < blocks.count(); first += in_round) {
    round.clear();
    for (int64_t i = first; i < std::min(first + in_round, blocks.count()); ++i) {
      float* const words = scratch.get() + workers * row + (i - first) * of_block;
      round.push_back({blocks[i], words, words + x_words});
    }
    over_tasks(2 * static_cast<int64_t>(round.size()), workers, [&](int worker, int64_t task) {
      const ConvProducts& block = round[static_cast<size_t>(task / 2)];
      float* const own = scratch.get() + worker * row;
      if (task % 2 == 0) kernel.pack_seen(problem, reach, block.block, own, block.x);
      if (task % 2 == 1) kernel.pack_gradients(problem, block.block, own, block.grad);
    });
    over_tasks(tasks, workers, [&](int, int64_t task) {
      sum_jobs(kernel, problem, reach, round, jobs, jobs.count() * task / tasks,
               jobs.count() * (task + 1) / tasks, sums, bias_sums);
    });
  }
}

}  // namespace

void masked_conv(const ConvKernels& kernels, ConvProblem problem, const void* bias, bool add,
                 bool winograd, int num_threads) {
  if (problem.B * problem.H * problem.W * problem.O == 0) return;
  if (winograd && winograd_runs(problem)) {
    return winograd_conv(kernels, problem, static_cast<const float*>(bias), add, num_threads);
  }
  const std::vector<ConvTap> taps = taps_within(problem);
  problem.taps = taps.data();
  problem.num_taps = static_cast<int64_t>(taps.size());
  const bool pairs = kernels.of_pairs != nullptr && problem.dtype == kBFloat16;
  const ConvKernel& kernel =
      pairs && may_pair_channels(problem) ? *kernels.of_pairs : *kernels.of_floats;
  const int64_t per_word = kernel.channels_per_word;
  const int workers = workers_for(problem, num_threads);

  const ConvReach reach = reach_of(problem);
  const int64_t inputs = std::max<int64_t>(planes_of(words_of(problem.C, per_word)), 1);
  const int64_t outputs = planes_of(problem.O);
  int64_t pixels = kPixelsOfSums / std::max(inputs, outputs);
  if (workers > 1) {
    pixels = std::min(pixels, problem.B * problem.H * problem.W / (kTasksOfWorker * workers));
  }
  const ConvBlocks blocks(problem.B, problem.H, problem.W, pixels);
  const ConvBlock largest = blocks.largest();
  const int64_t row = pitch_of(reach, largest), x_words = inputs * plane_of_x(reach, largest);
  const int64_t of_worker = row + x_words + outputs * largest.rows * largest.columns * kPlane;

  const ConvScratch weight(outputs * inputs * problem.num_taps * kPlane * kPlane);
  const ConvScratch scratch(workers * of_worker);
  pack_weights(problem, per_word, workers, weight.get());
  over_tasks(blocks.count(), workers, [&](int worker, int64_t task) {
    float* const own = scratch.get() + worker * of_worker;
    float* const words = own + row;
    float* const sums = words + x_words;
    const ConvBlock block = blocks[task];
    kernel.pack_x(problem, reach, block, own, words);
    kernel.convolve(problem, reach, block, weight.get(), words, sums);
    kernel.store(problem, block, sums, bias, add);
  });
}

void masked_conv_weight_gradient(const ConvKernels& kernels, ConvProblem problem, void* grad_bias,
                                 bool winograd, int num_threads) {
  if (winograd && grad_bias == nullptr && winograd_runs(problem)) {
    return winograd_weight_gradient(kernels, problem, num_threads);
  }
  const std::vector<ConvTap> taps = taps_within(problem);
  problem.taps = taps.data();
  problem.num_taps = static_cast<int64_t>(taps.size());
  const bool pairs = kernels.of_pairs != nullptr && problem.dtype == kBFloat16;
  const ConvKernel& kernel = pairs ? *kernels.of_pairs : *kernels.of_floats;
  const int workers = workers_for(problem, num_threads);
  const int64_t inputs = planes_of(problem.C), outputs = planes_of(problem.O);
  const int64_t products = outputs * inputs * problem.num_taps * kPlane * kPlane;
  const ConvScratch sums(products + outputs * kPlane);
  float* const bias_sums = sums.get() + products;
  std::fill(sums.get(), bias_sums + outputs * kPlane, 0.0f);
  if (problem.B * problem.H * problem.W * problem.O != 0) {
    sum_all_products(kernel, problem, workers, sums.get(), bias_sums,
                     grad_bias == nullptr ? 0 : outputs);
  }
  if (problem.dtype == kFloat32) {
    store_weights<float>(problem, sums.get(), bias_sums, workers, grad_bias);
  } else if (problem.dtype == kFloat16) {
    store_weights<Half>(problem, sums.get(), bias_sums, workers, grad_bias);
  } else {
    store_weights<BFloat>(problem, sums.get(), bias_sums, workers, grad_bias);
  }
}

}  // namespace fastvq
