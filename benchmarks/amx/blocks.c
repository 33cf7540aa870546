// 3x3 convolutions of few channels on large maps, together with what surrounds them in a residual block: the batch norm and
// ReLU in front are computed as the images are read, sums for the batch norm behind while they are in the cache.
//
// An image of H x W positions lies in a scratch of (H + 1) x (W + 1), whose last row and column are zeros, image behind
// image: position q of an output reads q + (dy - 1) * (W + 1) + dx - 1, whatever q is, so that tiles are loaded from
// the scratch as it lies. What is computed for the positions of zeros is thrown away, and so is, with a stride of 2, what
// is computed for odd positions.
#include "common.h"

#define MOST 4096  // numbers that the channels' ones are repeated to

typedef struct {
    const bf *x;                   // [n][h][w][c]; read as it is, or as relu(x * scale + offset)
    const float *scale, *offset;   // [c], or null
    const bf *weight;              // [o][3][3][c]
    bf *y;                         // [n][h / stride][w / stride][o]
    const float *shift;            // [o], near the means of y; null: no sums are wanted
    double *sum, *squares;         // [o], of y - shift
    long n, h, w, c, o, stride, skipped, first_skipped;
} Forward;

typedef struct {
    const bf *dy, *y, *z;          // [n][h / stride][w / stride][o]; y null: relu(z * scale + offset) is what dy belongs to
    const float *scale, *offset;   // [o]
    const float *a, *b, *t;        // [o]: dz = a * g + b * z + t, g = dy where the ReLU let it pass
    const bf *x;                   // as in Forward
    const float *x_scale, *x_offset, *x_mean;
    const bf *weight;
    bf *dx;                        // like x; null: not wanted
    const bf *skip_dy, *skip_y;    // null, or what is added to dx: with a stride of 1, like x, skip_dy where skip_y > 0;
                                   // with a stride of 2, like dy but of other channels, skip_dy as it is, where dx's are
                                   // those from number first_skipped on and its positions the even ones
    float *dw;                     // [o][3][3][c]
    double *sum, *products;        // [c], of g and g * (x - x_mean), g = dx where the ReLU in front let it pass; or null
    long n, h, w, c, o, stride, skipped, first_skipped;  // skipped: channels of skip_dy
} Backward;

typedef struct { long images, h, w, c, wide, each, lead, span; bf *at; } Scratch;

static void *cleared(size_t bytes)
{
    void *at = room(bytes);
    memset(at, 0, bytes);
    return at;
}

static Scratch scratch(long images, long h, long w, long c)
{
    Scratch s = {images, h, w, c, w + 1, (h + 1) * (w + 1), over(w + 2, 32) * 32, 0, 0};
    s.span = s.lead + over(images * s.each, 64) * 64 + s.lead + 64;
    s.at = cleared((s.span * c + 64) * sizeof(bf));
    return s;
}

// Lay down an image; with a stride of 2 its positions go to even ones
static void lay(Scratch *s, long i, const bf *image, long stride)
{
    bf *to = s->at + (s->lead + i * s->each) * s->c;
    for (long y = 0; y < s->h; y += stride, to += stride * s->wide * s->c)
        if (stride == 1) {
            memcpy(to, image, s->w * s->c * sizeof(bf));
            image += s->w * s->c;
        } else
            for (long x = 0; x < s->w; x += stride, image += s->c)
                memcpy(to + x * s->c, image, s->c * sizeof(bf));
}

static void clear_behind(Scratch *s, long images)
{
    memset(s->at + (s->lead + images * s->each) * s->c, 0, (s->images - images) * s->each * s->c * sizeof(bf));
}

// Elements after which channels and vectors of 16 begin together, as many as fit into an image, up to 128
static long period(long c, long elements)
{
    long l = c;
    while (l % 16) l += c;
    while (l < 128 && elements % (2 * l) == 0) l *= 2;
    return l;
}

static void spread(const float *from, long c, long l, float *to)
{
    for (long j = 0; j < l; j++) to[j] = from ? from[j % c] : 0;
}

static void norm_relu_image(const bf *x, long elements, long l, const float *scale, const float *offset, bf *to)
{
    for (long i = 0; i < elements; i += l)
        for (long j = 0; j < l; j += 16) {
            __m512 v = _mm512_fmadd_ps(loaded(x + i + j), _mm512_load_ps(scale + j), _mm512_load_ps(offset + j));
            stored(to + i + j, _mm512_max_ps(v, _mm512_setzero_ps()));
        }
}

static void add_sums(const float *s, long c, long l, double *to)
{
    for (long j = 0; j < l; j++) to[j % c] += s[j];
}

// ---------------------------------------------------------------------------------------- products

static bf *pack_weight(const bf *weight, long o, long c, long steps)  // a row dy of taps in tiles of 32 of its 3 * c numbers
{
    long blocks = over(o, 16);
    bf *to = room(blocks * 3 * steps * TILE * sizeof(bf)), *at = to;
    for (long n = 0; n < blocks; n++)
        for (long dy = 0; dy < 3; dy++)
            for (long s = 0; s < steps; s++, at += TILE) {
                __m512i v[16];
                for (long i = 0; i < 16; i++)
                    v[i] = n * 16 + i < o
                        ? _mm512_maskz_loadu_epi16(first32(3 * c - s * 32), weight + ((n * 16 + i) * 3 + dy) * 3 * c + s * 32)
                        : _mm512_setzero_si512();
                transpose_words(v);
                for (long i = 0; i < 16; i++) _mm512_store_si512(at + i * 32, v[i]);
            }
    return to;
}

static bf *turned(const bf *weight, long o, long c)  // [c][3][3][o], with the taps reversed
{
    bf *to = room(c * 9 * o * sizeof(bf));
    for (long i = 0; i < o; i++)
        for (long tap = 0; tap < 9; tap++)
            for (long k = 0; k < c; k++) to[(k * 9 + 8 - tap) * o + i] = weight[(i * 9 + tap) * c + k];
    return to;
}

static int *places(const Scratch *s, long stride)  // where a position of the scratch goes in the output, or -1
{
    long all = over(s->images * s->each, 64) * 64, h = s->h / stride, w = s->w / stride;
    int *to = malloc(all * sizeof(int));
    for (long q = 0; q < all; q++) {
        long i = q / s->each, row = q % s->each / s->wide, column = q % s->each % s->wide;
        int inside = i < s->images && row < s->h && column < s->w && row % stride == 0 && column % stride == 0;
        to[q] = inside ? (int)((i * h + row / stride) * w + column / stride) : -1;
    }
    return to;
}

static inline void put(const float *sums, const int *place, long tiles, long block, long o, bf *y)
{
    __mmask16 mask = first16(o - block * 16);
    for (long i = 0; i < 16 * tiles; i++)
        if (place[i] >= 0)
            _mm256_mask_storeu_epi16(y + (long)place[i] * o + block * 16, mask,
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + i * 16)));
}

// The convolution of what lies in the scratch, for the images in it; tiles are open
static void convolve(const Scratch *s, long images, const bf *weight, long o, const int *place, bf *y)
{
    const long c = s->c, steps = over(3 * c, 32), blocks = over(o, 16), row = 16 * c, stride = c * 2, end = images * s->each;
    float sums[1024] __attribute__((aligned(64)));
    for (long k = 0; k < blocks;) {
        const bf *b0 = weight + k * 3 * steps * TILE, *b1 = b0 + 3 * steps * TILE;
        if (blocks - k >= 2) {
            for (long q = 0; q < end; q += 32) {
                _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
                for (long dy = 0; dy < 3; dy++) {
                    const bf *a = s->at + (s->lead + q + (dy - 1) * s->wide - 1) * c;
                    for (long t = 0; t < steps; t++) {
                        _tile_loadd(4, a + t * 32, stride);
                        _tile_loadd(6, b0 + (dy * steps + t) * TILE, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, b1 + (dy * steps + t) * TILE, 64);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, a + row + t * 32, stride);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
                _tile_stored(0, sums, 64); _tile_stored(2, sums + 256, 64);
                _tile_stored(1, sums + 512, 64); _tile_stored(3, sums + 768, 64);
                put(sums, place + q, 2, k, o, y);
                put(sums + 512, place + q, 2, k + 1, o, y);
            }
            k += 2;
        } else {
            for (long q = 0; q < end; q += 64) {
                _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
                for (long dy = 0; dy < 3; dy++) {
                    const bf *a = s->at + (s->lead + q + (dy - 1) * s->wide - 1) * c;
                    for (long t = 0; t < steps; t++) {
                        _tile_loadd(6, b0 + (dy * steps + t) * TILE, 64);
                        _tile_loadd(4, a + t * 32, stride);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(5, a + row + t * 32, stride);
                        _tile_dpbf16ps(1, 5, 6);
                        _tile_loadd(7, a + 2 * row + t * 32, stride);
                        _tile_dpbf16ps(2, 7, 6);
                        _tile_loadd(4, a + 3 * row + t * 32, stride);
                        _tile_dpbf16ps(3, 4, 6);
                    }
                }
                _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64);
                _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64);
                put(sums, place + q, 4, k, o, y);
            }
            k++;
        }
    }
}

// The same where the rows are made of whole tiles, and three rows of taps fit into two steps at most: an input's tile is
// loaded once for the three rows of outputs that it reaches, and half of the weights or all stay in their tiles
static int in_strips(const Scratch *s) { return s->w % 16 == 0 && 3 * s->c <= 64; }

static void put_strip(const float *sums, long row, long x, const Scratch *s, long block, long o, long stride, bf *y)
{
    if (row % stride) return;
    __mmask16 mask = first16(o - block * 16);
    y += (row / stride * (s->w / stride) + x / stride) * o + block * 16;
    for (long i = 0; i < 16; i += stride, y += o)
        _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + i * 16)));
}

static void convolve_strips(const Scratch *s, long images, const bf *weight, long o, long stride, bf *y)
{
    const long c = s->c, steps = over(3 * c, 32), blocks = over(o, 16), apart = c * 2, down = s->wide * c;
    float sums[256] __attribute__((aligned(64)));
    for (long k = 0; k < blocks; k++) {
        const bf *b = weight + k * 3 * steps * TILE;
        _tile_loadd(5, b, 64);
        _tile_loadd(6, b + steps * TILE, 64);
        _tile_loadd(7, b + 2 * steps * TILE, 64);
        for (long i = 0; i < images; i++)
            for (long x = 0; x < s->w; x += 16) {
                const bf *a = s->at + (s->lead + i * s->each + x - 1) * c;
                bf *to = y + i * (s->h / stride) * (s->w / stride) * o;
                _tile_zero(0); _tile_zero(1); _tile_zero(2);
#define ROW(BEFORE, SAME, NEXT, R) {                                                                  \
    _tile_loadd(3, a + (R) * down, apart);                                                            \
    _tile_dpbf16ps(BEFORE, 3, 7); _tile_dpbf16ps(SAME, 3, 6); _tile_dpbf16ps(NEXT, 3, 5);             \
    if (steps == 2) {                                                                                 \
        _tile_loadd(3, a + (R) * down + 32, apart);                                                   \
        _tile_loadd(4, b + 5 * TILE, 64); _tile_dpbf16ps(BEFORE, 3, 4);                               \
        _tile_loadd(4, b + 3 * TILE, 64); _tile_dpbf16ps(SAME, 3, 4);                                 \
        _tile_loadd(4, b + TILE, 64); _tile_dpbf16ps(NEXT, 3, 4);                                     \
    }                                                                                                 \
    _tile_stored(BEFORE, sums, 64);                                                                   \
    _tile_zero(BEFORE);                                                                               \
    if ((R) > 0) put_strip(sums, (R) - 1, x, s, k, o, stride, to);                                    \
}
                long r = 0;
                for (; r + 3 <= s->h; r += 3) {
                    ROW(2, 0, 1, r)
                    ROW(0, 1, 2, r + 1)
                    ROW(1, 2, 0, r + 2)
                }
                if (r < s->h) { ROW(2, 0, 1, r) r++;
                    if (r < s->h) { ROW(0, 1, 2, r) r++; } }
                if ((r - 1) % 3 == 0) { _tile_stored(0, sums, 64); }
                else if ((r - 1) % 3 == 1) { _tile_stored(1, sums, 64); }
                else { _tile_stored(2, sums, 64); }
                put_strip(sums, s->h - 1, x, s, k, o, stride, to);
            }
    }
}

static long group_of(long n, long h, long w) { return least(n, over(1024, (h + 1) * (w + 1))); }

void block_forward(const Forward *f)
{
    long group = group_of(f->n, f->h, f->w), elements = f->h * f->w * f->c, l = period(f->c, elements);
    long out = f->h / f->stride * (f->w / f->stride) * f->o, ol = period(f->o, out);
    float scale[MOST] __attribute__((aligned(64))), offset[MOST] __attribute__((aligned(64)));
    float shift[MOST] __attribute__((aligned(64))), sum[MOST] __attribute__((aligned(64)));
    float squares[MOST] __attribute__((aligned(64)));
    spread(f->scale, f->c, l, scale);
    spread(f->offset, f->c, l, offset);
    spread(f->shift, f->o, ol, shift);
    Scratch s = scratch(group, f->h, f->w, f->c);
    bf *weight = pack_weight(f->weight, f->o, f->c, over(3 * f->c, 32)), *image = room(elements * sizeof(bf));
    int *place = places(&s, f->stride);
    if (f->shift) memset(f->sum, 0, f->o * sizeof(double)), memset(f->squares, 0, f->o * sizeof(double));
    open_tiles();
    for (long i = 0; i < f->n; i += group) {
        long images = least(group, f->n - i);
        for (long k = 0; k < images; k++) {
            const bf *x = f->x + (i + k) * elements;
            if (f->scale) norm_relu_image(x, elements, l, scale, offset, image), x = image;
            lay(&s, k, x, 1);
        }
        if (images < group) clear_behind(&s, images);
        bf *y = f->y + i * out;
        if (images < group)
            for (long q = images * s.each; q < over(group * s.each, 64) * 64; q++) place[q] = -1;
        if (in_strips(&s)) convolve_strips(&s, images, weight, f->o, f->stride, y);
        else convolve(&s, images, weight, f->o, place, y);
        if (!f->shift) continue;
        memset(sum, 0, ol * sizeof(float));
        memset(squares, 0, ol * sizeof(float));
        for (long q = 0; q < images * out; q += ol)
            for (long j = 0; j < ol; j += 16) {
                __m512 v = _mm512_sub_ps(loaded(y + q + j), _mm512_load_ps(shift + j));
                _mm512_store_ps(sum + j, _mm512_add_ps(_mm512_load_ps(sum + j), v));
                _mm512_store_ps(squares + j, _mm512_fmadd_ps(v, v, _mm512_load_ps(squares + j)));
            }
        add_sums(sum, f->o, ol, f->sum);
        add_sums(squares, f->o, ol, f->squares);
    }
    _tile_release();
    free(place), free(image), free(weight), free(s.at);
}

// ----------------------------------------------------------------------------------------- way back

static void transpose(const bf *from, long rows, long columns, bf *to, long length)  // rows: a multiple of 32
{
    for (long c = 0; c < columns; c += 16)
        for (long r = 0; r < rows; r += 32) {
            __m512i v[16];
            for (long i = 0; i < 16; i++) {
                const bf *row = from + (r + 2 * i) * columns + c;
                v[i] = paired(row, row + columns, first16(columns - c));
            }
            transpose_words(v);
            for (long i = 0; i < least(16, columns - c); i++) _mm512_storeu_si512(to + (c + i) * length + r, v[i]);
        }
}

// Adds to sums [block of channels][tap][block of outputs] what the images in the scratches bring; tiles are open
static void add_weight_gradient(const bf **base, long rows, long length, const bf *pairs, long positions, long blocks,
                                long end, float *sums)
{
    const long stride = length * 2;
    for (long k = 0; k < blocks;) {
        const bf *b = pairs + k * positions * 16, *b1 = b + positions * 16;
        if (blocks - k >= 2) {
            for (long m = 0; m < rows; m += 2) {
                long two = m + 1 < rows;
                float *to = sums + (m * blocks + k) * 256, *below = two ? to + blocks * 256 : to;
                const bf *a0 = base[m], *a1 = base[m + two];
                _tile_loadd(0, to, 64); _tile_loadd(1, to + 256, 64);
                _tile_loadd(2, below, 64); _tile_loadd(3, below + 256, 64);
                for (long q = 0; q < end; q += 32) {
                    _tile_loadd(4, a0 + q, stride);
                    _tile_loadd(6, b + q * 16, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, b1 + q * 16, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_loadd(5, a1 + q, stride);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                if (two) { _tile_stored(2, below, 64); _tile_stored(3, below + 256, 64); }
                _tile_stored(0, to, 64); _tile_stored(1, to + 256, 64);
            }
            k += 2;
        } else {
            for (long m = 0; m < rows; m += 3) {  // rows are nine times something
                float *to = sums + (m * blocks + k) * 256, *second = to + blocks * 256, *third = second + blocks * 256;
                _tile_loadd(0, to, 64); _tile_loadd(1, second, 64); _tile_loadd(2, third, 64);
                for (long q = 0; q < end; q += 32) {
                    _tile_loadd(7, b + q * 16, 64);
                    _tile_loadd(4, base[m] + q, stride);
                    _tile_dpbf16ps(0, 4, 7);
                    _tile_loadd(5, base[m + 1] + q, stride);
                    _tile_dpbf16ps(1, 5, 7);
                    _tile_loadd(6, base[m + 2] + q, stride);
                    _tile_dpbf16ps(2, 6, 7);
                }
                _tile_stored(0, to, 64); _tile_stored(1, second, 64); _tile_stored(2, third, 64);
            }
            k++;
        }
    }
}

// The same where a row of the map is one step of 32: a tile of the input is loaded once for its three rows of outputs.
// pairs: [block of outputs][row of any image]
static void add_weight_gradient_of_rows(const bf *across, long channel_blocks, long length, const Scratch *s, const bf *pairs,
                                        long all_rows, long blocks, long images, float *sums)
{
    const long stride = length * 2, apart = blocks * 256;
    for (long m = 0; m < channel_blocks; m++)
        for (long k = 0; k < blocks; k++)
            for (long dx = 0; dx < 3; dx++) {
                float *to = sums + ((m * 9 + dx) * blocks + k) * 256;
                _tile_loadd(0, to, 64); _tile_loadd(1, to + 3 * apart, 64); _tile_loadd(2, to + 6 * apart, 64);
                for (long i = 0; i < images; i++) {
                    const bf *a = across + m * 16 * length + s->lead + i * s->each + dx - 1;
                    const bf *b = pairs + (k * all_rows + i * s->h) * TILE;
                    long r = 0, h = s->h;
                    _tile_zero(4);
                    _tile_loadd(5, b, 64);
#define ROWS(BEFORE, SAME, NEXT) {                                                                    \
    _tile_loadd(3, a + r * s->wide, stride);                                                          \
    _tile_dpbf16ps(2, 3, BEFORE);                                                                     \
    _tile_dpbf16ps(1, 3, SAME);                                                                       \
    r++;                                                                                              \
    if (r == h) break;                                                                                \
    _tile_loadd(NEXT, b + r * TILE, 64);                                                              \
    _tile_dpbf16ps(0, 3, NEXT);                                                                       \
}
                    for (;;) {
                        ROWS(4, 5, 6)
                        ROWS(5, 6, 4)
                        ROWS(6, 4, 5)
                    }
                }
                _tile_stored(0, to, 64); _tile_stored(1, to + 3 * apart, 64); _tile_stored(2, to + 6 * apart, 64);
            }
}

static void write_weight_gradient(const float *sums, long rows, long blocks, long o, long c, float *dw)
{
    for (long m = 0; m < rows; m++)
        for (long k = 0; k < blocks; k++) {
            __m512i v[16];
            for (long i = 0; i < 16; i++) v[i] = _mm512_load_si512(sums + (m * blocks + k) * 256 + i * 16);
            transpose_words(v);
            for (long i = 0; i < least(16, o - k * 16); i++)
                _mm512_mask_storeu_epi32(dw + ((k * 16 + i) * 9 + m % 9) * c + m / 9 * 16, first16(c - m / 9 * 16), v[i]);
        }
}

// dy where the ReLU let it pass: where y > 0, or, without y, where z * scale + offset > 0
static inline __m512 passed(const bf *dy, const bf *y, __m512 z, const float *scale, const float *offset)
{
    __mmask16 live;
    if (y) {
        __m256i v = _mm256_loadu_si256((const __m256i *)y);
        live = _mm256_test_epi16_mask(v, v);
    } else
        live = _mm512_cmp_ps_mask(_mm512_fmadd_ps(z, _mm512_load_ps(scale), _mm512_load_ps(offset)),
                                  _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_maskz_mov_ps(live, loaded(dy));
}

// The way back of pad_skipped
static void add_skipped(const Backward *f, const bf *g, long images, bf *dx)
{
    g += f->first_skipped;
    for (long line = 0; line < images * f->h; line += 2, dx += 2 * f->w * f->c)
        for (long x = 0; x < f->w; x += 2, g += f->skipped)
            for (long k = 0; k < f->c; k += 16) {
                __mmask16 mask = first16(f->c - k);
                bf *to = dx + x * f->c + k;
                __m512 own = (__m512)_mm512_slli_epi32(widened(to, mask), 16);
                __m512 v = _mm512_add_ps(own, (__m512)_mm512_slli_epi32(widened(g + k, mask), 16));
                _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(v));
            }
}

// Every second position of x [n][h][w][c], its channels between zeros: to [n][h / 2][w / 2][o], from channel first on
void pad_skipped(const bf *x, long n, long h, long w, long c, long o, long first, bf *to)
{
    for (long line = 0; line < n * h; line += 2, x += 2 * w * c)
        for (long at = 0; at < w; at += 2, to += o) {
            memset(to, 0, o * sizeof(bf));
            memcpy(to + first, x + at * c, c * sizeof(bf));
        }
}

void block_backward(const Backward *f)
{
    long group = group_of(f->n, f->h, f->w), elements = f->h * f->w * f->c, l = period(f->c, elements);
    long out = f->h / f->stride * (f->w / f->stride) * f->o, ol = period(f->o, out);
    long rows = 9 * over(f->c, 16), blocks = over(f->o, 16);
    float p[8][MOST] __attribute__((aligned(64)));
    float *scale = p[0], *offset = p[1], *a = p[2], *b = p[3], *t = p[4], *x_scale = p[5], *x_offset = p[6], *x_mean = p[7];
    float sum[MOST] __attribute__((aligned(64))), products[MOST] __attribute__((aligned(64)));
    spread(f->scale, f->o, ol, scale), spread(f->offset, f->o, ol, offset);
    spread(f->a, f->o, ol, a), spread(f->b, f->o, ol, b), spread(f->t, f->o, ol, t);
    spread(f->x_scale, f->c, l, x_scale), spread(f->x_offset, f->c, l, x_offset), spread(f->x_mean, f->c, l, x_mean);
    Scratch sx = scratch(group, f->h, f->w, f->c), sy = scratch(group, f->h, f->w, f->o);
    long length = sx.span / 32 * 32 + 32, positions = over(group * sx.each, 32) * 32;
    while (length * 2 % 1024 != 64) length += 32;
    bf *across = cleared(over(f->c, 16) * 16 * length * sizeof(bf) + 128);
    bf *pairs = room(positions * blocks * 16 * sizeof(bf));
    bf *image = room((elements > out ? elements : out) * sizeof(bf));
    float *sums = cleared(rows * blocks * 256 * sizeof(float));
    const bf **base = malloc(rows * sizeof(bf *));
    for (long m = 0; m < rows; m++)  // taps of the same channels behind each other: they read the same cache lines
        base[m] = across + m / 9 * 16 * length + sx.lead + (m % 9 / 3 - 1) * sx.wide + m % 3 - 1;
    bf *back = turned(f->weight, f->o, f->c), *weight = pack_weight(back, f->c, f->o, over(3 * f->o, 32));
    int *place = places(&sy, 1);
    if (f->sum) memset(f->sum, 0, f->c * sizeof(double)), memset(f->products, 0, f->c * sizeof(double));
    open_tiles();
    for (long i = 0; i < f->n; i += group) {
        long images = least(group, f->n - i), end = over(images * sx.each, 32) * 32;
        for (long k = 0; k < images; k++) {
            const bf *x = f->x + (i + k) * elements;
            if (f->x_scale) norm_relu_image(x, elements, l, x_scale, x_offset, image), x = image;
            lay(&sx, k, x, 1);
            const bf *dy = f->dy + (i + k) * out, *y = f->y ? f->y + (i + k) * out : 0, *z = f->z + (i + k) * out;
            for (long q = 0; q < out; q += ol)
                for (long j = 0; j < ol; j += 16) {
                    __m512 at = loaded(z + q + j);
                    __m512 g = passed(dy + q + j, y ? y + q + j : 0, at, scale + j, offset + j);
                    __m512 v = _mm512_fmadd_ps(at, _mm512_load_ps(b + j), _mm512_load_ps(t + j));
                    stored(image + q + j, _mm512_fmadd_ps(g, _mm512_load_ps(a + j), v));
                }
            lay(&sy, k, image, f->stride);
        }
        if (images < group) {
            clear_behind(&sx, images), clear_behind(&sy, images);
            for (long q = images * sx.each; q < over(group * sx.each, 64) * 64; q++) place[q] = -1;
        }
        transpose(sx.at, sx.span / 32 * 32, f->c, across, length);
        if (f->w == 32) {
            for (long k = 0; k < blocks; k++)
                for (long line = 0; line < images * f->h; line++)
                    for (long q = 0; q < 32; q += 2) {
                        const bf *at = sy.at + (sy.lead + line / f->h * sy.each + line % f->h * sy.wide + q) * f->o + k * 16;
                        _mm512_store_si512(pairs + (k * group * f->h + line) * TILE + q * 16,
                                           paired(at, at + f->o, first16(f->o - k * 16)));
                    }
            add_weight_gradient_of_rows(across, over(f->c, 16), length, &sx, pairs, group * f->h, blocks, images, sums);
        } else {
            for (long k = 0; k < blocks; k++)
                for (long q = 0; q < end; q += 2) {
                    const bf *at = sy.at + (sy.lead + q) * f->o + k * 16;
                    _mm512_store_si512(pairs + (k * positions + q) * 16, paired(at, at + f->o, first16(f->o - k * 16)));
                }
            add_weight_gradient(base, rows, length, pairs, positions, blocks, end, sums);
        }
        if (!f->dx) continue;
        bf *dx = f->dx + i * elements;
        if (in_strips(&sy)) convolve_strips(&sy, images, weight, f->c, 1, dx);
        else convolve(&sy, images, weight, f->c, place, dx);
        if (f->skip_dy && f->stride == 2)
            add_skipped(f, f->skip_dy + i * (out / f->o * f->skipped), images, dx);
        else if (f->skip_dy) {
            const bf *dy = f->skip_dy + i * elements, *y = f->skip_y + i * elements;
            for (long q = 0; q < images * elements; q += 16)
                stored(dx + q, _mm512_add_ps(loaded(dx + q), passed(dy + q, y + q, _mm512_setzero_ps(), 0, 0)));
        }
        if (!f->sum) continue;
        const bf *x = f->x + i * elements;
        memset(sum, 0, l * sizeof(float));
        memset(products, 0, l * sizeof(float));
        for (long q = 0; q < images * elements; q += l)
            for (long j = 0; j < l; j += 16) {
                __m512 at = loaded(x + q + j), g = passed(dx + q + j, 0, at, x_scale + j, x_offset + j);
                _mm512_store_ps(sum + j, _mm512_add_ps(_mm512_load_ps(sum + j), g));
                _mm512_store_ps(products + j, _mm512_fmadd_ps(g, _mm512_sub_ps(at, _mm512_load_ps(x_mean + j)),
                                                              _mm512_load_ps(products + j)));
            }
        add_sums(sum, f->c, l, f->sum);
        add_sums(products, f->c, l, f->products);
    }
    _tile_release();
    write_weight_gradient(sums, rows, blocks, f->o, f->c, f->dw);
    free(place), free(weight), free(back), free(base), free(sums), free(image), free(pairs), free(across);
    free(sx.at), free(sy.at);
}

// Sums of g and g * (z - mean), g = dy where y > 0; [m][c] each. dskip null, or where g goes
void block_sums(const bf *dy, const bf *y, const bf *z, long m, long c, const float *mean, bf *dskip, double *sum,
                double *products)
{
    long l = period(c, m * c), chunk = over(8192, l) * l;
    float k[MOST] __attribute__((aligned(64))), s[MOST] __attribute__((aligned(64))), ss[MOST] __attribute__((aligned(64)));
    spread(mean, c, l, k);
    memset(sum, 0, c * sizeof(double));
    memset(products, 0, c * sizeof(double));
    for (long from = 0; from < m * c; from += chunk) {
        memset(s, 0, l * sizeof(float));
        memset(ss, 0, l * sizeof(float));
        for (long q = from; q < least(from + chunk, m * c); q += l)
            for (long j = 0; j < l; j += 16) {
                __m512 g = passed(dy + q + j, y + q + j, _mm512_setzero_ps(), 0, 0);
                if (dskip) stored(dskip + q + j, g);
                _mm512_store_ps(s + j, _mm512_add_ps(_mm512_load_ps(s + j), g));
                _mm512_store_ps(ss + j, _mm512_fmadd_ps(g, _mm512_sub_ps(loaded(z + q + j), _mm512_load_ps(k + j)),
                                                        _mm512_load_ps(ss + j)));
            }
        add_sums(s, c, l, sum);
        add_sums(ss, c, l, products);
    }
}

// From the sums of y - shift to what the batch norm does with y, and on to its running statistics
void norm_numbers(const double *sum, const double *squares, const float *shift, long m, long c, float eps, float momentum,
                  const float *weight, const float *bias, float *running_mean, float *running_variance, float *mean,
                  float *invstd, float *scale, float *offset)
{
    for (long j = 0; j < c; j++) {
        double d = sum[j] / m, variance = squares[j] / m - d * d, unbiased;
        if (variance < 0) variance = 0;
        unbiased = variance * m / (m > 1 ? m - 1 : 1);
        mean[j] = (float)(d + shift[j]);
        running_mean[j] += momentum * (mean[j] - running_mean[j]);  // shift may lie there: it is not read again
        running_variance[j] += momentum * ((float)unbiased - running_variance[j]);
        invstd[j] = (float)(1 / __builtin_sqrt(variance + eps));
        scale[j] = weight[j] * invstd[j];
        offset[j] = bias[j] - mean[j] * scale[j];
    }
}

// From the sums of g and g * (z - mean) to the gradients of the batch norm, and the numbers that Backward takes
void back_numbers(const double *sum, const double *products, const float *mean, const float *invstd,
                  const float *weight, long m, long c, float *a, float *b, float *t, float *dweight, float *dbias)
{
    for (long j = 0; j < c; j++) {
        double scale = (double)weight[j] * invstd[j], slope = -scale * invstd[j] * invstd[j] * products[j] / m;
        dbias[j] = (float)sum[j];
        dweight[j] = (float)(products[j] * invstd[j]);
        a[j] = (float)scale;
        b[j] = (float)slope;
        t[j] = (float)(-scale * sum[j] / m - slope * mean[j]);
    }
}
