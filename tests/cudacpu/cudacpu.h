// CUDA C++ for a C++ compiler, so that an unmodified .cu file runs on the CPU: g++ -include cudacpu.h kernel.cu
//
// Every CUDA thread is a fiber on one OS thread, and runs until it meets others: at a barrier or a warp shuffle.
// runtime.cpp says what is checked there. The rest is done by the compiler's sanitizers, which see ordinary C++.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include <cuda_fp16.h>  // NVIDIA's own, by its host branch
#include <vector_functions.h>

// Shared variables stand in one section: the runtime fills it with 0xff before each block. g++ ignores the section of a
// template's variables, so templates must take dynamic shared memory.
#define __shared__ static __attribute__((section("cudacpu_shared")))
#define ALWAYS_INLINE __attribute__((always_inline)) static inline

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- where threads meet; runtime.cpp has the rules. The call's address says which of a kernel's meetings it is.
void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffff);

namespace cudacpu {
void* dynamic_shared();
int lane();
// The value that lane `source` gives; all lanes of `mask` meet here.
uint64_t exchange(unsigned mask, uint64_t value, int source);
}  // namespace cudacpu

#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cudacpu::dynamic_shared())

template <class T>
ALWAYS_INLINE T shuffle(unsigned mask, T value, int source, bool inside) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = cudacpu::exchange(mask, word, inside ? source : cudacpu::lane());
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

template <class T>
ALWAYS_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return shuffle(mask, value, (cudacpu::lane() & -width) | (source & (width - 1)), true);
}

template <class T>
ALWAYS_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = cudacpu::lane(), source = lane ^ bits;
  return shuffle(mask, value, source, (source & -width) <= (lane & -width));
}

template <class T>
ALWAYS_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = cudacpu::lane();
  return shuffle(mask, value, lane + (int)distance, (lane & (width - 1)) + (int)distance < width);
}

// ---- arithmetic. The harness compiles without contraction and flushes subnormals, as CuPy's -ftz=true does.
using std::max;
using std::min;
ALWAYS_INLINE float __fmul_rn(float a, float b) { return a * b; }
ALWAYS_INLINE float __fadd_rn(float a, float b) { return a + b; }
ALWAYS_INLINE double __dadd_rn(double a, double b) { return a + b; }

// Products and their sums are exact in float64, unless one number is 2^31 times the other.
ALWAYS_INLINE __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __halves2half2(__double2half((double)x.x * y.x + z.x), __double2half((double)x.y * y.y + z.y));
}

template <class To, class From>
ALWAYS_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
ALWAYS_INLINE unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
ALWAYS_INLINE float __uint_as_float(unsigned value) { return bits_as<float>(value); }

// The low 32 bits of `high` and `low`, one after the other, shifted to the right.
ALWAYS_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned distance) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (distance & 31));
}
// The same, but at most by 32.
ALWAYS_INLINE unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned distance) {
  return (unsigned)(((uint64_t)high << 32 | low) >> std::min(distance, 32u));
}
// `sum` and the products of the four bytes of `a` and `b`.
ALWAYS_INLINE unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += (a >> shift & 255) * (b >> shift & 255);
  return sum;
}

// ---- the kernels of a program, by the name that the launcher uses.
namespace cudacpu {
typedef void (*Launch)(void** arguments);
std::map<std::string, Launch>& kernels();

template <class... Types, size_t... Index>
void call(void (*kernel)(Types...), void** arguments, std::index_sequence<Index...>) {
  kernel(*static_cast<std::remove_reference_t<Types>*>(arguments[Index])...);
}

template <class... Types>
void call(void (*kernel)(Types...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Types...>{});
}
}  // namespace cudacpu

#define CUDACPU_JOIN(a, b) a##b
#define CUDACPU_NAME(line) CUDACPU_JOIN(cudacpu_registered_, line)
#define CUDACPU_KERNEL(...)                                                                    \
  static const bool CUDACPU_NAME(__LINE__) =                                                   \
      cudacpu::kernels().emplace(#__VA_ARGS__, [](void** a) { cudacpu::call(__VA_ARGS__, a); }).second;
