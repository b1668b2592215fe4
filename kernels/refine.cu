// Rounds of coordinate descent over one block of columns, as refine.py's refine_block makes them.
//
// A warp takes a row. Column j belongs to lane j % 32: only this lane reads or writes its value, gradient and code. So
// lanes exchange data by shuffles, except for the stored numbers of the row.
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
    double wished = fmin(fmax(rint(best), (double)stored.low), (double)stored.high);
    if (of_super) wished = round_float(best, stored);
    if (!lowers(wished - old, step)) continue;
    __syncwarp();  // all lanes have read the old number
    if (row.lane == 0 && of_super) stored.supers[n] = (float)wished;
    if (row.lane == 0 && !of_super) stored.subs[n] = (short)wished;
    __syncwarp();
    move(row, stored, run, wished - old);
  }
}

// Moves each code in turn to the best one.
__device__ __forceinline__ void sweep_codes(const Row& row, const Stored& scale, const Stored& offset) {
  for (int block = 0; block < row.width; block += 32) {
    const int own = block + row.lane;
    const bool real = own < row.width;
    const float s = real ? number(scale, own / row.group, 1) : 0, o = real ? number(offset, own / row.group, 0) : 0;
    const float curvature = real ? row.hessian[(size_t)own * row.width + own] : 0;
    for (int l = 0; l < 32 && block + l < row.width; l++) {
      float change = 0;
      if (row.lane == l && s != 0 && curvature > 0) {
        const float value = row.values[own], step = -row.gradient[own] / curvature;
        const int code = nearest((value + step - o) / s, row.levels, row.level_count, row.uniform);
        const float wished = grid_value(s, row.levels[code], o, row.rounding) - value;
        // Rounding can make the nearest level's value farther than the old one.
        if (code != row.codes[own] && (!row.rounding || lowers(wished, step))) {
          change = wished;
          row.codes[own] = (u8)code;
          row.values[own] = value + change;
        }
      }
      change = __shfl_sync(ALL_LANES, change, l);
      if (change != 0) push(row, block + l, change);
    }
  }
}

// values    [rows, width], the decoded weights Q
// gradient  [rows, width], (Q - W) H
// hessian   [width, width]
// codes     [rows, width]
// levels    [level_rows, level_count], where level_rows is 1 or rows
// rounding  how values are rounded (grid.cuh)
//
// All are the block's part of the whole. All but the Hessian and the levels are changed in place.
__global__ void __launch_bounds__(128, 4)
    refine_block(float* values, float* gradient, const float* hessian, u8* codes, const float* levels, int level_rows,
                 int level_count, int uniform, int rounding, int group, int rows, int width, float* scale_supers,
                 short* scale_subs, int scale_span, int scale_low, int scale_high, int scale_sign, int scale_mantissa,
                 int scale_lowest, float scale_least, float scale_most, float* offset_supers, short* offset_subs,
                 int offset_span, int offset_low, int offset_high, int offset_sign, int offset_mantissa,
                 int offset_lowest, float offset_least, float offset_most, int refitting, int rounds) {
  const int r = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (r >= rows) return;
  const size_t start = (size_t)r * width, groups = width / group;
  const Row row = {values + start, gradient + start, codes + start, hessian,
                   levels + (level_rows == 1 ? 0 : (size_t)r * level_count), level_count, uniform, rounding, width,
                   group, (int)threadIdx.x % 32};
  const Stored scale = of_row({scale_supers, scale_subs, scale_span, scale_low, scale_high, scale_sign, scale_mantissa,
                               scale_lowest, scale_least, scale_most}, r, groups);
  const Stored offset = of_row({offset_supers, offset_subs, offset_span, offset_low, offset_high, offset_sign,
                                offset_mantissa, offset_lowest, offset_least, offset_most}, r, groups);
  // Offsets come before scales, and floats before integers. One loop, not unrolled, keeps one copy of the code.
#pragma unroll 1
  for (int pass = 0; pass < 5 * rounds; pass++) {
    const int part = pass % 5;
    if (part == 4) {
      sweep_codes(row, scale, offset);
      continue;
    }
    const bool of_scale = part / 2, of_super = part % 2 == 0;
    const Stored stored = of_scale ? scale : offset;
    if (refitting && stored.supers && (of_super || stored.low != stored.high)) refit(row, stored, of_scale, of_super);
  }
}
