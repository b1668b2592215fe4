// Error feedback through one block of columns. The results are bitwise equal to those of cpu.py's feedback_block.
#include "grid.cuh"

const int MOST_COLUMNS = 128;  // of a block; cuda_solve.py has the same number
const int PER_LANE = MOST_COLUMNS / 32;

// A warp takes a row and keeps its weights in registers: lane l has the columns l, l + 32, l + 64 and l + 96. In step i
// the lane of column i rounds it, and every lane subtracts the error's part from its own columns.
//
// weights        [rows, width], in solve order
// factor         [width, width], the block's part of U, where H^-1 = U^T U
// scale, offset  [rows, width], for every column
// all_levels     [level_rows, level_count], where level_rows is 1 or rows
// rounding       how values are rounded (grid.cuh)
// codes, errors  [rows, width], written
__global__ void __launch_bounds__(128)
    feedback_block(const float* weights, const float* factor, const float* scale, const float* offset,
                   const float* all_levels, int level_rows, int level_count, int uniform, int rounding, int rows,
                   int width, u8* codes, float* errors) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const float* levels = all_levels + (level_rows == 1 ? 0 : (size_t)row * level_count);
  const size_t start = (size_t)row * width;

  float left[PER_LANE];
#pragma unroll
  for (int s = 0; s < PER_LANE; s++) left[s] = s * 32 + lane < width ? weights[start + s * 32 + lane] : 0;

#pragma unroll
  for (int s = 0; s < PER_LANE; s++) {
    const int own = s * 32 + lane;
    const bool real = own < width;
    const float a = real ? scale[start + own] : 0, b = real ? offset[start + own] : 0;
    const float pivot = real ? factor[(size_t)own * width + own] : 1;
    for (int l = 0; l < 32 && s * 32 + l < width; l++) {
      // Every lane rounds its own column, but only the weight of lane l is final and only its result is used.
      const float target = a != 0 ? (left[s] - b) / a : 0;
      const int code = nearest(target, levels, level_count, uniform);
      const float own_error = (left[s] - grid_value(a, levels[code], b, rounding)) / pivot;
      const float error = __shfl_sync(ALL_LANES, own_error, l);
      if (lane == l) {
        codes[start + own] = (u8)code;
        errors[start + own] = error;
      }
      const float* spread = factor + (size_t)(s * 32 + l) * width;
#pragma unroll
      for (int t = s; t < PER_LANE; t++) {
        const int column = t * 32 + lane;
        if (column > s * 32 + l && column < width) left[t] = less(left[t], error, spread[column]);
      }
    }
  }
}
