/* One sample: blur, warp, colour and normalisation in two passes over the output, by AVX2.
 *
 * What it computes is what opencv.py computes, without rounding in between: parity tests hold both to
 * torchvision. Compiled when the package is built (hatch_build.py); native.py calls it, without Python's lock.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define TAPS 5    /* weights of a symmetric kernel from its middle: geometry.blur_kernels */
#define LANES 8   /* pixels at a time */

typedef struct {
    const uint8_t *source;         /* RGB, the region's first pixel */
    const uint8_t *end;            /* behind the last byte of the photograph */
    int64_t stride;                /* bytes from row to row */
    int32_t height, width;         /* pixels of the region, each at least 2 */
    float warp[6];                 /* output to region, whole numbers at pixel centres */
    float frame[6];                /* output to the crop stretched over an output: what lies outside is black */
    int32_t masked;                /* whether anything does */
    int32_t blurred;
    float blur[2][TAPS];           /* weights down and across */
    float brightness, contrast, saturation, hue; /* hue in turns */
} Job;

typedef struct {
    int32_t height, width, kind;   /* kind: 0 uint8, 1 float32, 2 float16, 3 bfloat16 */
    float multiply[3], add[3];     /* normalisation of levels in 0 .. 255 */
} Output;

static inline int clampi(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

/* Bytes of scratch that a region and an output need. */
int64_t scratch_bytes(int64_t region_height, int64_t region_width, int64_t height, int64_t width)
{
    int64_t blurred = region_height * region_width * 3 + 64;
    int64_t row = (region_width + 2 * TAPS) * 3 * 2 + 128;
    int64_t colour = height * ((width + LANES - 1) / LANES) * LANES * 3 * 4;
    return ((blurred + 63) / 64) * 64 + ((row + 63) / 64) * 64 + colour + 64;
}

static inline __m256i weight(float value) { return _mm256_set1_epi16((int16_t)(value * 32768 > 32767 ? 32767 : value * 32768 + 0.5f)); }

/* Sixteen bytes as 16-bit levels with seven bits of fraction; the sum of two with six. */
static inline __m256i level(const uint8_t *p)
{
    return _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
}
static inline __m256i pair(const uint8_t *p, const uint8_t *q)
{
    __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    return _mm256_slli_epi16(_mm256_add_epi16(a, _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)q))), 6);
}

/* Blur the region into `out`, rows of width * 3 bytes; edges are repeated. */
static void blur(const Job *job, uint8_t *out, int16_t *row)
{
    const int64_t stride = job->stride;
    const int height = job->height, bytes = job->width * 3;
    int reach[2];
    __m256i weights[2][TAPS];
    for (int axis = 0; axis < 2; axis++) {
        reach[axis] = 0;
        for (int k = 0; k < TAPS; k++) {
            weights[axis][k] = weight(job->blur[axis][k] * (k ? 2 : 1)); /* of the mean of two, but for the middle */
            if (job->blur[axis][k] != 0) reach[axis] = k;
        }
    }
    int16_t *middle = row + TAPS * 3;
    for (int y = 0; y < height; y++) {
        const uint8_t *centre = job->source + y * stride, *above[TAPS], *below[TAPS];
        for (int k = 1; k <= reach[0]; k++) {
            above[k] = job->source + clampi(y - k, 0, height - 1) * stride;
            below[k] = job->source + clampi(y + k, 0, height - 1) * stride;
        }
        int i = 0;
        for (; i + 16 <= bytes; i += 16) {
            __m256i sum = _mm256_mulhrs_epi16(level(centre + i), weights[0][0]);
            for (int k = 1; k <= reach[0]; k++)
                sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(pair(above[k] + i, below[k] + i), weights[0][k]));
            _mm256_storeu_si256((__m256i *)(middle + i), sum);
        }
        if (i < bytes) { /* the last bytes, without reading behind them */
            uint8_t tail[2 * TAPS + 1][16] = {{0}};
            memcpy(tail[0], centre + i, bytes - i);
            __m256i sum = _mm256_mulhrs_epi16(level(tail[0]), weights[0][0]);
            for (int k = 1; k <= reach[0]; k++) {
                memcpy(tail[2 * k - 1], above[k] + i, bytes - i);
                memcpy(tail[2 * k], below[k] + i, bytes - i);
                sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(pair(tail[2 * k - 1], tail[2 * k]), weights[0][k]));
            }
            _mm256_storeu_si256((__m256i *)(middle + i), sum);
        }
        for (int k = 1; k <= reach[1]; k++)
            for (int c = 0; c < 3; c++) {
                middle[-3 * k + c] = middle[c];
                middle[bytes + 3 * (k - 1) + c] = middle[bytes - 3 + c];
            }
        uint8_t *to = out + (int64_t)y * bytes;
        const __m256i half = _mm256_set1_epi16(64);
        for (i = 0; i < bytes; i += 16) { /* writes up to 15 bytes into the next row, which is written later */
            __m256i sum = _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *)(middle + i)), weights[1][0]);
            for (int k = 1; k <= reach[1]; k++) {
                __m256i left = _mm256_loadu_si256((const __m256i *)(middle + i - 3 * k));
                __m256i right = _mm256_loadu_si256((const __m256i *)(middle + i + 3 * k));
                sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(_mm256_avg_epu16(left, right), weights[1][k]));
            }
            sum = _mm256_srli_epi16(_mm256_add_epi16(sum, half), 7);
            __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(sum, sum), 0x88);
            _mm_storeu_si128((__m128i *)(to + i), _mm256_castsi256_si128(packed));
        }
    }
}

/* Two neighbouring pixels, six bytes, of each of two places. `near`: close to the photograph's end, where eight cannot be read. */
static inline __m128i neighbours(const uint8_t *p, const uint8_t *q, int near)
{
    if (!near) return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)), (const __m64 *)q));
    uint8_t bytes[16] = {0};
    memcpy(bytes, p, 6);
    memcpy(bytes + 8, q, 6);
    return _mm_loadu_si128((const __m128i *)bytes);
}

/* Blend the four neighbours of two places, a lane each: 32-bit [R, G, B, -] times 127 * 16384. */
static inline __m256i blend(const uint8_t *p, const uint8_t *q, int64_t stride, __m256i down, __m256i across, int near)
{
    const __m256i sides = _mm256_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1, 0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1);
    const __m128i upper = neighbours(p, q, near), lower = neighbours(p + stride, q + stride, near);
    const __m256i rows = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(upper, lower)), _mm_unpackhi_epi8(upper, lower), 1);
    return _mm256_madd_epi16(_mm256_shuffle_epi8(_mm256_maddubs_epi16(rows, down), sides), across);
}

/* The same of places k and k + 4 of eight. */
#define BLEND(k) blend(source + offset[k], source + offset[k + 4], stride, _mm256_shuffle_epi32(down, k * 0x55), _mm256_shuffle_epi32(across, k * 0x55), near)

static inline __m256 clamp(__m256 value, __m256 low, __m256 high) { return _mm256_min_ps(_mm256_max_ps(value, low), high); }

static inline __m256 luma(__m256 r, __m256 g, __m256 b) /* ITU-R BT.601 */
{
    return _mm256_fmadd_ps(r, _mm256_set1_ps(0.299f), _mm256_fmadd_ps(g, _mm256_set1_ps(0.587f), _mm256_mul_ps(b, _mm256_set1_ps(0.114f))));
}

/* How much of output pixels lies inside a frame of that size: 1, and falling to 0 over a pixel at its edges. `place`: + 1. */
static inline __m256 inside(__m256 place, float size)
{
    const __m256 nearer = _mm256_min_ps(place, _mm256_sub_ps(_mm256_set1_ps(size + 1), place));
    return clamp(nearer, _mm256_setzero_ps(), _mm256_set1_ps(1));
}

/* Warp and brighten into planes, eight R, eight G, eight B; returns the mean grey. */
static float warp(const Job *job, const Output *output, const uint8_t *source, int64_t stride, const uint8_t *end, float *planes)
{
    const int width = output->width;
    const float *w = job->warp, *f = job->frame;
    const __m256i last = _mm256_set1_epi32((int32_t)(end - source - stride - 8)); /* from where eight bytes of two rows can be read */
    const __m256 zero = _mm256_setzero_ps(), white = _mm256_set1_ps(255);
    const __m256 right = _mm256_set1_ps(job->width - 1), bottom = _mm256_set1_ps(job->height - 1);
    const __m256i before_right = _mm256_set1_epi32(job->width - 2), before_bottom = _mm256_set1_epi32(job->height - 2);
    const __m256i line = _mm256_set1_epi32((int32_t)stride), three = _mm256_set1_epi32(3);
    const __m256 step_x = _mm256_set1_ps(w[0]), step_y = _mm256_set1_ps(w[3]);
    const __m256 scale = _mm256_set1_ps(job->brightness / (127.0f * 16384.0f));
    double total = 0;
    for (int i = 0; i < output->height; i++) {
        const __m256 start_x = _mm256_set1_ps((float)((double)w[1] * i + w[2])), start_y = _mm256_set1_ps((float)((double)w[4] * i + w[5]));
        __m256 grey = zero;
        for (int j = 0; j < width; j += LANES, planes += 3 * LANES) {
            const __m256 column = _mm256_add_ps(_mm256_set1_ps((float)j), _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7));
            __m256 x = clamp(_mm256_fmadd_ps(step_x, column, start_x), zero, right);
            __m256 y = clamp(_mm256_fmadd_ps(step_y, column, start_y), zero, bottom);
            __m256i x0 = _mm256_min_epi32(_mm256_cvttps_epi32(x), before_right);
            __m256i y0 = _mm256_min_epi32(_mm256_cvttps_epi32(y), before_bottom);
            __m256i across = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(x, _mm256_cvtepi32_ps(x0)), _mm256_set1_ps(16384)));
            __m256i down = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(y, _mm256_cvtepi32_ps(y0)), _mm256_set1_ps(127)));
            /* (16384 - across, across) as 16-bit numbers, (127 - down, down) twice as bytes */
            across = _mm256_or_si256(_mm256_slli_epi32(across, 16), _mm256_sub_epi32(_mm256_set1_epi32(16384), across));
            down = _mm256_or_si256(_mm256_slli_epi32(down, 8), _mm256_sub_epi32(_mm256_set1_epi32(127), down));
            down = _mm256_or_si256(down, _mm256_slli_epi32(down, 16));
            const __m256i places = _mm256_add_epi32(_mm256_mullo_epi32(y0, line), _mm256_mullo_epi32(x0, three));
            int32_t offset[LANES];
            _mm256_storeu_si256((__m256i *)offset, places);
            __asm__("" : "+m"(offset)); /* through memory: eight loads are cheaper than taking a vector apart */
            __m256i pixels[4];
            if (__builtin_expect(_mm256_testz_si256(_mm256_cmpgt_epi32(places, last), _mm256_set1_epi32(-1)), 1)) {
                const int near = 0;
                pixels[0] = BLEND(0), pixels[1] = BLEND(1), pixels[2] = BLEND(2), pixels[3] = BLEND(3);
            } else {
                const int near = 1;
                pixels[0] = BLEND(0), pixels[1] = BLEND(1), pixels[2] = BLEND(2), pixels[3] = BLEND(3);
            }
            __m256i rg01 = _mm256_unpacklo_epi32(pixels[0], pixels[1]), rg23 = _mm256_unpacklo_epi32(pixels[2], pixels[3]);
            __m256i b01 = _mm256_unpackhi_epi32(pixels[0], pixels[1]), b23 = _mm256_unpackhi_epi32(pixels[2], pixels[3]);
            __m256 r = _mm256_cvtepi32_ps(_mm256_unpacklo_epi64(rg01, rg23));
            __m256 g = _mm256_cvtepi32_ps(_mm256_unpackhi_epi64(rg01, rg23));
            __m256 b = _mm256_cvtepi32_ps(_mm256_unpacklo_epi64(b01, b23));
            __m256 factor = scale;
            if (job->masked) {
                __m256 u = _mm256_fmadd_ps(_mm256_set1_ps(f[0]), column, _mm256_set1_ps((float)((double)f[1] * i + f[2] + 1)));
                __m256 v = _mm256_fmadd_ps(_mm256_set1_ps(f[3]), column, _mm256_set1_ps((float)((double)f[4] * i + f[5] + 1)));
                factor = _mm256_mul_ps(factor, _mm256_mul_ps(inside(u, (float)width), inside(v, (float)output->height)));
            }
            r = _mm256_min_ps(_mm256_mul_ps(r, factor), white);
            g = _mm256_min_ps(_mm256_mul_ps(g, factor), white);
            b = _mm256_min_ps(_mm256_mul_ps(b, factor), white);
            if (job->contrast != 1) {
                __m256 counts = _mm256_cmp_ps(column, _mm256_set1_ps((float)width), _CMP_LT_OQ);
                grey = _mm256_add_ps(grey, _mm256_and_ps(luma(r, g, b), counts));
            }
            _mm256_storeu_ps(planes, r);
            _mm256_storeu_ps(planes + LANES, g);
            _mm256_storeu_ps(planes + 2 * LANES, b);
        }
        float lanes[LANES];
        _mm256_storeu_ps(lanes, grey);
        for (int k = 0; k < LANES; k++) total += lanes[k];
    }
    return (float)(total / ((double)output->height * width));
}

/* clamp(|distance| - 1, 0, 1) or clamp(2 - |distance|, 0, 1): "HSL and HSV", Wikipedia, HSV to RGB. */
static inline __m256 ramp(__m256 hue, float centre, float offset, float sign)
{
    const __m256 distance = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_sub_ps(hue, _mm256_set1_ps(centre)));
    return clamp(_mm256_fmadd_ps(distance, _mm256_set1_ps(sign), _mm256_set1_ps(offset)), _mm256_setzero_ps(), _mm256_set1_ps(1));
}

static inline void turn(__m256 *r, __m256 *g, __m256 *b, float turns)
{
    const __m256 high = _mm256_max_ps(*r, _mm256_max_ps(*g, *b)), low = _mm256_min_ps(*r, _mm256_min_ps(*g, *b));
    const __m256 chroma = _mm256_sub_ps(high, low);
    const __m256 scale = _mm256_div_ps(_mm256_set1_ps(1), _mm256_max_ps(chroma, _mm256_set1_ps(1e-6f)));
    const __m256 is_red = _mm256_cmp_ps(*r, high, _CMP_EQ_OQ), is_green = _mm256_cmp_ps(*g, high, _CMP_EQ_OQ);
    __m256 hue = _mm256_fmadd_ps(_mm256_sub_ps(*r, *g), scale, _mm256_set1_ps(4));
    hue = _mm256_blendv_ps(hue, _mm256_fmadd_ps(_mm256_sub_ps(*b, *r), scale, _mm256_set1_ps(2)), is_green);
    hue = _mm256_blendv_ps(hue, _mm256_mul_ps(_mm256_sub_ps(*g, *b), scale), is_red);
    hue = _mm256_add_ps(hue, _mm256_set1_ps(6 * turns)); /* to 0 .. 6 */
    hue = _mm256_fnmadd_ps(_mm256_floor_ps(_mm256_mul_ps(hue, _mm256_set1_ps(1.0f / 6))), _mm256_set1_ps(6), hue);
    *r = _mm256_fmadd_ps(chroma, ramp(hue, 3, -1, 1), low);
    *g = _mm256_fmadd_ps(chroma, ramp(hue, 2, 2, -1), low);
    *b = _mm256_fmadd_ps(chroma, ramp(hue, 4, 2, -1), low);
}

static inline __m128i narrow(__m256i wide) /* 32-bit numbers to 16 bits */
{
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x88));
}

/* Write eight numbers in the output's type. */
static inline char *put(char *to, __m256 values, int kind)
{
    if (kind == 1) {
        _mm256_storeu_ps((float *)to, values);
        return to + 32;
    }
    if (kind == 2) {
        _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
        return to + 16;
    }
    if (kind == 3) { /* rounded to even */
        __m256i bits = _mm256_castps_si256(values);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        _mm_storeu_si128((__m128i *)to, narrow(_mm256_srli_epi32(bits, 16)));
        return to + 16;
    }
    __m128i levels = narrow(_mm256_cvtps_epi32(values));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(levels, levels));
    return to + 8;
}

/* Interleave eight pixels and write them. */
static inline char *put_pixels(char *to, __m256 r, __m256 g, __m256 b, int kind)
{
    /* a: r0 g0 r2 g2 | r4 g4 r6 g6; c: b0 r1 b2 r3 | ...; d: g1 b1 g3 b3 | ... */
    __m256 a = _mm256_shuffle_ps(r, g, 0x88), c = _mm256_shuffle_ps(b, r, 0xd8), d = _mm256_shuffle_ps(g, b, 0xdd);
    a = _mm256_shuffle_ps(a, a, 0xd8); /* r0 g0 r2 g2 */
    c = _mm256_shuffle_ps(c, c, 0xd8); /* b0 r1 b2 r3 */
    d = _mm256_shuffle_ps(d, d, 0xd8); /* g1 b1 g3 b3 */
    __m256 first = _mm256_shuffle_ps(a, c, 0x44);  /* r0 g0 b0 r1 */
    __m256 second = _mm256_shuffle_ps(d, a, 0xe4); /* g1 b1 r2 g2 */
    __m256 third = _mm256_shuffle_ps(c, d, 0xee);  /* b2 r3 g3 b3 */
    to = put(to, _mm256_permute2f128_ps(first, second, 0x20), kind);
    to = put(to, _mm256_permute2f128_ps(third, first, 0x30), kind);
    return put(to, _mm256_permute2f128_ps(second, third, 0x31), kind);
}

static inline void colour_as(const Job *job, const Output *output, const float *planes, float mean, char *out, int kind)
{
    const __m256 zero = _mm256_setzero_ps(), white = _mm256_set1_ps(255);
    const __m256 contrast = _mm256_set1_ps(job->contrast), base = _mm256_set1_ps(mean * (1 - job->contrast));
    const __m256 saturation = _mm256_set1_ps(job->saturation), rest = _mm256_set1_ps(1 - job->saturation);
    const __m256 multiply[3] = {_mm256_set1_ps(output->multiply[0]), _mm256_set1_ps(output->multiply[1]), _mm256_set1_ps(output->multiply[2])};
    const __m256 add[3] = {_mm256_set1_ps(output->add[0]), _mm256_set1_ps(output->add[1]), _mm256_set1_ps(output->add[2])};
    const int bytes = kind == 0 ? 1 : kind == 1 ? 4 : 2;
    for (int i = 0; i < output->height; i++)
        for (int j = 0; j < output->width; j += LANES, planes += 3 * LANES) {
            __m256 r = _mm256_loadu_ps(planes), g = _mm256_loadu_ps(planes + LANES), b = _mm256_loadu_ps(planes + 2 * LANES);
            if (job->contrast != 1) {
                r = clamp(_mm256_fmadd_ps(r, contrast, base), zero, white);
                g = clamp(_mm256_fmadd_ps(g, contrast, base), zero, white);
                b = clamp(_mm256_fmadd_ps(b, contrast, base), zero, white);
            }
            if (job->saturation != 1) {
                __m256 grey = _mm256_mul_ps(luma(r, g, b), rest);
                r = clamp(_mm256_fmadd_ps(r, saturation, grey), zero, white);
                g = clamp(_mm256_fmadd_ps(g, saturation, grey), zero, white);
                b = clamp(_mm256_fmadd_ps(b, saturation, grey), zero, white);
            }
            if (job->hue != 0) turn(&r, &g, &b, job->hue);
            if (kind) {
                r = _mm256_fmadd_ps(r, multiply[0], add[0]);
                g = _mm256_fmadd_ps(g, multiply[1], add[1]);
                b = _mm256_fmadd_ps(b, multiply[2], add[2]);
            }
            if (j + LANES <= output->width)
                out = put_pixels(out, r, g, b, kind);
            else {
                char tail[3 * LANES * 4];
                put_pixels(tail, r, g, b, kind);
                memcpy(out, tail, (output->width - j) * 3 * bytes);
                out += (output->width - j) * 3 * bytes;
            }
        }
}

/* Make one sample: (height, width, 3) of the output's type at `out`. */
void render(const Job *job, const Output *output, char *out, char *scratch)
{
    scratch = (char *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    const uint8_t *source = job->source, *end = job->end;
    int64_t stride = job->stride;
    if (job->blurred) {
        const int64_t bytes = (int64_t)job->height * job->width * 3 + 64;
        uint8_t *blurred = (uint8_t *)scratch;
        scratch += (bytes + 63) / 64 * 64;
        blur(job, blurred, (int16_t *)scratch);
        scratch += (((int64_t)job->width + 2 * TAPS) * 6 + 128 + 63) / 64 * 64;
        source = blurred, stride = job->width * 3, end = blurred + bytes;
    } else /* the warp jumps from row to row, which no hardware foresees */
        for (int y = 0; y < job->height; y++)
            for (int x = 0; x < job->width * 3; x += 64)
                _mm_prefetch((const char *)source + y * stride + x, _MM_HINT_T1);
    float *planes = (float *)scratch;
    const float mean = warp(job, output, source, stride, end, planes);
    switch (output->kind) {
    case 0: colour_as(job, output, planes, mean, out, 0); break;
    case 1: colour_as(job, output, planes, mean, out, 1); break;
    case 2: colour_as(job, output, planes, mean, out, 2); break;
    default: colour_as(job, output, planes, mean, out, 3);
    }
}
