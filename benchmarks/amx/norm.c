// Batch norm with the residual sum and the ReLU behind it, and max-pooling behind that
#include "common.h"

static long period(long c)  // elements after which channels and vectors begin together; at least 128
{
    long l = c;
    while (l % 16) l += c;
    long all = l;
    while (all < 128) all += l;
    return all;
}

#define FLUSH 128
#define MOST (512 * 16 + 128)

// mean and biased variance of x [m][c]; shift: numbers near the means
void moments(const bf *x, long m, long c, const float *shift, float *mean, float *variance)
{
    long l = period(c), lines = m * c / l;
    float s[MOST] __attribute__((aligned(64))), ss[MOST] __attribute__((aligned(64)));
    float k[MOST] __attribute__((aligned(64)));
    double *sum = calloc(2 * c, sizeof(double)), *squares = sum + c;
    for (long j = 0; j < l; j++) k[j] = shift[j % c];
    for (long from = 0; from < lines; from += FLUSH) {
        long to = from + FLUSH < lines ? from + FLUSH : lines;
        memset(s, 0, l * sizeof(float));
        memset(ss, 0, l * sizeof(float));
        for (long i = from; i < to; i++)
            for (long j = 0; j < l; j += 16) {
                __m512 v = _mm512_sub_ps(loaded(x + i * l + j), _mm512_load_ps(k + j));
                _mm512_store_ps(s + j, _mm512_add_ps(_mm512_load_ps(s + j), v));
                _mm512_store_ps(ss + j, _mm512_fmadd_ps(v, v, _mm512_load_ps(ss + j)));
            }
        for (long j = 0; j < l; j++) sum[j % c] += s[j], squares[j % c] += ss[j];
    }
    for (long i = lines * l; i < m * c; i++) {
        double v = one(x[i]) - shift[i % c];
        sum[i % c] += v, squares[i % c] += v * v;
    }
    for (long j = 0; j < c; j++) {
        double d = sum[j] / m;
        mean[j] = (float)(d + shift[j]);
        double v = squares[j] / m - d * d;
        variance[j] = v > 0 ? (float)v : 0;
    }
    free(sum);
}

// y = max(0, x * scale + offset + skip)
void norm_relu(const bf *x, const bf *skip, long m, long c, const float *scale, const float *offset, bf *y)
{
    long l = period(c), lines = m * c / l;
    float a[MOST] __attribute__((aligned(64))), b[MOST] __attribute__((aligned(64)));
    const __m512 zero = _mm512_setzero_ps();
    for (long j = 0; j < l; j++) a[j] = scale[j % c], b[j] = offset[j % c];
    for (long i = 0; i < lines * l; i += l)
        for (long j = 0; j < l; j += 16) {
            __m512 v = _mm512_fmadd_ps(loaded(x + i + j), _mm512_load_ps(a + j), _mm512_load_ps(b + j));
            if (skip) v = _mm512_add_ps(v, loaded(skip + i + j));
            stored(y + i + j, _mm512_max_ps(v, zero));
        }
    for (long i = lines * l; i < m * c; i++) {
        float v = one(x[i]) * scale[i % c] + offset[i % c] + (skip ? one(skip[i]) : 0);
        y[i] = rounded(v > 0 ? v : 0);
    }
}

static inline __m512 passed(const bf *dy, const bf *y)
{
    __m512i live = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)y));
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(live, live), loaded(dy));
}

// Gradients of the two functions above together. dskip may be null; dweight and dbias: [c]; dx may be x or dy
void norm_relu_back(const bf *dy, const bf *y, const bf *x, long m, long c, const float *mean, const float *invstd,
                    const float *weight, bf *dskip, bf *dx, float *dweight, float *dbias)
{
    long l = period(c), lines = m * c / l;
    float s[MOST] __attribute__((aligned(64))), ss[MOST] __attribute__((aligned(64)));
    float k[MOST] __attribute__((aligned(64)));
    double *sum = calloc(2 * c, sizeof(double)), *products = sum + c;
    for (long j = 0; j < l; j++) k[j] = mean[j % c];
    for (long from = 0; from < lines; from += FLUSH) {
        long to = from + FLUSH < lines ? from + FLUSH : lines;
        memset(s, 0, l * sizeof(float));
        memset(ss, 0, l * sizeof(float));
        for (long i = from; i < to; i++)
            for (long j = 0; j < l; j += 16) {
                long at = i * l + j;
                __m512 g = passed(dy + at, y + at), v = _mm512_sub_ps(loaded(x + at), _mm512_load_ps(k + j));
                if (dskip) stored(dskip + at, g);
                _mm512_store_ps(s + j, _mm512_add_ps(_mm512_load_ps(s + j), g));
                _mm512_store_ps(ss + j, _mm512_fmadd_ps(g, v, _mm512_load_ps(ss + j)));
            }
        for (long j = 0; j < l; j++) sum[j % c] += s[j], products[j % c] += ss[j];
    }
    for (long i = lines * l; i < m * c; i++) {
        bf g = y[i] ? dy[i] : 0;
        if (dskip) dskip[i] = g;
        sum[i % c] += one(g), products[i % c] += (double)one(g) * (one(x[i]) - mean[i % c]);
    }
    for (long j = 0; j < c; j++) dbias[j] = (float)sum[j], dweight[j] = (float)(products[j] * invstd[j]);
    for (long j = 0; j < l; j++) {  // dx = s * g + ss * (x - mean) + t
        long i = j % c;
        double scale = (double)weight[i] * invstd[i];
        s[j] = (float)scale;
        ss[j] = (float)(-scale * invstd[i] * dweight[i] / m);
    }
    float t[MOST] __attribute__((aligned(64)));
    for (long j = 0; j < l; j++) t[j] = (float)(-(double)s[j] * sum[j % c] / m);
    for (long i = 0; i < lines * l; i += l)
        for (long j = 0; j < l; j += 16) {
            __m512 g = passed(dy + i + j, y + i + j), v = _mm512_sub_ps(loaded(x + i + j), _mm512_load_ps(k + j));
            v = _mm512_fmadd_ps(v, _mm512_load_ps(ss + j), _mm512_load_ps(t + j));
            stored(dx + i + j, _mm512_fmadd_ps(g, _mm512_load_ps(s + j), v));
        }
    for (long i = lines * l; i < m * c; i++) {
        long j = i % c;
        float g = y[i] ? one(dy[i]) : 0;
        dx[i] = rounded(s[j] * g + ss[j] * (one(x[i]) - mean[j]) + t[j]);
    }
    free(sum);
}

// The larger of each 2 x 2 positions of x [n][h][w][c], where no number is negative: behind a ReLU bfloat16 sorts as integers
void pool(const bf *x, long n, long h, long w, long c, bf *y)
{
    for (long line = 0; line < n * h / 2; line++, x += w * c)
        for (long i = 0; i < w / 2; i++, x += 2 * c, y += c)
            for (long k = 0; k < c; k += 32) {
                __mmask32 mask = first32(c - k);
                const bf *at = x + k, *below = at + w * c;
                __m512i upper = _mm512_max_epi16(_mm512_maskz_loadu_epi16(mask, at), _mm512_maskz_loadu_epi16(mask, at + c));
                __m512i lower = _mm512_max_epi16(_mm512_maskz_loadu_epi16(mask, below),
                                                 _mm512_maskz_loadu_epi16(mask, below + c));
                _mm512_mask_storeu_epi16(y + k, mask, _mm512_max_epi16(upper, lower));
            }
}

// Its way back: dy goes to the first of the largest numbers
void pool_back(const bf *dy, const bf *x, const bf *y, long n, long h, long w, long c, bf *dx)
{
    for (long line = 0; line < n * h / 2; line++, x += w * c, dx += w * c)
        for (long i = 0; i < w / 2; i++, x += 2 * c, dx += 2 * c, y += c, dy += c)
            for (long k = 0; k < c; k += 32) {
                __mmask32 mask = first32(c - k), open = mask;
                __m512i most = _mm512_maskz_loadu_epi16(mask, y + k), g = _mm512_maskz_loadu_epi16(mask, dy + k);
                for (long at = 0; at < 4; at++) {
                    long offset = at / 2 * w * c + at % 2 * c + k;
                    __mmask32 here = open & _mm512_cmpeq_epi16_mask(_mm512_maskz_loadu_epi16(mask, x + offset), most);
                    _mm512_mask_storeu_epi16(dx + offset, mask, _mm512_maskz_mov_epi16(here, g));
                    open &= ~here;
                }
            }
}
