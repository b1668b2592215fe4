// Searches the walk of a trellis that is nearest to a tile: what trellis.py does, which says how, with costs of 32 bits.
#include "common.cuh"

const int POSITIONS = 256;
const int APPROACH = 64;     // positions on each side of the seam that the first pass goes over
const u32 NEVER = 1u << 30;  // the cost of a node that no walk leads to: more than any walk costs, and sums fit

// halves      2 K
// values      [65536], the value of each state
// doublings   how often a difference is doubled
struct Form {
  const short* values;
  int halves, doublings;
};

__device__ __forceinline__ int new_bits(const Form& form, int position) {
  return form.halves / 2 + (position & form.halves & 1);
}

// Returns the weighted squared difference of a state's value from the target.
__device__ __forceinline__ u32 error_of(const Form& form, int state, int target, u32 weight) {
  const int error = min(max((form.values[state] - target) * (1 << form.doublings), -32768), 32767);
  return ((u32)(error * error) >> 16) * weight >> 16;
}

// Writes the costs of the nodes after a position from those of the nodes before it.
__device__ void step(const Form& form, const u32* before, u32* after, int position, int target, u32 weight) {
  const int here = new_bits(form, position), there = new_bits(form, position + 1), nodes = 1 << (16 - there);
  for (int node = threadIdx.x; node < nodes; node += blockDim.x) {
    u32 least = ~0u;
    for (int state = node; state < 1 << 16; state += nodes)
      least = min(least, before[state >> here] + error_of(form, state, target, weight));
    after[node] = least;
  }
  __syncthreads();
}

// Returns the least number of a warp's lanes, in all of them.
__device__ __forceinline__ u64 warp_least(u64 number) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) number = min(number, __shfl_xor_sync(ALL_LANES, number, distance));
  return number;
}

// Returns the state at a position of the best walk to a node after it. Of equal ones it is the first. One warp calls it.
__device__ int state_before(const Form& form, const u32* before, int position, int target, u32 weight, int node) {
  const int here = new_bits(form, position), nodes = 1 << (16 - new_bits(form, position + 1));
  u64 best = ~0ull;
  for (int state = node + (int)threadIdx.x * nodes; state < 1 << 16; state += 32 * nodes)
    best = min(best, (u64)(before[state >> here] + error_of(form, state, target, weight)) << 16 | (u32)state);
  return (int)(warp_least(best) & 0xffff);
}

// Returns the first of the nodes that cost least. One warp calls it.
__device__ int cheapest(const u32* costs, int nodes) {
  u64 best = ~0ull;
  for (int node = threadIdx.x; node < nodes; node += 32) best = min(best, (u64)costs[node] << 16 | (u32)node);
  return (int)(warp_least(best) & 0xffff);
}

// Goes over `count` positions of the ring from `start`. costs [257, nodes] has the first line.
__device__ void along(const Form& form, const short* targets, const int* weights, int start, int count, int nodes,
                      u32* costs) {
  for (int k = 0; k < count; k++) {
    const int position = (start + k) % POSITIONS;
    step(form, costs + (size_t)k * nodes, costs + (size_t)(k + 1) * nodes, position, targets[position],
         (u32)weights[position]);
  }
}

// Follows the best walk back from `node`, after `count` positions, to before step `end`. Returns the node there, and
// writes the states if there is room for them. One warp calls it.
__device__ int back(const Form& form, const short* targets, const int* weights, int start, int count, int nodes,
                    const u32* costs, int node, int end, u16* states) {
  for (int k = count - 1; k >= end; k--) {
    const int position = (start + k) % POSITIONS;
    const int state = state_before(form, costs + (size_t)k * nodes, position, targets[position],
                                   (u32)weights[position], node);
    if (states && threadIdx.x == 0) states[position] = (u16)state;
    node = state >> new_bits(form, position);
  }
  return node;
}

// Each block searches every gridDim-th tile.
//
// targets   [tiles, 256]
// weights   [256], at most 65535
// again     whether `states` hold walks, whose nodes before position `begin` stay
// costs     [blocks, 257, nodes], work space
// states    [tiles, 256], written
__global__ void __launch_bounds__(1024)
    search(const short* targets, const int* weights, const short* values, int halves, int doublings, int tiles,
           int begin, int again, int nodes, u32* costs, u16* states) {
  const Form form = {values, halves, doublings};
  DYNAMIC_SHARED(int, seam);
  costs += (size_t)blockIdx.x * (POSITIONS + 1) * nodes;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const short* target = targets + (size_t)tile * POSITIONS;
    u16* walk = states + (size_t)tile * POSITIONS;
    const int first = begin + POSITIONS - APPROACH, count = 2 * APPROACH;
    if (again) {
      if (threadIdx.x == 0)
        *seam = walk[(begin + POSITIONS - 1) % POSITIONS] & ((1 << (16 - new_bits(form, begin))) - 1);
    } else {
      for (int node = threadIdx.x; node < nodes; node += blockDim.x) costs[node] = 0;
      __syncthreads();
      along(form, target, weights, first, count, nodes, costs);
      if (threadIdx.x < 32) {
        const int last = cheapest(costs + (size_t)count * nodes, 1 << (16 - new_bits(form, first + count)));
        const int node = back(form, target, weights, first, count, nodes, costs, last, APPROACH, nullptr);
        if (threadIdx.x == 0) *seam = node;
      }
    }
    __syncthreads();
    const int closed = *seam;
    for (int node = threadIdx.x; node < nodes; node += blockDim.x) costs[node] = node == closed ? 0 : NEVER;
    __syncthreads();
    along(form, target, weights, begin, POSITIONS, nodes, costs);
    if (threadIdx.x < 32) back(form, target, weights, begin, POSITIONS, nodes, costs, closed, 0, walk);
    __syncthreads();
  }
}
