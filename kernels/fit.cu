// Searches every group's scale and shift for the least weighted squared error, as cpu.py's fit_groups does.
#include "grid.cuh"

const int LANES = 16;  // lanes of a group; each tries other ranges

struct Group {
  const float* x;
  const float* weight;
  int width;
  const float* levels;
  int level_count;
  int uniform;
  int has_offset;
  int not_positive;
  float low;  // of x
  float high;
};

struct Found {
  float error;
  float scale;
  float shift;
  float cut_low;
  float cut_high;
};

__device__ __forceinline__ float level_near(const Group& group, float target) {
  if (group.uniform) return fminf(fmaxf(rintf(target), group.levels[0]), group.levels[group.level_count - 1]);
  return group.levels[nearest(target, group.levels, group.level_count, 0)];
}

__device__ __forceinline__ float inverse(float scale) { return scale != 0 ? 1 / scale : 0; }

// Sets the scale and shift that map the levels onto the range of x, after cutting a share of it at each end.
__device__ void span(const Group& group, Found& found) {
  float low = group.low, high = group.high;
  if (!group.has_offset) {  // in every codebook the first level has the largest magnitude
    found.scale = (1 - found.cut_low) * (-low >= high ? low : high) / group.levels[0];
    found.shift = 0;
    return;
  }
  if (group.not_positive) low = fminf(low, 0), high = fmaxf(high, 0);
  const float range = high - low;
  low += found.cut_low * range;
  high -= found.cut_high * range;
  found.scale = (high - low) / (group.levels[group.level_count - 1] - group.levels[0]);
  found.shift = low - found.scale * group.levels[0];
}

// Refits scale and shift by weighted least squares, to the levels nearest under the old ones.
__device__ void refit(const Group& group, Found& found) {
  const float reciprocal = inverse(found.scale);
  float square = 0, cross = 0, mean_level = 0, mean = 0;
  for (int i = 0; i < group.width; i++) {
    const float level = level_near(group, (group.x[i] - found.shift) * reciprocal), weighted = group.weight[i] * level;
    square += weighted * level;
    cross += weighted * group.x[i];
    mean_level += weighted;
    mean += group.weight[i] * group.x[i];
  }
  const float alone = square > 0 ? cross / square : found.scale;
  const float variance = square - mean_level * mean_level;
  if (variance > 1e-12f) found.scale = (cross - mean_level * mean) / variance;
  found.shift = mean - found.scale * mean_level;
  if (!group.has_offset || (group.not_positive && found.shift > 0)) found.scale = alone, found.shift = 0;
}

__device__ float group_error(const Group& group, const Found& found) {
  const float reciprocal = inverse(found.scale);
  float error = 0;
  for (int i = 0; i < group.width; i++) {
    const float level = level_near(group, (group.x[i] - found.shift) * reciprocal);
    const float off = group.x[i] - found.scale * level - found.shift;
    error += group.weight[i] * off * off;
  }
  return error;
}

// Gives all lanes the result with the least error. Of equal errors, the lowest lane's wins.
__device__ void best_of_lanes(Found& best) {
  int winner = threadIdx.x % LANES;
  float least = best.error;
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    const float error = __shfl_xor_sync(ALL_LANES, least, distance, LANES);
    const int lane = __shfl_xor_sync(ALL_LANES, winner, distance, LANES);
    if (error < least || (error == least && lane < winner)) least = error, winner = lane;
  }
  best.error = least;
  best.scale = __shfl_sync(ALL_LANES, best.scale, winner, LANES);
  best.shift = __shfl_sync(ALL_LANES, best.shift, winner, LANES);
  best.cut_low = __shfl_sync(ALL_LANES, best.cut_low, winner, LANES);
  best.cut_high = __shfl_sync(ALL_LANES, best.cut_high, winner, LANES);
}

// Tries the ranges whose cuts are those of the best range plus `cuts` [count, 2]. The lanes divide them.
__device__ void search(const Group& group, const float* cuts, int count, Found& best) {
  const Found around = best;
  for (int n = threadIdx.x % LANES; n < count; n += LANES) {
    Found found = {0, 0, 0, around.cut_low + cuts[2 * n], around.cut_high + cuts[2 * n + 1]};
    span(group, found);
    refit(group, found);
    refit(group, found);
    found.error = group_error(group, found);
    if (found.error < best.error) best = found;
  }
  best_of_lanes(best);
}

__device__ void find_range(Group& group) {
  float low = group.x[0], high = group.x[0];
  for (int i = threadIdx.x % LANES; i < group.width; i += LANES) low = fminf(low, group.x[i]), high = fmaxf(high, group.x[i]);
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    low = fminf(low, __shfl_xor_sync(ALL_LANES, low, distance, LANES));
    high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, distance, LANES));
  }
  group.low = low;
  group.high = high;
}

// weights       [rows, groups * width]
// weight        [groups, width], the importance of each column; it sums to 1 in a group
// levels        [level_count]
// has_offset    whether the format has an offset
// not_positive  whether the offset must not be above 0
// cuts, fine    [cut_count, 2] and [fine_count, 2], the shares of the range to cut below and above
// scale, shift  [rows, groups], written
__global__ void __launch_bounds__(128)
    fit_groups(const float* weights, const float* weight, const float* levels, int level_count, int uniform,
               int has_offset, int not_positive, const float* cuts, int cut_count, const float* fine, int fine_count,
               int rows, int groups, int width, float* scale, float* shift) {
  const size_t total = (size_t)rows * groups;
  const size_t wanted = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
  const size_t own = wanted < total ? wanted : total - 1;  // spare lanes repeat it: shuffles need all
  Group group = {weights + own * width, weight + own % groups * width, width, levels, level_count, uniform, has_offset,
                 not_positive, 0, 0};
  find_range(group);
  Found best = {__uint_as_float(0x7f800000), 0, 0, 0, 0};
  search(group, cuts, cut_count, best);
  search(group, fine, fine_count, best);
  if (wanted < total && threadIdx.x % LANES == 0) {
    scale[own] = best.scale;
    shift[own] = best.shift;
  }
}
