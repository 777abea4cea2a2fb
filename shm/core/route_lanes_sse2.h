/* What the vector kernels need of SSE2, which every x86-64 has: blocks of eight floats in two registers, and vectors
 * of two keys. */
#ifndef HOTSET_ROUTE_LANES_SSE2_H
#define HOTSET_ROUTE_LANES_SSE2_H

#include "route_keys.h"
#include "route_softmax.h"

#include <emmintrin.h>

#define ROUTE_AVX512 0
#define BLOCK_LANES 8u
#define KEY_LANES 2u

typedef struct {
    __m128 low, high;
} block, lane_mask;
typedef __m128d keys;

#define BLOCK_EACH(op, a, b) (block){op((a).low, (b).low), op((a).high, (b).high)}

static inline block block_load(const float *from) { return (block){_mm_loadu_ps(from), _mm_loadu_ps(from + 4)}; }
/* The first `count` floats, then `fill`. */
static inline block block_load_padded(const float *from, uint32_t count, float fill) {
    float padded[BLOCK_LANES];
    for (uint32_t i = 0; i < BLOCK_LANES; i++) padded[i] = i < count ? from[i] : fill;
    return block_load(padded);
}
static inline void block_store(float *to, block a) { _mm_storeu_ps(to, a.low), _mm_storeu_ps(to + 4, a.high); }
static inline block block_all(float value) { return (block){_mm_set1_ps(value), _mm_set1_ps(value)}; }
static inline block block_add(block a, block b) { return BLOCK_EACH(_mm_add_ps, a, b); }
static inline block block_sub(block a, block b) { return BLOCK_EACH(_mm_sub_ps, a, b); }
static inline block block_mul(block a, block b) { return BLOCK_EACH(_mm_mul_ps, a, b); }
static inline block block_div(block a, block b) { return BLOCK_EACH(_mm_div_ps, a, b); }
static inline block block_max(block a, block b) { return BLOCK_EACH(_mm_max_ps, a, b); }
static inline block block_min(block a, block b) { return BLOCK_EACH(_mm_min_ps, a, b); }
static inline block block_and(block a, block b) { return BLOCK_EACH(_mm_and_ps, a, b); }
static inline block block_or(block a, block b) { return BLOCK_EACH(_mm_or_ps, a, b); }
static inline block block_xor(block a, block b) { return BLOCK_EACH(_mm_xor_ps, a, b); }
static inline int block_is_zero(block a) {
    __m128i any = _mm_castps_si128(_mm_or_ps(a.low, a.high));
    return _mm_movemask_epi8(_mm_cmpeq_epi32(any, _mm_setzero_si128())) == 0xFFFF;
}

static inline lane_mask block_at_least(block a, block b) { return BLOCK_EACH(_mm_cmpge_ps, a, b); }
static inline lane_mask block_equal(block a, block b) { return BLOCK_EACH(_mm_cmpeq_ps, a, b); }
static inline lane_mask block_above(block a, block b) { return BLOCK_EACH(_mm_cmpgt_ps, a, b); }
static inline lane_mask mask_or(lane_mask a, lane_mask b) { return block_or(a, b); }
static inline lane_mask mask_and(lane_mask a, lane_mask b) { return block_and(a, b); }
/* A bit per lane. */
static inline uint32_t mask_bits(lane_mask mask) {
    return (uint32_t)(_mm_movemask_ps(mask.low) | _mm_movemask_ps(mask.high) << 4);
}
static inline lane_mask mask_from_bits(uint32_t bits) {
    const __m128i low = _mm_setr_epi32(1, 2, 4, 8), high = _mm_setr_epi32(16, 32, 64, 128);
    __m128i all = _mm_set1_epi32((int)bits);
    return (lane_mask){_mm_castsi128_ps(_mm_cmpeq_epi32(_mm_and_si128(all, low), low)),
                       _mm_castsi128_ps(_mm_cmpeq_epi32(_mm_and_si128(all, high), high))};
}
/* `a` where the mask is set, zero elsewhere. */
static inline block block_where(lane_mask mask, block a) { return block_and(mask, a); }
/* `a` where the mask is set, else `b`. */
static inline block block_choose(lane_mask mask, block a, block b) {
    return block_or(block_and(mask, a), BLOCK_EACH(_mm_andnot_ps, mask, b));
}
/* All ones where the mask is set, zero elsewhere. */
static inline block block_from_mask(lane_mask mask) { return mask; }

/* t less the nearest integer, which is in the low bits of `whole`; |t| < 2^22. And a * 2^whole. */
static inline block block_fraction(block t, block *whole) {
    block rounder = block_all(SOFTMAX_ROUNDER);
    *whole = block_add(t, rounder);
    return block_sub(t, block_sub(*whole, rounder));
}
static inline __m128 half_scale(__m128 a, __m128 whole) {
    return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a), _mm_slli_epi32(_mm_castps_si128(whole), 23)));
}
static inline block block_scale(block a, block whole) { return BLOCK_EACH(half_scale, a, whole); }

#define BLOCK_FOLD(a, op)                               \
    __m128 half = op((a).low, (a).high);                \
    half = op(half, _mm_movehl_ps(half, half));         \
    return _mm_cvtss_f32(op(half, _mm_shuffle_ps(half, half, 1)));

static inline float block_fold_sum(block a) { BLOCK_FOLD(a, _mm_add_ps) }
static inline float block_fold_max(block a) { BLOCK_FOLD(a, _mm_max_ps) }
static inline float block_fold_min(block a) { BLOCK_FOLD(a, _mm_min_ps) }

/* The eight floats of `from` at `ids`. */
static inline block block_eight(const float *from, const int32_t *ids) {
    return (block){_mm_setr_ps(from[ids[0]], from[ids[1]], from[ids[2]], from[ids[3]]),
                   _mm_setr_ps(from[ids[4]], from[ids[5]], from[ids[6]], from[ids[7]])};
}
/* Of the first eight lanes: here, of all. */
static inline float eight_fold_sum(block a) { return block_fold_sum(a); }
static inline float eight_fold_max(block a) { return block_fold_max(a); }
static inline float eight_fold_min(block a) { return block_fold_min(a); }
/* The first `count` lanes. */
static inline void block_store_first(float *to, block a, uint32_t count) {
    float all[BLOCK_LANES];
    block_store(all, a);
    memcpy(to, all, count * sizeof *to);
}

static inline keys keys_max(keys a, keys b) { return _mm_max_pd(a, b); }
static inline keys keys_min(keys a, keys b) { return _mm_min_pd(a, b); }
static inline uint64_t keys_first(keys a) { return (uint64_t)_mm_cvtsi128_si64(_mm_castpd_si128(a)); }
/* The two lanes, exchanged. */
static inline keys keys_exchange(keys a, uint32_t distance) {
    (void)distance;
    return _mm_shuffle_pd(a, a, 1);
}

/* Integers that order like the scores. */
typedef struct {
    __m128i low, high;
} ordered_block;
static inline __m128i half_ordered(__m128 scores) {
    __m128i bits = _mm_castps_si128(scores);
    return _mm_xor_si128(bits, _mm_or_si128(_mm_srai_epi32(bits, 31), _mm_set1_epi32(INT32_MIN)));
}
static inline ordered_block block_ordered(block scores) {
    return (ordered_block){half_ordered(scores.low), half_ordered(scores.high)};
}

/* Of four scores those in even lanes or those in odd ones as keys; `tags`: what the score leaves free of each. */
static inline keys half_keys(__m128i ordered, __m128i tags, uint32_t odd) {
    const __m128i place = _mm_set1_epi64x(KEY_SCORE_MASK);
    __m128i placed = odd ? _mm_srli_epi64(ordered, 12) : _mm_slli_epi64(ordered, 20);
    return _mm_castsi128_pd(_mm_or_si128(_mm_and_si128(placed, place), tags));
}
static inline keys ordered_keys(ordered_block ordered, __m128i tags, uint32_t part) {
    return half_keys(part < 2 ? ordered.low : ordered.high, tags, part % 2);
}

/* The keys of eight scores whose first has id `first`; in any order, for the id is in the key. */
static inline void block_keys(block scores, uint32_t first, keys *out) {
    __m128i tags = _mm_sub_epi64(_mm_set1_epi64x((int64_t)key_tag(first)), _mm_set_epi64x(2, 0));
    ordered_block ordered = block_ordered(scores);
    out[0] = ordered_keys(ordered, tags, 0);
    out[1] = ordered_keys(ordered, _mm_sub_epi64(tags, _mm_set1_epi64x(1)), 1);
    out[2] = ordered_keys(ordered, _mm_sub_epi64(tags, _mm_set1_epi64x(4)), 2);
    out[3] = ordered_keys(ordered, _mm_sub_epi64(tags, _mm_set1_epi64x(5)), 3);
}

/* Lanes `distance` apart, exchanged; and the bits of the first one. */
static inline block block_exchange(block a, uint32_t distance) {
    return distance == 4   ? (block){a.high, a.low}
           : distance == 2 ? (block){_mm_shuffle_ps(a.low, a.low, 0x4E), _mm_shuffle_ps(a.high, a.high, 0x4E)}
                           : (block){_mm_shuffle_ps(a.low, a.low, 0xB1), _mm_shuffle_ps(a.high, a.high, 0xB1)};
}
static inline uint32_t block_first(block a) { return (uint32_t)_mm_cvtsi128_si32(_mm_castps_si128(a.low)); }

/* The integers from 0 on, as bits; and those that follow on some. */
static inline block block_count(void) {
    return (block){_mm_castsi128_ps(_mm_setr_epi32(0, 1, 2, 3)), _mm_castsi128_ps(_mm_setr_epi32(4, 5, 6, 7))};
}
static inline __m128 half_count_on(__m128 a) {
    return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a), _mm_set1_epi32(8)));
}
static inline block block_count_on(block a) { return (block){half_count_on(a.low), half_count_on(a.high)}; }
/* The scores, of whose bits `kept` stays and `tags` take the others' place. */
static inline block block_tagged(block scores, block tags, block kept) { return block_or(block_and(scores, kept), tags); }
static inline block block_tags(block tagged, block kept) { return BLOCK_EACH(_mm_andnot_ps, kept, tagged); }
/* Lane i of column ids[i], for every lane. */
static inline block column_gather(const float *columns, const int32_t *ids) {
#define LANE(i) columns[(uint32_t)ids[i] * BLOCK_LANES + (i)]
    return (block){_mm_setr_ps(LANE(0), LANE(1), LANE(2), LANE(3)), _mm_setr_ps(LANE(4), LANE(5), LANE(6), LANE(7))};
#undef LANE
}

/* Of rows of eight floats, one to a lane, those at `ids`. */
static inline block rows_gather(const float *rows, block ids) {
    int32_t at[BLOCK_LANES];
    block_store((float *)at, ids);
#define LANE(i) rows[(i) * 8 + (uint32_t)at[i]]
    return (block){_mm_setr_ps(LANE(0), LANE(1), LANE(2), LANE(3)), _mm_setr_ps(LANE(4), LANE(5), LANE(6), LANE(7))};
#undef LANE
}

/* Eight floats each of eight rows that are `stride` apart, as a block for each of the eight. */
static inline void block_transpose(const float *rows, size_t stride, block *out) {
    for (uint32_t half = 0; half < 2; half++, rows += 4, out += 4) {
        __m128 r[8];
        for (uint32_t i = 0; i < 8; i++) r[i] = _mm_loadu_ps(rows + i * stride);
        _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
        _MM_TRANSPOSE4_PS(r[4], r[5], r[6], r[7]);
        for (uint32_t i = 0; i < 4; i++) out[i] = (block){r[i], r[4 + i]};
    }
}

/* The reverse of two blocks: their lanes in turn. */
static inline void block_store_pairs(block a, block b, float *to) {
    block_store(to, (block){_mm_unpacklo_ps(a.low, b.low), _mm_unpackhi_ps(a.low, b.low)});
    block_store(to + 8, (block){_mm_unpacklo_ps(a.high, b.high), _mm_unpackhi_ps(a.high, b.high)});
}

/* The reverse, of four blocks or eight: lane i of all of them to to[i * stride]. Each row overruns into the next one's
 * place, the last one beyond. */
static inline void block_store_rows(const block *in, uint32_t count, float *to, uint32_t stride) {
    __m128 quads[2][8]; /* eight rows of four */
    for (uint32_t half = 0; half < count / 4; half++, in += 4) {
        for (uint32_t i = 0; i < 4; i++) quads[half][i] = in[i].low, quads[half][4 + i] = in[i].high;
        _MM_TRANSPOSE4_PS(quads[half][0], quads[half][1], quads[half][2], quads[half][3]);
        _MM_TRANSPOSE4_PS(quads[half][4], quads[half][5], quads[half][6], quads[half][7]);
    }
    for (uint32_t i = 0; i < 8; i++, to += stride) {
        _mm_storeu_ps(to, quads[0][i]);
        if (count == 8) _mm_storeu_ps(to + 4, quads[1][i]);
    }
}

#endif
