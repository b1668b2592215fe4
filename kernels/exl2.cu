// EXL2: decodes a matrix, and multiplies a few activations by it. lqexport.formats.exl2 defines the value of a weight.
//
// The file holds the transposed matrix. Neighbouring words belong to neighbouring rows, so a lane takes a row, and a
// warp reads whole lines. A unit is 32 stored columns. `units` [columns / 32, 3] holds the bits of each unit, its first
// line in `weight`, and its group. Rows and columns of a matrix are multiples of 32.
#include "common.cuh"

struct Unit {
  int bits;
  int line;
  int group;
};

// weight  [lines, rows], the codes; those of a row are a bit stream down its column
// scale   [groups, rows / 8], eight scale codes of 4 bits in a word
// maxima  [groups]
struct Exl2 {
  const u32* weight;
  const u32* scale;
  const __half* maxima;
  const Unit* units;
  int rows;
};

// Rounds the result of an operation to float16, as ExLlamaV2 does after every operation. Products are exact before
// that.
__device__ __forceinline__ float rounded(float value) { return to_float(__float2half_rn(value)); }

__device__ __forceinline__ float scale_of(const Exl2& matrix, int group, int row) {
  const u32 codes = matrix.scale[(size_t)group * (matrix.rows / 8) + row / 8];
  const int step = (int)(codes >> row % 8 * 4 & 15) + 1;
  return rounded(__fmul_rn((float)(step * step), rounded(__fmul_rn(to_float(matrix.maxima[group]), 1.0f / 256))));
}

// Returns codes `first` .. `first` + 7 of a unit in the lowest bits. `first` is a multiple of eight. The codes begin in
// one word and end in it or in the next.
__device__ __forceinline__ u64 eight_codes(const Exl2& matrix, const Unit& unit, int first, int row) {
  const int bit = first * unit.bits;
  const u32* word = matrix.weight + (size_t)(unit.line + bit / 32) * matrix.rows + row;
  u64 codes = word[0];
  if (bit % 32 + 8 * unit.bits > 32) codes |= (u64)word[matrix.rows] << 32;
  return codes >> bit % 32;
}

// Returns the weight of the k-th of eight codes.
__device__ __forceinline__ float weight_of(u64 codes, int k, int bits, float scale) {
  const int code = (int)(codes >> k * bits) & ((1 << bits) - 1);
  return rounded(__fmul_rn(scale, (float)(code - (1 << (bits - 1)))));
}

const int TILE = 32;

// Writes the weights, rounded to T, to out [rows, columns], in the matrix's column order. places [columns] are the
// positions at which the columns are stored. A block takes a tile: it reads the tile by columns, as the file stores it,
// and writes it by rows.
template <class T>
__global__ void __launch_bounds__(256)
    decode_exl2(const u32* weight, const u32* scale, const __half* maxima, const Unit* units, const int* places,
                int rows, int columns, T* out) {
  DYNAMIC_SHARED(float, tile);  // [TILE, TILE + 1], so that two lanes share a bank neither by rows nor by columns
  const Exl2 matrix = {weight, scale, maxima, units, rows};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int row = (int)(blockIdx.x % (rows / TILE)) * TILE, column = (int)(blockIdx.x / (rows / TILE)) * TILE;
  for (int c = warp; c < TILE; c += warps) {
    const int place = places[column + c];
    const Unit unit = units[place / 32];
    const u64 codes = eight_codes(matrix, unit, place % 32 / 8 * 8, row + lane);
    tile[lane * (TILE + 1) + c] = weight_of(codes, place % 8, unit.bits, scale_of(matrix, unit.group, row + lane));
  }
  __syncthreads();
  for (int r = warp; r < TILE; r += warps)
    store(out + (size_t)(row + r) * columns + column + lane, tile[r * (TILE + 1) + lane]);
}

const int WARPS = 16;

// x   [tokens, columns], its columns in the order in which the file stores them, on a 16-byte boundary
// y   [tokens, rows], written
// left, reduced, rank   a low-rank correction, as in multiply.cu
//
// A block takes TILE rows and TOKENS tokens, and its warps divide the units. Sums are float32.
template <class T, int TOKENS>
__global__ void __launch_bounds__(WARPS * 32, 2)
    multiply_exl2(const u32* weight, const u32* scale, const __half* maxima, const Unit* units, int rows, int columns,
                  const T* x, int all_tokens, const __half* left, const float* reduced, int rank, T* y) {
  const Exl2 matrix = {weight, scale, maxima, units, rows};
  const int tiles = (all_tokens + TOKENS - 1) / TOKENS;
  const int lane = threadIdx.x % 32, row = (int)(blockIdx.x / tiles) * TILE + lane;
  const int token = (int)(blockIdx.x % tiles) * TOKENS, tokens = min(TOKENS, all_tokens - token);
  float sum[TOKENS] = {};
  for (int u = threadIdx.x / 32; u < columns / 32; u += WARPS) {
    const Unit unit = units[u];
    const float own_scale = scale_of(matrix, unit.group, row);
    for (int first = 0; first < 32; first += 8) {
      const u64 codes = eight_codes(matrix, unit, first, row);
      float value[8];
#pragma unroll
      for (int k = 0; k < 8; k++) value[k] = weight_of(codes, k, unit.bits, own_scale);
#pragma unroll
      for (int m = 0; m < TOKENS; m++) {
        if (m >= tokens) break;
        const Eight<T> given = *reinterpret_cast<const Eight<T>*>(x + (size_t)(token + m) * columns + u * 32 + first);
#pragma unroll
        for (int k = 0; k < 8; k++) sum[m] += value[k] * to_float(given.item[k]);
      }
    }
  }

  DYNAMIC_SHARED(float, partial);  // [WARPS, TOKENS, TILE]
#pragma unroll
  for (int m = 0; m < TOKENS; m++) partial[(threadIdx.x / 32 * TOKENS + m) * TILE + lane] = sum[m];
  __syncthreads();

  const int m = threadIdx.x / 32;
  if (m >= tokens) return;
  float whole = 0;
  for (int w = 0; w < WARPS; w++) whole += partial[(w * TOKENS + m) * TILE + lane];
  for (int k = 0; k < rank; k++) whole += to_float(left[(size_t)row * rank + k]) * reduced[(token + m) * rank + k];
  store(y + (size_t)(token + m) * rows + row, whole);
}
