// Exact weighted k-means of sorted rows: kmeans.py's dynamic programme, whose comments say why it is exact.
#include "common.cuh"

// Of a row's first i values, i = 0 .. n: the sums of s, s w and s w^2.
struct Sums {
  const double* mass;
  const double* first;
  const double* second;
};

struct Split {
  double cost;
  int where;
};

// Weighted squared error of values i .. j - 1 around their mean.
__device__ __forceinline__ double interval_cost(const Sums& sums, int i, int j) {
  const double total = sums.mass[j] - sums.mass[i];
  if (total <= 0) return 0;
  const double moment = sums.first[j] - sums.first[i];
  return fmax(sums.second[j] - sums.second[i] - moment * moment / total, 0.0);
}

// The best start least .. most of the last interval of values 0 .. j - 1, of equally good ones the first. `share` lanes
// look for it together, 32 or 1; each of them gets it.
__device__ __forceinline__ Split best_split(const Sums& sums, const double* previous, int j, int least, int most,
                                            int share) {
  Split best = {(double)__uint_as_float(0x7f800000), least};
  for (int i = least + (int)threadIdx.x % share; i <= most; i += share) {
    const double cost = previous[i] + interval_cost(sums, i, j);
    if (cost < best.cost) best = {cost, i};
  }
  for (int distance = share / 2; distance > 0; distance /= 2) {
    const double cost = __shfl_xor_sync(ALL_LANES, best.cost, distance);
    const int where = __shfl_xor_sync(ALL_LANES, best.where, distance);
    if (cost < best.cost || (cost == best.cost && where < best.where)) best = {cost, where};
  }
  return best;
}

// current[j]: least error of values 0 .. j - 1 in one interval more than `previous`; split[j]: start of the last.
//
// The best start moves right with j, so those of j - stride and j + stride bound that of j: strides are halved from
// level to level. While there are fewer j's than threads, a warp takes each, then a thread.
__device__ void layer(const Sums& sums, const double* previous, double* current, int* split, int n) {
  int stride = 1;
  while (2 * stride <= n) stride *= 2;
  if (threadIdx.x == 0) current[0] = 0, split[0] = 0;
  for (; stride > 0; stride /= 2) {
    __syncthreads();
    const int count = (n / stride + 1) / 2;  // odd multiples of the stride
    const int share = count < (int)blockDim.x ? 32 : 1;
    for (int k = threadIdx.x / share; k < count; k += blockDim.x / share) {
      const int j = (2 * k + 1) * stride;
      const int most = j + stride <= n ? split[j + stride] : n - 1;
      const Split best = best_split(sums, previous, j, split[j - stride], min(most, j - 1), share);
      if (threadIdx.x % share == 0) current[j] = best.cost, split[j] = best.where;
    }
  }
  __syncthreads();
}

// The means of the intervals that `splits` [count, n + 1] lead to from the last to the first; of an empty one, or one
// whose values do not count, its first value.
__device__ void means(const Sums& sums, const double* values, const int* splits, int n, int count, double* centers) {
  int end = n;
  for (int k = count - 1; k >= 0; k--) {
    const int begin = splits[(size_t)k * (n + 1) + end];
    const double total = sums.mass[end] - sums.mass[begin];
    centers[k] = total > 0 ? (sums.first[end] - sums.first[begin]) / total : values[min(begin, n - 1)];
    end = begin;
  }
}

// values [rows, n], ascending    sums [3, rows, n + 1], see Sums    costs [rows, 2, n + 1] and splits [rows, count, n + 1],
// for its own use    centers [rows, count] and errors [rows], written
__global__ void __launch_bounds__(256)
    kmeans(const double* values, const double* sums, int rows, int n, int count, double* costs, int* splits,
           double* centers, double* errors) {
  const size_t row = blockIdx.x, line = n + 1;
  const Sums own = {sums + row * line, sums + (rows + row) * line, sums + (2 * (size_t)rows + row) * line};
  double *previous = costs + 2 * row * line, *current = previous + line;
  int* split = splits + row * count * line;
  for (int j = threadIdx.x; j <= n; j += blockDim.x) previous[j] = j ? (double)__uint_as_float(0x7f800000) : 0;
  for (int k = 0; k < count; k++) {
    layer(own, previous, current, split + k * line, n);
    double* other = previous;
    previous = current;
    current = other;
  }
  if (threadIdx.x > 0) return;
  means(own, values + row * n, split, n, count, centers + row * count);
  errors[row] = previous[n];
}
