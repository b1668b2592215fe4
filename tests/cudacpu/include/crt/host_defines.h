// Stands in for NVIDIA's header of this name (nvidia-cuda-nvcc), which cuda_fp16.h includes: qualifiers mean nothing here.
#pragma once
#define __host__
#define __device__
#define __global__
#define __constant__
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __specialization_static
#define CUDARTAPI
#define __CUDA_ARCH_HAS_FEATURE__(feature) 0
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __no_return__ __attribute__((noreturn))
#define __launch_bounds__(...)
