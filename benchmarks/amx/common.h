// What the kernels share: tiles, transposing, numbers in bfloat16. All images are bfloat16 in channels_last.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf;

#define TILE 512  // bfloat16 numbers in a tile: 16 rows of 64 bytes

static inline void open_tiles(void)
{
    struct { uint8_t palette, first, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {0};
    shape.palette = 1;
    for (int t = 0; t < 8; t++) shape.bytes[t] = 64, shape.rows[t] = 16;
    _tile_loadconfig(&shape);
}

static inline void *room(size_t bytes) { return aligned_alloc(64, (bytes + 4095) / 4096 * 4096); }

static inline long over(long a, long b) { return (a + b - 1) / b; }

static inline long least(long a, long b) { return a < b ? a : b; }

static inline void transpose_words(__m512i v[16])  // 16 x 16 words of 32 bits
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x88);
        t[j + 4] = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xdd);
        t[j + 8] = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x88);
        t[j + 12] = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xdd);
    }
    for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

static inline __m512i widened(const bf *at, __mmask16 mask)
{
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
}

static inline __mmask16 first16(long n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

static inline __mmask32 first32(long n) { return n >= 32 ? 0xffffffff : (1u << n) - 1; }

static inline __m512i paired(const bf *even, const bf *odd, __mmask16 mask)  // (even[i], odd[i]) as one word
{
    return _mm512_or_si512(widened(even, mask), _mm512_slli_epi32(widened(odd, mask), 16));
}

static inline __m512 loaded(const bf *at)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
}

static inline void stored(bf *at, __m512 v) { _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh(v)); }

static inline float one(bf v) { union { uint32_t i; float f; } u = {(uint32_t)v << 16}; return u.f; }

static inline bf rounded(float v) { return (bf)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(v)), 0); }
