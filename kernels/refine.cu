// Rounds of coordinate descent over one block of columns, as refine.py's refine_block makes them. A warp takes a row.
#include "stored.cuh"

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
                 int scale_lowest, float scale_least, float scale_most, int scale_step, float* offset_supers,
                 short* offset_subs, int offset_span, int offset_low, int offset_high, int offset_sign,
                 int offset_mantissa, int offset_lowest, float offset_least, float offset_most, int offset_step,
                 int refitting, int rounds) {
  const int r = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (r >= rows) return;
  const size_t start = (size_t)r * width, groups = width / group;
  const Row row = {values + start, gradient + start, codes + start, hessian,
                   levels + (level_rows == 1 ? 0 : (size_t)r * level_count), level_count, uniform, rounding, width,
                   group, (int)threadIdx.x % 32};
  const Stored scale = of_row({scale_supers, scale_subs, scale_span, scale_low, scale_high, scale_sign, scale_mantissa,
                               scale_lowest, scale_least, scale_most, scale_step}, r, groups);
  const Stored offset = of_row({offset_supers, offset_subs, offset_span, offset_low, offset_high, offset_sign,
                                offset_mantissa, offset_lowest, offset_least, offset_most, offset_step}, r, groups);
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
