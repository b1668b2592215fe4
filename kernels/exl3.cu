// EXL3: decodes a matrix, and multiplies a few activations by it. lqexport.formats.trellis defines the value of a weight.
//
// trellis  [inputs / 16, outputs / 16, 8 K] words of 32 bits: the ring of each tile of 16 x 16 codes, its first bit
//          highest; inputs and outputs are the columns and rows of the matrix, raised to multiples of 128
// suh      [columns], the scale of each input
// svh      [rows], the scale of each output
// halves   2 K
//
// Lane t of a warp takes positions 8 t .. 8 t + 7 of a tile. They are inputs 2 (t % 4) + {0, 1, 8, 9} of output t / 4,
// and the same inputs of output t / 4 + 8. The tensor cores of a GPU take a tile in this order.
#include "common.cuh"

const int SIDE = 16;                        // inputs and outputs of a tile
const int RUN = 128;                        // inputs or outputs that a rotation mixes
const float LENGTH = 0.08838834764831845f;  // 1 / sqrt(RUN)

// The values of two states, in each codebook. Of their operations only one rounds, and that to float16.
__device__ __forceinline__ __half2 halves_of(u32 low, u32 high) {
  return __halves2half2(__ushort_as_half((u16)low), __ushort_as_half((u16)high));
}

struct Mul1 {
  static __device__ __forceinline__ __half2 values(u32 one, u32 other) {
    // 0x6400 is 1024, and adding the sum of four bytes to its bits adds the sum to the number.
    const u32 first = __dp4a(one * 0x83DCD12Du, 0x01010101u, 0x6400u);
    const u32 second = __dp4a(other * 0x83DCD12Du, 0x01010101u, 0x6400u);
    return __hfma2(halves_of(first, second), halves_of(0x1EEE, 0x1EEE), halves_of(0xC931, 0xC931));
  }
};

__device__ __forceinline__ __half sum_of_halves(u32 mixed) {
  const u32 halves = (mixed & 0x8FFF8FFFu) ^ 0x3B603B60u;
  return __hadd_rn(__ushort_as_half((u16)halves), __ushort_as_half((u16)(halves >> 16)));
}

struct Mcg {
  static __device__ __forceinline__ __half2 values(u32 one, u32 other) {
    return __halves2half2(sum_of_halves(one * 0xCBAC1FEDu), sum_of_halves(other * 0xCBAC1FEDu));
  }
};

struct ThreeInst {
  static __device__ __forceinline__ __half2 values(u32 one, u32 other) {
    return __halves2half2(sum_of_halves(one * 89226354u + 64248484u), sum_of_halves(other * 89226354u + 64248484u));
  }
};

// Where a lane's eight states are in each ring: in three words, which follow one another. The last `later` bits of the
// third belong to later states.
struct Place {
  int halves;
  int first, second, third;
  int later;
};

__device__ __forceinline__ Place place_of(int halves, int lane) {
  const int words = 4 * halves, end = 4 * halves * (lane + 1), third = (end - 1) / 32;
  const int second = third > 0 ? third - 1 : words - 1, first = second > 0 ? second - 1 : words - 1;
  return {halves, first, second, third, 32 * (third + 1) - end};
}

// Reads a lane's eight codes of a tile.
template <class Codebook>
__device__ __forceinline__ void read_eight(const u32* ring, const Place& place, float* code) {
  const u32 first = ring[place.first], second = ring[place.second], third = ring[place.third];
  const int whole = place.halves / 2, half = place.halves & 1;
  u32 low = __funnelshift_r(third, second, place.later), high = __funnelshift_r(second, first, place.later);
#pragma unroll
  for (int j = 7; j > 0; j -= 2) {
    if (j == 3) {  // four states, of 32 bits at most, are done
      low = __funnelshift_rc(low, high, 2 * place.halves);
      high = __funnelshift_rc(high, first >> place.later, 2 * place.halves);
    }
    // The bits of the states after each, of these four.
    const int later = (7 - j) % 4 * whole + (7 - j) % 4 / 2 * half, earlier = later + whole + half;
    const u32 one = __funnelshift_r(low, high, earlier) & 0xffff, other = __funnelshift_r(low, high, later) & 0xffff;
    const float2 values = __half22float2(Codebook::values(one, other));
    code[j - 1] = values.x, code[j] = values.y;
  }
}

// One step of a rotation of many vectors at once: a sum and a difference of each pair of numbers whose indices differ
// in one bit. formats/trellis.py has the order of the steps.
template <int COUNT, int DISTANCE>
__device__ __forceinline__ void mix_own(float* value) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    if (i & DISTANCE) continue;
    const float first = value[i], second = value[i + DISTANCE];
    value[i] = first + second;
    value[i + DISTANCE] = first - second;
  }
}

// The same, where the partner is in another lane.
template <int COUNT, int DISTANCE>
__device__ __forceinline__ void mix_lanes(float* value) {
  const float sign = threadIdx.x & DISTANCE ? -1 : 1;
#pragma unroll
  for (int i = 0; i < COUNT; i++) value[i] = value[i] * sign + __shfl_xor_sync(ALL_LANES, value[i], DISTANCE);
}

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T item[2];
};

template <class T>
__device__ __forceinline__ void store_two(T* out, __half2 values) {
  const float2 exact = __half22float2(values);
  Two<T> stored;
  store(&stored.item[0], exact.x);
  store(&stored.item[1], exact.y);
  *reinterpret_cast<Two<T>*>(out) = stored;
}
__device__ __forceinline__ void store_two(__half* out, __half2 values) { *reinterpret_cast<__half2*>(out) = values; }

// Returns the last step of two rotations, each times a scale.
__device__ __forceinline__ __half2 scaled(float one, float other, __half2 scales) {
  return __hmul2_rn(__floats2half2_rn(one * LENGTH, other * LENGTH), scales);
}

// Where the weights of two neighbouring inputs and an output are in shared memory. Neither the lanes that write at once
// nor those that read at once share a bank.
__device__ __forceinline__ int shared_place(int output, int pair) { return output * 68 + output / 32 * 8 + pair; }
const int SHARED_WEIGHTS = RUN * 68 + 32;

// Writes the weights, rounded to T, to out [rows, pitch]; `pitch` is even. A block takes 128 inputs and outputs. `out` is
// on a 16-byte boundary.
template <class Codebook, class T>
__global__ void __launch_bounds__(256, 2)
    decode_exl3(const u32* trellis, const __half* suh, const __half* svh, int halves, int rows, int columns, int pitch,
                T* out) {
  DYNAMIC_SHARED(__half2, tile);  // the weights, and the scales of the block's inputs and outputs
  __half2* scales = tile + SHARED_WEIGHTS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, runs = (rows + RUN - 1) / RUN;
  const int first_output = (int)(blockIdx.x % runs) * RUN, first_input = (int)(blockIdx.x / runs) * RUN;
  {
    const bool of_output = threadIdx.x >= RUN;
    const int index = (of_output ? first_output : first_input) + threadIdx.x % RUN;
    const bool padding = index >= (of_output ? rows : columns);
    reinterpret_cast<__half*>(scales)[threadIdx.x] = padding ? __ushort_as_half(0) : (of_output ? svh : suh)[index];
  }

  // A warp takes the eight tiles of 16 outputs.
  float value[64];
  const int across = runs * (RUN / SIDE), words = 4 * halves;
  const u32* ring = trellis + ((size_t)(first_input / SIDE) * across + first_output / SIDE + warp) * words;
  const Place place = place_of(halves, lane);
#pragma unroll
  for (int t = 0; t < 8; t++) read_eight<Codebook>(ring + (size_t)t * across * words, place, value + 8 * t);

  // The bits of an input's number: position, lane, lane, position, and three of the tile.
  mix_own<64, 1>(value);
  mix_lanes<64, 1>(value);
  mix_lanes<64, 2>(value);
  mix_own<64, 2>(value);
  mix_own<64, 8>(value);
  mix_own<64, 16>(value);
  mix_own<64, 32>(value);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    const int pair = i / 8 * 8 + i % 4 * 2 + lane % 4, output = warp * SIDE + i / 4 % 2 * 8 + lane / 4;
    tile[shared_place(output, pair)] = scaled(value[i], value[i + 1], scales[pair]);
  }
  __syncthreads();

  // A warp takes 16 inputs of all outputs, and a lane two of 32 outputs, which are the lower bits of an output's number.
  const int pair = warp * SIDE / 2 + lane % 8, output = lane / 8 * 32;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const float2 weights = __half22float2(tile[shared_place(output + i, pair)]);
    value[2 * i] = weights.x, value[2 * i + 1] = weights.y;
  }
  mix_own<64, 2>(value);
  mix_own<64, 4>(value);
  mix_own<64, 8>(value);
  mix_own<64, 16>(value);
  mix_own<64, 32>(value);
  mix_lanes<64, 8>(value);
  mix_lanes<64, 16>(value);
  const int column = first_input + 2 * pair, count = rows - first_output - output;
  if (column >= pitch) return;
  T* target = out + (size_t)(first_output + output) * pitch + column;
#pragma unroll
  for (int i = 0; i < 32; i++, target += pitch) {
    const __half2 two = scales[RUN / 2 + (output + i) / 2], scale = i % 2 ? __high2half2(two) : __low2half2(two);
    if (i < count) store_two(target, scaled(value[2 * i], value[2 * i + 1], scale));
  }
}

// The product is y = ((x diag(suh) H) C H) diag(svh), for the codes C, in three launches. It leaves out the roundings to
// float16 within the matrix, as ExLlamaV3's kernels for generation do. Sums are float32. A warp rotates a run of a token,
// and a lane has numbers `lane` + {0, 32, 64, 96} of it.
__device__ __forceinline__ void rotate(float* value) {
  mix_lanes<4, 1>(value);
  mix_lanes<4, 2>(value);
  mix_lanes<4, 4>(value);
  mix_lanes<4, 8>(value);
  mix_lanes<4, 16>(value);
  mix_own<4, 1>(value);
  mix_own<4, 2>(value);
}

// x        [tokens, columns]
// rotated  [tokens, inputs], written
template <class T>
__global__ void __launch_bounds__(128)
    rotate_inputs(const T* x, const __half* suh, int tokens, int columns, float* rotated) {
  const int runs = (columns + RUN - 1) / RUN, warp = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int token = warp / runs, first = warp % runs * RUN + threadIdx.x % 32;
  if (token >= tokens) return;
  float value[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int input = first + 32 * k;
    value[k] = input < columns ? to_float(x[(size_t)token * columns + input]) * to_float(suh[input]) : 0;
  }
  rotate(value);
#pragma unroll
  for (int k = 0; k < 4; k++) rotated[(size_t)token * runs * RUN + first + 32 * k] = value[k] * LENGTH;
}

const int WARPS = 16;

// x    [tokens, inputs], rotated, on a 16-byte boundary
// sums [tokens, outputs], written: x C
//
// A block takes the tiles of 16 outputs and TOKENS tokens, and its warps divide the tiles.
template <class Codebook, int TOKENS>
__global__ void __launch_bounds__(WARPS * 32, 2)
    multiply_exl3(const u32* trellis, int halves, int outputs, int inputs, const float* x, int all_tokens,
                  float* sums) {
  const int tiles = (all_tokens + TOKENS - 1) / TOKENS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = outputs / SIDE, words = 4 * halves, column = (int)(blockIdx.x / tiles);
  const int token = (int)(blockIdx.x % tiles) * TOKENS, tokens = min(TOKENS, all_tokens - token);
  const Place place = place_of(halves, lane);
  float sum[2][TOKENS] = {};
  for (int t = warp; t < inputs / SIDE; t += WARPS) {
    float code[8];
    read_eight<Codebook>(trellis + ((size_t)t * across + column) * words, place, code);
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
      if (m >= tokens) break;
      const float* given = x + (size_t)(token + m) * inputs + t * SIDE + lane % 4 * 2;
      const Two<float> near = *reinterpret_cast<const Two<float>*>(given);
      const Two<float> far = *reinterpret_cast<const Two<float>*>(given + 8);
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int k = 0; k < 2; k++)
          sum[c][m] += code[4 * c + k] * near.item[k] + code[4 * c + 2 + k] * far.item[k];
    }
  }

  DYNAMIC_SHARED(float, partial);  // [WARPS, TOKENS, SIDE]
#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
      float whole = sum[c][m];
      whole += __shfl_xor_sync(ALL_LANES, whole, 1);
      whole += __shfl_xor_sync(ALL_LANES, whole, 2);
      if (lane % 4 == 0) partial[(warp * TOKENS + m) * SIDE + 8 * c + lane / 4] = whole;
    }
  __syncthreads();

  const int m = threadIdx.x / SIDE, output = threadIdx.x % SIDE;
  if (m >= tokens) return;
  float whole = 0;
  for (int w = 0; w < WARPS; w++) whole += partial[(w * TOKENS + m) * SIDE + output];
  sums[(size_t)(token + m) * outputs + column * SIDE + output] = whole;
}

// sums  [tokens, outputs]
// y     [tokens, rows], written
// left, reduced, rank   a low-rank correction, as in multiply.cu
template <class T>
__global__ void __launch_bounds__(128)
    rotate_outputs(const float* sums, const __half* svh, int tokens, int rows, const __half* left,
                   const float* reduced, int rank, T* y) {
  const int runs = (rows + RUN - 1) / RUN, warp = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int token = warp / runs, first = warp % runs * RUN + threadIdx.x % 32;
  if (token >= tokens) return;
  float value[4];
#pragma unroll
  for (int k = 0; k < 4; k++) value[k] = sums[(size_t)token * runs * RUN + first + 32 * k];
  rotate(value);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int row = first + 32 * k;
    if (row >= rows) continue;
    float whole = value[k] * LENGTH * to_float(svh[row]);
    for (int r = 0; r < rank; r++) whole += to_float(left[(size_t)row * rank + r]) * reduced[token * rank + r];
    store(y + (size_t)token * rows + row, whole);
  }
}
