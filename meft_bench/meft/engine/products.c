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
enum { LANES = 16, TOKENS = 4, KEYS = 4 };
#else
enum { LANES = 8, TOKENS = 2, KEYS = 4 };
#endif
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));
enum { FP32 = 0, BF16 = 1, INT8 = 3 };
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *h;
    const void *keys;
    const float *scales; /* NULL unless int8 */
    const int64_t *experts, *starts, *order; /* [T, P]; [N + 1]; pairs t * P + j sorted by expert */
    const float *gates; /* [T, P]; NULL: no gate */
    float *scores;      /* [T, P * size] */
    int64_t *kept;
    float *outputs;
    uint64_t *work; /* P * size numbers for each thread, which takes its part by number */
    int64_t *taken;
    int64_t h_stride, keys_stride, tokens, width, number, probed, size, best, relu, kind;
} Search;

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

/* nt x nk dot products; both are constants where this is inlined. ahead: bytes from each key to the one that takes its
   place next, which is asked for from memory meanwhile; 0 for none. */
INLINE void block(const float *const *h, const char *const *keys, float *const *out, int nt, int nk, int64_t width,
                  int kind, int64_t ahead) {
    const int64_t item = kind == FP32 ? 4 : kind == BF16 ? 2 : 1;
    vf sums[TOKENS][KEYS];
    for (int t = 0; t < nt; ++t)
        for (int k = 0; k < nk; ++k) sums[t][k] = (vf){0};
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
        vf key[KEYS];
        for (int k = 0; k < nk; ++k) {
            key[k] = load(keys[k], d, kind);
            if (ahead) __builtin_prefetch(keys[k] + ahead + d * item, 0, 2);
        }
        for (int t = 0; t < nt; ++t) {
            const vf x = load(h[t], d, FP32);
            for (int k = 0; k < nk; ++k) sums[t][k] += x * key[k];
        }
    }
    if (d < width) {
        vf key[KEYS];
        for (int k = 0; k < nk; ++k) key[k] = load_tail(keys[k], d, width - d, kind);
        for (int t = 0; t < nt; ++t) {
            const vf x = load_tail(h[t], d, width - d, FP32);
            for (int k = 0; k < nk; ++k) sums[t][k] += x * key[k];
        }
    }
    for (int t = 0; t < nt; ++t)
        for (int k = 0; k < nk; ++k) out[t][k] = lanes_sum(sums[t][k]);
}

/* Up to TOKENS tokens with KEYS keys. Few tokens, too, share what is read of the keys. */
INLINE void some_tokens(const float *const *h, const char *const *keys, float *const *out, int nt, int64_t width,
                        int kind, int64_t ahead) {
    if (nt == TOKENS && ahead) block(h, keys, out, TOKENS, KEYS, width, kind, ahead);
    else if (nt == TOKENS) block(h, keys, out, TOKENS, KEYS, width, kind, 0);
    else if (nt == 3) block(h, keys, out, 3, KEYS, width, kind, ahead);
    else if (nt == 2) block(h, keys, out, 2, KEYS, width, kind, ahead);
    else block(h, keys, out, 1, KEYS, width, kind, ahead);
}

INLINE void score_expert(const Search *s, int64_t expert, int kind) {
    const int64_t item = kind == FP32 ? 4 : kind == BF16 ? 2 : 1, from = s->starts[expert], to = s->starts[expert + 1];
    for (int64_t k = 0; k < s->size; k += KEYS) {
        const int nk = s->size - k < KEYS ? (int)(s->size - k) : KEYS;
        const int64_t first = expert * s->size + k;
        const char *keys[KEYS];
        for (int i = 0; i < nk; ++i) keys[i] = (const char *)s->keys + (first + i) * s->keys_stride * item;
        /* The next keys, of this expert or of the one behind it, are the next rows; the first tokens fetch them. */
        const int64_t next = first + 2 * KEYS <= s->number * s->size ? KEYS * s->keys_stride * item : 0;
        for (int64_t pair = from; pair < to; pair += TOKENS) {
            const int nt = to - pair < TOKENS ? (int)(to - pair) : TOKENS;
            const float *h[TOKENS];
            float *out[TOKENS];
            for (int i = 0; i < nt; ++i) {
                h[i] = s->h + s->order[pair + i] / s->probed * s->h_stride;
                out[i] = s->scores + s->order[pair + i] * s->size + k;
            }
            if (nk == KEYS) {
                some_tokens(h, keys, out, nt, s->width, kind, pair == from ? next : 0);
            } else {
                for (int i = 0; i < nt; ++i)
                    for (int j = 0; j < nk; ++j) {
                        float *one = out[i] + j;
                        block(h + i, keys + j, &one, 1, 1, s->width, kind, 0);
                    }
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

/* dots[i] = x . rows[i] */
INLINE void dot_all(const float *x, const float *const *rows, float *dots, int64_t n, int64_t width) {
    int64_t i = 0;
    for (; i + GROUP <= n; i += GROUP) {
        float *at = dots + i;
        block(&x, (const char *const *)(rows + i), &at, 1, GROUP, width, FP32, 0);
    }
    for (; i < n; ++i) {
        float *at = dots + i;
        block(&x, (const char *const *)(rows + i), &at, 1, 1, width, FP32, 0);
    }
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
