/* The vector operations that the kernels are written in, once per instruction set.
 *
 * Included once per instruction set by kernels.c, with V(name) giving each copy its own names. A kernel always sees 16 logical
 * lanes: VEC_PARTS registers of VEC_LANES floats each. Lane l of a dot product sums the elements i with i % 16 == l in
 * ascending order, and V(sum16) adds the lanes in one fixed tree. So a result depends on its own inputs only: not on
 * the rows and outputs computed beside it, not on the number of threads, and not on the width of a register. AVX2 and
 * AVX-512 give the same bits. The portable copy has no fused multiply-add and may differ from them in the last bits. */

#if VECTOR_ISA == 2 /* AVX-512 F */

#define VEC_LANES 16
typedef __m512 V(vec);
INLINE TARGET V(vec) V(zero)(void) { return _mm512_setzero_ps(); }
INLINE TARGET V(vec) V(splat)(float a) { return _mm512_set1_ps(a); }
INLINE TARGET V(vec) V(load)(const float *p) { return _mm512_loadu_ps(p); }
INLINE TARGET void V(store)(float *p, V(vec) a) { _mm512_storeu_ps(p, a); }
INLINE TARGET V(vec) V(load_f16)(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE TARGET V(vec) V(load_bf16)(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE TARGET V(vec) V(load_int8)(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE TARGET V(vec) V(add)(V(vec) a, V(vec) b) { return _mm512_add_ps(a, b); }
INLINE TARGET V(vec) V(sub)(V(vec) a, V(vec) b) { return _mm512_sub_ps(a, b); }
INLINE TARGET V(vec) V(mul)(V(vec) a, V(vec) b) { return _mm512_mul_ps(a, b); }
INLINE TARGET V(vec) V(div)(V(vec) a, V(vec) b) { return _mm512_div_ps(a, b); }
INLINE TARGET V(vec) V(min)(V(vec) a, V(vec) b) { return _mm512_min_ps(a, b); }
INLINE TARGET V(vec) V(max)(V(vec) a, V(vec) b) { return _mm512_max_ps(a, b); }
INLINE TARGET V(vec) V(fma)(V(vec) a, V(vec) b, V(vec) c) { return _mm512_fmadd_ps(a, b, c); }
INLINE TARGET V(vec) V(add_exponent)(V(vec) a, V(vec) n) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
INLINE TARGET __m128 V(fold)(const V(vec) parts[1]) {
    __m512d all = _mm512_castps_pd(parts[0]);
    __m256 eight = _mm256_add_ps(_mm256_castpd_ps(_mm512_castpd512_pd256(all)),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(all, 1)));
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

#elif VECTOR_ISA == 1 /* AVX2 with FMA and F16C */

#define VEC_LANES 8
typedef __m256 V(vec);
INLINE TARGET V(vec) V(zero)(void) { return _mm256_setzero_ps(); }
INLINE TARGET V(vec) V(splat)(float a) { return _mm256_set1_ps(a); }
INLINE TARGET V(vec) V(load)(const float *p) { return _mm256_loadu_ps(p); }
INLINE TARGET void V(store)(float *p, V(vec) a) { _mm256_storeu_ps(p, a); }
INLINE TARGET V(vec) V(load_f16)(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE TARGET V(vec) V(load_bf16)(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE TARGET V(vec) V(load_int8)(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE TARGET V(vec) V(add)(V(vec) a, V(vec) b) { return _mm256_add_ps(a, b); }
INLINE TARGET V(vec) V(sub)(V(vec) a, V(vec) b) { return _mm256_sub_ps(a, b); }
INLINE TARGET V(vec) V(mul)(V(vec) a, V(vec) b) { return _mm256_mul_ps(a, b); }
INLINE TARGET V(vec) V(div)(V(vec) a, V(vec) b) { return _mm256_div_ps(a, b); }
INLINE TARGET V(vec) V(min)(V(vec) a, V(vec) b) { return _mm256_min_ps(a, b); }
INLINE TARGET V(vec) V(max)(V(vec) a, V(vec) b) { return _mm256_max_ps(a, b); }
INLINE TARGET V(vec) V(fma)(V(vec) a, V(vec) b, V(vec) c) { return _mm256_fmadd_ps(a, b, c); }
INLINE TARGET V(vec) V(add_exponent)(V(vec) a, V(vec) n) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
INLINE TARGET __m128 V(fold)(const V(vec) parts[2]) {
    __m256 eight = _mm256_add_ps(parts[0], parts[1]);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

#else /* portable C; compilers turn these loops into whatever vectors the baseline has */

#define VEC_LANES 16
typedef struct { float lane[16]; } V(vec);
#define EACH_LANE(expression) \
    V(vec) r; \
    for (int l = 0; l < 16; l++) r.lane[l] = (expression); \
    return r
INLINE V(vec) V(splat)(float a) { EACH_LANE(a); }
INLINE V(vec) V(zero)(void) { EACH_LANE(0.0f); }
INLINE V(vec) V(load)(const float *p) { EACH_LANE(p[l]); }
INLINE void V(store)(float *p, V(vec) a) { memcpy(p, a.lane, sizeof a.lane); }
INLINE V(vec) V(load_f16)(const uint16_t *p) { EACH_LANE(float_from_f16(p[l])); }
INLINE V(vec) V(load_bf16)(const uint16_t *p) { EACH_LANE(float_from_bf16(p[l])); }
INLINE V(vec) V(load_int8)(const int8_t *p) { EACH_LANE(p[l]); }
INLINE V(vec) V(add)(V(vec) a, V(vec) b) { EACH_LANE(a.lane[l] + b.lane[l]); }
INLINE V(vec) V(sub)(V(vec) a, V(vec) b) { EACH_LANE(a.lane[l] - b.lane[l]); }
INLINE V(vec) V(mul)(V(vec) a, V(vec) b) { EACH_LANE(a.lane[l] * b.lane[l]); }
INLINE V(vec) V(div)(V(vec) a, V(vec) b) { EACH_LANE(a.lane[l] / b.lane[l]); }
/* Like the x86 instructions: the second operand where the two cannot be ordered. */
INLINE V(vec) V(min)(V(vec) a, V(vec) b) { EACH_LANE(a.lane[l] < b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE V(vec) V(max)(V(vec) a, V(vec) b) { EACH_LANE(a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE V(vec) V(fma)(V(vec) a, V(vec) b, V(vec) c) { EACH_LANE(a.lane[l] * b.lane[l] + c.lane[l]); }
INLINE V(vec) V(add_exponent)(V(vec) a, V(vec) n) {
    EACH_LANE(float_from_bits(bits_from_float(a.lane[l]) + (bits_from_float(n.lane[l]) << 23)));
}
INLINE float V(sum16)(const V(vec) parts[1]) {
    float sum[16];
    memcpy(sum, parts[0].lane, sizeof sum);
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) sum[l] += sum[l + half];
    return sum[0];
}
INLINE void V(sum16_of_four)(const V(vec) parts[4][1], float sums[4]) {
    for (int i = 0; i < 4; i++) sums[i] = V(sum16)(parts[i]);
}
#undef EACH_LANE

#endif

#define VEC_PARTS (16 / VEC_LANES)

/* Looked up, because loads have execution ports of their own, which conversions would take from the products. */
INLINE TARGET V(vec) V(splat_f16)(const void *p) {
    uint16_t half;
    memcpy(&half, p, sizeof half);
    return V(splat)(float16_values[half]);
}

#if VECTOR_ISA
/* fold adds lanes 8 apart, then 4 apart; the two below go on with 2 apart, then 1. */
INLINE TARGET float V(sum16)(const V(vec) parts[VEC_PARTS]) {
    __m128 four = V(fold)(parts);
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE TARGET void V(sum16_of_four)(const V(vec) parts[4][VEC_PARTS], float sums[4]) {
    __m128 a = V(fold)(parts[0]), b = V(fold)(parts[1]), c = V(fold)(parts[2]), d = V(fold)(parts[3]);
    __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)); /* a0+a2 b0+b2 a1+a3 b1+b3 */
    __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}
#endif

/* e^x, relative error under 2e-7 for -87 <= x <= 88, clamped beyond; NaN stays NaN.
 * 2^n * p(r) with x = n ln 2 + r (Cody-Waite); p is the polynomial of Cephes' expf. Adding 1.5 * 2^23 rounds to an
 * integer and leaves that integer in the low bits, from where add_exponent takes it. */
INLINE TARGET V(vec) V(exp)(V(vec) x) {
    V(vec) round = V(splat)(12582912.0f);
    x = V(min)(V(splat)(88.0f), V(max)(V(splat)(-87.0f), x));
    V(vec) n_bits = V(fma)(x, V(splat)(1.44269504088896341f), round);
    V(vec) n = V(sub)(n_bits, round);
    V(vec) r = V(fma)(n, V(splat)(-0.693359375f), x);
    r = V(fma)(n, V(splat)(2.12194440e-4f), r);
    V(vec) p = V(splat)(1.9875691500e-4f);
    p = V(fma)(p, r, V(splat)(1.3981999507e-3f));
    p = V(fma)(p, r, V(splat)(8.3334519073e-3f));
    p = V(fma)(p, r, V(splat)(4.1665795894e-2f));
    p = V(fma)(p, r, V(splat)(1.6666665459e-1f));
    p = V(fma)(p, r, V(splat)(5.0000001201e-1f));
    p = V(fma)(V(mul)(p, r), r, V(add)(r, V(splat)(1.0f)));
    return V(add_exponent)(p, n_bits);
}
