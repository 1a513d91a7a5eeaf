/* Renders one sample with AVX2: blur, warp, color and normalization in two passes over the output.
 *
 * Performs the same steps as opencv.py, without intermediate rounding. Parity tests compare both with torchvision.
 * hatch_build.py compiles this file when the package is built. native.py calls `render` without the GIL, and
 * declares the same two structures.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define TAPS 5    /* weights of a symmetric kernel from its center outward, as in geometry.blur_kernels */
#define LANES 8   /* pixels processed at a time */

typedef struct {
    const uint8_t *source;         /* first pixel of the region, RGB */
    const uint8_t *end;            /* one past the last byte of the region */
    int64_t stride;                /* bytes from one row to the next */
    int32_t height, width;         /* of the region, in pixels; each at least 2 */
    float warp[6];                 /* maps output to region; pixel centers are at integers */
    float frame[6];                /* maps output to the visible part, scaled to the output size; outside is black */
    int32_t masked;                /* whether any output pixel lies outside the visible part */
    int32_t blurred;
    float blur[2][TAPS];           /* vertical and horizontal weights */
    float brightness, contrast, saturation, hue; /* hue in turns of the color wheel */
    int64_t gray;                  /* whether to turn the image gray; 64 bits, so that any further field changes the size */
} Numbers;

typedef struct {
    int32_t height, width, kind;   /* kind: 0 uint8, 1 float32, 2 float16, 3 bfloat16 */
    float multiply[3], add[3];     /* normalization of pixel values in 0 .. 255 */
} Output;

static inline int clampi(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

/* native.py compares this with the size of its own structure, to detect a kernel compiled from a different source. */
int64_t numbers_bytes(void) { return sizeof(Numbers); }

/* Scratch memory holds the blurred region, one row during the blur, and the output planes; each is a multiple of 64 bytes. */
static inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static inline int64_t region_bytes(int64_t height, int64_t width) { return whole_lines(height * width * 3 + 64); }
static inline int64_t row_bytes(int64_t width) { return whole_lines((width + 2 * TAPS) * 3 * 2 + 128); }

int64_t scratch_bytes(int64_t region_height, int64_t region_width, int64_t height, int64_t width)
{
    int64_t planes = height * ((width + LANES - 1) / LANES) * LANES * 3 * 4;
    return region_bytes(region_height, region_width) + row_bytes(region_width) + planes + 64;
}

static inline __m256i weight(float value) { return _mm256_set1_epi16((int16_t)(value * 32768 > 32767 ? 32767 : value * 32768 + 0.5f)); }

/* Load sixteen bytes as 16-bit values with seven fractional bits. `pair` returns the mean of two such loads. */
static inline __m256i level(const uint8_t *p)
{
    return _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
}
static inline __m256i pair(const uint8_t *p, const uint8_t *q)
{
    __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    return _mm256_slli_epi16(_mm256_add_epi16(a, _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)q))), 6);
}

/* Blur the region into `out`, in rows of width * 3 bytes, repeating the edge pixels. */
static void blur(const Numbers *numbers, uint8_t *out, int16_t *row)
{
    const int64_t stride = numbers->stride;
    const int height = numbers->height, bytes = numbers->width * 3;
    int reach[2];
    __m256i weights[2][TAPS];
    for (int axis = 0; axis < 2; axis++) {
        reach[axis] = 0;
        for (int k = 0; k < TAPS; k++) {
            weights[axis][k] = weight(numbers->blur[axis][k] * (k ? 2 : 1)); /* doubled off-center, where it applies to the mean of two pixels */
            if (numbers->blur[axis][k] != 0) reach[axis] = k;
        }
    }
    int16_t *middle = row + TAPS * 3;
    for (int y = 0; y < height; y++) {
        const uint8_t *center = numbers->source + y * stride, *above[TAPS], *below[TAPS];
        for (int k = 1; k <= reach[0]; k++) {
            above[k] = numbers->source + clampi(y - k, 0, height - 1) * stride;
            below[k] = numbers->source + clampi(y + k, 0, height - 1) * stride;
        }
        int i = 0;
        for (; i + 16 <= bytes; i += 16) {
            __m256i sum = _mm256_mulhrs_epi16(level(center + i), weights[0][0]);
            for (int k = 1; k <= reach[0]; k++)
                sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(pair(above[k] + i, below[k] + i), weights[0][k]));
            _mm256_storeu_si256((__m256i *)(middle + i), sum);
        }
        if (i < bytes) { /* the last bytes, without reading beyond them */
            uint8_t tail[2 * TAPS + 1][16] = {{0}};
            memcpy(tail[0], center + i, bytes - i);
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
        for (i = 0; i < bytes; i += 16) { /* may write up to 15 bytes into the next row, which is overwritten later */
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

/* Input of the warp: the region or its blurred copy. */
typedef struct {
    const uint8_t *first, *end;
    int64_t stride;
    int32_t height, width;
} Source;

typedef struct {
    __m256 r, g, b;
} Pixels; /* eight pixels */

/* Load two neighboring pixels (six bytes) at each of two points. `near`: a read of eight bytes may pass the source's end. */
static inline __m128i neighbors(const uint8_t *p, const uint8_t *q, int near)
{
    if (!near) return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)), (const __m64 *)q));
    uint8_t bytes[16] = {0};
    memcpy(bytes, p, 6);
    memcpy(bytes + 8, q, 6);
    return _mm_loadu_si128((const __m128i *)bytes);
}

/* Blend the four neighbors of each of two points. Each 128-bit lane holds one result: 32-bit [R, G, B, -] times 127 * 16384. */
static inline __m256i blend(const uint8_t *p, const uint8_t *q, int64_t stride, __m256i down, __m256i across, int near)
{
    const __m256i sides = _mm256_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1, 0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1);
    const __m128i upper = neighbors(p, q, near), lower = neighbors(p + stride, q + stride, near);
    const __m256i rows = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(upper, lower)), _mm_unpackhi_epi8(upper, lower), 1);
    return _mm256_madd_epi16(_mm256_shuffle_epi8(_mm256_maddubs_epi16(rows, down), sides), across);
}

/* Blend eight points, in pairs of points k and k + 4. */
static inline void blend_eight(__m256i pixels[4], const Source source, const int32_t *offset, __m256i down, __m256i across, int near)
{
#define BLEND(k) pixels[k] = blend(source.first + offset[k], source.first + offset[k + 4], source.stride, \
                                   _mm256_shuffle_epi32(down, k * 0x55), _mm256_shuffle_epi32(across, k * 0x55), near)
    BLEND(0), BLEND(1), BLEND(2), BLEND(3);
#undef BLEND
}

static inline __m256 clamp(__m256 value, __m256 low, __m256 high) { return _mm256_min_ps(_mm256_max_ps(value, low), high); }

/* Interpolate the source at eight points, repeating the edge pixels. The results are scaled by 127 * 16384. */
static inline Pixels interpolate(const Source source, __m256 x, __m256 y)
{
    x = clamp(x, _mm256_setzero_ps(), _mm256_set1_ps(source.width - 1));
    y = clamp(y, _mm256_setzero_ps(), _mm256_set1_ps(source.height - 1));
    const __m256i x0 = _mm256_min_epi32(_mm256_cvttps_epi32(x), _mm256_set1_epi32(source.width - 2));
    const __m256i y0 = _mm256_min_epi32(_mm256_cvttps_epi32(y), _mm256_set1_epi32(source.height - 2));
    __m256i across = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(x, _mm256_cvtepi32_ps(x0)), _mm256_set1_ps(16384)));
    __m256i down = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(y, _mm256_cvtepi32_ps(y0)), _mm256_set1_ps(127)));
    /* weights: (16384 - across, across) as 16-bit numbers; (127 - down, down) as bytes, twice */
    across = _mm256_or_si256(_mm256_slli_epi32(across, 16), _mm256_sub_epi32(_mm256_set1_epi32(16384), across));
    down = _mm256_or_si256(_mm256_slli_epi32(down, 8), _mm256_sub_epi32(_mm256_set1_epi32(127), down));
    down = _mm256_or_si256(down, _mm256_slli_epi32(down, 16));
    const __m256i line = _mm256_set1_epi32((int32_t)source.stride);
    const __m256i places = _mm256_add_epi32(_mm256_mullo_epi32(y0, line), _mm256_mullo_epi32(x0, _mm256_set1_epi32(3)));
    int32_t offset[LANES];
    _mm256_storeu_si256((__m256i *)offset, places);
    __asm__("" : "+m"(offset)); /* go through memory: eight loads are cheaper than extracting from a vector */
    /* the last offset at which eight bytes can be read from both rows */
    const __m256i last = _mm256_set1_epi32((int32_t)(source.end - source.first - source.stride - 8));
    __m256i pixels[4];
    if (__builtin_expect(_mm256_testz_si256(_mm256_cmpgt_epi32(places, last), _mm256_set1_epi32(-1)), 1))
        blend_eight(pixels, source, offset, down, across, 0);
    else
        blend_eight(pixels, source, offset, down, across, 1);
    const __m256i rg01 = _mm256_unpacklo_epi32(pixels[0], pixels[1]), rg23 = _mm256_unpacklo_epi32(pixels[2], pixels[3]);
    const __m256i b01 = _mm256_unpackhi_epi32(pixels[0], pixels[1]), b23 = _mm256_unpackhi_epi32(pixels[2], pixels[3]);
    return (Pixels){_mm256_cvtepi32_ps(_mm256_unpacklo_epi64(rg01, rg23)), _mm256_cvtepi32_ps(_mm256_unpackhi_epi64(rg01, rg23)),
                    _mm256_cvtepi32_ps(_mm256_unpacklo_epi64(b01, b23))};
}

/* Apply one row of a matrix to the output pixel in row i, column 0, and add `more`. */
static inline __m256 start(const float *matrix, int i, float more) { return _mm256_set1_ps((float)((double)matrix[1] * i + matrix[2] + more)); }

/* Return the share of each output pixel inside a frame of `size`. It falls from 1 to 0 over one pixel at the edges.
 * `place` is the position plus 1. */
static inline __m256 inside(__m256 place, float size)
{
    const __m256 nearer = _mm256_min_ps(place, _mm256_sub_ps(_mm256_set1_ps(size + 1), place));
    return clamp(nearer, _mm256_setzero_ps(), _mm256_set1_ps(1));
}

static inline __m256 luma(Pixels p) /* ITU-R BT.601 */
{
    return _mm256_fmadd_ps(p.r, _mm256_set1_ps(0.299f), _mm256_fmadd_ps(p.g, _mm256_set1_ps(0.587f), _mm256_mul_ps(p.b, _mm256_set1_ps(0.114f))));
}

/* Warp, apply brightness and store in `planes`: eight R, eight G, then eight B values, and so on. Return the mean gray. */
static float warp(const Numbers *numbers, const Output *output, const Source source, float *planes)
{
    const int width = output->width;
    const float *w = numbers->warp, *f = numbers->frame;
    const __m256 step_x = _mm256_set1_ps(w[0]), step_y = _mm256_set1_ps(w[3]);
    const __m256 white = _mm256_set1_ps(255), scale = _mm256_set1_ps(numbers->brightness / (127.0f * 16384.0f));
    double total = 0;
    for (int i = 0; i < output->height; i++) {
        const __m256 start_x = start(w, i, 0), start_y = start(w + 3, i, 0);
        __m256 gray = _mm256_setzero_ps();
        for (int j = 0; j < width; j += LANES, planes += 3 * LANES) {
            const __m256 column = _mm256_add_ps(_mm256_set1_ps((float)j), _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7));
            Pixels p = interpolate(source, _mm256_fmadd_ps(step_x, column, start_x), _mm256_fmadd_ps(step_y, column, start_y));
            __m256 factor = scale;
            if (numbers->masked) {
                const __m256 u = _mm256_fmadd_ps(_mm256_set1_ps(f[0]), column, start(f, i, 1));
                const __m256 v = _mm256_fmadd_ps(_mm256_set1_ps(f[3]), column, start(f + 3, i, 1));
                factor = _mm256_mul_ps(factor, _mm256_mul_ps(inside(u, (float)width), inside(v, (float)output->height)));
            }
            p.r = _mm256_min_ps(_mm256_mul_ps(p.r, factor), white);
            p.g = _mm256_min_ps(_mm256_mul_ps(p.g, factor), white);
            p.b = _mm256_min_ps(_mm256_mul_ps(p.b, factor), white);
            if (numbers->contrast != 1) {
                const __m256 counts = _mm256_cmp_ps(column, _mm256_set1_ps((float)width), _CMP_LT_OQ);
                gray = _mm256_add_ps(gray, _mm256_and_ps(luma(p), counts));
            }
            _mm256_storeu_ps(planes, p.r);
            _mm256_storeu_ps(planes + LANES, p.g);
            _mm256_storeu_ps(planes + 2 * LANES, p.b);
        }
        float lanes[LANES];
        _mm256_storeu_ps(lanes, gray);
        for (int k = 0; k < LANES; k++) total += lanes[k];
    }
    return (float)(total / ((double)output->height * width));
}

/* Return one channel of a hue: clamp(d - 1, 0, 1) or clamp(2 - d, 0, 1), d = |hue - center| (Wikipedia, "HSL and HSV"). */
static inline __m256 ramp(__m256 hue, float center, float offset, float sign)
{
    const __m256 distance = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_sub_ps(hue, _mm256_set1_ps(center)));
    return clamp(_mm256_fmadd_ps(distance, _mm256_set1_ps(sign), _mm256_set1_ps(offset)), _mm256_setzero_ps(), _mm256_set1_ps(1));
}

static inline Pixels turned(Pixels p, float turns)
{
    const __m256 high = _mm256_max_ps(p.r, _mm256_max_ps(p.g, p.b)), low = _mm256_min_ps(p.r, _mm256_min_ps(p.g, p.b));
    const __m256 chroma = _mm256_sub_ps(high, low);
    const __m256 scale = _mm256_div_ps(_mm256_set1_ps(1), _mm256_max_ps(chroma, _mm256_set1_ps(1e-6f)));
    const __m256 is_red = _mm256_cmp_ps(p.r, high, _CMP_EQ_OQ), is_green = _mm256_cmp_ps(p.g, high, _CMP_EQ_OQ);
    __m256 hue = _mm256_fmadd_ps(_mm256_sub_ps(p.r, p.g), scale, _mm256_set1_ps(4));
    hue = _mm256_blendv_ps(hue, _mm256_fmadd_ps(_mm256_sub_ps(p.b, p.r), scale, _mm256_set1_ps(2)), is_green);
    hue = _mm256_blendv_ps(hue, _mm256_mul_ps(_mm256_sub_ps(p.g, p.b), scale), is_red);
    hue = _mm256_add_ps(hue, _mm256_set1_ps(6 * turns)); /* then wrap to 0 .. 6 */
    hue = _mm256_fnmadd_ps(_mm256_floor_ps(_mm256_mul_ps(hue, _mm256_set1_ps(1.0f / 6))), _mm256_set1_ps(6), hue);
    return (Pixels){_mm256_fmadd_ps(chroma, ramp(hue, 3, -1, 1), low), _mm256_fmadd_ps(chroma, ramp(hue, 2, 2, -1), low),
                    _mm256_fmadd_ps(chroma, ramp(hue, 4, 2, -1), low)};
}

static inline __m128i narrow(__m256i wide) /* 32-bit to 16-bit numbers */
{
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x88));
}

/* Store eight values in the output's dtype, and return the address after them. */
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
    if (kind == 3) { /* round half to even */
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

/* Interleave eight pixels and store them. */
static inline char *put_pixels(char *to, Pixels p, int kind)
{
    /* a: r0 g0 r2 g2 | r4 g4 r6 g6; c: b0 r1 b2 r3 | ...; d: g1 b1 g3 b3 | ... */
    __m256 a = _mm256_shuffle_ps(p.r, p.g, 0x88), c = _mm256_shuffle_ps(p.b, p.r, 0xd8), d = _mm256_shuffle_ps(p.g, p.b, 0xdd);
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

static inline void color_as(const Numbers *numbers, const Output *output, const float *planes, float mean, char *out, int kind)
{
    const __m256 zero = _mm256_setzero_ps(), white = _mm256_set1_ps(255);
    const __m256 contrast = _mm256_set1_ps(numbers->contrast), base = _mm256_set1_ps(mean * (1 - numbers->contrast));
    const __m256 saturation = _mm256_set1_ps(numbers->saturation), rest = _mm256_set1_ps(1 - numbers->saturation);
    const __m256 multiply[3] = {_mm256_set1_ps(output->multiply[0]), _mm256_set1_ps(output->multiply[1]), _mm256_set1_ps(output->multiply[2])};
    const __m256 add[3] = {_mm256_set1_ps(output->add[0]), _mm256_set1_ps(output->add[1]), _mm256_set1_ps(output->add[2])};
    const int bytes = kind == 0 ? 1 : kind == 1 ? 4 : 2;
    for (int i = 0; i < output->height; i++)
        for (int j = 0; j < output->width; j += LANES, planes += 3 * LANES) {
            Pixels p = {_mm256_loadu_ps(planes), _mm256_loadu_ps(planes + LANES), _mm256_loadu_ps(planes + 2 * LANES)};
            if (numbers->contrast != 1) {
                p.r = clamp(_mm256_fmadd_ps(p.r, contrast, base), zero, white);
                p.g = clamp(_mm256_fmadd_ps(p.g, contrast, base), zero, white);
                p.b = clamp(_mm256_fmadd_ps(p.b, contrast, base), zero, white);
            }
            if (numbers->saturation != 1) {
                const __m256 gray = _mm256_mul_ps(luma(p), rest);
                p.r = clamp(_mm256_fmadd_ps(p.r, saturation, gray), zero, white);
                p.g = clamp(_mm256_fmadd_ps(p.g, saturation, gray), zero, white);
                p.b = clamp(_mm256_fmadd_ps(p.b, saturation, gray), zero, white);
            }
            if (numbers->hue != 0) p = turned(p, numbers->hue);
            if (numbers->gray) p.r = p.g = p.b = luma(p);
            if (kind) {
                p.r = _mm256_fmadd_ps(p.r, multiply[0], add[0]);
                p.g = _mm256_fmadd_ps(p.g, multiply[1], add[1]);
                p.b = _mm256_fmadd_ps(p.b, multiply[2], add[2]);
            }
            if (j + LANES <= output->width)
                out = put_pixels(out, p, kind);
            else {
                char tail[3 * LANES * 4];
                put_pixels(tail, p, kind);
                memcpy(out, tail, (output->width - j) * 3 * bytes);
                out += (output->width - j) * 3 * bytes;
            }
        }
}

/* Render one sample into `out`, (height, width, 3) in the output's dtype. */
void render(const Numbers *numbers, const Output *output, char *out, char *scratch)
{
    scratch = (char *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    Source source = {numbers->source, numbers->end, numbers->stride, numbers->height, numbers->width};
    if (numbers->blurred) {
        const int64_t bytes = region_bytes(source.height, source.width);
        uint8_t *blurred = (uint8_t *)scratch;
        blur(numbers, blurred, (int16_t *)(scratch + bytes));
        scratch += bytes + row_bytes(source.width);
        source.first = blurred, source.stride = source.width * 3;
        source.end = blurred + source.height * source.stride + 64;
    } else /* prefetch, because hardware cannot predict the warp's jumps between rows */
        for (int y = 0; y < source.height; y++)
            for (int x = 0; x < source.width * 3; x += 64)
                _mm_prefetch((const char *)source.first + y * source.stride + x, _MM_HINT_T1);
    float *planes = (float *)scratch;
    const float mean = warp(numbers, output, source, planes);
    switch (output->kind) { /* the dtype is a compile-time constant in each case */
    case 0: color_as(numbers, output, planes, mean, out, 0); break;
    case 1: color_as(numbers, output, planes, mean, out, 1); break;
    case 2: color_as(numbers, output, planes, mean, out, 2); break;
    default: color_as(numbers, output, planes, mean, out, 3);
    }
}
