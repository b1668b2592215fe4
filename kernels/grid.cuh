// The solver's arithmetic on a grid. Where cpu.py rounds twice, the device must too: no product is fused with a sum.
#pragma once
#include "common.cuh"

// Returns the code of the level nearest to `target`, which is (weight - offset) / scale. A tie between levels of a
// table goes to the lower level, a tie between integers to the even one.
__device__ __forceinline__ int nearest(float target, const float* levels, int count, int uniform) {
  if (uniform) return (int)fminf(fmaxf(rintf(target - levels[0]), 0.0f), (float)(count - 1));
  int code = 0;
  for (int k = 0; k < count - 1; k++) code += target > 0.5f * (levels[k] + levels[k + 1]);
  return code;
}

// How a decoded weight is rounded: formats.codec.Rounding has the same numbers.
const int HALF = 1, HALF_STEPS = 2, BFLOAT_STEPS = 3;

__device__ __forceinline__ float rounded_half(float value) { return to_float(__float2half_rn(value)); }
__device__ __forceinline__ float rounded_bfloat(float value) {
  bf16 stored;
  store(&stored, value);
  return to_float(stored);
}

// Returns the decoded weight.
__device__ __forceinline__ float grid_value(float scale, float level, float offset, int rounding) {
  const float product = __fmul_rn(scale, level);
  if (rounding == BFLOAT_STEPS) return rounded_bfloat(__fadd_rn(rounded_bfloat(product), offset));
  if (rounding == HALF_STEPS) return rounded_half(__fadd_rn(rounded_half(product), offset));
  const float value = __fadd_rn(product, offset);
  return rounding == HALF ? rounded_half(value) : value;
}

// Returns value - a * b, rounded twice.
__device__ __forceinline__ float less(float value, float a, float b) { return __fadd_rn(value, -__fmul_rn(a, b)); }
// Returns value + a * b, rounded twice.
__device__ __forceinline__ float plus(float value, float a, float b) { return __fadd_rn(value, __fmul_rn(a, b)); }
