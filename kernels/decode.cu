// Decodes packed planes to a dense matrix.
#include "formats.cuh"

// Writes the weights that the planes hold to out [rows, columns], rounded to T. A thread decodes eight weights of a
// row. `out` is on a 16-byte boundary.
template <class Format, class T>
__global__ void __launch_bounds__(256)
    decode(const u8* first, const u8* second, const u8* third, int rows, int columns, int group, T* out) {
  const u32 per_row = (columns + 7) / 8;
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)rows * per_row) return;
  const size_t row = i / per_row;
  const u32 column = (u32)(i % per_row) * 8;
  const int count = min(8, columns - (int)column);

  float value[8];
  const Planes planes = {first, second, third};
  Format(planes, row, columns, group).eight(column, count, value);

  T* target = out + row * columns + column;
  if (columns % 8 == 0) {
    Eight<T> stored;
#pragma unroll
    for (int k = 0; k < 8; k++) store(&stored.item[k], value[k]);
    *reinterpret_cast<Eight<T>*>(target) = stored;
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; k++)
    if (k < count) store(target + k, value[k]);
}
