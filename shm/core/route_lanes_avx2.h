/* What the vector kernels need of AVX2: blocks of eight floats, and vectors of four keys. */
#ifndef HOTSET_ROUTE_LANES_AVX2_H
#define HOTSET_ROUTE_LANES_AVX2_H

#include <immintrin.h>
#include <stdint.h>

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
static inline block block_max(block a, block b) { return _mm256_max_ps(a, b); }
static inline block block_min(block a, block b) { return _mm256_min_ps(a, b); }
static inline block block_and(block a, block b) { return _mm256_and_ps(a, b); }
static inline block block_or(block a, block b) { return _mm256_or_ps(a, b); }
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
/* All ones where the mask is set, zero elsewhere. */
static inline block block_from_mask(lane_mask mask) { return mask; }

/* a * 2^n, n in the low bits of `rounded` */
static inline block block_scale(block a, block rounded) {
    __m256i n = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n));
}

#define BLOCK_FOLD(a, op)                                                            \
    __m128 half = op(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));        \
    half = op(half, _mm_movehl_ps(half, half));                                      \
    return _mm_cvtss_f32(op(half, _mm_shuffle_ps(half, half, 1)));

static inline float block_fold_sum(block a) { BLOCK_FOLD(a, _mm_add_ps) }
static inline float block_fold_max(block a) { BLOCK_FOLD(a, _mm_max_ps) }
static inline float block_fold_min(block a) { BLOCK_FOLD(a, _mm_min_ps) }

static inline keys keys_max(keys a, keys b) { return _mm256_max_pd(a, b); }
static inline keys keys_min(keys a, keys b) { return _mm256_min_pd(a, b); }
static inline uint64_t keys_first(keys a) { return (uint64_t)_mm_cvtsi128_si64(_mm_castpd_si128(_mm256_castpd256_pd128(a))); }
/* Lanes `distance` apart, exchanged. */
static inline keys keys_exchange(keys a, uint32_t distance) {
    return distance == 2 ? _mm256_permute2f128_pd(a, a, 1) : _mm256_permute_pd(a, 5);
}

/* The keys of eight scores whose first has id `first`: see route_network.h. In any order, for the id is in the key. */
static inline void block_keys(block scores, uint32_t first, keys *out) {
    const __m256i lane = _mm256_setr_epi32(0, 1 << 12, 2 << 12, 3 << 12, 4 << 12, 5 << 12, 6 << 12, 7 << 12);
    const __m256i exponent = _mm256_set1_epi64x(0x3FF0000000000000);
    __m256i bits = _mm256_castps_si256(scores);
    __m256i sign = _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MIN));
    __m256i ordered = _mm256_xor_si256(bits, sign);
    __m256i inverted = _mm256_sub_epi32(_mm256_set1_epi32((int)((0xFFFFFu - first) << 12)), lane);
    __m256i low = _mm256_srli_epi64(_mm256_unpacklo_epi32(inverted, ordered), 12);
    __m256i high = _mm256_srli_epi64(_mm256_unpackhi_epi32(inverted, ordered), 12);
    out[0] = _mm256_castsi256_pd(_mm256_or_si256(low, exponent));
    out[1] = _mm256_castsi256_pd(_mm256_or_si256(high, exponent));
}

#endif
