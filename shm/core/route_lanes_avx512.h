/* What the vector kernels need of AVX-512: blocks of sixteen floats, and vectors of eight keys. */
#ifndef HOTSET_ROUTE_LANES_AVX512_H
#define HOTSET_ROUTE_LANES_AVX512_H

#include "route_keys.h"

#include <immintrin.h>

#define ROUTE_AVX512 1
#define BLOCK_LANES 16u
#define KEY_LANES 8u

typedef __m512 block;
typedef __mmask16 lane_mask;
typedef __m512d keys;

static inline block block_load(const float *from) { return _mm512_loadu_ps(from); }
/* The first `count` floats, then `fill`. */
static inline block block_load_padded(const float *from, uint32_t count, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << count) - 1), from);
}
static inline void block_store(float *to, block a) { _mm512_storeu_ps(to, a); }
static inline block block_all(float value) { return _mm512_set1_ps(value); }
static inline block block_add(block a, block b) { return _mm512_add_ps(a, b); }
static inline block block_sub(block a, block b) { return _mm512_sub_ps(a, b); }
static inline block block_mul(block a, block b) { return _mm512_mul_ps(a, b); }
static inline block block_div(block a, block b) { return _mm512_div_ps(a, b); }
static inline block block_max(block a, block b) { return _mm512_max_ps(a, b); }
static inline block block_min(block a, block b) { return _mm512_min_ps(a, b); }
static inline block block_and(block a, block b) { return _mm512_and_ps(a, b); }
static inline block block_or(block a, block b) { return _mm512_or_ps(a, b); }
static inline block block_xor(block a, block b) { return _mm512_xor_ps(a, b); }
static inline int block_is_zero(block a) { return !_mm512_test_epi32_mask(_mm512_castps_si512(a), _mm512_castps_si512(a)); }

static inline lane_mask block_at_least(block a, block b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline lane_mask block_equal(block a, block b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline lane_mask block_above(block a, block b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline lane_mask mask_or(lane_mask a, lane_mask b) { return _kor_mask16(a, b); }
static inline lane_mask mask_and(lane_mask a, lane_mask b) { return _kand_mask16(a, b); }
/* A bit per lane. */
static inline uint32_t mask_bits(lane_mask mask) { return mask; }
static inline lane_mask mask_from_bits(uint32_t bits) { return (lane_mask)bits; }
/* `a` where the mask is set, zero elsewhere. */
static inline block block_where(lane_mask mask, block a) { return _mm512_maskz_mov_ps(mask, a); }
/* `a` where the mask is set, else `b`. */
static inline block block_choose(lane_mask mask, block a, block b) { return _mm512_mask_mov_ps(b, mask, a); }
/* All ones where the mask is set, zero elsewhere. */
static inline block block_from_mask(lane_mask mask) { return _mm512_castsi512_ps(_mm512_movm_epi32(mask)); }

/* t less the nearest integer, `whole`; |t| < 2^22. And a * 2^whole. */
static inline block block_fraction(block t, block *whole) {
    block fraction = _mm512_reduce_ps(t, 0);
    *whole = _mm512_sub_ps(t, fraction);
    return fraction;
}
static inline block block_scale(block a, block whole) { return _mm512_scalef_ps(a, whole); }

#define BLOCK_FOLD(a, op)                                                                   \
    __m256 eight = op##256_(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));       \
    __m128 four = op##128_(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    four = op##128_(four, _mm_movehl_ps(four, four));                                       \
    return _mm_cvtss_f32(op##128_(four, _mm_shuffle_ps(four, four, 1)));
#define ADD256_(a, b) _mm256_add_ps(a, b)
#define ADD128_(a, b) _mm_add_ps(a, b)
#define MAX256_(a, b) _mm256_max_ps(a, b)
#define MAX128_(a, b) _mm_max_ps(a, b)
#define MIN256_(a, b) _mm256_min_ps(a, b)
#define MIN128_(a, b) _mm_min_ps(a, b)

static inline float block_fold_sum(block a) { BLOCK_FOLD(a, ADD) }
static inline float block_fold_max(block a) { BLOCK_FOLD(a, MAX) }
static inline float block_fold_min(block a) { BLOCK_FOLD(a, MIN) }

/* The eight floats of `from` at `ids`; the other lanes hold zeros. Not a gather, which takes longer. */
static inline block block_eight(const float *from, const int32_t *ids) {
    __m128 low = _mm_setr_ps(from[ids[0]], from[ids[1]], from[ids[2]], from[ids[3]]);
    __m128 high = _mm_setr_ps(from[ids[4]], from[ids[5]], from[ids[6]], from[ids[7]]);
    return _mm512_zextps256_ps512(_mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1));
}
#define EIGHT_FOLD(a, op)                                                                   \
    __m128 four = op##128_(_mm512_castps512_ps128(a), _mm512_extractf32x4_ps(a, 1));        \
    four = op##128_(four, _mm_movehl_ps(four, four));                                       \
    return _mm_cvtss_f32(op##128_(four, _mm_shuffle_ps(four, four, 1)));
/* Of the first eight lanes; the sum of the same bits as if zeros followed. */
static inline float eight_fold_sum(block a) { EIGHT_FOLD(a, ADD) }
static inline float eight_fold_max(block a) { EIGHT_FOLD(a, MAX) }
static inline float eight_fold_min(block a) { EIGHT_FOLD(a, MIN) }
/* The first `count` lanes. */
static inline void block_store_first(float *to, block a, uint32_t count) {
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), a);
}

static inline keys keys_max(keys a, keys b) { return _mm512_max_pd(a, b); }
static inline keys keys_min(keys a, keys b) { return _mm512_min_pd(a, b); }
static inline uint64_t keys_first(keys a) { return (uint64_t)_mm_cvtsi128_si64(_mm_castpd_si128(_mm512_castpd512_pd128(a))); }
/* Lanes `distance` apart, exchanged. */
static inline keys keys_exchange(keys a, uint32_t distance) {
    return distance == 4   ? _mm512_shuffle_f64x2(a, a, 0x4E)
           : distance == 2 ? _mm512_permutex_pd(a, 0x4E)
                           : _mm512_permute_pd(a, 0x55);
}

/* Integers that order like the scores. */
typedef __m512i ordered_block;
static inline ordered_block block_ordered(block scores) {
    __m512i bits = _mm512_castps_si512(scores);
    __m512i sign = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MIN));
    return _mm512_xor_si512(bits, sign);
}

/* Of sixteen scores those in even lanes or those in odd ones as keys; `tags`: what the score leaves free of each. */
static inline keys ordered_keys(ordered_block ordered, __m512i tags, uint32_t odd) {
    const __m512i place = _mm512_set1_epi64(KEY_SCORE_MASK);
    __m512i placed = odd ? _mm512_srli_epi64(ordered, 12) : _mm512_slli_epi64(ordered, 20);
    return _mm512_castsi512_pd(_mm512_or_si512(_mm512_and_si512(placed, place), tags));
}

/* The keys of sixteen scores whose first has id `first`; in any order, for the id is in the key. */
static inline void block_keys(block scores, uint32_t first, keys *out) {
    __m512i tags = _mm512_sub_epi64(_mm512_set1_epi64((int64_t)key_tag(first)), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
    out[0] = ordered_keys(block_ordered(scores), tags, 0);
    out[1] = ordered_keys(block_ordered(scores), _mm512_sub_epi64(tags, _mm512_set1_epi64(1)), 1);
}

/* Lanes `distance` apart, exchanged; and the bits of the first one. */
static inline block block_exchange(block a, uint32_t distance) {
    return distance == 8   ? _mm512_shuffle_f32x4(a, a, 0x4E)
           : distance == 4 ? _mm512_shuffle_f32x4(a, a, 0xB1)
           : distance == 2 ? _mm512_permute_ps(a, 0x4E)
                           : _mm512_permute_ps(a, 0xB1);
}
static inline uint32_t block_first(block a) { return (uint32_t)_mm_cvtsi128_si32(_mm_castps_si128(_mm512_castps512_ps128(a))); }

/* The integers from 0 on, as bits; and those that follow on some. */
static inline block block_count(void) {
    return _mm512_castsi512_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
static inline block block_count_on(block a) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(16)));
}
/* The scores, of whose bits `kept` stays and `tags` take the others' place. */
static inline block block_tagged(block scores, block tags, block kept) {
    const int kept_or_tag = 0xEA; /* (a & b) | c */
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(scores), _mm512_castps_si512(kept),
                                                         _mm512_castps_si512(tags), kept_or_tag));
}
static inline block block_tags(block tagged, block kept) { return _mm512_andnot_ps(kept, tagged); }
/* Lane i of column ids[i], for every lane. */
static inline block column_gather(const float *columns, const int32_t *ids) {
    __m512i lanes = _mm512_castps_si512(block_count());
    __m512i at = _mm512_or_si512(_mm512_slli_epi32(_mm512_loadu_si512(ids), 4), lanes);
    return _mm512_i32gather_ps(at, columns, sizeof *columns);
}

/* Of rows of eight floats, one to a lane, those at `ids`. */
static inline block rows_gather(const float *rows, block ids) {
    __m512i firsts = _mm512_slli_epi32(_mm512_castps_si512(block_count()), 3);
    return _mm512_i32gather_ps(_mm512_or_si512(firsts, _mm512_castps_si512(ids)), rows, sizeof *rows);
}

/* Eight floats each of sixteen rows that are `stride` apart, as a block for each of the eight. */
static inline void block_transpose(const float *rows, size_t stride, block *out) {
    for (uint32_t half = 0; half < 2; half++, rows += 4, out += 4) {
        __m512 r[4];
        for (uint32_t i = 0; i < 4; i++) {
            r[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows + i * stride));
            r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(rows + (i + 4) * stride), 1);
            r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(rows + (i + 8) * stride), 2);
            r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(rows + (i + 12) * stride), 3);
        }
        /* Quarter by quarter the four rows that go into four neighbouring lanes. */
        __m512 low01 = _mm512_unpacklo_ps(r[0], r[1]), high01 = _mm512_unpackhi_ps(r[0], r[1]);
        __m512 low23 = _mm512_unpacklo_ps(r[2], r[3]), high23 = _mm512_unpackhi_ps(r[2], r[3]);
        out[0] = _mm512_shuffle_ps(low01, low23, 0x44);
        out[1] = _mm512_shuffle_ps(low01, low23, 0xEE);
        out[2] = _mm512_shuffle_ps(high01, high23, 0x44);
        out[3] = _mm512_shuffle_ps(high01, high23, 0xEE);
    }
}

/* The reverse of two blocks: their lanes in turn. */
static inline void block_store_pairs(block a, block b, float *to) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    block_store(to, _mm512_permutex2var_ps(a, low, b));
    block_store(to + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b));
}

/* The reverse, of four blocks or eight: lane i of all of them to to[i * stride]. Each row overruns into the next one's
 * place, the last one beyond. */
static inline void block_store_rows(const block *in, uint32_t count, float *to, uint32_t stride) {
    __m512 quads[2][4]; /* quarter by quarter four rows of four */
    for (uint32_t half = 0; half < count / 4; half++, in += 4) {
        __m512 low01 = _mm512_unpacklo_ps(in[0], in[1]), high01 = _mm512_unpackhi_ps(in[0], in[1]);
        __m512 low23 = _mm512_unpacklo_ps(in[2], in[3]), high23 = _mm512_unpackhi_ps(in[2], in[3]);
        quads[half][0] = _mm512_shuffle_ps(low01, low23, 0x44);
        quads[half][1] = _mm512_shuffle_ps(low01, low23, 0xEE);
        quads[half][2] = _mm512_shuffle_ps(high01, high23, 0x44);
        quads[half][3] = _mm512_shuffle_ps(high01, high23, 0xEE);
    }
#define STORE_QUARTER(quarter)                                                                                       \
    for (uint32_t i = 0; i < 4; i++, to += stride) {                                                                 \
        _mm_storeu_ps(to, _mm512_extractf32x4_ps(quads[0][i], quarter));                                             \
        if (count == 8) _mm_storeu_ps(to + 4, _mm512_extractf32x4_ps(quads[1][i], quarter));                         \
    }
    STORE_QUARTER(0)
    STORE_QUARTER(1)
    STORE_QUARTER(2)
    STORE_QUARTER(3)
#undef STORE_QUARTER
}

#endif
