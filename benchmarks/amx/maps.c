// 3x3 convolutions of small maps: tiles hold 16 images each, or 32, at one position. Every tap of a position is a product of
// whole tiles, a tap beyond the border is left out, and small maps waste nothing.
#include "common.h"
#include <sys/syscall.h>
#include <unistd.h>

int start(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }  // ask Linux for the tiles (XTILEDATA)

typedef struct { long n, h, w, c, o; } Shape;  // images, height, width, channels, outputs

// The rows of the map that are worked on at once, y from .. to, and the rows that their taps reach
typedef struct { long from, to, first, last; } Rows;

static Rows rows_from(long y, long count, long h)
{
    Rows r = {y, least(y + count, h), y > 0 ? y - 1 : 0, 0};
    r.last = least(r.to + 1, h);
    return r;
}

// Tiles [16 images][32 channels] at [position][block of channels][2], of up to 32 images
static void pack_images(const bf *x, long images, Shape s, Rows r, bf *to)
{
    long blocks = over(s.c, 32), positions = (r.last - r.first) * s.w;
    for (long i = 0; i < 32; i++) {
        const bf *from = x + (i * s.h + r.first) * s.w * s.c;
        bf *at = to + i / 16 * TILE + i % 16 * 32;
        for (long p = 0; p < positions; p++, from += s.c)
            for (long k = 0; k < blocks; k++, at += 2 * TILE)
                _mm512_store_si512(at, i < images ? _mm512_maskz_loadu_epi16(first32(s.c - k * 32), from + k * 32)
                                                  : _mm512_setzero_si512());
    }
}

// Tiles [16 pairs of channels][16 outputs] at [block of outputs][tap][block of channels], of weight [o][9][c]
static bf *pack_weight(const bf *weight, long o, long c)
{
    long blocks = over(o, 16), steps = over(c, 32);
    bf *to = room(blocks * 9 * steps * TILE * sizeof(bf)), *at = to;
    for (long b = 0; b < blocks; b++)
        for (long tap = 0; tap < 9; tap++)
            for (long k = 0; k < steps; k++, at += TILE) {
                __m512i v[16];
                for (long i = 0; i < 16; i++)
                    v[i] = b * 16 + i < o
                        ? _mm512_maskz_loadu_epi16(first32(c - k * 32), weight + ((b * 16 + i) * 9 + tap) * c + k * 32)
                        : _mm512_setzero_si512();
                transpose_words(v);
                for (long i = 0; i < 16; i++) _mm512_store_si512(at + i * 32, v[i]);
            }
    return to;
}

// The same for the way back: outputs and channels change places, and the taps their order
static bf *pack_weight_back(const bf *weight, long o, long c)
{
    long blocks = over(c, 16), steps = over(o, 32);
    bf *to = room(blocks * 9 * steps * TILE * sizeof(bf)), *at = to;
    for (long b = 0; b < blocks; b++)
        for (long tap = 8; tap >= 0; tap--)
            for (long k = 0; k < steps; k++, at += TILE)
                for (long i = 0; i < 16; i++) {
                    long even = k * 32 + 2 * i;
                    const bf *row = weight + (even * 9 + tap) * c + b * 16;
                    __mmask16 mask = first16(c - b * 16);
                    __m512i v = _mm512_setzero_si512();
                    if (even + 1 < o) v = paired(row, row + 9 * c, mask);
                    else if (even < o) v = widened(row, mask);
                    _mm512_store_si512(at + i * 32, v);
                }
    return to;
}

// Sums of 16 images, [image][output], of one block or two, to y
static void put(const float *sums, long blocks, long images, long stride, long left, bf *y)
{
    for (long i = 0; i < least(images, 16); i++) {
        __m512 low = _mm512_load_ps(sums + i * 16);
        __m512 high = blocks == 2 ? _mm512_load_ps(sums + 256 + i * 16) : low;
        _mm512_mask_storeu_epi16(y + i * stride, first32(least(left, 16 * blocks)),
                                 (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

static void convolve(const bf *x, const bf *weight, bf *y, Shape s)  // weight: packed
{
    long steps = over(s.c, 32), blocks = over(s.o, 16), line = s.w * steps * 2 * TILE;
    long count = least(s.h, 500000 / line > 2 ? 500000 / line - 2 : 1);
    bf *tiles = room((count + 2) * line * sizeof(bf));
    float sums[1024] __attribute__((aligned(64)));
    open_tiles();
    for (long i = 0; i < s.n; i += 32)
        for (long top = 0; top < s.h; top += count) {
            Rows r = rows_from(top, count, s.h);
            pack_images(x + i * s.h * s.w * s.c, s.n - i, s, r, tiles);
            for (long b = 0; b < blocks; b += 2) {
                const bf *b0 = weight + b * 9 * steps * TILE, *b1 = b0 + 9 * steps * TILE;
                long both = blocks - b > 1 ? 2 : 1;
                for (long v = r.from; v < r.to; v++)
                    for (long u = 0; u < s.w; u++) {
                        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
                        for (long tap = 0; tap < 9; tap++) {
                            long row = v + tap / 3 - 1, column = u + tap % 3 - 1;
                            if (row < 0 || row >= s.h || column < 0 || column >= s.w) continue;
                            const bf *a = tiles + ((row - r.first) * s.w + column) * steps * 2 * TILE;
                            const bf *c0 = b0 + tap * steps * TILE, *c1 = b1 + tap * steps * TILE;
                            if (both == 2)
                                for (long k = 0; k < steps; k++, a += 2 * TILE) {
                                    _tile_loadd(4, a, 64);
                                    _tile_loadd(6, c0 + k * TILE, 64);
                                    _tile_dpbf16ps(0, 4, 6);
                                    _tile_loadd(7, c1 + k * TILE, 64);
                                    _tile_dpbf16ps(1, 4, 7);
                                    _tile_loadd(5, a + TILE, 64);
                                    _tile_dpbf16ps(2, 5, 6);
                                    _tile_dpbf16ps(3, 5, 7);
                                }
                            else
                                for (long k = 0; k < steps; k++, a += 2 * TILE) {
                                    _tile_loadd(6, c0 + k * TILE, 64);
                                    _tile_loadd(4, a, 64);
                                    _tile_dpbf16ps(0, 4, 6);
                                    _tile_loadd(5, a + TILE, 64);
                                    _tile_dpbf16ps(2, 5, 6);
                                }
                        }
                        bf *to = y + ((i * s.h + v) * s.w + u) * s.o + b * 16;
                        long stride = s.h * s.w * s.o, left = s.o - b * 16;
                        _tile_stored(0, sums, 64);
                        if (both == 2) _tile_stored(1, sums + 256, 64);
                        put(sums, both, s.n - i, stride, left, to);
                        if (s.n - i > 16) {
                            _tile_stored(2, sums + 512, 64);
                            if (both == 2) _tile_stored(3, sums + 768, 64);
                            put(sums + 512, both, s.n - i - 16, stride, left, to + 16 * stride);
                        }
                    }
            }
        }
    _tile_release();
    free(tiles);
}

// y = x * weight; x: [n][h][w][c], weight: [o][3][3][c], y: [n][h][w][o]
void conv(const bf *x, const bf *weight, bf *y, long n, long h, long w, long c, long o)
{
    bf *packed = pack_weight(weight, o, c);
    convolve(x, packed, y, (Shape){n, h, w, c, o});
    free(packed);
}

// The gradient with respect to the images: dx [n][h][w][c] of dy [n][h][w][o]
void conv_dx(const bf *dy, const bf *weight, bf *dx, long n, long h, long w, long c, long o)
{
    bf *packed = pack_weight_back(weight, o, c);
    convolve(dy, packed, dx, (Shape){n, h, w, o, c});
    free(packed);
}

// Tiles of 32 images at one position: [16 channels][32 images], or, paired, [16 pairs of images][16 channels];
// at [block of channels][position][block of images]
static void pack_across(const bf *x, long images, long groups, long h, long w, long c, long top, long bottom, int pairs,
                        bf *to)
{
    long each = h * w * c, positions = (bottom - top) * w;
    for (long g = 0; g < groups; g++)
        for (long p = 0; p < positions; p++)
            for (long b = 0; b < over(c, 16); b++) {
                const bf *from = x + g * 32 * each + (top * w + p) * c + b * 16;
                bf *at = to + ((b * positions + p) * groups + g) * TILE;
                __mmask16 mask = first16(c - b * 16);
                __m512i v[16];
                for (long i = 0; i < 16; i++, from += 2 * each) {
                    long left = images - g * 32 - 2 * i;
                    v[i] = left > 1 ? paired(from, from + each, mask)
                         : left == 1 ? widened(from, mask) : _mm512_setzero_si512();
                }
                if (!pairs) transpose_words(v);
                for (long i = 0; i < 16; i++) _mm512_store_si512(at + i * 32, v[i]);
            }
}

#define SUMS(DO) DO(0, to) if (two_o) DO(1, to + 9 * 256) if (two_c) DO(2, below) if (two_c && two_o) DO(3, below + 9 * 256)
#define LOAD(T, AT) _tile_loadd(T, AT, 64);
#define STORE(T, AT) _tile_stored(T, AT, 64);

// Sums [16 channels][16 outputs] of a tap to dw, which points at the first of them
static void put_gradient(const float *sums, long c, long channels, long outputs, float *dw)
{
    __m512i v[16];
    for (long i = 0; i < 16; i++) v[i] = _mm512_load_si512(sums + i * 16);
    transpose_words(v);
    for (long i = 0; i < least(16, outputs); i++) _mm512_mask_storeu_epi32(dw + i * 9 * c, first16(channels), v[i]);
}

// The gradient with respect to the weights: dw [o][3][3][c] float32
void conv_dw(const bf *x, const bf *dy, float *dw, long n, long h, long w, long c, long o)
{
    long cs = over(c, 16), os = over(o, 16), groups = least(over(n, 32), 4), most = 2000000 / (groups * w * TILE);
    while (groups > 1 && most < (cs * 3 + os)) groups /= 2, most *= 2;
    long count = h * (cs + os) <= most ? h : (most - 2 * cs) / (cs + os);  // the whole map needs no rows around it
    count = count < 1 ? 1 : least(count, h);
    int once = count == h && groups * 32 >= n;
    bf *across = room((count + 2) * w * groups * cs * TILE * sizeof(bf));
    bf *pairs = room(count * w * groups * os * TILE * sizeof(bf));
    float *sums = once ? 0 : room(9 * cs * os * 256 * sizeof(float));
    float few[4 * 9 * 256] __attribute__((aligned(64)));  // of two blocks of channels and of outputs
    open_tiles();
    for (long i = 0; i < n; i += groups * 32)
        for (long top = 0; top < h; top += count) {
            Rows r = rows_from(top, count, h);
            long reached = (r.last - r.first) * w, own = (r.to - r.from) * w, used = least(groups, over(n - i, 32));
            pack_across(x + i * h * w * c, n - i, used, h, w, c, r.first, r.last, 0, across);
            pack_across(dy + i * h * w * o, n - i, used, h, w, o, r.from, r.to, 1, pairs);
            for (long m = 0; m < cs; m += 2)
                for (long k = 0; k < os; k += 2)
                    for (long tap = 0; tap < 9; tap++) {
                        int two_c = cs - m > 1, two_o = os - k > 1;
                        float *to = once ? few + tap * 256 : sums + ((m * os + k) * 9 + tap) * 256;
                        float *below = to + (once ? 2 : os) * 9 * 256;
                        if (i == 0 && top == 0) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
                        else { SUMS(LOAD) }
                        long left = tap % 3 == 0, right = w - (tap % 3 == 2);
                        for (long v = r.from; v < r.to; v++) {
                            long row = v + tap / 3 - 1;
                            if (row < 0 || row >= h || left >= right) continue;
                            const bf *a0 = across
                                + (m * reached + (row - r.first) * w + left + tap % 3 - 1) * used * TILE;
                            const bf *b0 = pairs + (k * own + (v - r.from) * w + left) * used * TILE;
                            const bf *a1 = a0 + reached * used * TILE, *b1 = b0 + own * used * TILE;
                            long end = (right - left) * used * TILE;
                            if (two_c && two_o)
                                for (long q = 0; q < end; q += TILE) {
                                    _tile_loadd(4, a0 + q, 64);
                                    _tile_loadd(6, b0 + q, 64);
                                    _tile_dpbf16ps(0, 4, 6);
                                    _tile_loadd(7, b1 + q, 64);
                                    _tile_dpbf16ps(1, 4, 7);
                                    _tile_loadd(5, a1 + q, 64);
                                    _tile_dpbf16ps(2, 5, 6);
                                    _tile_dpbf16ps(3, 5, 7);
                                }
                            else if (two_c)
                                for (long q = 0; q < end; q += TILE) {
                                    _tile_loadd(6, b0 + q, 64);
                                    _tile_loadd(4, a0 + q, 64);
                                    _tile_dpbf16ps(0, 4, 6);
                                    _tile_loadd(5, a1 + q, 64);
                                    _tile_dpbf16ps(2, 5, 6);
                                }
                            else if (two_o)
                                for (long q = 0; q < end; q += TILE) {
                                    _tile_loadd(4, a0 + q, 64);
                                    _tile_loadd(6, b0 + q, 64);
                                    _tile_dpbf16ps(0, 4, 6);
                                    _tile_loadd(7, b1 + q, 64);
                                    _tile_dpbf16ps(1, 4, 7);
                                }
                            else
                                for (long q = 0; q < end; q += TILE) {
                                    _tile_loadd(4, a0 + q, 64);
                                    _tile_loadd(6, b0 + q, 64);
                                    _tile_dpbf16ps(0, 4, 6);
                                }
                        }
                        SUMS(STORE)
                        if (i + groups * 32 < n || top + count < h) continue;
#define PUT(T, AT) put_gradient(AT, c, c - (m + T / 2) * 16, o - (k + T % 2) * 16,                                    \
                                dw + ((k + T % 2) * 16 * 9 + tap) * c + (m + T / 2) * 16);
                        SUMS(PUT)
                    }
        }
    _tile_release();
    free(sums), free(pairs), free(across);
}
