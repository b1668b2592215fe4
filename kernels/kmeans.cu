// Exact weighted k-means of sorted rows: the dynamic program of kmeans.py, which says why it is exact.
#include "common.cuh"

// Prefix sums of a row: s, s w and s w^2 over the first i values, i = 0 .. n, for values w with weights s.
struct Sums {
  const double* mass;
  const double* first;
  const double* second;
};

struct Split {
  double cost;
  int where;
};

// Returns the weighted squared error of values i .. j - 1 around their mean.
__device__ __forceinline__ double interval_cost(const Sums& sums, int i, int j) {
  const double total = sums.mass[j] - sums.mass[i];
  if (total <= 0) return 0;
  const double moment = sums.first[j] - sums.first[i];
  return fmax(sums.second[j] - sums.second[i] - moment * moment / total, 0.0);
}

// Returns the best start of the last interval of values 0 .. j - 1, from least .. most. Of equally good starts it is
// the first. `share` lanes, 32 or 1, search together, and each of them gets the result.
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

// Adds one interval to the division of every prefix. current[j] becomes the least error of values 0 .. j - 1 with one
// interval more than in `previous`, and split[j] becomes the start of the last interval.
//
// The best start moves right with j, so the starts of j - stride and j + stride bound the start of j. The stride is
// halved from level to level. While a level has fewer j's than threads, a warp takes each j; later, a thread does.
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

// Writes the mean of every interval, from the last to the first, which `splits` [count, n + 1] leads to. For an empty
// interval, or one whose values have no weight, writes its first value.
__device__ void means(const Sums& sums, const double* values, const int* splits, int n, int count, double* centers) {
  int end = n;
  for (int k = count - 1; k >= 0; k--) {
    const int begin = splits[(size_t)k * (n + 1) + end];
    const double total = sums.mass[end] - sums.mass[begin];
    centers[k] = total > 0 ? (sums.first[end] - sums.first[begin]) / total : values[min(begin, n - 1)];
    end = begin;
  }
}

// values   [rows, n], ascending
// sums     [3, rows, n + 1], see Sums
// costs    [rows, 2, n + 1], work space
// splits   [rows, count, n + 1], work space
// centers  [rows, count], written
// errors   [rows], written
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
