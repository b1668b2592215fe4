// Multiplies a few activations by packed weights and decodes them on the way: y = x W^T + reduced left^T. The second
// term is the low-rank correction.
#include "formats.cuh"

const int WARPS = 4;
const int ROWS = 2;  // rows of W of a block; the activations that it loads serve both

// Loads eight activations from `column` on; those beyond the last column are zero.
template <class T>
__device__ __forceinline__ void load_eight(const T* x, int columns, int column, float* value) {
  if (columns % 8 == 0) {
    const Eight<T> loaded = *reinterpret_cast<const Eight<T>*>(x + column);
#pragma unroll
    for (int k = 0; k < 8; k++) value[k] = to_float(loaded.item[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; k++) value[k] = column + k < columns ? to_float(x[column + k]) : 0;
}

// x        [tokens, columns], on a 16-byte boundary
// y        [tokens, rows], written
// left     [rows, rank], the left factor of the low-rank correction
// reduced  [tokens, rank], the activations times the right factor
// rank     0 if there is no correction
//
// A block takes ROWS rows and TOKENS tokens. Blocks that read the same weights are neighbours, so all but the first
// find them in the L2 cache. The block's warps divide the columns, and a lane takes eight at a time. Sums are float32.
template <class Format, class T, int TOKENS>
__global__ void __launch_bounds__(WARPS * 32, 4)
    multiply(const u8* first, const u8* second, const u8* third, int rows, int columns, int group, const T* x,
             int all_tokens, const __half* left, const float* reduced, int rank, T* y) {
  const Planes planes = {first, second, third};
  const int tiles = (all_tokens + TOKENS - 1) / TOKENS;
  const int row = blockIdx.x / tiles * ROWS, token = blockIdx.x % tiles * TOKENS;
  const int tokens = min(TOKENS, all_tokens - token);
  float sum[ROWS][TOKENS] = {};
  for (int column = threadIdx.x * 8; column < columns; column += WARPS * 32 * 8) {
    float weight[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      Format(planes, min(row + r, rows - 1), columns, group).eight(column, min(8, columns - column), weight[r]);
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
      if (m >= tokens) break;
      float value[8];
      load_eight(x + (size_t)(token + m) * columns, columns, column, value);
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int k = 0; k < 8; k++) sum[r][m] += weight[r][k] * value[k];
    }
  }

  DYNAMIC_SHARED(float, partial);  // [WARPS, ROWS * TOKENS]
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
      const float whole = warp_sum(sum[r][m]);
      if (threadIdx.x % 32 == 0) partial[(threadIdx.x / 32 * ROWS + r) * TOKENS + m] = whole;
    }
  __syncthreads();

  const int r = threadIdx.x / TOKENS, m = threadIdx.x % TOKENS;
  if (r >= ROWS || row + r >= rows || m >= tokens) return;
  float whole = 0;
  for (int w = 0; w < WARPS; w++) whole += partial[w * ROWS * TOKENS + threadIdx.x];
  for (int k = 0; k < rank; k++) whole += to_float(left[(size_t)(row + r) * rank + k]) * reduced[(token + m) * rank + k];
  store(y + (size_t)(token + m) * rows + row + r, whole);
}
