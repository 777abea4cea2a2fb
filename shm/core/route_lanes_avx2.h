/* What the vector kernels need of AVX2: blocks of eight floats, and vectors of four keys. */
#ifndef HOTSET_ROUTE_LANES_AVX2_H
#define HOTSET_ROUTE_LANES_AVX2_H

#include "route_keys.h"
#include "route_softmax.h"

#include <immintrin.h>

#define ROUTE_AVX512 0
#define BLOCK_LANES 8u
#define KEY_LANES 4u

typedef __m256 block, lane_mask;
typedef __m256d keys;

static inline block block_load(const float *from) { return _mm256_loadu_ps(from); }
/* The first `count` floats, then `fill`. */
static inline block block_load_padded(const float *from, uint32_t count, float fill) {
    __m256i given = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(from, given), _mm256_castsi256_ps(given));
}
static inline void block_store(float *to, block a) { _mm256_storeu_ps(to, a); }
static inline block block_all(float value) { return _mm256_set1_ps(value); }
static inline block block_add(block a, block b) { return _mm256_add_ps(a, b); }
static inline block block_sub(block a, block b) { return _mm256_sub_ps(a, b); }
static inline block block_mul(block a, block b) { return _mm256_mul_ps(a, b); }
static inline block block_div(block a, block b) { return _mm256_div_ps(a, b); }
static inline block block_max(block a, block b) { return _mm256_max_ps(a, b); }
static inline block block_min(block a, block b) { return _mm256_min_ps(a, b); }
static inline block block_and(block a, block b) { return _mm256_and_ps(a, b); }
static inline block block_or(block a, block b) { return _mm256_or_ps(a, b); }
static inline block block_xor(block a, block b) { return _mm256_xor_ps(a, b); }
static inline int block_is_zero(block a) { return _mm256_testz_si256(_mm256_castps_si256(a), _mm256_castps_si256(a)); }

static inline lane_mask block_at_least(block a, block b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
static inline lane_mask block_equal(block a, block b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline lane_mask block_above(block a, block b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline lane_mask mask_or(lane_mask a, lane_mask b) { return block_or(a, b); }
static inline lane_mask mask_and(lane_mask a, lane_mask b) { return block_and(a, b); }
/* A bit per lane. */
static inline uint32_t mask_bits(lane_mask mask) { return (uint32_t)_mm256_movemask_ps(mask); }
static inline lane_mask mask_from_bits(uint32_t bits) {
    const __m256i weight = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), weight), weight));
}
/* `a` where the mask is set, zero elsewhere. */
static inline block block_where(lane_mask mask, block a) { return block_and(mask, a); }
/* `a` where the mask is set, else `b`. */
static inline block block_choose(lane_mask mask, block a, block b) { return _mm256_blendv_ps(b, a, mask); }
/* All ones where the mask is set, zero elsewhere. */
static inline block block_from_mask(lane_mask mask) { return mask; }

/* t less the nearest integer, which is in the low bits of `whole`; |t| < 2^22. And a * 2^whole. */
static inline block block_fraction(block t, block *whole) {
    block rounder = _mm256_set1_ps(SOFTMAX_ROUNDER);
    *whole = _mm256_add_ps(t, rounder);
    return _mm256_sub_ps(t, _mm256_sub_ps(*whole, rounder));
}
static inline block block_scale(block a, block whole) {
    __m256i n = _mm256_slli_epi32(_mm256_castps_si256(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n));
}

#define BLOCK_FOLD(a, op)                                                            \
    __m128 half = op(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));        \
    half = op(half, _mm_movehl_ps(half, half));                                      \
    return _mm_cvtss_f32(op(half, _mm_shuffle_ps(half, half, 1)));

static inline float block_fold_sum(block a) { BLOCK_FOLD(a, _mm_add_ps) }
static inline float block_fold_max(block a) { BLOCK_FOLD(a, _mm_max_ps) }
static inline float block_fold_min(block a) { BLOCK_FOLD(a, _mm_min_ps) }

/* The eight floats of `from` at `ids`. Not a gather, which takes longer. */
static inline block block_eight(const float *from, const int32_t *ids) {
    __m128 low = _mm_setr_ps(from[ids[0]], from[ids[1]], from[ids[2]], from[ids[3]]);
    __m128 high = _mm_setr_ps(from[ids[4]], from[ids[5]], from[ids[6]], from[ids[7]]);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}
/* Of the first eight lanes: here, of all. */
static inline float eight_fold_sum(block a) { return block_fold_sum(a); }
static inline float eight_fold_max(block a) { return block_fold_max(a); }
static inline float eight_fold_min(block a) { return block_fold_min(a); }
/* The first `count` lanes. */
static inline void block_store_first(float *to, block a, uint32_t count) {
    __m256i given = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    _mm256_maskstore_ps(to, given, a);
}

static inline keys keys_max(keys a, keys b) { return _mm256_max_pd(a, b); }
static inline keys keys_min(keys a, keys b) { return _mm256_min_pd(a, b); }
static inline uint64_t keys_first(keys a) { return (uint64_t)_mm_cvtsi128_si64(_mm_castpd_si128(_mm256_castpd256_pd128(a))); }
/* Lanes `distance` apart, exchanged. */
static inline keys keys_exchange(keys a, uint32_t distance) {
    return distance == 2 ? _mm256_permute2f128_pd(a, a, 1) : _mm256_permute_pd(a, 5);
}

/* Integers that order like the scores. */
typedef __m256i ordered_block;
static inline ordered_block block_ordered(block scores) {
    __m256i bits = _mm256_castps_si256(scores);
    __m256i sign = _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_si256(bits, sign);
}

/* Of eight scores those in even lanes or those in odd ones as keys; `tags`: what the score leaves free of each. */
static inline keys ordered_keys(ordered_block ordered, __m256i tags, uint32_t odd) {
    const __m256i place = _mm256_set1_epi64x(KEY_SCORE_MASK);
    __m256i placed = odd ? _mm256_srli_epi64(ordered, 12) : _mm256_slli_epi64(ordered, 20);
    return _mm256_castsi256_pd(_mm256_or_si256(_mm256_and_si256(placed, place), tags));
}

/* The keys of eight scores whose first has id `first`; in any order, for the id is in the key. */
static inline void block_keys(block scores, uint32_t first, keys *out) {
    __m256i tags = _mm256_sub_epi64(_mm256_set1_epi64x((int64_t)key_tag(first)), _mm256_setr_epi64x(0, 2, 4, 6));
    out[0] = ordered_keys(block_ordered(scores), tags, 0);
    out[1] = ordered_keys(block_ordered(scores), _mm256_sub_epi64(tags, _mm256_set1_epi64x(1)), 1);
}

/* Lanes `distance` apart, exchanged; and the bits of the first one. */
static inline block block_exchange(block a, uint32_t distance) {
    return distance == 4   ? _mm256_permute2f128_ps(a, a, 1)
           : distance == 2 ? _mm256_permute_ps(a, 0x4E)
                           : _mm256_permute_ps(a, 0xB1);
}
static inline uint32_t block_first(block a) { return (uint32_t)_mm_cvtsi128_si32(_mm_castps_si128(_mm256_castps256_ps128(a))); }

/* The integers from 0 on, as bits; and those that follow on some. */
static inline block block_count(void) { return _mm256_castsi256_ps(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
static inline block block_count_on(block a) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(8)));
}
/* The scores, of whose bits `kept` stays and `tags` take the others' place. */
static inline block block_tagged(block scores, block tags, block kept) {
    return _mm256_or_ps(_mm256_and_ps(scores, kept), tags);
}
static inline block block_tags(block tagged, block kept) { return _mm256_andnot_ps(kept, tagged); }
/* Lane i of column ids[i], for every lane. */
static inline block column_gather(const float *columns, const int32_t *ids) {
    __m256i lanes = _mm256_castps_si256(block_count());
    __m256i at = _mm256_or_si256(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)ids), 3), lanes);
    return _mm256_i32gather_ps(columns, at, sizeof *columns);
}

/* Of rows of eight floats, one to a lane, those at `ids`. */
static inline block rows_gather(const float *rows, block ids) {
    __m256i firsts = _mm256_slli_epi32(_mm256_castps_si256(block_count()), 3);
    return _mm256_i32gather_ps(rows, _mm256_or_si256(firsts, _mm256_castps_si256(ids)), sizeof *rows);
}

/* Eight floats each of eight rows that are `stride` apart, as a block for each of the eight. */
static inline void block_transpose(const float *rows, size_t stride, block *out) {
    for (uint32_t half = 0; half < 2; half++, rows += 4, out += 4) {
        __m256 r[4];
        for (uint32_t i = 0; i < 4; i++)
            r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows + i * stride)),
                                        _mm_loadu_ps(rows + (i + 4) * stride), 1);
        __m256 low01 = _mm256_unpacklo_ps(r[0], r[1]), high01 = _mm256_unpackhi_ps(r[0], r[1]);
        __m256 low23 = _mm256_unpacklo_ps(r[2], r[3]), high23 = _mm256_unpackhi_ps(r[2], r[3]);
        out[0] = _mm256_shuffle_ps(low01, low23, 0x44);
        out[1] = _mm256_shuffle_ps(low01, low23, 0xEE);
        out[2] = _mm256_shuffle_ps(high01, high23, 0x44);
        out[3] = _mm256_shuffle_ps(high01, high23, 0xEE);
    }
}

/* The reverse of two blocks: their lanes in turn. */
static inline void block_store_pairs(block a, block b, float *to) {
    block low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    block_store(to, _mm256_permute2f128_ps(low, high, 0x20));
    block_store(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

/* The reverse, of four blocks or eight: lane i of all of them to to[i * stride]. Each row overruns into the next one's
 * place, the last one beyond. */
static inline void block_store_rows(const block *in, uint32_t count, float *to, uint32_t stride) {
    __m256 quads[2][4]; /* half by half four rows of four */
    for (uint32_t half = 0; half < count / 4; half++, in += 4) {
        __m256 low01 = _mm256_unpacklo_ps(in[0], in[1]), high01 = _mm256_unpackhi_ps(in[0], in[1]);
        __m256 low23 = _mm256_unpacklo_ps(in[2], in[3]), high23 = _mm256_unpackhi_ps(in[2], in[3]);
        quads[half][0] = _mm256_shuffle_ps(low01, low23, 0x44);
        quads[half][1] = _mm256_shuffle_ps(low01, low23, 0xEE);
        quads[half][2] = _mm256_shuffle_ps(high01, high23, 0x44);
        quads[half][3] = _mm256_shuffle_ps(high01, high23, 0xEE);
    }
    for (uint32_t i = 0; i < 4; i++, to += stride) {
        _mm_storeu_ps(to, _mm256_castps256_ps128(quads[0][i]));
        if (count == 8) _mm_storeu_ps(to + 4, _mm256_castps256_ps128(quads[1][i]));
    }
    for (uint32_t i = 0; i < 4; i++, to += stride) {
        _mm_storeu_ps(to, _mm256_extractf128_ps(quads[0][i], 1));
        if (count == 8) _mm_storeu_ps(to + 4, _mm256_extractf128_ps(quads[1][i], 1));
    }
}

#endif
