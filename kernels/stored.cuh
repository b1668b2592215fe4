// The stored numbers of a row in coordinate descent, and their moves to the best values that the file can hold, as
// refine.py's and cpu.py's `_refit` make them.
//
// A warp takes a row. Column j belongs to lane j % 32: only this lane reads or writes its value, gradient and code. So
// lanes exchange data by shuffles, except for the stored numbers of the row.
#pragma once
#include "grid.cuh"

// Scales or offsets of the block as the file stores them (formats.codec.ScaleFormat): supers [rows, groups / span],
// each value a float of the format (formats.codec.FloatFormat), and subs [rows, groups]. `supers` is a null pointer if
// the format has no such number.
struct Stored {
  float* supers;
  short* subs;
  int span;
  int low;
  int high;
  int sign;
  int mantissa;
  int lowest;
  float least;
  float most;
  int step;  // the distance between the integers
};

__device__ Stored of_row(Stored stored, size_t row, size_t groups) {
  if (stored.supers) {
    stored.supers += row * (groups / stored.span);
    stored.subs += row * groups;
  }
  return stored;
}

struct Row {
  float* values;
  float* gradient;
  u8* codes;
  const float* hessian;
  const float* levels;
  int level_count;
  int uniform;
  int rounding;
  int width;
  int group;
  int lane;
};

__device__ __forceinline__ float number(const Stored& stored, int group, float absent) {
  if (!stored.supers) return absent;
  return __fmul_rn((float)stored.sign * stored.supers[group / stored.span], (float)stored.subs[group]);
}

// Rounds a float64 to the nearest float that the format stores, ties to even.
__device__ __forceinline__ double round_float(double x, const Stored& stored) {
  const double unit = scalbn(1.0, max(ilogb(x), stored.lowest) - stored.mantissa);
  return fmin(fmax(rint(x / unit) * unit, (double)stored.least), (double)stored.most);
}

// Returns the change of column j for a unit step of one stored number: `own` times the level, or for an offset `own`.
__device__ __forceinline__ float direction(const Row& row, int j, float own, bool of_scale) {
  return of_scale ? __fmul_rn(own, row.levels[row.codes[j]]) : own;
}

// Returns the factor `own` of `direction` in a column: for a super, sign * the group's integer; for an integer, sign *
// its super.
__device__ __forceinline__ float basis(const Row& row, const Stored& stored, int j, bool of_super) {
  const int group = j / row.group;
  return (float)stored.sign * (of_super ? (float)stored.subs[group] : stored.supers[group / stored.span]);
}

// The run of columns that one stored number changes.
struct Run {
  int first;
  int last;
  bool of_scale;
  bool of_super;
};

__device__ __forceinline__ float along(const Row& row, const Stored& stored, const Run& run, int j) {
  if (j < run.first || j >= run.last) return 0;
  return direction(row, j, basis(row, stored, j, run.of_super), run.of_scale);
}

// Returns the step that minimises the loss, minus slope over curvature, in all lanes.
__device__ __forceinline__ double best_step(const Row& row, const Stored& stored, const Run& run) {
  double slope = 0, curvature = 0;
  for (int block = run.first / 32 * 32; block < run.last; block += 32) {
    const int own = block + row.lane;
    const float mine = along(row, stored, run, own);
    if (mine != 0) slope += (double)mine * row.gradient[own];
    float product = 0;  // (H d) of the lane's column
    for (int other = run.first / 32 * 32; other < run.last; other += 32) {
      const float given = along(row, stored, run, other + row.lane);
      for (int l = max(run.first - other, 0); l < min(run.last - other, 32); l++) {
        const float d = __shfl_sync(ALL_LANES, given, l);
        if (own < row.width) product += d * row.hessian[(size_t)(other + l) * row.width + own];
      }
    }
    curvature += (double)mine * product;
  }
  slope = warp_sum(slope);
  curvature = warp_sum(curvature);
  return curvature > 0 ? -slope / curvature : 0;
}

// Updates the gradient of the lane's columns after column `i` changed by `change`.
__device__ __forceinline__ void push(const Row& row, int i, float change) {
  const float* line = row.hessian + (size_t)i * row.width;
  for (int j = row.lane; j < row.width; j += 32) row.gradient[j] = plus(row.gradient[j], change, line[j]);
}

// Moves the run's columns by `amount` along the direction and updates the gradient.
__device__ __forceinline__ void move(const Row& row, const Stored& stored, const Run& run, double amount) {
  for (int block = run.first / 32 * 32; block < run.last; block += 32) {
    const float mine = (float)(amount * along(row, stored, run, block + row.lane));
    if (mine != 0) row.values[block + row.lane] = __fadd_rn(row.values[block + row.lane], mine);
    for (int l = max(run.first - block, 0); l < min(run.last - block, 32); l++) {
      const float change = __shfl_sync(ALL_LANES, mine, l);
      if (change != 0) push(row, block + l, change);
    }
  }
}

// Returns whether a quadratic with its minimum at `step` is lower at `change` than at 0.
__device__ __forceinline__ bool lowers(double change, double step) { return change * (change - 2 * step) < 0; }

// Moves each float (of_super) or each group's integer to the best value that the file can hold.
__device__ __forceinline__ void refit(const Row& row, const Stored& stored, bool of_scale, bool of_super) {
  const int groups = row.width / row.group;
  const int count = of_super ? groups / stored.span : groups;
  const int width = of_super ? row.group * stored.span : row.group;
  for (int n = 0; n < count; n++) {
    const Run run = {n * width, (n + 1) * width, of_scale, of_super};
    const double step = best_step(row, stored, run), old = of_super ? stored.supers[n] : stored.subs[n];
    const double best = old + step;
    const double whole = stored.step == 1 ? rint(best) : old + stored.step * rint(step / stored.step);
    double wished = fmin(fmax(whole, (double)stored.low), (double)stored.high);
    if (of_super) wished = round_float(best, stored);
    if (!lowers(wished - old, step)) continue;
    __syncwarp();  // all lanes have read the old number
    if (row.lane == 0 && of_super) stored.supers[n] = (float)wished;
    if (row.lane == 0 && !of_super) stored.subs[n] = (short)wished;
    __syncwarp();
    move(row, stored, run, wished - old);
  }
}
