// Readers of all formats on the GPU. lqexport.formats defines how each format stores a weight.
//
// In every format, eight weights that begin at a multiple of eight share their scale and offset, and their codes fill
// whole bytes. So a format is a reader of one row, with
//
//   Reader(planes, row, columns, group)
//   eight(column, count, value)    reads weights column .. column + count - 1; count is 8 except at the end of a row
//
// To add a format, write a reader in this file and add its name to lqexport/kernels/cuda_decode.py. Every product and
// sum is rounded by itself (__fmul_rn, __fadd_rn), as the format defines a value: the compiler must not fuse them.
#pragma once
#include "common.cuh"

// Up to three planes of a packed tensor. The first axis of each is the rows.
struct Planes {
  const u8* first;
  const u8* second;
  const u8* third;
};

__device__ __forceinline__ float half_at(const u8* bytes) { return to_float(*reinterpret_cast<const __half*>(bytes)); }

// ---- GGUF: rows of blocks. A block has an even number of bytes, so its 16-bit words are aligned (but for MXFP4).

__device__ __forceinline__ u64 eight_bytes(const u8* bytes) {
  const u16* words = reinterpret_cast<const u16*>(bytes);
  return words[0] | (u64)words[1] << 16 | (u64)words[2] << 32 | (u64)words[3] << 48;
}

// The position of integer n in a member that is packed as `Bits` in formats/gguf.py says: its byte, and its lowest bit
// in that byte.
template <int BITS, int RUN>
__device__ __forceinline__ u32 byte_of(u32 n) {
  return n / (RUN * 8 / BITS) * RUN + n % RUN;
}

template <int BITS, int RUN>
__device__ __forceinline__ u32 shift_of(u32 n) {
  return n / RUN % (8 / BITS) * BITS;
}

// Returns integers n .. n + 7 of a member, one in each byte.
template <int BITS, int RUN>
__device__ __forceinline__ u64 integers(const u8* member, u32 n) {
  return eight_bytes(member + byte_of<BITS, RUN>(n)) >> shift_of<BITS, RUN>(n) & 0x0101010101010101ull * ((1 << BITS) - 1);
}

template <int BITS, int RUN>
__device__ __forceinline__ int integer(const u8* member, u32 n) {
  return member[byte_of<BITS, RUN>(n)] >> shift_of<BITS, RUN>(n) & ((1 << BITS) - 1);
}

// Returns bits n .. n + 7 of a bit mask, one in each byte.
__device__ __forceinline__ u64 mask_bits(const u8* mask, u32 n) {
  u64 bits = 0;
#pragma unroll
  for (int k = 0; k < 8; k++) bits |= (u64)(mask[n / 8] >> k & 1) << 8 * k;
  return bits;
}

// A block type has its sizes and: codes(block, n), codes n .. n + 7, one in each byte; level(code); scale(block, n) and
// offset(block, n) of weight n.
struct Block32 {
  static const int weights = 32;
  static const bool has_offset = false;
  static __device__ float offset(const u8*, u32) { return 0; }
  static __device__ float scale(const u8* block, u32) { return half_at(block); }
};

struct Block256 {
  static const int weights = 256;
  static const bool has_offset = false;
  static __device__ float offset(const u8*, u32) { return 0; }
};

struct Q4_0 : Block32 {
  static const int bytes = 18;
  static __device__ u64 codes(const u8* block, u32 n) { return integers<4, 16>(block + 2, n); }
  static __device__ int level(int code) { return code - 8; }
};

struct Q4_1 : Block32 {
  static const int bytes = 20;
  static const bool has_offset = true;
  static __device__ u64 codes(const u8* block, u32 n) { return integers<4, 16>(block + 4, n); }
  static __device__ int level(int code) { return code; }
  static __device__ float offset(const u8* block, u32) { return half_at(block + 2); }
};

struct Q5_0 : Block32 {
  static const int bytes = 22;
  static __device__ u64 codes(const u8* block, u32 n) {
    return integers<4, 16>(block + 6, n) | mask_bits(block + 2, n) << 4;
  }
  static __device__ int level(int code) { return code - 16; }
};

struct Q5_1 : Block32 {
  static const int bytes = 24;
  static const bool has_offset = true;
  static __device__ u64 codes(const u8* block, u32 n) {
    return integers<4, 16>(block + 8, n) | mask_bits(block + 4, n) << 4;
  }
  static __device__ int level(int code) { return code; }
  static __device__ float offset(const u8* block, u32) { return half_at(block + 2); }
};

struct Q8_0 : Block32 {
  static const int bytes = 34;
  static __device__ u64 codes(const u8* block, u32 n) { return eight_bytes(block + 2 + n); }
  static __device__ int level(int code) { return (signed char)code; }
};

// IQ4_LEVELS of formats/gguf.py: -127 -104 -83 -65 -49 -35 -22 -10 and 1 13 25 38 53 69 89 113, lowest byte first.
__device__ __forceinline__ int codebook(int code) {
  const u64 levels = code < 8 ? 0xf6eaddcfbfad9881ull : 0x7159453526190d01ull;
  return (signed char)(levels >> 8 * (code & 7));
}

struct IQ4_NL : Block32 {
  static const int bytes = 18;
  static __device__ u64 codes(const u8* block, u32 n) { return integers<4, 16>(block + 2, n); }
  static __device__ int level(int code) { return codebook(code); }
};

// E2M1 of formats/gguf.py, in the order of stored codes: a sign bit above 0 1 2 3 4 6 8 12. ggml has no negative zero.
__device__ __forceinline__ int e2m1(int code) {
  const int magnitude = (int)(0x0c08060403020100ull >> 8 * (code & 7) & 255);
  return code < 8 ? magnitude : -magnitude;
}

struct MXFP4 : Block32 {
  static const int bytes = 17;
  // A block has an odd number of bytes, so its words are not aligned.
  static __device__ u64 codes(const u8* block, u32 n) {
    u64 integers = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) integers |= (u64)integer<4, 16>(block + 1, n + k) << 8 * k;
    return integers;
  }
  static __device__ int level(int code) { return e2m1(code); }
  // 2^(e - 128). The two least are subnormal, and a compiler with -ftz=true makes their products 0.
  static __device__ float scale(const u8* block, u32) {
    const u32 e = block[0];
    return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  }
};

struct NVFP4 {
  static const int weights = 64;
  static const int bytes = 36;
  static const bool has_offset = false;
  static __device__ float offset(const u8*, u32) { return 0; }
  static __device__ u64 codes(const u8* block, u32 n) { return integers<4, 8>(block + 4, n); }
  static __device__ int level(int code) { return e2m1(code); }
  // Half a float8 (E4M3, bias 7) without a sign. The byte 127 stands for NaN, and ggml decodes it to 0.
  static __device__ float scale(const u8* block, u32 n) {
    const u32 stored = block[n / 16], exponent = stored >> 3 & 15, mantissa = stored & 7;
    if (stored == 127) return 0;
    return exponent ? __uint_as_float(exponent + 119 << 23 | mantissa << 20) : (float)mantissa * 0x1p-10f;
  }
};

struct IQ4_XS : Block256 {
  static const int bytes = 136;
  static __device__ u64 codes(const u8* block, u32 n) { return integers<4, 16>(block + 8, n); }
  static __device__ int level(int code) { return codebook(code); }
  static __device__ float scale(const u8* block, u32 n) {
    const int stored = integer<4, 1>(block + 4, n / 32) | integer<2, 1>(block + 2, n / 32) << 4;
    return __fmul_rn(half_at(block), (float)(stored - 32));
  }
};

struct Q2_K : Block256 {
  static const int bytes = 84;
  static const bool has_offset = true;
  static __device__ u64 codes(const u8* block, u32 n) { return integers<2, 32>(block + 16, n); }
  static __device__ int level(int code) { return code; }
  static __device__ float scale(const u8* block, u32 n) {
    return __fmul_rn(half_at(block + 80), (float)(block[n / 16] & 15));
  }
  static __device__ float offset(const u8* block, u32 n) {
    return __fmul_rn(-half_at(block + 82), (float)(block[n / 16] >> 4));
  }
};

struct Q3_K : Block256 {
  static const int bytes = 110;
  static __device__ u64 codes(const u8* block, u32 n) {
    return integers<2, 32>(block + 32, n) | integers<1, 32>(block, n) << 2;
  }
  static __device__ int level(int code) { return code - 4; }
  static __device__ float scale(const u8* block, u32 n) {
    const int stored = integer<4, 8>(block + 96, n / 16) | integer<2, 4>(block + 104, n / 16) << 4;
    return __fmul_rn(half_at(block + 108), (float)(stored - 32));
  }
};

struct Q4_K : Block256 {
  static const int bytes = 144;
  static const bool has_offset = true;
  static __device__ u64 codes(const u8* block, u32 n) { return integers<4, 32>(block + 16, n); }
  static __device__ int level(int code) { return code; }
  // `at` is 0 for scales and 4 for mins. In groups 4 .. 7, the low 4 bits of both share a byte: nibble at / 4.
  static __device__ int six_bits(const u8* block, u32 group, int at) {
    const u8* scales = block + 4;
    if (group < 4) return scales[at + group] & 63;
    return scales[4 + group] >> at & 15 | scales[at + group - 4] >> 6 << 4;
  }
  static __device__ float scale(const u8* block, u32 n) {
    return __fmul_rn(half_at(block), (float)six_bits(block, n / 32, 0));
  }
  static __device__ float offset(const u8* block, u32 n) {
    return __fmul_rn(-half_at(block + 2), (float)six_bits(block, n / 32, 4));
  }
};

struct Q5_K : Q4_K {
  static const int bytes = 176;
  static __device__ u64 codes(const u8* block, u32 n) {
    return integers<4, 32>(block + 48, n) | integers<1, 32>(block + 16, n) << 4;
  }
};

struct Q6_K : Block256 {
  static const int bytes = 210;
  static __device__ u64 codes(const u8* block, u32 n) {
    return integers<4, 64>(block, n) | integers<2, 32>(block + 128, n) << 4;
  }
  static __device__ int level(int code) { return code - 32; }
  static __device__ float scale(const u8* block, u32 n) {
    return __fmul_rn(half_at(block + 208), (float)(signed char)block[192 + n / 16]);
  }
};

struct TQ1_0 : Block256 {
  static const int bytes = 54;
  // Digit k of 32, then of 16, then of 4 bytes comes before digit k + 1 of any of them. A byte times 3^k keeps, below
  // 256, the digits from k on.
  static __device__ u64 codes(const u8* block, u32 n) {
    const u32 shift = n < 160 ? 5 : n < 240 ? 4 : 2, start = n < 160 ? 0 : n < 240 ? 160 : 240;
    const u8* members = block + (n < 160 ? 0 : n < 240 ? 32 : 48);
    u64 codes = 0;
#pragma unroll 1  // unrolled, it takes more registers than the others
    for (int k = 7; k >= 0; k--) {
      const u32 i = n - start + k, power = (u32)(0x511b090301ull >> 8 * (i >> shift)) & 255;
      codes = codes << 8 | (members[i & ((1 << shift) - 1)] * power & 255) * 3 >> 8;
    }
    return codes;
  }
  static __device__ int level(int code) { return code - 1; }
  static __device__ float scale(const u8* block, u32) { return half_at(block + 52); }
};

struct TQ2_0 : Block256 {
  static const int bytes = 66;
  static __device__ u64 codes(const u8* block, u32 n) { return integers<2, 32>(block, n); }
  static __device__ int level(int code) { return code - 1; }
  static __device__ float scale(const u8* block, u32) { return half_at(block + 64); }
};

struct Q1_0 : Block32 {
  static const int weights = 128;
  static const int bytes = 18;
  static __device__ u64 codes(const u8* block, u32 n) { return mask_bits(block + 2, n); }
  static __device__ int level(int code) { return 2 * code - 1; }
};

// A row of blocks. A weight is scale * level + offset.
template <class Block>
struct Blocks {
  const u8* row;

  __device__ Blocks(const Planes& planes, size_t r, int columns, int)
      : row(planes.first + r * (columns / Block::weights * Block::bytes)) {}

  __device__ __forceinline__ void eight(u32 column, int, float* value) const {
    const u8* block = row + column / Block::weights * Block::bytes;
    const u32 n = column % Block::weights;
    const u64 codes = Block::codes(block, n);
    const float scale = Block::scale(block, n);
    const float offset = Block::offset(block, n);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      value[k] = __fmul_rn(scale, (float)Block::level((int)(codes >> 8 * k & 255)));
      if (Block::has_offset) value[k] = __fadd_rn(value[k], offset);
    }
  }
};

// ---- GGUF's i-quants of 1 to 3 bits: vectors of 4 or 8 weights, from a table that is the second plane. The table has a
// byte for each weight of a vector: its rank among the magnitudes, or 0, 1 and 2 of IQ1.

__device__ __forceinline__ u32 word_at(const u8* bytes) { return *reinterpret_cast<const u16*>(bytes); }
__device__ __forceinline__ u32 long_word_at(const u8* bytes) { return word_at(bytes) | word_at(bytes + 2) << 16; }

// Returns the sign bits that an index of seven bits stands for: an even number of them is set.
__device__ __forceinline__ u32 even_signs(u32 index) {
  const u32 parity = 0x6996 >> ((index ^ index >> 4) & 15) & 1;  // of the four bits that are left, by a table
  return index | parity << 7;
}

// A type has its sizes and: width, the weights of a vector; index(block, v) of vector v; flags(block, e), the signs of
// eight weights or whether they are lifted; level(rank, flag); factor(block, n), the odd multiple of d for weight n; and
// super(block), d.
struct Vectors256 {
  static const int weights = 256;
  static const int width = 8;
  static __device__ float super(const u8* block) { return half_at(block); }
};

struct Iq2 : Vectors256 {
  static __device__ float level(u32 rank, u32 minus) {
    const float magnitude = rank == 0 ? 1.0f : rank == 1 ? 3.125f : 5.375f;
    return minus ? -magnitude : magnitude;
  }
};

struct IQ2_XXS : Iq2 {
  static const int bytes = 66;
  static __device__ u32 index(const u8* block, u32 v) { return block[2 + v / 4 * 8 + v % 4]; }
  static __device__ u32 flags(const u8* block, u32 e) {
    return even_signs(long_word_at(block + 6 + e / 4 * 8) >> 7 * (e % 4) & 127);
  }
  static __device__ int factor(const u8* block, u32 n) { return 2 * (long_word_at(block + 6 + n / 32 * 8) >> 28) + 1; }
};

struct IQ2_XS : Iq2 {
  static const int bytes = 74;
  static __device__ u32 index(const u8* block, u32 v) { return word_at(block + 2 + 2 * v) & 511; }
  static __device__ u32 flags(const u8* block, u32 e) { return even_signs(word_at(block + 2 + 2 * e) >> 9); }
  static __device__ int factor(const u8* block, u32 n) { return 2 * integer<4, 1>(block + 66, n / 16) + 1; }
};

struct IQ2_S : Iq2 {
  static const int bytes = 82;
  static __device__ u32 index(const u8* block, u32 v) { return block[2 + v] | integer<2, 1>(block + 66, v) << 8; }
  static __device__ u32 flags(const u8* block, u32 e) { return block[34 + e]; }
  static __device__ int factor(const u8* block, u32 n) { return 2 * integer<4, 1>(block + 74, n / 16) + 1; }
};

struct IQ3_XXS : Vectors256 {
  static const int bytes = 98;
  static const int width = 4;
  static __device__ u32 index(const u8* block, u32 v) { return block[2 + v]; }
  static __device__ u32 flags(const u8* block, u32 e) {
    return even_signs(long_word_at(block + 66 + e / 4 * 4) >> 7 * (e % 4) & 127);
  }
  static __device__ int factor(const u8* block, u32 n) { return 2 * (long_word_at(block + 66 + n / 32 * 4) >> 28) + 1; }
  static __device__ float level(u32 rank, u32 minus) {
    const float magnitude = rank < 7 ? (float)(2 * rank + 1) : 15.5f;
    return minus ? -magnitude : magnitude;
  }
};

struct IQ3_S : Vectors256 {
  static const int bytes = 110;
  static const int width = 4;
  static __device__ u32 index(const u8* block, u32 v) { return block[2 + v] | integer<1, 1>(block + 66, v) << 8; }
  static __device__ u32 flags(const u8* block, u32 e) { return block[74 + e]; }
  static __device__ int factor(const u8* block, u32 n) { return 2 * integer<4, 1>(block + 106, n / 32) + 1; }
  static __device__ float level(u32 rank, u32 minus) {
    const int magnitude = 2 * rank + 1;
    return (float)(minus ? -magnitude : magnitude);
  }
};

struct Iq1 : Vectors256 {
  static __device__ float level(u32 rank, u32 lifted) { return (float)((int)rank - 1) + (lifted ? 0.125f : -0.125f); }
};

struct IQ1_S : Iq1 {
  static const int bytes = 50;
  static __device__ u32 index(const u8* block, u32 v) {
    return block[2 + v] | (word_at(block + 34 + v / 4 * 2) >> 3 * (v % 4) & 7) << 8;
  }
  static __device__ u32 flags(const u8* block, u32 e) { return word_at(block + 34 + e / 4 * 2) >> 15 ? 0 : 255; }
  static __device__ int factor(const u8* block, u32 n) { return 2 * (word_at(block + 34 + n / 32 * 2) >> 12 & 7) + 1; }
};

struct IQ1_M : Iq1 {
  static const int bytes = 56;
  static __device__ u32 index(const u8* block, u32 v) { return block[v] | (integer<4, 1>(block + 32, v) & 7) << 8; }
  static __device__ u32 flags(const u8* block, u32 e) { return integer<4, 1>(block + 32, e) & 8 ? 0 : 255; }
  static __device__ int factor(const u8* block, u32 n) {
    return 2 * (word_at(block + 48 + n / 64 * 2) >> 3 * (n / 16 % 4) & 7) + 1;
  }
  // The highest four bits of four words, the lowest bits first.
  static __device__ float super(const u8* block) {
    u16 bits = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) bits |= word_at(block + 48 + 2 * k) >> 12 << 4 * k;
    return half_at(reinterpret_cast<const u8*>(&bits));
  }
};

// A row of blocks. A weight is d * factor * level.
template <class Block>
struct Vectors {
  const u8* row;
  const u8* table;

  __device__ Vectors(const Planes& planes, size_t r, int columns, int)
      : row(planes.first + r * (columns / Block::weights * Block::bytes)), table(planes.second) {}

  __device__ __forceinline__ void eight(u32 column, int, float* value) const {
    const u8* block = row + column / Block::weights * Block::bytes;
    const u32 n = column % Block::weights, flags = Block::flags(block, n / 8);
    const float scale = __fmul_rn(Block::super(block), (float)Block::factor(block, n));
#pragma unroll
    for (int part = 0; part < 8 / Block::width; part++) {
      const u8* vector = table + Block::index(block, n / Block::width + part) * Block::width;
#pragma unroll
      for (int j = 0; j < Block::width; j++) {
        const int k = part * Block::width + j;
        value[k] = __fmul_rn(scale, Block::level(vector[j], flags >> k & 1));
      }
    }
  }
};

// ---- Plain types: each weight is one number.
template <class T>
struct Plain {
  const T* row;

  __device__ Plain(const Planes& planes, size_t r, int columns, int)
      : row(reinterpret_cast<const T*>(planes.first) + r * columns) {}

  __device__ __forceinline__ void eight(u32 column, int count, float* value) const {
#pragma unroll
    for (int k = 0; k < 8; k++)
      value[k] = k < count ? to_float(row[column + k]) : 0;
  }
};

// A norm of Gemma as llama.cpp stores it: the weight plus 1.
struct NormPlusOne : Plain<float> {
  __device__ NormPlusOne(const Planes& planes, size_t r, int columns, int group) : Plain(planes, r, columns, group) {}

  __device__ __forceinline__ void eight(u32 column, int count, float* value) const {
    Plain::eight(column, count, value);
#pragma unroll
    for (int k = 0; k < 8; k++)
      value[k] -= 1;
  }
};

// ---- Native formats: each row has a bit stream of codes, and a table or scales.

// Returns the BITS bytes of the stream that hold eight codes, the lowest bits first. A row may end with fewer bytes.
template <int BITS>
__device__ __forceinline__ u64 stream_bytes(const u8* stream, u32 column, int count) {
  const u8* bytes = stream + column / 8 * BITS;
  u64 word = 0;
#pragma unroll
  for (int k = 0; k < BITS; k++)
    if (8 * k < count * BITS) word |= (u64)bytes[k] << 8 * k;
  return word;
}

template <int BITS>
__device__ __forceinline__ const u8* stream_of(const u8* codes, size_t r, int columns) {
  return codes + r * (((size_t)columns * BITS + 7) / 8);
}

// Planes: codes, table.
template <int BITS>
struct Table {
  const u8* stream;
  const __half* table;

  __device__ Table(const Planes& planes, size_t r, int columns, int)
      : stream(stream_of<BITS>(planes.first, r, columns)),
        table(reinterpret_cast<const __half*>(planes.second) + (r << BITS)) {}

  __device__ __forceinline__ void eight(u32 column, int count, float* value) const {
    const u64 word = stream_bytes<BITS>(stream, column, count);
#pragma unroll
    for (int k = 0; k < 8; k++) value[k] = to_float(table[word >> BITS * k & ((1 << BITS) - 1)]);
  }
};

// Planes: codes, scale, offset. `group` columns share a scale and an offset.
template <int BITS>
struct Affine {
  const u8* stream;
  const __half* scale;
  const __half* offset;
  int group;

  __device__ Affine(const Planes& planes, size_t r, int columns, int group)
      : stream(stream_of<BITS>(planes.first, r, columns)),
        scale(reinterpret_cast<const __half*>(planes.second) + r * (columns / group)),
        offset(reinterpret_cast<const __half*>(planes.third) + r * (columns / group)),
        group(group) {}

  __device__ __forceinline__ void eight(u32 column, int count, float* value) const {
    const u64 word = stream_bytes<BITS>(stream, column, count);
    const float s = to_float(scale[column / group]), o = to_float(offset[column / group]);
#pragma unroll
    for (int k = 0; k < 8; k++) value[k] = __fadd_rn(__fmul_rn(s, (float)(word >> BITS * k & ((1 << BITS) - 1))), o);
  }
};

// Planes: codes, exponents. A weight is MXINT's integer, code - (2^(BITS - 1) - 1), times the group's power of two.
template <int BITS>
struct MxInt {
  const u8* stream;
  const u8* exponents;
  int group;

  __device__ MxInt(const Planes& planes, size_t r, int columns, int group)
      : stream(stream_of<BITS>(planes.first, r, columns)), exponents(planes.second + r * (columns / group)), group(group) {}

  __device__ __forceinline__ void eight(u32 column, int count, float* value) const {
    const u64 word = stream_bytes<BITS>(stream, column, count);
    // 2^(e - (BITS - 1)): the stored number e + 127 is already the exponent field of a float.
    const float scale = __uint_as_float((u32)(exponents[column / group] - (BITS - 1)) << 23);
    const int most = (1 << (BITS - 1)) - 1;
#pragma unroll
    for (int k = 0; k < 8; k++) value[k] = __fmul_rn(scale, (float)((int)(word >> BITS * k & ((1 << BITS) - 1)) - most));
  }
};
