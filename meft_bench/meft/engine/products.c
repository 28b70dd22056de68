/* Products of hidden states and rows: the search of kernels.py (the dot products of each expert's tokens with its keys, then
   each token's best K), and the adapter itself where the device is the processor (products.py).

   A dot product is summed in one vector register over d in order and then across its lanes in one fixed order, whatever
   block it is part of: its bits depend on neither threads nor batch mates. Contraction to fused multiply-adds is on. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, TOKENS = 4, KEYS = 4, WIDE = 6 };
#else
enum { LANES = 8, TOKENS = 3, KEYS = 4, WIDE = 3 };
#endif
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));
enum { FP32 = 0, BF16 = 1, INT8 = 3 };
#if defined(__AVX512BF16__)
enum { PAIRS = 1 }; /* an instruction adds the products of two pairs of bf16 numbers to each lane */
#else
enum { PAIRS = 0 };
#endif
enum { LINE = 64 }; /* bytes that a cache takes from memory at once */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *h;
    const void *keys;
    const float *scales; /* NULL unless int8 */
    const int64_t *experts, *starts, *order; /* [T, P]; [N + 1]; pairs t * P + j sorted by expert */
    const float *gates; /* [T, P]; NULL: no gate */
    char *apart;        /* [T, apart_stride] in bytes; room for h */
    float *scores;      /* [T, P * size] */
    int64_t *kept;
    float *outputs;
    uint64_t *work; /* P * size numbers for each thread, which takes its part by number */
    int64_t *taken;
    int64_t h_stride, keys_stride, apart_stride, tokens, width, number, probed, size, best, relu, kind;
} Search;

int has_bf16_products(void) { return PAIRS; }

INLINE vf load(const void *from, int64_t at, int kind) {
    vf x;
    if (kind == FP32) {
        memcpy(&x, (const float *)from + at, sizeof x);
    } else if (kind == BF16) {
        vh narrow;
        memcpy(&narrow, (const uint16_t *)from + at, sizeof narrow);
        vi wide = __builtin_convertvector(narrow, vi) << 16;
        memcpy(&x, &wide, sizeof x);
    } else {
        /* Left to the compiler, this conversion goes lane by lane. */
#if defined(__AVX512F__)
        const __m128i narrow = _mm_loadu_si128((const __m128i *)((const int8_t *)from + at));
        const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow));
        memcpy(&x, &wide, sizeof x);
#elif defined(__AVX2__)
        const __m128i narrow = _mm_loadl_epi64((const __m128i *)((const int8_t *)from + at));
        const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow));
        memcpy(&x, &wide, sizeof x);
#else
        vb narrow;
        memcpy(&narrow, (const int8_t *)from + at, sizeof narrow);
        x = __builtin_convertvector(narrow, vf);
#endif
    }
    return x;
}

/* The last, partial vector of a row, filled up with zeros. */
INLINE vf load_tail(const void *from, int64_t at, int64_t n, int kind) {
    union { float f[LANES]; uint16_t h[LANES]; int8_t b[LANES]; } part;
    memset(&part, 0, sizeof part);
    const int64_t item = kind == FP32 ? 4 : kind == BF16 ? 2 : 1;
    memcpy(&part, (const char *)from + at * item, n * item);
    return load(&part, 0, kind);
}

INLINE float lanes_sum(vf x) {
    float part[LANES];
    memcpy(part, &x, sizeof part);
    for (int w = LANES / 2; w > 0; w /= 2)
        for (int k = 0; k < w; ++k) part[k] += part[k + w];
    return part[0];
}

/* lanes_sum() of each of KEYS vectors, side by side; each in its own order. */
INLINE void lanes_sums(const vf *x, float *out) {
#if defined(__AVX512F__)
#define FOLD(a, b, low, high) _mm512_add_ps(_mm512_shuffle_f32x4(a, b, low), _mm512_shuffle_f32x4(a, b, high))
    const __m512 eights01 = FOLD((__m512)x[0], (__m512)x[1], 0x44, 0xee);
    const __m512 eights23 = FOLD((__m512)x[2], (__m512)x[3], 0x44, 0xee);
    const __m512 fours = FOLD(eights01, eights23, 0x88, 0xdd);
    const __m512 twos = _mm512_add_ps(fours, _mm512_shuffle_ps(fours, fours, 0xee));
    const __m512 ones = _mm512_add_ps(twos, _mm512_shuffle_ps(twos, twos, 0x55));
    const __m512i firsts = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, ones)));
#elif defined(__AVX2__)
#define FOLD(a, b) _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))
    const __m256 fours01 = FOLD((__m256)x[0], (__m256)x[1]), fours23 = FOLD((__m256)x[2], (__m256)x[3]);
    /* The lower half has x[0] and x[2], the upper one x[1] and x[3]. */
    const __m256 twos = _mm256_add_ps(_mm256_shuffle_ps(fours01, fours23, 0x44), _mm256_shuffle_ps(fours01, fours23, 0xee));
    const __m256 ones = _mm256_add_ps(_mm256_shuffle_ps(twos, twos, 0x88), _mm256_shuffle_ps(twos, twos, 0xdd));
    _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(ones), _mm256_extractf128_ps(ones, 1)));
#else
    for (int k = 0; k < KEYS; ++k) out[k] = lanes_sum(x[k]);
#endif
}

/* Whether hidden states are bf16 numbers too, and how many of them a vector's products take. */
INLINE int paired(int kind) { return PAIRS && kind == BF16; }
INLINE int64_t numbers_at_once(int kind) { return paired(kind) ? 2 * LANES : LANES; }

/* sums += the products of n <= numbers_at_once() numbers, from d on; behind them h is 0. */
INLINE void add_vector(const char *const *h, const char *rows, int64_t stride, vf (*sums)[KEYS], int nt, int nk, int64_t d,
                       int64_t n, int kind) {
#if defined(__AVX512BF16__)
    if (paired(kind)) {
        const __mmask32 there = n == 2 * LANES ? ~0u : (1u << n) - 1;
        __m512bh row[KEYS];
        for (int k = 0; k < nk; ++k) row[k] = (__m512bh)_mm512_maskz_loadu_epi16(there, rows + k * stride + 2 * d);
        for (int t = 0; t < nt; ++t) {
            const __m512bh x = (__m512bh)_mm512_loadu_si512(h[t] + 2 * d);
            for (int k = 0; k < nk; ++k) sums[t][k] = (vf)_mm512_dpbf16_ps((__m512)sums[t][k], x, row[k]);
        }
        return;
    }
#endif
    vf row[KEYS];
    for (int k = 0; k < nk; ++k)
        row[k] = n == LANES ? load(rows + k * stride, d, kind) : load_tail(rows + k * stride, d, n, kind);
    for (int t = 0; t < nt; ++t) {
        const vf x = load(h[t], d, FP32);
        for (int k = 0; k < nk; ++k) sums[t][k] += x * row[k];
    }
}

/* ---- the search ----

   KEY_BLOCK keys at a time meet TOKEN_BLOCK of their expert's tokens at a time, DEPTH of the width at a time: that much of
   the keys, and the sums so far, stay in the nearest cache while the tokens pass by from the second. FEW tokens wait for
   memory whatever is done; the processor itself then fetches best, if whole keys are read in order, KEYS at a time, and as
   many tokens as there are registers for, WIDE, are served on the way. */

enum { KEY_BLOCK = 2 * KEYS, TOKEN_BLOCK = 16 * TOKENS, DEPTH = 384, FEW = 2 * WIDE };

/* n numbers rounded to bf16, to the nearest and of two the even one, as torch does. */
INLINE void narrow(const float *from, void *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t u;
        memcpy(&u, from + i, sizeof u);
        const int is_nan = (u & 0x7fffffffu) > 0x7f800000u;
        u = is_nan ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u);
        if (PAIRS) ((uint16_t *)to)[i] = (uint16_t)(u >> 16);
        else ((uint32_t *)to)[i] = u & 0xffff0000u;
    }
}

/* The tokens, rounded as the keys are, with zeros behind the width. Each lies a vector later in its page than the one
   before: of numbers that lie at the same place of their pages, as those of rows of 1,024 would, a cache keeps few. */
void set_apart(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Search *s = about;
    for (int64_t lo; (lo = __atomic_fetch_add(next, grain, __ATOMIC_RELAXED)) < count;) {
        const int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t t = lo; t < hi; ++t) {
            const float *from = s->h + t * s->h_stride;
            char *to = s->apart + t * s->apart_stride;
            const int64_t used = (paired((int)s->kind) ? 2 : 4) * s->width;
            if (s->kind == BF16) narrow(from, to, s->width);
            else memcpy(to, from, used);
            memset(to + used, 0, s->apart_stride - used);
        }
    }
}

/* What is asked for from memory while products are added up, `each` lines of both for every two vectors. */
typedef struct {
    const char *next, *deeper; /* of the keys that come next; of these keys the next DEPTH, at last the next keys' first */
    int each;
} Ahead;

/* The part from `from` to `to` of nt x nk dot products; nt, nk and each are constants where this is inlined. */
INLINE void add_depth(const char *const *h, const char *keys, int64_t stride, vf (*sums)[KEY_BLOCK], int nt, int nk,
                      int64_t from, int64_t to, int kind, Ahead ahead, int each) {
    vf now[WIDE][KEYS];
    for (int t = 0; t < nt; ++t)
        for (int k = 0; k < nk; ++k) now[t][k] = from ? sums[t][k] : (vf){0};
    const int64_t step = numbers_at_once(kind);
    int64_t d = from;
    for (; d + 2 * step <= to; d += 2 * step) {
        for (int i = 0; i < each; ++i, ahead.next += LINE, ahead.deeper += LINE) {
            __builtin_prefetch(ahead.next, 0, 2);
            __builtin_prefetch(ahead.deeper, 0, 3);
        }
        add_vector(h, keys, stride, now, nt, nk, d, step, kind);
        add_vector(h, keys, stride, now, nt, nk, d + step, step, kind);
    }
    if (d + step <= to) {
        add_vector(h, keys, stride, now, nt, nk, d, step, kind);
        d += step;
    }
    if (d < to) add_vector(h, keys, stride, now, nt, nk, d, to - d, kind);
    for (int t = 0; t < nt; ++t)
        for (int k = 0; k < nk; ++k) sums[t][k] = now[t][k];
}

/* The same for up to TOKENS tokens, or WIDE while nothing is asked for ahead, and KEYS keys. Few tokens, too, share what is
   read of the keys. */
INLINE void add_some(const char *const *h, const char *keys, int64_t stride, vf (*sums)[KEY_BLOCK], int nt, int nk,
                     int64_t from, int64_t to, int kind, Ahead ahead) {
#define ADD(nt, each) add_depth(h, keys, stride, sums, nt, KEYS, from, to, kind, ahead, each)
    if (nk < KEYS) {
        for (int t = 0; t < nt; ++t)
            for (int k = 0; k < nk; ++k)
                add_depth(h + t, keys + k * stride, stride, (vf(*)[KEY_BLOCK])(sums[t] + k), 1, 1, from, to, kind, ahead, 0);
    } else if (nt == TOKENS) {
        if (ahead.each == 0) ADD(TOKENS, 0);
        else if (ahead.each == 1) ADD(TOKENS, 1);
        else ADD(TOKENS, 2);
    } else if (nt > TOKENS) {
        if (nt == WIDE) ADD(WIDE, 0);
        else ADD(WIDE - 1, 0);
    } else if (nt == 3) ADD(3, ahead.each);
    else if (nt == 2) ADD(2, ahead.each);
    else ADD(1, ahead.each);
}

/* sums of n <= TOKEN_BLOCK tokens and nk <= KEY_BLOCK keys. beyond: bytes from these keys to those that come next, of which
   all is asked for by the time this returns, if there are enough tokens; 0 for none. */
INLINE void add_block(const char *const *h, const char *keys, int64_t stride, vf (*sums)[KEY_BLOCK], int n, int nk,
                      int64_t width, int kind, int64_t beyond) {
    const int64_t item = kind == FP32 ? 4 : kind == BF16 ? 2 : 1;
    const int64_t calls = (n + TOKENS - 1) / TOKENS * ((nk + KEYS - 1) / KEYS);
    const int few = n <= FEW, per_call = few ? WIDE : TOKENS;
    const int64_t depth = few ? width : paired(kind) ? 2 * DEPTH : DEPTH; /* as many bytes */
    for (int64_t from = 0; from < width; from += depth) {
        const int64_t to = from + depth < width ? from + depth : width;
        const int64_t lines = (to - from) * item / LINE, twos = (to - from) / (2 * numbers_at_once(kind));
        const int each = nk * lines > calls * twos ? 2 : 1;
        int64_t line = 0;
        int key = beyond && !few ? 0 : nk; /* a call asks for lines of one key */
        for (int t = 0; t < n; t += per_call)
            for (int k = 0; k < nk; k += KEYS) {
                Ahead ahead = {keys, keys, 0};
                if (key < nk) {
                    const char *here = keys + key * stride + from * item + line * LINE;
                    const char *following = here + beyond;
                    ahead = (Ahead){following, to < width ? here + depth * item : following - from * item, each};
                    line += each * twos;
                    if (line >= lines) line = 0, ++key;
                }
                add_some(h + t, keys + k * stride, stride, (vf(*)[KEY_BLOCK])(sums[t] + k), n - t < per_call ? n - t : per_call,
                         nk - k < KEYS ? nk - k : KEYS, from, to, kind, ahead);
            }
    }
}

INLINE void score_expert(const Search *s, int64_t expert, int kind) {
    const int64_t item = kind == FP32 ? 4 : kind == BF16 ? 2 : 1, stride = s->keys_stride * item;
    const int64_t *order = s->order + s->starts[expert], pairs = s->starts[expert + 1] - s->starts[expert];
    const int64_t end = s->number * s->size * stride, blocks = (pairs + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
    const int64_t step = pairs <= FEW ? KEYS : KEY_BLOCK;
    const int64_t per_block = blocks ? ((pairs + blocks - 1) / blocks + TOKENS - 1) / TOKENS * TOKENS : 0;
    for (int64_t k = 0; k < s->size; k += step) {
        const int nk = (int)(s->size - k < step ? s->size - k : step);
        const int64_t at = (expert * s->size + k) * stride;
        /* The next keys, of this expert or of the one behind it, are the next rows. The first tokens fetch them. */
        const int64_t beyond = at + 2 * nk * stride <= end ? nk * stride : 0;
        for (int64_t first = 0; first < pairs; first += per_block) {
            const int n = (int)(pairs - first < per_block ? pairs - first : per_block);
            const char *h[TOKEN_BLOCK];
            vf sums[TOKEN_BLOCK][KEY_BLOCK];
            for (int t = 0; t < n; ++t) h[t] = s->apart + order[first + t] / s->probed * s->apart_stride;
            add_block(h, (const char *)s->keys + at, stride, sums, n, nk, s->width, kind, first ? 0 : beyond);
            for (int t = 0; t < n; ++t) {
                float *out = s->scores + order[first + t] * s->size + k;
                int i = 0;
                for (; i + KEYS <= nk; i += KEYS) lanes_sums(sums[t] + i, out + i);
                for (; i < nk; ++i) out[i] = lanes_sum(sums[t][i]);
            }
        }
    }
}

/* Pairs in the order of their experts; starts [N + 1] and order [T * P] are written. */
void sort_pairs(const int64_t *experts, int64_t pairs, int64_t number, int64_t *starts, int64_t *order) {
    memset(starts, 0, (number + 1) * sizeof *starts);
    for (int64_t i = 0; i < pairs; ++i) starts[experts[i] + 1]++;
    for (int64_t e = 0; e < number; ++e) starts[e + 1] += starts[e];
    for (int64_t i = 0; i < pairs; ++i) order[starts[experts[i]]++] = i;
    for (int64_t e = number; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;
}

void score(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Search *s = about;
    for (int64_t lo; (lo = __atomic_fetch_add(next, grain, __ATOMIC_RELAXED)) < count;) {
        const int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t e = lo; e < hi; ++e) {
            if (s->kind == FP32) score_expert(s, e, FP32);
            else if (s->kind == BF16) score_expert(s, e, BF16);
            else score_expert(s, e, INT8);
        }
    }
}

INLINE float relu(float x) { return x <= 0 ? 0 : x; } /* NaN stays NaN */

/* Larger values are larger numbers, NaN (of either sign) the largest as in torch. */
INLINE uint32_t rank(float value) {
    uint32_t u;
    value += 0.0f; /* -0 is 0 */
    memcpy(&u, &value, 4);
    return value != value ? 0xffffffffu : u >> 31 ? ~u : u | 0x80000000u;
}

/* The k-th largest (k from 1) of n numbers, bit by bit: without branches that nobody can foresee. */
static uint32_t kth_largest(const uint32_t *a, int64_t n, int64_t k) {
    uint32_t least = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const uint32_t higher = least | 1u << bit;
        uint32_t reach = 0;
        for (int64_t i = 0; i < n; ++i) reach += a[i] >= higher;
        if (reach >= k) least = higher;
        if (reach == k) break;
    }
    return least;
}

/* The `best` first of n places whose rank is among the largest, in the order of places: of equal ranks the earlier place
   is kept. */
INLINE int64_t keep_ranked(const uint32_t *ranks, int64_t n, int64_t best, uint32_t least, int32_t *places) {
    uint32_t above = 0;
    for (int64_t i = 0; i < n; ++i) above += ranks[i] > least;
    int64_t found = 0, equal = best - above; /* how many of those that are `least` have room */
    for (int64_t i = 0; i < n && found < best; ++i) {
        places[found] = (int32_t)i;
        if (ranks[i] == least) found += equal-- > 0;
        else found += ranks[i] > least;
    }
    return found;
}

void keep_best(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Search *s = about;
    const int64_t candidates = s->probed * s->size;
    uint32_t *ranks = (uint32_t *)(s->work + __atomic_fetch_add(s->taken, 1, __ATOMIC_RELAXED) * candidates);
    int32_t *places = (int32_t *)(ranks + candidates);
    for (int64_t lo; (lo = __atomic_fetch_add(next, grain, __ATOMIC_RELAXED)) < count;) {
        const int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t t = lo; t < hi; ++t) {
            const int64_t *experts = s->experts + t * s->probed;
            float *scores = s->scores + t * candidates;
            for (int64_t j = 0; j < s->probed; ++j) {
                float *some = scores + j * s->size;
                if (s->scales)
                    for (int64_t k = 0; k < s->size; ++k) some[k] *= s->scales[experts[j] * s->size + k];
                if (s->gates) {
                    const float gate = s->gates[t * s->probed + j];
                    for (int64_t k = 0; k < s->size; ++k) some[k] *= gate;
                }
                if (s->relu)
                    for (int64_t k = 0; k < s->size; ++k) some[k] = relu(some[k]);
            }
            for (int64_t i = 0; i < candidates; ++i) ranks[i] = rank(scores[i]);
            const uint32_t least = kth_largest(ranks, candidates, s->best);
            const int64_t found = keep_ranked(ranks, candidates, s->best, least, places);
            for (int64_t i = 0; i < found; ++i) {
                const int64_t at = places[i], j = at / s->size;
                s->kept[t * s->best + i] = experts[j] * s->size + at - j * s->size;
                s->outputs[t * s->best + i] = scores[at];
            }
        }
    }
}

/* ---- the adapter: forward and backward over each token's kept rows, fp32 ---- */

typedef struct {
    const float *h, *grad, *rows; /* [T, D]; grad is that of the output; [U, 2, D] */
    const int64_t *local;         /* [T, K], -1 where a token kept fewer */
    const float *gates;           /* [T, K], NULL without a gate */
    float *dots, *outputs_grad;   /* [T, K] */
    const float *weights;         /* [T, K] of weighted() */
    float *out;                   /* [T, D] */
    float *grads;                 /* [U, halves, D] */
    const int64_t *starts, *order; /* [U + 1]; places t * K + k sorted by row */
    int64_t h_stride, grad_stride, rows_stride, width, kept, halves, silu;
} Math;

INLINE float activation(float o, int64_t silu) { return silu ? o / (1.0f + expf(-o)) : relu(o); }

INLINE float slope(float o, int64_t silu) {
    const float sigmoid = 1.0f / (1.0f + expf(-o));
    return silu ? sigmoid * (1.0f + o * (1.0f - sigmoid)) : (o <= 0 ? 0.0f : 1.0f);
}

/* out = or += sum over i of w[i] * from[i], added in the order of i whatever the grouping. */
INLINE void add_rows(float *restrict out, const float *const *from, const float *w, int n, int64_t width, int fresh) {
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
        vf x = fresh ? (vf){0} : load(out, d, FP32);
        for (int i = 0; i < n; ++i) x += load(from[i], d, FP32) * w[i];
        memcpy(out + d, &x, sizeof x);
    }
    for (; d < width; ++d) {
        float x = fresh ? 0.0f : out[d];
        for (int i = 0; i < n; ++i) x += from[i][d] * w[i];
        out[d] = x;
    }
}

enum { GROUP = 4 };

/* dots[i] = x . rows[i] of n <= GROUP rows, a constant where this is inlined */
INLINE void dot_some(const float *x, const float *const *rows, float *dots, int n, int64_t width) {
    vf sums[GROUP];
    for (int i = 0; i < n; ++i) sums[i] = (vf){0};
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES)
        for (int i = 0; i < n; ++i) sums[i] += load(x, d, FP32) * load(rows[i], d, FP32);
    if (d < width)
        for (int i = 0; i < n; ++i) sums[i] += load_tail(x, d, width - d, FP32) * load_tail(rows[i], d, width - d, FP32);
    for (int i = 0; i < n; ++i) dots[i] = lanes_sum(sums[i]);
}

INLINE void dot_all(const float *x, const float *const *rows, float *dots, int64_t n, int64_t width) {
    int64_t i = 0;
    for (; i + GROUP <= n; i += GROUP) dot_some(x, rows + i, dots + i, GROUP, width);
    for (; i < n; ++i) dot_some(x, rows + i, dots + i, 1, width);
}

enum { SOME = 512 }; /* kept rows of a token, or tokens of a row, that are worked on at once; a multiple of GROUP */

/* dots and out of each token. */
void adapter_forward(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Math *m = about;
    for (int64_t lo; (lo = __atomic_fetch_add(next, grain, __ATOMIC_RELAXED)) < count;) {
        const int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t t = lo; t < hi; ++t) {
            const int64_t *local = m->local + t * m->kept;
            const float *gates = m->gates ? m->gates + t * m->kept : 0;
            float *out = m->out + t * m->width;
            int fresh = 1;
            for (int64_t k = 0; k < m->kept;) {
                const float *keys[SOME], *values[SOME];
                float dots[SOME], acts[SOME];
                int64_t places[SOME], n = 0;
                for (; k < m->kept && n < SOME; ++k) {
                    m->dots[t * m->kept + k] = 0.0f;
                    if (local[k] < 0) continue;
                    places[n] = k;
                    keys[n++] = m->rows + local[k] * m->rows_stride;
                }
                dot_all(m->h + t * m->h_stride, keys, dots, n, m->width);
                for (int64_t i = 0; i < n; ++i) {
                    m->dots[t * m->kept + places[i]] = dots[i];
                    /* A row of activation 0 is added as well: 0 times NaN is NaN. */
                    acts[i] = activation(gates ? dots[i] * gates[places[i]] : dots[i], m->silu);
                    values[i] = keys[i] + m->width;
                }
                int64_t i = 0;
                for (; i + GROUP <= n; i += GROUP, fresh = 0) add_rows(out, values + i, acts + i, GROUP, m->width, fresh);
                for (; i < n; ++i, fresh = 0) add_rows(out, values + i, acts + i, 1, m->width, fresh);
            }
            if (fresh) memset(out, 0, 4 * m->width);
        }
    }
}

/* The gradient of each row's key and value, and of the outputs o = gate * dot. */
void adapter_backward(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Math *m = about;
    for (int64_t lo; (lo = __atomic_fetch_add(next, grain, __ATOMIC_RELAXED)) < count;) {
        const int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t u = lo; u < hi; ++u) {
            const float *value = m->rows + u * m->rows_stride + m->width;
            float *to = m->grads + u * m->halves * m->width, *to_value = to + (m->halves - 1) * m->width;
            int fresh = 1;
            for (int64_t at = m->starts[u]; at < m->starts[u + 1]; at += SOME, fresh = 0) {
                const int64_t left = m->starts[u + 1] - at;
                const int n = left < SOME ? (int)left : SOME;
                const float *h[SOME], *grad[SOME];
                float to_act[SOME], acts[SOME], to_dots[SOME];
                for (int i = 0; i < n; ++i) {
                    const int64_t t = m->order[at + i] / m->kept;
                    h[i] = m->h + t * m->h_stride;
                    grad[i] = m->grad + t * m->grad_stride;
                }
                dot_all(value, grad, to_act, n, m->width);
                for (int i = 0; i < n; ++i) {
                    const int64_t place = m->order[at + i];
                    const float gate = m->gates ? m->gates[place] : 1.0f;
                    const float o = m->gates ? m->dots[place] * gate : m->dots[place];
                    const float to_output = to_act[i] * slope(o, m->silu);
                    m->outputs_grad[place] = to_output;
                    acts[i] = activation(o, m->silu);
                    to_dots[i] = m->gates ? to_output * gate : to_output;
                }
                int i = 0;
                for (; i + GROUP <= n; i += GROUP) {
                    if (m->halves == 2) add_rows(to, h + i, to_dots + i, GROUP, m->width, fresh && i == 0);
                    add_rows(to_value, grad + i, acts + i, GROUP, m->width, fresh && i == 0);
                }
                for (; i < n; ++i) {
                    if (m->halves == 2) add_rows(to, h + i, to_dots + i, 1, m->width, fresh && i == 0);
                    add_rows(to_value, grad + i, acts + i, 1, m->width, fresh && i == 0);
                }
            }
            if (fresh) memset(to, 0, 4 * m->halves * m->width);
        }
    }
}

/* out[t] = sum over k of weights[t, k] * key of local[t, k]: the gradient of the hidden states. */
void adapter_hidden(const void *about, int64_t count, int64_t grain, int64_t *next) {
    const Math *m = about;
    for (int64_t lo; (lo = __atomic_fetch_add(next, grain, __ATOMIC_RELAXED)) < count;) {
        const int64_t hi = lo + grain < count ? lo + grain : count;
        for (int64_t t = lo; t < hi; ++t) {
            float *out = m->out + t * m->width;
            int fresh = 1;
            for (int64_t k = 0; k < m->kept;) {
                const float *keys[GROUP];
                float weights[GROUP];
                int n = 0;
                for (; k < m->kept && n < GROUP; ++k) {
                    const int64_t u = m->local[t * m->kept + k];
                    const float w = m->weights[t * m->kept + k];
                    if (u < 0) continue;
                    keys[n] = m->rows + u * m->rows_stride;
                    weights[n++] = w;
                }
                if (n == GROUP) {
                    add_rows(out, keys, weights, GROUP, m->width, fresh);
                    fresh = 0;
                } else {
                    for (int i = 0; i < n; ++i, fresh = 0) add_rows(out, keys + i, weights + i, 1, m->width, fresh);
                }
            }
            if (fresh) memset(out, 0, 4 * m->width);
        }
    }
}

/* Places t * K + k by their row, empty ones (-1) left out; starts [U + 1] and order [T * K] are written. */
void sort_places(const int64_t *local, int64_t places, int64_t rows, int64_t *starts, int64_t *order) {
    memset(starts, 0, (rows + 1) * sizeof *starts);
    for (int64_t i = 0; i < places; ++i)
        if (local[i] >= 0) starts[local[i] + 1]++;
    for (int64_t u = 0; u < rows; ++u) starts[u + 1] += starts[u];
    for (int64_t i = 0; i < places; ++i)
        if (local[i] >= 0) order[starts[local[i]]++] = i;
    for (int64_t u = rows; u > 0; --u) starts[u] = starts[u - 1];
    starts[0] = 0;
}
