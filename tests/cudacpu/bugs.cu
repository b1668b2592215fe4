// Kernels that are wrong on purpose, each in one way, and some that are right: this tests the harness. All take
// (x, y, n) and run as one block of 256 threads where test_cuda_harness.py says nothing else.
#include "common.cuh"

#define KERNEL(name) __global__ void name(const float* x, float* y, int n)
#define THREAD const int t = threadIdx.x, i = blockIdx.x * blockDim.x + threadIdx.x

// ---- right

KERNEL(right_sum) {  // of x, by warps and then by shared memory
  __shared__ float partial[8];
  THREAD;
  const float whole = warp_sum(i < n ? x[i] : 0);
  if (t % 32 == 0) partial[t / 32] = whole;
  __syncthreads();
  if (t == 0)
    for (int w = 1; w < 8; w++) y[0] = partial[0] += partial[w];
}

KERNEL(right_tiles) {  // two barriers in a loop, dynamic shared memory
  DYNAMIC_SHARED(float, tile);
  THREAD;
  float sum = 0;
  for (int k = 0; k < 3; k++) {
    tile[t] = x[t] + k;
    __syncthreads();
    sum += tile[255 - t];
    __syncthreads();
  }
  y[i] = sum;
}

KERNEL(right_warp) {  // lanes that meet by a part of a warp, and through shared memory
  __shared__ float given[256];
  THREAD;
  float value = x[t];
  if (t % 32 < 16) value += __shfl_xor_sync(0x0000ffff, value, 8);
  given[t] = value;
  __syncwarp();
  y[t] = given[t ^ 1];
}

KERNEL(right_exit) {  // threads that have left do not hold up a barrier
  THREAD;
  if (t >= 128) return;
  __syncthreads();
  y[t] = x[t];
}

KERNEL(right_blocks) {  // the shared memory of one block is not that of the next
  __shared__ float tile[256];
  THREAD;
  tile[t] = x[t];
  __syncthreads();
  if (t < 64) y[blockIdx.x * 64 + t] = tile[63 - t];
}

// ---- memory

KERNEL(reads_past_the_end) {
  THREAD;
  if (i < n) y[i] = x[i + 1];
}

KERNEL(writes_past_the_end) {
  THREAD;
  if (i < n) y[i + 1] = x[i];
}

KERNEL(reads_before_the_start) {
  THREAD;
  y[i] = x[i - 1];
}

KERNEL(leaves_shared_memory) {
  __shared__ float tile[200];
  THREAD;
  tile[t] = x[t];
  __syncthreads();
  y[t] = tile[0];
}

KERNEL(leaves_dynamic_shared_memory) {
  DYNAMIC_SHARED(float, tile);
  THREAD;
  tile[t + 1] = x[t];
  __syncthreads();
  y[t] = tile[t];
}

KERNEL(leaves_a_local_array) {
  float window[4];
  THREAD;
  for (int k = 0; k <= n / 64; k++) window[k] = x[k];
  y[i] = window[t % 4];
}

KERNEL(reads_unset_shared_memory) {  // the sum is no number
  __shared__ float tile[256];
  THREAD;
  if (t < 200) tile[t] = x[t];
  __syncthreads();
  y[t] = tile[t];
}

KERNEL(loads_unaligned) {
  THREAD;
  const uint4 loaded = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(x) + 2 * t);
  y[t] = (float)(loaded.x ^ loaded.w);
}

// ---- arithmetic that C++ does not define

KERNEL(shifts_too_far) {
  THREAD;
  y[t] = (float)(0xffffffffu >> (32 + n % 2));
}

KERNEL(overflows_an_index) {
  THREAD;
  const int rows = n << 12, columns = n << 12;
  y[t] = x[(rows * columns + t) & 255];
}

KERNEL(turns_a_large_float_into_an_int) {
  THREAD;
  y[t] = (float)(int)(x[t] * 1e20f + 1e20f);
}

// ---- races

KERNEL(misses_a_barrier) {
  __shared__ float tile[256];
  THREAD;
  tile[t] = x[t];
  y[t] = tile[255 - t];
}

KERNEL(misses_the_second_barrier_of_a_loop) {
  __shared__ float tile[256];
  THREAD;
  float sum = 0;
  for (int k = 0; k < 3; k++) {
    tile[t] = x[t] + k;
    __syncthreads();
    sum += tile[255 - t];
  }
  y[t] = sum;
}

KERNEL(misses_a_barrier_before_global_memory) {  // which other threads of the block have written
  THREAD;
  y[t] = x[t];
  if (t % 2 == 0) y[t + 1] += y[(t + 64) % 256];
}

KERNEL(misses_a_warp_barrier) {
  __shared__ float tile[256];
  THREAD;
  tile[t] = x[t];
  y[t] = tile[t ^ 1];
}

KERNEL(takes_a_shuffle_for_a_warp_barrier) {  // a shuffle orders no memory
  __shared__ float tile[256];
  THREAD;
  tile[t] = x[t];
  const float other = __shfl_xor_sync(ALL_LANES, x[t], 1);
  y[t] = tile[t ^ 1] + other;
}

KERNEL(races_with_other_blocks) {
  THREAD;
  if (t == 0) y[0] += x[blockIdx.x];
}

KERNEL(lets_threads_write_one_place) {
  THREAD;
  y[t / 2] = x[t];
}

// ---- meetings

KERNEL(meets_at_two_barriers) {
  THREAD;
  if (t < 128) {
    __syncthreads();
    y[t] = 1;
  } else {
    __syncthreads();
    y[t] = 2;
  }
}

KERNEL(waits_for_ever) {  // half of the warp at a barrier, half at a shuffle
  THREAD;
  if (t % 32 < 16)
    y[t] = __shfl_xor_sync(ALL_LANES, x[t], 1);
  else
    __syncthreads();
}

KERNEL(is_not_in_its_own_mask) {
  THREAD;
  y[t] = __shfl_xor_sync(0x0000ffff, x[t], 1);
}

KERNEL(reads_a_lane_outside_the_mask) {
  THREAD;
  if (t % 32 < 16) y[t] = __shfl_sync(0x0000ffff, x[t], 20);
}

KERNEL(reads_a_lane_that_has_left) {
  THREAD;
  if (t % 32 >= 20) return;
  y[t] = warp_sum(x[t]);
}

KERNEL(meets_at_two_shuffles) {
  THREAD;
  float value = x[t];
  if (t % 2)
    value += __shfl_xor_sync(ALL_LANES, value, 1);
  else
    value -= __shfl_xor_sync(ALL_LANES, value, 1);
  y[t] = value;
}
