/* Element-wise row kernels of kernels.py (gather, accumulate, squares, zero), adamw.py and groups.py. Called by native.py
   through pool.c.

   Every kernel is given what native.py's structure of its name holds, and is run by several threads at once; each takes
   chunks of `count` rows from *next until none is left. Compiled without contraction of products and sums (-ffp-contract=off) and without fast-math, so that each operation rounds as the
   torch reference does and all instruction sets give the same bits. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

enum { FP32 = 0, BF16 = 1, FP16 = 2 };
enum { BLOCK = 64 }; /* floats that one pass of advance keeps in registers */

static inline int64_t take(int64_t *next, int64_t grain) { return __atomic_fetch_add(next, grain, __ATOMIC_RELAXED); }

static inline float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float of_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* Round to nearest even; a NaN becomes torch's 0x7fc0. */
static inline uint16_t to_bf16(float f) {
    uint32_t u = bits_of(f);
    uint16_t rounded = (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    return f != f ? 0x7fc0 : rounded;
}

static inline float from_fp16(uint16_t h) {
#ifdef __FLT16_MANT_DIG__
    _Float16 x;
    memcpy(&x, &h, 2);
    return (float)x;
#else
    return 0.0f * h; /* native.py does not offer fp16 without _Float16 */
#endif
}

static inline uint16_t to_fp16(float f) {
#ifdef __FLT16_MANT_DIG__
    _Float16 x = (_Float16)f;
    uint16_t h;
    memcpy(&h, &x, 2);
    return h;
#else
    return (uint16_t)f;
#endif
}

int has_fp16(void) {
#ifdef __FLT16_MANT_DIG__
    return 1;
#else
    return 0;
#endif
}

/* ---- moving ---- */

/* A block of bytes to memory that nobody reads soon: past the caches, and without reading what it overwrites. `to` is
   aligned to 64 bytes. */
static inline void store_past_caches(void *to, const void *from, int64_t bytes) {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < bytes; i += 64)
        _mm512_stream_si512((void *)((char *)to + i), _mm512_loadu_si512((const char *)from + i));
#elif defined(__SSE2__)
    for (int64_t i = 0; i < bytes; i += 16)
        _mm_stream_si128((__m128i *)((char *)to + i), _mm_loadu_si128((const __m128i *)((const char *)from + i)));
#else
    memcpy(to, from, bytes);
#endif
}

static inline __attribute__((always_inline)) void narrow(const float *restrict from, uint16_t *restrict to, int64_t n,
                                                         int64_t kind) {
    if (kind == BF16)
        for (int64_t j = 0; j < n; ++j) to[j] = to_bf16(from[j]);
    else
        for (int64_t j = 0; j < n; ++j) to[j] = to_fp16(from[j]);
}

typedef struct {
    const float *rows;
    const int64_t *index;
    void *out;
    int64_t stride, out_stride, width, kind;
    int64_t large; /* the output does not fit into the caches */
} Gather;

void gather(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Gather *g = about;
    const int64_t width = g->width, kind = g->kind, item = kind == FP32 ? 4 : 2;
    const int past = g->large && ((uintptr_t)g->out | (uintptr_t)(g->out_stride * item)) % 64 == 0;
    for (int64_t lo; (lo = take(next, grain)) < count;) {
        int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t i = lo; i < hi; ++i) {
            const float *restrict from = g->rows + g->index[i] * g->stride;
            char *to = (char *)g->out + i * g->out_stride * item;
            int64_t j = 0;
            if (past) {
                for (; j + BLOCK <= width; j += BLOCK) {
                    uint16_t part[BLOCK];
                    if (kind == FP32) {
                        store_past_caches(to + 4 * j, from + j, 4 * BLOCK);
                    } else {
                        narrow(from + j, part, BLOCK, kind);
                        store_past_caches(to + 2 * j, part, 2 * BLOCK);
                    }
                }
            }
            if (kind == FP32) memcpy(to + 4 * j, from + j, 4 * (width - j));
            else narrow(from + j, (uint16_t *)to + j, width - j, kind);
        }
    }
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* One group of groups.py: its scale, then 32 codes. */
enum { GROUP = 32 };

static inline __attribute__((always_inline)) void widen_group(const uint8_t *restrict from, float *restrict to,
                                                              int64_t bits) {
    uint16_t half;
    memcpy(&half, from, 2);
    const float scale = from_bf16(half);
    const uint8_t *restrict codes = from + 2;
    if (bits == 8) {
        for (int k = 0; k < GROUP; ++k) to[k] = (float)(int8_t)codes[k] * scale;
    } else {
        for (int k = 0; k < GROUP / 2; ++k) to[k] = (float)((int)(codes[k] & 15) - 8) * scale;
        for (int k = 0; k < GROUP / 2; ++k) to[k + GROUP / 2] = (float)((int)(codes[k] >> 4) - 8) * scale;
    }
}

typedef struct {
    const uint8_t *blocks;
    const int64_t *index;
    void *out; /* contiguous: [count, halves, width] */
    int64_t stride, halves, width, bits, kind;
} GatherGroups;

static inline __attribute__((always_inline)) void gather_group_rows(const GatherGroups *g, int64_t bits, int64_t kind,
                                                                    int64_t lo, int64_t hi) {
    const int64_t item = kind == FP32 ? 4 : 2, group_bytes = 2 + GROUP * bits / 8, width = g->width;
    for (int64_t i = lo; i < hi; ++i) {
        const uint8_t *from = g->blocks + g->index[i] * g->stride;
        for (int64_t h = 0; h < g->halves; ++h) {
            char *to = (char *)g->out + (i * g->halves + h) * width * item;
            for (int64_t j = 0; j < width; j += GROUP, from += group_bytes) {
                const int n = width - j < GROUP ? (int)(width - j) : GROUP;
                float part[GROUP];
                widen_group(from, part, bits);
                if (kind == FP32) memcpy(to + 4 * j, part, 4 * n);
                else narrow(part, (uint16_t *)to + j, n, kind);
            }
        }
    }
}

void gather_groups(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const GatherGroups *g = about;
    for (int64_t lo; (lo = take(next, grain)) < count;) {
        int64_t hi = lo + grain < count ? lo + grain : count;
        if (g->bits == 8 && g->kind == FP32) gather_group_rows(g, 8, FP32, lo, hi);
        else if (g->bits == 8) gather_group_rows(g, 8, g->kind, lo, hi);
        else if (g->kind == FP32) gather_group_rows(g, 4, FP32, lo, hi);
        else gather_group_rows(g, 4, g->kind, lo, hi);
    }
}

/* n <= BLOCK values of any kind as fp32. */
static inline __attribute__((always_inline)) void widen(const void *from, int64_t at, float *restrict to, int n,
                                                        int64_t kind) {
    if (kind == FP32) {
        memcpy(to, (const float *)from + at, 4 * n);
    } else if (kind == BF16) {
        for (int k = 0; k < n; ++k) to[k] = from_bf16(((const uint16_t *)from)[at + k]);
    } else {
        for (int k = 0; k < n; ++k) to[k] = from_fp16(((const uint16_t *)from)[at + k]);
    }
}

/* Sums of squares in fp64, in one order for all instruction sets and numbers of threads: every 32nd value of a row into
   one of 32 sums, from left to right; then these in pairs (kernels.squares_torch). */
enum { LANES = 32 };

static inline __attribute__((always_inline)) void add_squares(double *restrict sums, const float *restrict x, int n) {
    for (int k = 0; k < n; ++k) sums[k] += (double)x[k] * (double)x[k];
}

static inline double in_pairs(double *sums) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) sums[k] += sums[half + k];
    return sums[0];
}

/* One row of the new sums, and its sum of squares. */
static inline __attribute__((always_inline)) double add_row(float *restrict to, const void *from, int64_t at,
                                                            int64_t width, int64_t kind, int filled) {
    double sums[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        float part[LANES];
        widen(from, at + j, part, LANES, kind);
        if (filled)
            for (int k = 0; k < LANES; ++k) part[k] = to[j + k] + part[k];
        memcpy(to + j, part, sizeof part);
        add_squares(sums, part, LANES);
    }
    if (j < width) {
        const int n = (int)(width - j);
        float part[LANES];
        widen(from, at + j, part, n, kind);
        if (filled)
            for (int k = 0; k < n; ++k) part[k] = to[j + k] + part[k];
        memcpy(to + j, part, 4 * n);
        add_squares(sums, part, n);
    }
    return in_pairs(sums);
}

typedef struct {
    float *sums;
    const int64_t *index;
    const void *source;
    const uint8_t *filled;
    double *squares;
    int64_t stride, source_stride, width, kind;
} Accumulate;

void accumulate(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Accumulate *a = about;
    const int64_t width = a->width;
    for (int64_t lo; (lo = take(next, grain)) < count;) {
        int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t i = lo; i < hi; ++i) {
            const int64_t row = a->index[i], at = i * a->source_stride;
            const int filled = a->filled[row];
            const void *from = a->source;
            float *to = a->sums + row * a->stride;
            if (a->kind == FP32)
                a->squares[row] = filled ? add_row(to, from, at, width, FP32, 1) : add_row(to, from, at, width, FP32, 0);
            else if (a->kind == BF16)
                a->squares[row] = filled ? add_row(to, from, at, width, BF16, 1) : add_row(to, from, at, width, BF16, 0);
            else
                a->squares[row] = add_row(to, from, at, width, FP16, filled);
        }
    }
}

static inline __attribute__((always_inline)) double square_row(const void *from, int64_t at, int64_t width, int64_t kind) {
    double sums[LANES] = {0};
    int64_t j = 0;
    float part[LANES];
    for (; j + LANES <= width; j += LANES) {
        widen(from, at + j, part, LANES, kind);
        add_squares(sums, part, LANES);
    }
    widen(from, at + j, part, (int)(width - j), kind);
    add_squares(sums, part, (int)(width - j));
    return in_pairs(sums);
}

typedef struct {
    const void *rows;
    double *sums;
    int64_t stride, width, kind;
} Squares;

void squares(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Squares *s = about;
    for (int64_t lo; (lo = take(next, grain)) < count;) {
        int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t i = lo; i < hi; ++i) {
            if (s->kind == FP32) s->sums[i] = square_row(s->rows, i * s->stride, s->width, FP32);
            else if (s->kind == BF16) s->sums[i] = square_row(s->rows, i * s->stride, s->width, BF16);
            else s->sums[i] = square_row(s->rows, i * s->stride, s->width, FP16);
        }
    }
}

typedef struct {
    float *sums;
    const int64_t *index;
    int64_t stride, width;
} Zero;

void zero(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Zero *z = about;
    for (int64_t lo; (lo = take(next, grain)) < count;) {
        int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t i = lo; i < hi; ++i) memset(z->sums + z->index[i] * z->stride, 0, 4 * z->width);
    }
}

/* ---- AdamW ---- */

typedef struct {
    float *rows;
    void *first, *second; /* fp32, or bf16 */
    const void *grads;    /* NULL: no gradient, catch up only */
    int32_t *done;
    uint8_t *is_still;
    const int64_t *index;
    const float *table; /* [steps, 3]: rate, scale, decay of steps table_first + 1, ... */
    /* Of a row, and from one of its halves to the next. */
    int64_t rows_stride, rows_half, moments_stride, moments_half, grads_stride, grads_half, done_stride;
    int64_t halves, width, table_first, step; /* step < 0: each row its own next */
    int64_t salt, grads_kind, listed;         /* listed: gradient i is that of index[i], else of row i */
    int64_t narrow;                           /* moments are bf16 */
    float beta1, beta2, rest1, rest2, eps, most; /* rest = 1 - beta; most: the rate that a still row withstands */
    float factor;                                /* of the gradients */
} Advance;

/* One half of one row. */
typedef struct {
    float *p;
    void *m, *v;
    const void *g; /* or NULL */
    uint8_t *is_still;
    int64_t place, t, count; /* in a matrix of one half: the first element's number; first step and how many */
    uint32_t salt;
} Row;

/* n <= BLOCK gradients, multiplied. */
static inline __attribute__((always_inline)) const float *gradients(const Row *row, int64_t j, int n, float *to,
                                                                    const Advance *a) {
    if (!row->g) return 0;
    widen(row->g, j, to, n, a->grads_kind);
    for (int k = 0; k < n; ++k) to[k] = to[k] * a->factor;
    return to;
}

/* m and v of one step for n values in registers; g is NULL without a gradient. */
static inline __attribute__((always_inline)) void moments(float *restrict m, float *restrict v, const float *restrict g,
                                                          int n, const Advance *a) {
    const float b1 = a->beta1, b2 = a->beta2, r1 = a->rest1, r2 = a->rest2;
    for (int k = 0; k < n; ++k) {
        float mm = m[k] * b1, vv = v[k] * b2;
        if (g) {
            mm = mm + g[k] * r1;
            vv = vv + (g[k] * g[k]) * r2;
        }
        m[k] = mm;
        v[k] = vv;
    }
}

/* p of one step from its m and v. */
static inline __attribute__((always_inline)) void move(float *restrict p, const float *restrict m,
                                                       const float *restrict v, int n, const float *constants,
                                                       const Advance *a) {
    const float rate = constants[0], scale = constants[1], decay = constants[2], eps = a->eps;
    for (int k = 0; k < n; ++k) p[k] = p[k] * decay - (rate * m[k]) / (sqrtf(v[k]) * scale + eps);
}

/* Whether none of n values moves in any step without gradient and decay whose rate is at most `most`: m only shrinks, the
   divisor is never below eps, and every rounding is monotone (adamw._still). */
static inline __attribute__((always_inline)) int still(const float *restrict p, const float *restrict m,
                                                       const float *restrict v, int n, const Advance *a) {
    const float most = a->most, eps = a->eps;
    int moved = 0;
    for (int k = 0; k < n; ++k) moved |= ((p[k] - (most * m[k]) / eps) != p[k]) | !(v[k] < INFINITY);
    return !moved;
}

/* A NaN stays one: of all its bits set, as GPUs make it, the sum would be a zero. */
static inline float round_by(float f, uint32_t noise) {
    return f != f ? f : of_bits((bits_of(f) + noise) & 0xFFFF0000u);
}

/* bf16 bits of n fp32 values, rounded up or down by a hash of place, step and salt (adamw._round_bf16). */
static inline __attribute__((always_inline)) void round_pair(float *restrict m, float *restrict v, int n,
                                                             uint32_t place, uint32_t step, uint32_t salt) {
    const uint32_t mixed = (step * 0x85EBCA6Bu) ^ salt;
    for (int k = 0; k < n; ++k) {
        uint32_t x = ((place + (uint32_t)k) * 0x9E3779B1u) ^ mixed;
        x = (x ^ (x >> 16)) * 0x7FEB352Du;
        x = (x ^ (x >> 15)) * 0x846CA68Bu;
        x = x ^ (x >> 16);
        m[k] = round_by(m[k], x & 0xFFFFu);
        v[k] = round_by(v[k], x >> 16);
    }
}

/* A whole step with a gradient in one pass over memory. */
static inline __attribute__((always_inline)) void stream(float *restrict p, float *restrict m, float *restrict v,
                                                         const float *restrict g, int n, const float *constants,
                                                         const Advance *a) {
    const float rate = constants[0], scale = constants[1], decay = constants[2];
    const float b1 = a->beta1, b2 = a->beta2, r1 = a->rest1, r2 = a->rest2, eps = a->eps;
    for (int k = 0; k < n; ++k) {
        const float mm = m[k] * b1 + g[k] * r1, vv = v[k] * b2 + (g[k] * g[k]) * r2;
        m[k] = mm;
        v[k] = vv;
        p[k] = p[k] * decay - (rate * mm) / (sqrtf(vv) * scale + eps);
    }
}

static inline __attribute__((always_inline)) int all_zero(const float *m, const float *v, int n) {
    uint32_t any = 0;
    for (int k = 0; k < n; ++k) any |= (bits_of(m[k]) | bits_of(v[k])) & 0x7fffffffu;
    return !any;
}

/* Decay alone, for steps that provably leave p as it is. */
static inline __attribute__((always_inline)) void decay_moments(float *restrict m, float *restrict v, int n,
                                                                int64_t steps, int half, uint32_t place,
                                                                uint32_t salt, uint32_t step, const Advance *a) {
    int first_moves = 1;
    for (int64_t s = 0; s < steps; ++s) {
        if (first_moves) {
            int moved = 0;
            for (int k = 0; k < n; ++k) {
                const float mm = m[k] * a->beta1;
                moved |= bits_of(mm) != bits_of(m[k]);
                m[k] = mm;
            }
            first_moves = half || moved; /* a product that changes nothing never will */
        }
        for (int k = 0; k < n; ++k) v[k] = v[k] * a->beta2;
        if (half) round_pair(m, v, n, place, step + (uint32_t)s, salt);
    }
}

/* The steps from t on (count of them, the last with gradient g unless NULL) for n values. Returns whether they are
   still afterwards. `asleep`: the row was still before, all but the last step leave p as it is. */
static inline __attribute__((always_inline)) int catch_up(float *restrict p, float *restrict m, float *restrict v,
                                                          const float *restrict g, int n, int64_t t, int64_t count,
                                                          int asleep, int half, uint32_t place, uint32_t salt,
                                                          const Advance *a) {
    const float *constants = a->table + 3 * (t - a->table_first - 1);
    int64_t missed = g ? count - 1 : count, s = 0;
    while (s < missed) {
        const float decay = constants[3 * s + 2];
        if (decay == 1.0f && (asleep || (a->eps > 0.0f && all_zero(m, v, n)) ||
                              ((s & 3) == 3 && still(p, m, v, n, a)))) {
            int64_t free = s; /* steps without weight decay that follow */
            while (free < missed && constants[3 * free + 2] == 1.0f) ++free;
            decay_moments(m, v, n, free - s, half, place, salt, (uint32_t)(t + s), a);
            s = free;
            continue;
        }
        moments(m, v, 0, n, a);
        if (half) round_pair(m, v, n, place, (uint32_t)(t + s), salt);
        move(p, m, v, n, constants + 3 * s, a);
        ++s;
    }
    if (g) {
        moments(m, v, g, n, a);
        if (half) round_pair(m, v, n, place, (uint32_t)(t + missed), salt);
        move(p, m, v, n, constants + 3 * missed, a);
    }
    const float *last = constants + 3 * (count - 1);
    return last[2] == 1.0f && still(p, m, v, n, a);
}

static void advance_fp32(const Advance *a, const Row *row) {
    float *p = row->p, *m = (float *)row->m, *v = (float *)row->v, gg[BLOCK];
    const int64_t t = row->t, count = row->count;
    const int asleep = *row->is_still;
    const float *constants = a->table + 3 * (t - a->table_first - 1);
    int is_still = constants[3 * (count - 1) + 2] == 1.0f;
    int64_t j = 0;
    if (count == 1 && row->g) { /* the hot path: one pass at the speed of memory, whether it is still only looked for until refuted */
        for (; j + BLOCK <= a->width && is_still; j += BLOCK) {
            stream(p + j, m + j, v + j, gradients(row, j, BLOCK, gg, a), BLOCK, constants, a);
            is_still = still(p + j, m + j, v + j, BLOCK, a);
        }
        if (!is_still) {
            for (; j + BLOCK <= a->width; j += BLOCK)
                stream(p + j, m + j, v + j, gradients(row, j, BLOCK, gg, a), BLOCK, constants, a);
        }
    }
    for (; j < a->width; j += BLOCK) {
        const int n = a->width - j < BLOCK ? (int)(a->width - j) : BLOCK;
        const float *g = gradients(row, j, n, gg, a);
        if (n == BLOCK) {
            float pp[BLOCK], mm[BLOCK], vv[BLOCK];
            memcpy(pp, p + j, sizeof pp);
            memcpy(mm, m + j, sizeof mm);
            memcpy(vv, v + j, sizeof vv);
            is_still &= catch_up(pp, mm, vv, g, BLOCK, t, count, asleep, 0, 0, 0, a);
            memcpy(p + j, pp, sizeof pp);
            memcpy(m + j, mm, sizeof mm);
            memcpy(v + j, vv, sizeof vv);
        } else {
            is_still &= catch_up(p + j, m + j, v + j, g, n, t, count, asleep, 0, 0, 0, a);
        }
    }
    *row->is_still = (uint8_t)is_still;
}

static void advance_bf16(const Advance *a, const Row *row) {
    float *p = row->p, gg[BLOCK];
    uint16_t *m = (uint16_t *)row->m, *v = (uint16_t *)row->v;
    const int asleep = *row->is_still;
    int is_still = 1;
    for (int64_t j = 0; j < a->width; j += BLOCK) {
        const int n = a->width - j < BLOCK ? (int)(a->width - j) : BLOCK;
        const uint32_t place = (uint32_t)(row->place + j);
        const float *g = gradients(row, j, n, gg, a);
        float mm[BLOCK], vv[BLOCK];
        for (int k = 0; k < n; ++k) mm[k] = from_bf16(m[j + k]);
        for (int k = 0; k < n; ++k) vv[k] = from_bf16(v[j + k]);
        if (n == BLOCK)
            is_still &= catch_up(p + j, mm, vv, g, BLOCK, row->t, row->count, asleep, 1, place, row->salt, a);
        else
            is_still &= catch_up(p + j, mm, vv, g, n, row->t, row->count, asleep, 1, place, row->salt, a);
        for (int k = 0; k < n; ++k) m[j + k] = (uint16_t)(bits_of(mm[k]) >> 16);
        for (int k = 0; k < n; ++k) v[j + k] = (uint16_t)(bits_of(vv[k]) >> 16);
    }
    *row->is_still = (uint8_t)is_still;
}

static void advance_half(const Advance *a, int64_t i, int64_t h) {
    const int64_t row = a->index[i], item = a->narrow ? 2 : 4, grad_item = a->grads_kind == FP32 ? 4 : 2;
    int32_t *done = a->done + row * a->done_stride + h;
    uint8_t *is_still = a->is_still + row * a->done_stride + h;
    if (!a->grads && *is_still) return;
    const int64_t steps = a->step < 0 ? 1 : a->step - *done;
    if (steps < 1) return;
    const int64_t moments_at = (row * a->moments_stride + h * a->moments_half) * item;
    const int64_t grads_at = ((a->listed ? i : row) * a->grads_stride + h * a->grads_half) * grad_item;
    const Row about = {a->rows + row * a->rows_stride + h * a->rows_half,
                       (char *)a->first + moments_at,
                       (char *)a->second + moments_at,
                       a->grads ? (const char *)a->grads + grads_at : 0,
                       is_still,
                       row * a->width,
                       *done + 1,
                       steps,
                       (uint32_t)(a->salt + h)};
    if (a->narrow)
        advance_bf16(a, &about);
    else
        advance_fp32(a, &about);
    *done = (int32_t)(*done + steps);
}

void advance(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Advance *a = about;
    for (int64_t lo; (lo = take(next, grain)) < count;) {
        int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t i = lo; i < hi; ++i)
            for (int64_t h = 0; h < a->halves; ++h) advance_half(a, i, h);
    }
}
