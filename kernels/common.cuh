// Used by every kernel: types, the storage formats of numbers, and sums over a warp.
#pragma once
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

const u32 ALL_LANES = 0xffffffffu;

// The block's dynamic shared memory; the launch gives its size. Kernels declare all shared memory with this macro. On
// the CPU the tests define it differently, and g++ could not keep track of static shared variables of templates.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char bytes[]; \
  type* name = reinterpret_cast<type*>(bytes)
#endif

// bfloat16, the upper half of a float. The toolkit's own type needs sm_80 for arithmetic; the kernels only store it.
struct bf16 {
  u16 bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((u32)value.bits << 16); }

__device__ __forceinline__ void store(float* out, float value) { *out = value; }
__device__ __forceinline__ void store(__half* out, float value) { *out = __float2half_rn(value); }
// Rounds to nearest, ties to even; a NaN becomes quiet. It uses integers, because float arithmetic flushes subnormals.
__device__ __forceinline__ void store(bf16* out, float value) {
  const u32 bits = __float_as_uint(value);
  const u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = (u16)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

// Eight numbers on a 16-byte boundary. They are loaded and stored as one or two words of 16 bytes.
template <class T>
struct __align__(16) Eight {
  T item[8];
};

// Returns the sum over a warp, with the same bits in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}
