/* What the vector kernels need of AVX-512: blocks of sixteen floats, and vectors of eight keys. */
#ifndef HOTSET_ROUTE_LANES_AVX512_H
#define HOTSET_ROUTE_LANES_AVX512_H

#include <immintrin.h>
#include <stdint.h>

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
static inline block block_max(block a, block b) { return _mm512_max_ps(a, b); }
static inline block block_min(block a, block b) { return _mm512_min_ps(a, b); }
static inline block block_and(block a, block b) { return _mm512_and_ps(a, b); }
static inline block block_or(block a, block b) { return _mm512_or_ps(a, b); }
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
/* All ones where the mask is set, zero elsewhere. */
static inline block block_from_mask(lane_mask mask) { return _mm512_castsi512_ps(_mm512_movm_epi32(mask)); }

/* a * 2^n, n in the low bits of `rounded` */
static inline block block_scale(block a, block rounded) {
    __m512i n = _mm512_slli_epi32(_mm512_castps_si512(rounded), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), n));
}

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

static inline keys keys_max(keys a, keys b) { return _mm512_max_pd(a, b); }
static inline keys keys_min(keys a, keys b) { return _mm512_min_pd(a, b); }
static inline uint64_t keys_first(keys a) { return (uint64_t)_mm_cvtsi128_si64(_mm_castpd_si128(_mm512_castpd512_pd128(a))); }
/* Lanes `distance` apart, exchanged. */
static inline keys keys_exchange(keys a, uint32_t distance) {
    return distance == 4   ? _mm512_shuffle_f64x2(a, a, 0x4E)
           : distance == 2 ? _mm512_permutex_pd(a, 0x4E)
                           : _mm512_permute_pd(a, 0x55);
}

/* The keys of sixteen scores whose first has id `first`: see route_network.h. In any order, for the id is in the key. */
static inline void block_keys(block scores, uint32_t first, keys *out) {
    const __m512i lane = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 12);
    const __m512i exponent = _mm512_set1_epi64(0x3FF0000000000000);
    __m512i bits = _mm512_castps_si512(scores);
    __m512i sign = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MIN));
    __m512i ordered = _mm512_xor_si512(bits, sign);
    __m512i inverted = _mm512_sub_epi32(_mm512_set1_epi32((int)((0xFFFFFu - first) << 12)), lane);
    __m512i low = _mm512_srli_epi64(_mm512_unpacklo_epi32(inverted, ordered), 12);
    __m512i high = _mm512_srli_epi64(_mm512_unpackhi_epi32(inverted, ordered), 12);
    out[0] = _mm512_castsi512_pd(_mm512_or_si512(low, exponent));
    out[1] = _mm512_castsi512_pd(_mm512_or_si512(high, exponent));
}

#endif
