// See masked_conv_winograd.h. Here: when it runs, and which tiles a thread works on.
#include "masked_conv_winograd.h"

#include <algorithm>

#include "masked_conv_blocks.h"
#include "masked_conv_winograd_kernel.h"
#include "rows.h"

namespace fastvq {
namespace {

// Floats of a block's words, points, products and sums, which stay in a 1 MiB L2 cache beside the
// weights that pass through it, or beside the weight gradient's sums. On a 2-core Zen 4.
constexpr int64_t kFloatsOfSums = 64 * 1024, kFloatsOfProducts = 160 * 1024;
// The weight gradient is summed in slices, in fours where their sums take no more floats than this.
constexpr int64_t kFloatsOfSlices = 1 << 20;
// Below this many channels, or pixels of all pictures, transforms cost more than the products they
// save. On one core of a Zen 4, 16 … 256 channels.
constexpr int64_t kLeastChannels = 16, kLeastPixelsOfAll = 1024;

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

void transform_weights(const ConvTilesKernel& kernel, const ConvProblem& problem,
                       const ConvTiling& tiling, int workers, float* packed) {
  over_tasks(planes_of(problem.O) * problem.C, workers, [&](int, int64_t task) {
    kernel.pack_weight(problem, tiling, task / problem.C, task % problem.C, packed);
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

// As many tiles as fill `floats`, and no more than a task's share.
int64_t tiles_of_block(const ConvProblem& problem, const ConvTiling& tiling, int64_t floats,
                       int64_t tasks) {
  const int64_t some = 64;
  const ConvTiles square = {{}, 8, some / 8};
  const int64_t of_tile = ScratchSizes(problem, tiling, square, planes_of(problem.O)).all() / some;
  const int64_t pixels = problem.B * problem.H * problem.W;
  const int64_t all = pixels / (tiling.rows().outputs * tiling.columns().outputs);
  return std::min(floats / of_tile, all / tasks);
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
                          tiles_of_block(problem, tiling, kFloatsOfSums, kTasksOfWorker * workers));
  const ConvTiles largest = blocks.largest();
  const ScratchSizes sizes(problem, tiling, largest, outputs);

  const ConvScratch weight(points_of(tiling) * outputs * inputs * kOfPlanes);
  const ConvScratch memory(workers * sizes.all());
  transform_weights(*kernels.of_tiles, problem, tiling, workers, weight.get());
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
  int64_t slices = 4 * of_slice > kFloatsOfSlices ? 2 : 4;
  const TileBlocks blocks(problem, tiling,
                          tiles_of_block(problem, tiling, kFloatsOfProducts, slices));
  slices = std::min(slices, blocks.count());
  // Output planes are as many tasks as it takes; each transforms x again.
  int64_t parts = 1;
  while (parts < outputs && slices * parts < kTasksOfWorker * workers) parts *= 2;
  parts = std::min(parts, outputs);
  const ScratchSizes sizes(problem, tiling, blocks.largest(), words_of(outputs, parts));

  const ConvScratch sums(slices * of_slice);
  const ConvScratch memory(workers * sizes.all());
  over_tasks(slices * parts, workers, [&](int worker, int64_t task) {
    const int64_t slice = task / parts, part = task % parts;
    float* const own = memory.get() + worker * sizes.all();
    float *const grad = own + sizes.seen, *const points = grad + sizes.grad;
    const ConvTileScratch scratch = {own, grad, points, points + sizes.points, nullptr};
    const int64_t begin = blocks.count() * slice / slices;
    const int64_t end = blocks.count() * (slice + 1) / slices;
    for (int64_t block = begin; block < end; ++block) {
      kernels.of_tiles->sum_products(problem, tiling, blocks[block], outputs * part / parts,
                                     outputs * (part + 1) / parts, block > begin, scratch,
                                     sums.get() + slice * of_slice);
    }
  });
  over_tasks(outputs * problem.C, workers, [&](int, int64_t task) {
    kernels.of_tiles->store_weight(problem, tiling, task / problem.C, task % problem.C, slices,
                                   sums.get());
  });
}

}  // namespace fastvq
