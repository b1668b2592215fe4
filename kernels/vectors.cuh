// The search of a codebook for eight columns of a row, as vectors.py makes it: the same arithmetic in the same order.
//
// A warp takes a row. Its work space is in shared memory, and so are the codebook's levels.
#pragma once
#include "grid.cuh"

const int EIGHT = 8, FOUR = 4;
const int ROUNDS = 4;          // vectors.py has the same number
const int HEADS_PER_LANE = 3;  // so a codebook has at most 96 first halves
const int VECTOR_WARPS = 4;    // of a block
const u64 MOST = 0x7fffffffffffffffull, INDEX = 0xffffffffull;

// Rows of eight numbers of a row's work space, after the eight of the matrix.
const int TARGET = 8, SIGN = 9, VALUE = 10, LINEAR = 11, GAIN = 12, CODE = 13, WORK = 14 * EIGHT;

// A codebook (vectors.Book). `halves` are in shared memory: width / 2 rows, each of the first half of the `heads` first
// halves and of the second half of every vector, `count` in all.
struct Book {
  const u8* vectors;
  const float* halves;
  const int* starts;
  const float* levels;
  int width;
  int count;
  int heads;
  int last;  // the highest code
  int even;
  int lift;
  float shift;
};

__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float sum(float a, float b) { return __fadd_rn(a, b); }

// Copies the codebook's levels into shared memory; all threads of the block meet here. Returns the book that has them.
__device__ __forceinline__ Book shared_book(Book book, float* halves) {
  for (int i = threadIdx.x; i < book.width / 2 * book.count; i += blockDim.x) halves[i] = book.halves[i];
  __syncthreads();
  book.halves = halves;
  return book;
}

// Orders vectors by their losses, which are not negative, and equal losses by n.
__device__ __forceinline__ u64 key_of(float loss, int n) { return (u64)__float_as_uint(loss) << 32 | (u32)n; }

__device__ __forceinline__ u64 warp_least(u64 key) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) key = min(key, __shfl_xor_sync(ALL_LANES, key, distance));
  return key;
}

// Returns the lane with the least value, the first one of equal ones, and sets `value` to that in all lanes.
__device__ __forceinline__ int lane_of_least(float& value) {
  int winner = threadIdx.x % 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(ALL_LANES, value, distance);
    const int lane = __shfl_xor_sync(ALL_LANES, winner, distance);
    if (other < value || (other == value && lane < winner)) value = other, winner = lane;
  }
  return winner;
}

// Returns `begin`, and the squared length of half a vector times the matrix from m on, plus the target.
__device__ __forceinline__ float half_loss(const Book& book, const float* m, const float* target, int n, float begin) {
  const float* half = book.halves + n;
  const float a = half[0], b = half[book.count];
  const float e1 = plus(target[0], a, m[0]), e2 = plus(plus(target[1], a, m[1]), b, m[9]);
  float e3 = 0, e4 = 0;
  if (book.width == EIGHT) {
    const float c = half[2 * book.count], d = half[3 * book.count];
    e3 = plus(plus(plus(target[2], a, m[2]), b, m[10]), c, m[18]);
    e4 = plus(plus(plus(plus(target[3], a, m[3]), b, m[11]), c, m[19]), d, m[27]);
  }
  return sum(begin, sum(sum(times(e1, e1), times(e2, e2)), sum(times(e3, e3), times(e4, e4))));
}

// Returns the key of the vector of least loss, in all lanes. First halves are looked at in the order of their losses,
// which bound those of their vectors from below.
__device__ __forceinline__ u64 search(const Book& book, const float* work) {
  const int lane = threadIdx.x % 32;
  float bound[HEADS_PER_LANE];  // negative where nothing is left to look at
#pragma unroll
  for (int k = 0; k < HEADS_PER_LANE; k++) {
    const int p = k * 32 + lane;
    bound[k] = p < book.heads ? half_loss(book, work, work + TARGET * EIGHT, p, 0) : -1;
  }
  u64 best = MOST;
  while (true) {
    u64 next = MOST;
#pragma unroll
    for (int k = 0; k < HEADS_PER_LANE; k++)
      if (bound[k] >= 0) next = min(next, key_of(bound[k], k * 32 + lane));
    next = warp_least(next);
    if (next == MOST || next >> 32 > best >> 32) return best;
    const int p = (int)(next & INDEX);
#pragma unroll
    for (int k = 0; k < HEADS_PER_LANE; k++)
      if (k * 32 + lane == p) bound[k] = -1;
    float end[FOUR];
#pragma unroll
    for (int i = 0; i < FOUR; i++) {
      end[i] = work[TARGET * EIGHT + FOUR + i];
#pragma unroll
      for (int j = 0; j < FOUR; j++)
        if (2 * j < book.width) end[i] = plus(end[i], book.halves[j * book.count + p], work[j * EIGHT + FOUR + i]);
    }
    const float begin = __uint_as_float((u32)(next >> 32));
    for (int n = book.starts[p] + lane; n < book.starts[p + 1]; n += 32)
      best = min(best, key_of(half_loss(book, work + FOUR * EIGHT + FOUR, end, n, begin), n));
    best = warp_least(best);
  }
}

// Returns the row and column of the matrix for column i of a vector.
__device__ __forceinline__ int place(int i, int width) { return width == EIGHT ? i : i + (i & 2); }

// The metrics of eight columns (vectors.feedback_block): M, and a factor and its reach for each vector.
__device__ __forceinline__ const float* metrics_of(const Book& book, const float* metrics, int u) {
  return metrics + (size_t)u * (1 + 2 * EIGHT / book.width) * EIGHT * EIGHT;
}

__device__ __forceinline__ int first_of(int part) { return part * FOUR; }

// Sets matrix and target for the columns of one vector, with the values of the others as they are.
__device__ __forceinline__ void set_problem(const Book& book, float* work, const float* metric, int part, float scale, float shift) {
  const int k = threadIdx.x % EIGHT, own = first_of(part) + threadIdx.x % book.width;
  const bool writes = threadIdx.x % 32 < EIGHT;
  const float* factor = metric + (1 + 2 * part) * EIGHT * EIGHT;
  const float lifted = times(scale, shift);
  float linear = work[LINEAR * EIGHT + own], target = 0;
  if (book.width == FOUR)
    for (int other = FOUR - first_of(part); other < EIGHT - first_of(part); other++)
      linear = less(linear, metric[own * EIGHT + other], work[VALUE * EIGHT + other]);
  for (int i = 0; i < book.width; i++) {
    const int at = place(i, book.width);
    const float given = __shfl_sync(ALL_LANES, linear, i), sign = times(scale, work[SIGN * EIGHT + first_of(part) + i]);
    const float f = factor[at * EIGHT + k], reach = factor[(EIGHT + at) * EIGHT + k];
    if (writes) work[at * EIGHT + k] = times(sign, f);
    target = sum(target, less(times(lifted, f), given, reach));
  }
  if (writes) work[TARGET * EIGHT + k] = target;
  __syncwarp();
}

// Sets codes and values of the columns of one vector. Returns whether a code changed.
__device__ __forceinline__ bool take(const Book& book, float* work, u64 key, int part, float scale, float shift) {
  const int lane = threadIdx.x % 32, first = part * FOUR;
  const u8* vector = book.vectors + (size_t)((int)(key & INDEX) - book.heads) * book.width;
  bool changed = false;
  for (int i = 0; i < book.width; i++) changed |= work[CODE * EIGHT + first + i] != (float)vector[i];
  __syncwarp();
  if (lane < book.width) {
    const float level = times(work[SIGN * EIGHT + first + lane], sum(book.levels[vector[lane]], book.shift));
    work[CODE * EIGHT + first + lane] = vector[lane];
    work[VALUE * EIGHT + first + lane] = times(scale, sum(level, shift));
  }
  __syncwarp();
  return changed;
}

// Returns (values M)[i], and some multiple of b[i], in lane i and in those that leave i divided by 8.
__device__ __forceinline__ float slope(const float* work, const float* metric, float multiple) {
  const int i = threadIdx.x % EIGHT;
  float total = times(multiple, work[LINEAR * EIGHT + i]);
  for (int j = 0; j < EIGHT; j++) total = plus(total, metric[j * EIGHT + i], work[VALUE * EIGHT + j]);
  return total;
}

// Changes the sign, or with `even` the two signs, whose change lowers the loss most. Returns whether it did.
__device__ __forceinline__ bool flip(const Book& book, float* work, const float* metric) {
  const int lane = threadIdx.x % 32, own = lane % EIGHT;
  float *gain = work + GAIN * EIGHT, *value = work + VALUE * EIGHT, *sign = work + SIGN * EIGHT;
  const float its_gain = times(value[own], sum(times(value[own], metric[own * 9]), -slope(work, metric, -1)));
  if (lane < EIGHT) gain[lane] = its_gain;
  __syncwarp();
  int i = own, j = -1;  // lanes beyond the last sign, or pair of signs, repeat others
  float change = its_gain;
  if (book.even) {
    const int pair = min(lane, EIGHT * (EIGHT - 1) / 2 - 1);
    for (i = 1; i * (i + 1) / 2 <= pair;) i++;
    j = pair - i * (i - 1) / 2;
    change = sum(sum(gain[i], gain[j]), times(times(times(2, value[i]), value[j]), metric[i * EIGHT + j]));
  }
  const int winner = lane_of_least(change);
  if (!(change < 0)) return false;
  const int one = __shfl_sync(ALL_LANES, i, winner), other = __shfl_sync(ALL_LANES, j, winner);
  __syncwarp();  // all lanes have read the values
  if ((lane == one) | (lane == other)) value[lane] = -value[lane], sign[lane] = -sign[lane];
  __syncwarp();
  return true;
}

// Finds codes and values of eight columns. Work has b, the signs and the values to begin with. Returns the shift, which
// is another one only if the eight have their own lift.
__device__ __forceinline__ float solve(const Book& book, float* work, const float* metric, float scale, float shift) {
  if (book.lift) {
    u64 least = MOST;
    float taken = shift;
#pragma unroll 1
    for (int sign = book.lift == EIGHT ? -1 : 1; sign < 2; sign += 2) {
      const float tried = times((float)sign, shift);
      set_problem(book, work, metric, 0, scale, tried);
      const u64 key = search(book, work);
      if (key < least) least = key, taken = tried;
      __syncwarp();
    }
    take(book, work, least, 0, scale, taken);
    return taken;
  }
  const int parts = EIGHT / book.width;
  int settled = 0;  // so many parts are the best, given the others and the signs
#pragma unroll 1
  for (int step = 0; step < ROUNDS * parts && settled < parts; step++) {
    const int part = step & (parts - 1);
    set_problem(book, work, metric, part, scale, 0);
    const u64 key = search(book, work);
    settled = take(book, work, key, part, scale, 0) ? 1 : settled + 1;
    if (part == parts - 1)
#pragma unroll 1
      for (int n = 0; n < EIGHT && flip(book, work, metric); n++) settled = 0;
  }
  return shift;
}

// Returns the loss of the values of eight columns, in all lanes.
__device__ __forceinline__ float loss_of(const float* work, const float* metric) {
  const float product = slope(work, metric, -2);
  float total = 0;
  for (int i = 0; i < EIGHT; i++) total = plus(total, work[VALUE * EIGHT + i], __shfl_sync(ALL_LANES, product, i));
  __syncwarp();  // all lanes have read the values
  return total;
}

// Writes the codes of eight columns.
__device__ __forceinline__ void store_codes(const Book& book, const float* work, bool lifted, u8* codes) {
  const int lane = threadIdx.x % 32;
  if (lane >= EIGHT) return;
  const int code = (int)work[CODE * EIGHT + lane];
  codes[lane] = (u8)(book.lift ? code + lifted : work[SIGN * EIGHT + lane] > 0 ? code : book.last - code);
}

// Sets b to eight values times the metric.
__device__ __forceinline__ void set_linear(float* work, const float* metric, const float* values) {
  const int i = threadIdx.x % EIGHT;
  float total = 0;
  for (int j = 0; j < EIGHT; j++) total = plus(total, metric[j * EIGHT + i], values[j]);
  if (threadIdx.x % 32 < EIGHT) work[LINEAR * EIGHT + i] = total;
}

// Sets the signs of eight columns to those of x; if their number must be even, but for the one that costs least.
__device__ __forceinline__ void set_signs(const Book& book, float* work, const float* x, const float* weight) {
  const int lane = threadIdx.x % 32, i = lane % EIGHT;
  const bool minus = x[i] < 0, odd = warp_sum(minus && lane < EIGHT ? 1 : 0) & 1;
  float cost = times(fabsf(x[i]), weight[i]);
  const int weakest = lane_of_least(cost);
  const bool changed = book.even & odd & (lane == weakest);
  if (lane < EIGHT) work[SIGN * EIGHT + lane] = minus != changed && !book.lift ? -1 : 1;
  __syncwarp();
}

// Sums over columns: weight * x * level, and weight * level^2.
struct Products {
  float cross;
  float square;
};

// Returns whether the first sums are those of a lower error than the others, under a scale.
__device__ __forceinline__ bool lower(const Products& one, const Products& other, float scale) {
  return times(scale, less(times(scale, one.square), 2, one.cross)) <
         times(scale, less(times(scale, other.square), 2, other.cross));
}

// Chooses vectors and signs of eight columns x for a metric that is diagonal: the weights.
__device__ __forceinline__ Products choose(const Book& book, float* work, const float* x, const float* weight, float scale,
                           float shift) {
  const int lane = threadIdx.x % 32;
  set_signs(book, work, x, weight);
  for (int k = lane; k < (TARGET + 1) * EIGHT; k += 32) work[k] = 0;
  __syncwarp();
#pragma unroll 1
  for (int part = 0; part < EIGHT / book.width; part++) {
    if (lane < book.width) {
      const int column = part * FOUR + lane, at = place(lane, book.width);
      const float root = sqrtf(weight[column]);
      work[at * EIGHT + at] = times(times(scale, work[SIGN * EIGHT + column]), root);
      work[TARGET * EIGHT + at] = times(root, sum(times(scale, shift), -x[column]));
    }
    __syncwarp();
    const u64 key = search(book, work);
    take(book, work, key, part, 1, shift);
  }
  Products products = {0, 0};
  for (int i = 0; i < EIGHT; i++) {
    const float value = work[VALUE * EIGHT + i];
    products.cross = plus(products.cross, times(weight[i], x[i]), value);
    products.square = plus(products.square, times(weight[i], value), value);
  }
  __syncwarp();
  return products;
}

// Returns the sums over `count` columns for the levels nearest to x / scale.
__device__ __forceinline__ Products products_of(const Book& book, float* work, const float* x, const float* weight, int count,
                                float scale, float shift) {
  Products total = {0, 0};
#pragma unroll 1
  for (int at = 0; at < count; at += EIGHT) {
    Products best = {0, 0};
#pragma unroll 1
    for (int side = 0; side < (book.lift == EIGHT ? 2 : 1); side++) {
      const Products one = choose(book, work, x + at, weight + at, scale, side ? -shift : shift);
      if (side == 0 || lower(one, best, scale)) best = one;
    }
    total.cross = sum(total.cross, best.cross);
    total.square = sum(total.square, best.square);
  }
  return total;
}
