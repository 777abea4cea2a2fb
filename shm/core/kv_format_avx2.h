/* kv_format.h with AVX2 and F16C: the same operations in the same order on eight values at a time. */
#ifndef HOTSET_KV_FORMAT_AVX2_H
#define HOTSET_KV_FORMAT_AVX2_H

#include <immintrin.h>

#define KV_AVX2 __attribute__((target("avx2,f16c")))

KV_AVX2 static inline __m256i kv_magnitudes(__m256 x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

KV_AVX2 static inline uint32_t kv_fold_max(__m256i a) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
    return (uint32_t)_mm_cvtsi128_si32(half);
}

KV_AVX2 static inline int kv_any_refused_avx2(enum kv_format format, const float *values, size_t count) {
    __m256i largest = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 8 <= count; i += 8) largest = _mm256_max_epi32(largest, kv_magnitudes(_mm256_loadu_ps(values + i)));
    return kv_fold_max(largest) >= kv_refused_bits(format) || kv_find_refused(format, values + i, count - i) >= 0;
}

/* The four vectors of a block and the largest magnitude among them. */
struct kv_block_avx2 {
    __m256 part[4];
    uint32_t largest;
};

KV_AVX2 static inline struct kv_block_avx2 kv_load_block(const float *x) {
    struct kv_block_avx2 b;
    for (int p = 0; p < 4; p++) b.part[p] = _mm256_loadu_ps(x + 8 * p);
    b.largest = kv_fold_max(_mm256_max_epi32(_mm256_max_epi32(kv_magnitudes(b.part[0]), kv_magnitudes(b.part[1])),
                                             _mm256_max_epi32(kv_magnitudes(b.part[2]), kv_magnitudes(b.part[3]))));
    return b;
}

KV_AVX2 static inline void kv_store_scale(uint8_t *out, float scale) {
    kv_store_u16(out, (uint16_t)_cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT));
}

/* kv_round_plain */
KV_AVX2 static inline __m256i kv_round(__m256 x) {
    __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    __m256 fraction = _mm256_sub_ps(x, whole);
    return _mm256_add_epi32(_mm256_cvttps_epi32(whole), _mm256_cvttps_epi32(_mm256_add_ps(fraction, fraction)));
}

KV_AVX2 static inline void kv_encode_q8_0_avx2(const float *x, uint8_t *out) {
    struct kv_block_avx2 b = kv_load_block(x);
    float scale = float_from_bits(b.largest) / 127.0f;
    __m256 inverse = _mm256_set1_ps(kv_inverse(scale));
    __m256i number[4];
    for (int p = 0; p < 4; p++) number[p] = kv_round(_mm256_mul_ps(b.part[p], inverse));
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(number[0], number[1]), _mm256_packs_epi32(number[2], number[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); /* packs works per half */
    kv_store_scale(out, scale);
    _mm256_storeu_si256((__m256i *)(out + 2), packed);
}

KV_AVX2 static inline void kv_encode_q4_0_avx2(const float *x, uint8_t *out) {
    struct kv_block_avx2 b = kv_load_block(x);
    __m256i largest = _mm256_set1_epi32((int)b.largest);
    uint32_t equal = 0; /* the first of equal magnitudes decides the sign */
    for (int p = 0; p < 4; p++) {
        __m256i same = _mm256_cmpeq_epi32(kv_magnitudes(b.part[p]), largest);
        equal |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(same)) << 8 * p;
    }
    float scale = x[__builtin_ctz(equal)] / -8.0f;
    __m256 inverse = _mm256_set1_ps(kv_inverse(scale)), half = _mm256_set1_ps(8.5f);
    __m256i number[4];
    for (int p = 0; p < 4; p++) {
        number[p] = _mm256_cvttps_epi32(_mm256_add_ps(_mm256_mul_ps(b.part[p], inverse), half));
        number[p] = _mm256_min_epi32(number[p], _mm256_set1_epi32(15));
    }
    __m256i low = _mm256_or_si256(number[0], _mm256_slli_epi32(number[2], 4));
    __m256i high = _mm256_or_si256(number[1], _mm256_slli_epi32(number[3], 4));
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), _MM_SHUFFLE(3, 1, 2, 0));
    kv_store_scale(out, scale);
    _mm_storeu_si128((__m128i *)(out + 2),
                     _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

KV_AVX2 static inline void kv_encode_float16_avx2(const float *values, size_t count, uint8_t *out) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(out + 2 * i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
    kv_encode_blocks_plain(KV_FLOAT16, values + i, count - i, out + 2 * i);
}

KV_AVX2 static inline void kv_encode_bfloat16_avx2(const float *values, size_t count, uint8_t *out) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(values + i));
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        __m256i upper = _mm256_srli_epi32(rounded, 16);
        upper = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), _MM_SHUFFLE(3, 1, 2, 0));
        _mm_storeu_si128((__m128i *)(out + 2 * i), _mm256_castsi256_si128(upper));
    }
    kv_encode_blocks_plain(KV_BFLOAT16, values + i, count - i, out + 2 * i);
}

KV_AVX2 static inline void kv_encode_blocks_avx2(enum kv_format format, const float *values, size_t count, uint8_t *out) {
    switch (format) {
    case KV_FLOAT16: kv_encode_float16_avx2(values, count, out); break;
    case KV_BFLOAT16: kv_encode_bfloat16_avx2(values, count, out); break;
    case KV_Q8_0:
        for (size_t i = 0; i < count; i += KV_QUANT_BLOCK, out += KV_Q8_0_NBYTES) kv_encode_q8_0_avx2(values + i, out);
        break;
    case KV_Q4_0:
        for (size_t i = 0; i < count; i += KV_QUANT_BLOCK, out += KV_Q4_0_NBYTES) kv_encode_q4_0_avx2(values + i, out);
        break;
    default: kv_encode_blocks_plain(format, values, count, out);
    }
}

#endif
