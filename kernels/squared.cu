// Finds EXL2's scale codes: the code with the least weighted squared error for every row of a group and every maximum,
// as squared.py's best_subs does.
#include "common.cuh"

const int CODES = 16;

__device__ float rounding_error(const float* x, const float* weight, int width, float scale, float low, float high) {
  const float inverse = scale > 0 ? 1 / scale : 0;
  float error = 0;
  for (int i = 0; i < width; i++) {
    const float off = x[i] - scale * fminf(fmaxf(rintf(x[i] * inverse), low), high);
    error += weight[i] * off * off;
  }
  return error;
}

// weights       [rows, width], the group's weights
// weight        [width], the importance of each column
// scales        [count, CODES], the scale of each maximum and code, ascending
// low, high     the lowest and the highest level
// narrow, wide  shares of the row's largest weight. Scales whose largest value is less than the first share are not
//               tried, and of those whose largest value is more than the second share, only the first is tried.
// errors, subs  [rows, count], written
//
// A thread takes a row and a maximum.
__global__ void __launch_bounds__(128)
    best_subs(const float* weights, const float* weight, const float* scales, float low, float high, float narrow,
              float wide, int rows, int width, int count, float* errors, short* subs) {
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)rows * count) return;
  const float* x = weights + i / count * width;
  float largest = 0;
  for (int k = 0; k < width; k++) largest = fmaxf(largest, fabsf(x[k]));
  float least = __uint_as_float(0x7f800000);
  int best = 0;
  for (int s = 0; s < CODES; s++) {
    const float scale = scales[i % count * CODES + s];
    if (s < CODES - 1 && -low * scale < narrow * largest) continue;
    const float error = rounding_error(x, weight, width, scale, low, high);
    if (error < least) least = error, best = s;
    if (high * scale > wide * largest) break;
  }
  errors[i] = least;
  subs[i] = (short)best;
}
