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

// Returns the decoded weight. `half`: it is rounded to float16, as EXL2 defines its weights.
__device__ __forceinline__ float grid_value(float scale, float level, float offset, int half) {
  const float value = __fadd_rn(__fmul_rn(scale, level), offset);
  return half ? to_float(__float2half_rn(value)) : value;
}

// Returns value - a * b, rounded twice.
__device__ __forceinline__ float less(float value, float a, float b) { return __fadd_rn(value, -__fmul_rn(a, b)); }
// Returns value + a * b, rounded twice.
__device__ __forceinline__ float plus(float value, float a, float b) { return __fadd_rn(value, __fmul_rn(a, b)); }
