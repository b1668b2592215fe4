// The solver's loops for formats with a codebook, as vectors.py makes them. A warp takes a row, or in the fit a group of
// a row. Dynamic shared memory has the codebook's levels, then the work space of each warp.
#include "stored.cuh"
#include "vectors.cuh"

const int MOST_COLUMNS = 128;  // of a block of error feedback; cuda_solve.py has the same number

// Subtracts from the row's later columns what the errors of eight columns spread to them, and writes the errors.
__device__ __forceinline__ void spread(const float* work, float* row, int first, int width, const float* inverse, const float* upper,
                       float* errors) {
  const int lane = threadIdx.x % 32, own = lane % EIGHT;
  float error = 0;
  for (int j = 0; j <= own; j++)
    error = plus(error, sum(row[first + j], -work[VALUE * EIGHT + j]), inverse[j * EIGHT + own]);
  if (lane < EIGHT) errors[first + lane] = error;
  for (int i = 0; i < EIGHT; i++) {
    const float given = __shfl_sync(ALL_LANES, error, i);
    for (int j = first + EIGHT + lane; j < width; j += 32)
      row[j] = less(row[j], given, upper[(size_t)(first + i) * width + j]);
  }
  __syncwarp();
}

// The book's arguments: vectors [N, vector_width]; halves [vector_width / 2, count]; starts [heads + 1]; levels
// [last + 1]; and even, lift and shift of vectors.Book.
//
// all_weights    [rows, width], in solve order
// upper          [width, width], the block's part of U, where H^-1 = U^T U
// metrics        [width / 8, 1 + 16 / vector_width, 8, 8], see vectors.feedback_block
// weight         [width], the diagonals of the metrics
// inverse        [width / 8, 8, 8], the inverse of each of U's blocks of eight columns on its diagonal
// scale          [rows, width / 8]
// codes, errors  [rows, width], written
__global__ void __launch_bounds__(32 * VECTOR_WARPS, 5)
    feedback_vectors(const float* all_weights, const float* upper, const float* metrics, const float* weight,
                     const float* inverse, const float* scale, int rows, int width, u8* codes, float* errors,
                     const u8* vectors, const float* halves, const int* starts, const float* levels, int vector_width,
                     int count, int heads, int last, int even, int lift, float shift) {
  DYNAMIC_SHARED(float, memory);
  const Book book =
      shared_book({vectors, halves, starts, levels, vector_width, count, heads, last, even, lift, shift}, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = blockIdx.x * VECTOR_WARPS + warp;
  if (r >= rows) return;
  float* work = memory + vector_width / 2 * count + warp * (WORK + MOST_COLUMNS);
  float* row = work + WORK;
  for (int j = lane; j < width; j += 32) row[j] = all_weights[(size_t)r * width + j];
  __syncwarp();
  float shared = shift;  // by the columns of a run
#pragma unroll 1
  for (int u = 0; u < width / EIGHT; u++) {
    const int first = EIGHT * u;
    const float s = scale[(size_t)r * (width / EIGHT) + u];
    const float* metric = metrics_of(book, metrics, u);
    if (lift > EIGHT && first % lift == 0) {
      Products best = {0, 0};
#pragma unroll 1
      for (int side = 0; side < 2; side++) {
        const Products one = products_of(book, work, row + first, weight + first, lift, s, side ? -shift : shift);
        if (side && !lower(one, best, s)) continue;
        best = one, shared = side ? -shift : shift;
      }
    }
    set_signs(book, work, row + first, weight + first);
    set_linear(work, metric, row + first);
    if (lane < EIGHT) work[VALUE * EIGHT + lane] = row[first + lane], work[CODE * EIGHT + lane] = -1;
    __syncwarp();
    const bool lifted = solve(book, work, metric, s, shared) > 0;
    store_codes(book, work, lifted, codes + (size_t)r * width + first);
    spread(work, row, first, width, inverse + u * EIGHT * EIGHT, upper, errors + (size_t)r * width);
  }
}

// Sets signs and values of eight columns to the present ones, and b to what makes the gradient that of the loss.
__device__ __forceinline__ void resume(const Book& book, float* work, const float* metric, const Row& row, int first) {
  set_linear(work, metric, row.values + first);
  if (row.lane < EIGHT) {
    const int code = row.codes[first + row.lane];
    const bool minus = !book.lift && book.levels[code] < 0;
    work[SIGN * EIGHT + row.lane] = minus ? -1 : 1;
    work[CODE * EIGHT + row.lane] = minus ? book.last - code : code;
    work[VALUE * EIGHT + row.lane] = row.values[first + row.lane];
    work[LINEAR * EIGHT + row.lane] = sum(work[LINEAR * EIGHT + row.lane], -row.gradient[first + row.lane]);
  }
  __syncwarp();
}

// Changes the codes of eight columns where that lowers the loss.
__device__ __forceinline__ void refine_eight(const Book& book, float* work, const float* metric, const Row& row, int first, float scale) {
  const float shift = book.lift == EIGHT || row.codes[first] & 1 ? book.shift : -book.shift;
  resume(book, work, metric, row, first);
  const float before = loss_of(work, metric);
  const float taken = solve(book, work, metric, scale, shift);
  if (loss_of(work, metric) >= before) return;
  store_codes(book, work, taken > 0, row.codes + first);
  const int own = row.lane % EIGHT;
  const float value = row.values[first + own], change = sum(work[VALUE * EIGHT + own], -value);
  __syncwarp();
  if (row.lane < EIGHT) row.values[first + own] = sum(value, change);
#pragma unroll 1
  for (int i = 0; i < EIGHT; i++) {
    const float given = __shfl_sync(ALL_LANES, change, i);
    if (given != 0) push(row, first + i, given);
  }
  __syncwarp();
}

// values    [rows, width], the decoded weights Q
// gradient  [rows, width], (Q - W) H
// hessian   [width, width]
// metrics   of the Hessian's blocks of eight columns on its diagonal, as for feedback_vectors
// codes     [rows, width]
//
// All but the Hessian and the metrics are changed in place.
__global__ void __launch_bounds__(32 * VECTOR_WARPS, 4)
    refine_vectors(float* values, float* gradient, const float* hessian, const float* metrics, u8* codes, int group,
                   int rows, int width, float* supers, short* subs, int span, int low, int high, int sign, int mantissa,
                   int lowest, float least, float most, int step, int refitting, int rounds, const u8* vectors,
                   const float* halves, const int* starts, const float* levels, int vector_width, int count, int heads,
                   int last, int even, int lift, float shift) {
  DYNAMIC_SHARED(float, memory);
  const Book book =
      shared_book({vectors, halves, starts, levels, vector_width, count, heads, last, even, lift, shift}, memory);
  const int warp = threadIdx.x / 32, r = blockIdx.x * VECTOR_WARPS + warp;
  if (r >= rows) return;
  float* work = memory + vector_width / 2 * count + warp * WORK;
  const size_t start = (size_t)r * width;
  const Row row = {values + start, gradient + start, codes + start, hessian, levels, last + 1, 0, 0, width, group,
                   (int)threadIdx.x % 32};
  const Stored scale =
      of_row({supers, subs, span, low, high, sign, mantissa, lowest, least, most, step}, r, width / group);
  for (int round = 0; round < rounds; round++) {
    if (refitting) {
#pragma unroll 1
      for (int of_super = 1; of_super >= 0; of_super--)
        if (of_super || low != high) refit(row, scale, true, of_super);
    }
    __syncwarp();
    for (int first = 0; first < width; first += EIGHT) {
      const float s = number(scale, first / group, 1);
      if (s != 0) refine_eight(book, work, metrics_of(book, metrics, first / EIGHT), row, first, s);
    }
  }
}

// weights        [rows, groups * width]
// weight         [groups * width], the importance of each column; it sums to 1 in a group
// cuts           [cut_count], shares of the largest magnitude that the levels do not reach
// scale, square  [rows, groups], written: the scale, and the sum of weight * level^2
__global__ void __launch_bounds__(32 * VECTOR_WARPS, 5)
    fit_vectors(const float* weights, const float* weight, const float* cuts, int cut_count, int rows, int groups,
                int width, float* scale, float* square, const u8* vectors, const float* halves, const int* starts,
                const float* levels, int vector_width, int count, int heads, int last, int even, int lift, float shift) {
  DYNAMIC_SHARED(float, memory);
  const Book book =
      shared_book({vectors, halves, starts, levels, vector_width, count, heads, last, even, lift, shift}, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t own = (size_t)blockIdx.x * VECTOR_WARPS + warp;
  if (own >= (size_t)rows * groups) return;
  float* work = memory + vector_width / 2 * count + warp * WORK;
  const float *x = weights + own * width, *importance = weight + own % groups * width;
  float largest = 0, gain = 0, best = 0, its_square = 0;
  for (int i = 0; i < width; i++) largest = fmaxf(largest, fabsf(x[i]));
  for (int t = 0; t < cut_count + 2; t++) {
    const float tried = t < cut_count ? times(1 - cuts[t], largest) / levels[last] : best;
    if (tried == 0) continue;
#pragma unroll 1
    for (int side = lift > EIGHT ? -1 : 1; side < 2; side += 2) {
      const Products found = products_of(book, work, x, importance, width, tried, times((float)side, shift));
      const float squared = times(found.cross, found.cross);
      if (found.cross > 0 && squared > times(gain, found.square))
        gain = squared / found.square, best = found.cross / found.square, its_square = found.square;
    }
  }
  if (lane == 0) scale[own] = best, square[own] = its_square;
}
