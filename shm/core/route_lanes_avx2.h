/* What the vector kernels need of AVX2: blocks of eight floats, and vectors of four keys. */
#ifndef HOTSET_ROUTE_LANES_AVX2_H
#define HOTSET_ROUTE_LANES_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#define KEY_LANES 4u

typedef __m256 block;
typedef __m256d keys;

static inline block block_load(const float *from) { return _mm256_loadu_ps(from); }
static inline void block_store(float *to, block a) { _mm256_storeu_ps(to, a); }
static inline block block_all(float value) { return _mm256_set1_ps(value); }
static inline block block_add(block a, block b) { return _mm256_add_ps(a, b); }
static inline block block_sub(block a, block b) { return _mm256_sub_ps(a, b); }
static inline block block_mul(block a, block b) { return _mm256_mul_ps(a, b); }
static inline block block_max(block a, block b) { return _mm256_max_ps(a, b); }
static inline block block_min(block a, block b) { return _mm256_min_ps(a, b); }
static inline block block_and(block a, block b) { return _mm256_and_ps(a, b); }
static inline block block_or(block a, block b) { return _mm256_or_ps(a, b); }
static inline block block_at_least(block a, block b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
static inline block block_equal(block a, block b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline block block_above(block a, block b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
/* A bit per lane that is set in a mask. */
static inline uint32_t block_bits(block mask) { return (uint32_t)_mm256_movemask_ps(mask); }
/* A mask added up: how often each lane was set; and the sum of all lanes. */
typedef __m256i counts;
static inline counts counts_none(void) { return _mm256_setzero_si256(); }
static inline counts counts_add(counts a, block mask) { return _mm256_sub_epi32(a, _mm256_castps_si256(mask)); }
static inline uint32_t counts_sum(counts a) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}
static inline int block_is_zero(block a) { return _mm256_testz_si256(_mm256_castps_si256(a), _mm256_castps_si256(a)); }

/* The eight low bits, as a mask. */
static inline block block_from_bits(uint32_t bits) {
    const __m256i weight = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), weight), weight));
}

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

/* Lanes `distance` apart, exchanged. */
static inline block block_exchange(block a, uint32_t distance) {
    return distance == 4 ? _mm256_permute2f128_ps(a, a, 1)
                         : distance == 2 ? _mm256_permute_ps(a, 0x4E) : _mm256_permute_ps(a, 0xB1);
}
/* Lanes 0 and 1 of four blocks. */
static inline block block_gather_pairs(const block *r) {
    __m128 low = _mm_movelh_ps(_mm256_castps256_ps128(r[0]), _mm256_castps256_ps128(r[1]));
    __m128 high = _mm_movelh_ps(_mm256_castps256_ps128(r[2]), _mm256_castps256_ps128(r[3]));
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}

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
