// See masked_conv_winograd.h. Here: when it runs, the transforms of the weights, in float64 and
// rounded once, and which tiles a thread works on.
#include "masked_conv_winograd.h"

#include <algorithm>

#include "masked_conv_blocks.h"
#include "masked_conv_winograd_kernel.h"
#include "rows.h"

namespace fastvq {
namespace {

// Floats of a block's words, points, products and sums: what a 1 MiB L2 cache holds beside the
// weights that pass through it. On a 2-core Zen 4.
constexpr int64_t kFloatsOfBlock = 160 * 1024;
// Floats of all slices' sums of the weight gradient.
constexpr int64_t kFloatsOfSlices = int64_t{1} << 22;
constexpr int64_t kMostSlices = 8, kLeastSlices = 2;
// Below this many channels, or pixels, transforms cost more than products.
constexpr int64_t kLeastChannels = 16, kLeastPixelsOfAll = 256;

constexpr int64_t kOfPlanes = kPlane * kPlane;

ConvTiling tiling_of(const ConvProblem& problem) {
  const auto by_row = [](const ConvTap& a, const ConvTap& b) { return a.dy < b.dy; };
  const auto by_column = [](const ConvTap& a, const ConvTap& b) { return a.dx < b.dx; };
  const ConvTap* const end = problem.taps + problem.num_taps;
  const auto rows = std::minmax_element(problem.taps, end, by_row);
  const auto columns = std::minmax_element(problem.taps, end, by_column);
  const int64_t height = rows.second->dy - rows.first->dy + 1;
  const int64_t width = columns.second->dx - columns.first->dx + 1;
  const int64_t most = kMostFormTaps + 1;
  return {static_cast<int>(std::min(height, most)), static_cast<int>(std::min(width, most)),
          rows.first->dy, columns.first->dx};
}

int64_t points_of(const ConvTiling& tiling) {
  return static_cast<int64_t>(tiling.rows().points) * tiling.columns().points;
}

// Tiles instead of pixels, cut into blocks.
class TileBlocks {
 public:
  TileBlocks(const ConvProblem& problem, const ConvTiling& tiling, int64_t tiles)
      : H_(problem.H),
        W_(problem.W),
        down_(tiling.rows().outputs),
        across_(tiling.columns().outputs),
        blocks_(problem.B, words_of(H_, down_), words_of(W_, across_), tiles) {}
  int64_t count() const { return blocks_.count(); }
  ConvTiles operator[](int64_t index) const {
    const ConvBlock of = blocks_[index];
    const int64_t row = of.row * down_, column = of.column * across_;
    return {{of.image, row, std::min(of.rows * down_, H_ - row), column,
             std::min(of.columns * across_, W_ - column)},
            of.rows,
            of.columns};
  }
  ConvTiles largest() const {
    const ConvBlock of = blocks_.largest();
    return {{}, of.rows, of.columns};
  }

 private:
  int64_t H_, W_, down_, across_;
  ConvBlocks blocks_;
};

// float64 numbers of one input channel and kPlane output channels, by rows and columns.
using Plane = double[kMostFormPoints][kMostFormPoints][kPlane];

void add_scaled(double factor, const double* from, double* to) {
  if (factor == 0.0) return;
  for (int64_t o = 0; o < kPlane; ++o) to[o] += factor * from[o];
}

// Calls body(o, row, column, weight's element) for the live weights of one input channel and the
// output channels of one plane.
template <class Body>
void over_weights(const ConvProblem& problem, const ConvTiling& tiling, int64_t plane, int64_t c,
                  const Body& body) {
  const int64_t count = std::min(problem.O - plane * kPlane, kPlane);
  for (int64_t o = 0; o < count; ++o) {
    float* const of_channels = static_cast<float*>(problem.weight) +
                               (plane * kPlane + o) * problem.stride_o + c * problem.stride_c;
    for (int64_t t = 0; t < problem.num_taps; ++t) {
      const ConvTap& tap = problem.taps[t];
      body(o, tap.dy - tiling.dy, tap.dx - tiling.dx, of_channels[tap.weight_offset]);
    }
  }
}

// Weights as ConvTilesKernel::convolve takes them.
void transform_weights(const ConvProblem& problem, const ConvTiling& tiling, int workers,
                       float* packed) {
  const ConvForm &rows = tiling.rows(), &columns = tiling.columns();
  const int64_t inputs = planes_of(problem.C), outputs = planes_of(problem.O);
  over_tasks(outputs * problem.C, workers, [&](int, int64_t task) {
    const int64_t plane = task / problem.C, c = task % problem.C;
    Plane taps = {}, half = {};
    over_weights(problem, tiling, plane, c,
                 [&](int64_t o, int64_t u, int64_t v, float& weight) { taps[u][v][o] = weight; });
    for (int p = 0; p < rows.points; ++p) {
      for (int u = 0; u < rows.taps; ++u) {
        for (int v = 0; v < columns.taps; ++v) {
          add_scaled(rows.weight[p][u], taps[u][v], half[p][v]);
        }
      }
      for (int q = 0; q < columns.points; ++q) {
        double whole[kPlane] = {};
        for (int v = 0; v < columns.taps; ++v) {
          add_scaled(columns.weight[q][v], half[p][v], whole);
        }
        const int64_t at = ((p * outputs + plane) * columns.points + q) * inputs + c / kPlane;
        std::copy(whole, whole + kPlane, packed + at * kOfPlanes + c % kPlane * kPlane);
      }
    }
  });
}

// The transpose: live weights from the slices' sums.
void store_gradients(const ConvProblem& problem, const ConvTiling& tiling, int64_t slices,
                     const float* sums, int workers) {
  const ConvForm &rows = tiling.rows(), &columns = tiling.columns();
  const int64_t inputs = planes_of(problem.C), outputs = planes_of(problem.O);
  const int64_t of_slice = points_of(tiling) * outputs * inputs * kOfPlanes;
  over_tasks(outputs * problem.C, workers, [&](int, int64_t task) {
    const int64_t plane = task / problem.C, c = task % problem.C;
    Plane taps = {};
    for (int p = 0; p < rows.points; ++p) {
      Plane half = {};
      for (int q = 0; q < columns.points; ++q) {
        const int64_t at = ((p * outputs + plane) * columns.points + q) * inputs + c / kPlane;
        double whole[kPlane] = {};
        for (int64_t slice = 0; slice < slices; ++slice) {
          const float* from = sums + slice * of_slice + at * kOfPlanes + c % kPlane * kPlane;
          for (int64_t o = 0; o < kPlane; ++o) whole[o] += from[o];
        }
        for (int v = 0; v < columns.taps; ++v) {
          add_scaled(columns.weight[q][v], whole, half[0][v]);
        }
      }
      for (int u = 0; u < rows.taps; ++u) {
        for (int v = 0; v < columns.taps; ++v)
          add_scaled(rows.weight[p][u], half[0][v], taps[u][v]);
      }
    }
    over_weights(problem, tiling, plane, c, [&](int64_t o, int64_t u, int64_t v, float& weight) {
      weight = static_cast<float>(taps[u][v][o]);
    });
  });
}

// Floats of one worker's parts for `tiles`, with `outputs` planes of gradients.
struct ScratchSizes {
  ScratchSizes(const ConvProblem& problem, const ConvTiling& tiling, const ConvTiles& tiles,
               int64_t outputs)
      : seen(planes_of(problem.C) * floats_seen(tiling, tiles)),
        grad(outputs * floats_covered(tiling, tiles)),
        points(planes_of(problem.C) * tiling.columns().points * tiles.count() * kPlane),
        products(tiling.columns().points * tiles.count() * kPlane) {}
  int64_t all() const { return seen + grad + points + products; }
  int64_t seen, grad, points, products;
};

// As many tiles as fill kFloatsOfBlock, and a share of all for each worker.
int64_t tiles_of_block(const ConvProblem& problem, const ConvTiling& tiling, int64_t outputs,
                       int64_t tasks) {
  const int64_t some = 64;
  const ConvTiles square = {{}, 8, some / 8};
  const int64_t of_tile = ScratchSizes(problem, tiling, square, outputs).all() / some;
  const int64_t pixels = problem.B * problem.H * problem.W;
  const int64_t all = pixels / (tiling.rows().outputs * tiling.columns().outputs);
  return std::min(kFloatsOfBlock / of_tile, all / tasks);
}

}  // namespace

bool winograd_runs(const ConvProblem& problem) {
  if (problem.dtype != kFloat32 || problem.num_taps < 2) return false;
  if (std::min(problem.C, problem.O) < kLeastChannels) return false;
  if (problem.B * problem.H * problem.W < kLeastPixelsOfAll) return false;
  const ConvTiling tiling = tiling_of(problem);
  if (tiling.row_taps > kMostFormTaps || tiling.column_taps > kMostFormTaps) return false;
  if (tiling.row_taps * tiling.column_taps != problem.num_taps) return false;
  return std::all_of(problem.taps, problem.taps + problem.num_taps,
                     [&](const ConvTap& tap) { return tap.first == 0 && tap.last == problem.C; });
}

void winograd_conv(const ConvKernels& kernels, const ConvProblem& problem, const float* bias,
                   bool add, int num_threads) {
  const ConvTiling tiling = tiling_of(problem);
  const int workers = workers_for(problem, num_threads);
  const int64_t inputs = planes_of(problem.C), outputs = planes_of(problem.O);
  const TileBlocks blocks(problem, tiling,
                          tiles_of_block(problem, tiling, outputs, kTasksOfWorker * workers));
  const ConvTiles largest = blocks.largest();
  const ScratchSizes sizes(problem, tiling, largest, outputs);

  const ConvScratch weight(points_of(tiling) * outputs * inputs * kOfPlanes);
  const ConvScratch memory(workers * sizes.all());
  transform_weights(problem, tiling, workers, weight.get());
  over_tasks(blocks.count(), workers, [&](int worker, int64_t task) {
    float* const own = memory.get() + worker * sizes.all();
    float *const sums = own + sizes.seen, *const points = sums + sizes.grad;
    const ConvTiles tiles = blocks[task];
    kernels.of_tiles->convolve(problem, tiling, tiles, weight.get(),
                               {own, nullptr, points, nullptr, points + sizes.points}, sums);
    kernels.of_floats->store(problem, tiles.block, sums, bias, add);
  });
}

void winograd_weight_gradient(const ConvKernels& kernels, const ConvProblem& problem,
                              int num_threads) {
  const ConvTiling tiling = tiling_of(problem);
  const int workers = workers_for(problem, num_threads);
  const int64_t inputs = planes_of(problem.C), outputs = planes_of(problem.O);
  const int64_t of_slice = points_of(tiling) * outputs * inputs * kOfPlanes;
  // Slices depend on the problem alone, so that every sum is one fixed order of additions.
  int64_t slices = kMostSlices;
  while (slices > kLeastSlices && slices * of_slice > kFloatsOfSlices) slices /= 2;
  const TileBlocks blocks(problem, tiling, tiles_of_block(problem, tiling, outputs, slices));
  slices = std::min(slices, blocks.count());
  // Output planes are as many tasks as it takes; each transforms x again.
  int64_t parts = 1;
  while (parts < outputs && slices * parts < kTasksOfWorker * workers) parts *= 2;
  parts = std::min(parts, outputs);
  const ScratchSizes sizes(problem, tiling, blocks.largest(), words_of(outputs, parts));

  const ConvScratch sums(slices * of_slice);
  const ConvScratch memory(workers * sizes.all());
  std::fill(sums.get(), sums.get() + slices * of_slice, 0.0f);
  over_tasks(slices * parts, workers, [&](int worker, int64_t task) {
    const int64_t slice = task / parts, part = task % parts;
    float* const own = memory.get() + worker * sizes.all();
    float *const grad = own + sizes.seen, *const points = grad + sizes.grad;
    const ConvTileScratch scratch = {own, grad, points, points + sizes.points, nullptr};
    const int64_t end = blocks.count() * (slice + 1) / slices;
    for (int64_t block = blocks.count() * slice / slices; block < end; ++block) {
      kernels.of_tiles->sum_products(problem, tiling, blocks[block], outputs * part / parts,
                                     outputs * (part + 1) / parts, scratch,
                                     sums.get() + slice * of_slice);
    }
  });
  store_gradients(problem, tiling, slices, sums.get(), workers);
}

}  // namespace fastvq
