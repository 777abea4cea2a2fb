/* Stored values of any format as floats. A template: see vector.h for the lanes, kernels.c for the copies.
 *
 * Each conversion is exact (a quantised value is the product of a number of at most 8 bits and a scale of 11), so a
 * kernel gives for every format the bits that it gives for a float32 row with the same values. */

/* 4-bit numbers. A register of AVX-512 holds all 16 values of a block, ready scaled, and one instruction looks them up;
 * elsewhere the unscaled value is looked up. V(nibbles) are VEC_LANES of them; `unit` is what 1 in `values` stands for,
 * in units of the scale. */
#if VECTOR_ISA == 2
typedef __m512i V(nibbles); /* in the low 4 bits of each 32, whatever the others are */
INLINE TARGET V(nibbles) V(load_nibbles)(const uint8_t *bytes, const int part) {
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
    return part ? _mm512_srli_epi32(wide, 4) : wide;
}
INLINE TARGET V(nibbles) V(load_paired_nibbles)(const uint8_t *bytes, const int part) {
    /* Every byte twice, in the lowest byte of its lanes; shuffles stay within 128 bits, which all hold all bytes. */
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high_in_odd_lanes = _mm512_set1_epi64(4ll << 32);
    __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes));
    __m512i lanes = _mm512_shuffle_epi8(all, _mm512_add_epi32(twice, _mm512_set1_epi32(part * 8)));
    return _mm512_srlv_epi32(lanes, high_in_odd_lanes);
}
INLINE TARGET V(vec) V(scale_values)(const int8_t values[16], float unit, V(vec) scale) {
    return V(mul)(V(mul)(V(load_int8)(values), V(splat)(unit)), scale);
}
INLINE TARGET V(vec) V(look_up)(const int8_t values[16], V(vec) scaled_values, V(nibbles) nibbles) {
    (void)values;
    return _mm512_permutexvar_ps(nibbles, scaled_values);
}
#elif VECTOR_ISA == 1
typedef __m128i V(nibbles); /* in the low 8 bytes */
INLINE TARGET V(nibbles) V(load_nibbles)(const uint8_t *bytes, const int part) {
    __m128i eight = _mm_loadl_epi64((const __m128i *)(bytes + part % 2 * 8));
    return _mm_and_si128(part >= 2 ? _mm_srli_epi16(eight, 4) : eight, _mm_set1_epi8(15));
}
INLINE TARGET V(nibbles) V(load_paired_nibbles)(const uint8_t *bytes, const int part) {
    int32_t four;
    memcpy(&four, bytes + part * 4, sizeof four);
    __m128i low = _mm_cvtsi32_si128(four), high = _mm_srli_epi16(low, 4);
    return _mm_and_si128(_mm_unpacklo_epi8(low, high), _mm_set1_epi8(15));
}
INLINE TARGET V(vec) V(scale_values)(const int8_t values[16], float unit, V(vec) scale) {
    return (void)values, V(mul)(scale, V(splat)(unit));
}
INLINE TARGET V(vec) V(look_up)(const int8_t values[16], V(vec) scale, V(nibbles) nibbles) {
    __m128i eight = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values), nibbles);
    return V(mul)(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), scale);
}
#else
typedef struct { uint8_t lane[16]; } V(nibbles);
INLINE V(nibbles) V(load_nibbles)(const uint8_t *bytes, const int part) {
    V(nibbles) nibbles;
    for (int l = 0; l < 16; l++) nibbles.lane[l] = part ? bytes[l] >> 4 : bytes[l] & 15;
    return nibbles;
}
INLINE V(nibbles) V(load_paired_nibbles)(const uint8_t *bytes, const int part) {
    V(nibbles) nibbles;
    for (int l = 0; l < 16; l++) nibbles.lane[l] = bytes[part * 8 + l / 2] >> l % 2 * 4 & 15;
    return nibbles;
}
INLINE V(vec) V(scale_values)(const int8_t values[16], float unit, V(vec) scale) {
    return (void)values, V(mul)(scale, V(splat)(unit));
}
INLINE V(vec) V(look_up)(const int8_t values[16], V(vec) scale, V(nibbles) nibbles) {
    V(vec) x;
    for (int l = 0; l < 16; l++) x.lane[l] = values[nibbles.lane[l]];
    return V(mul)(x, scale);
}
#endif

#define BLOCK_PARTS (BLOCK_VALUES / VEC_LANES)

INLINE TARGET V(vec) V(scale_mxfp4)(uint8_t scale) {
    return V(scale_values)(MXFP4_VALUES, 0.5f, V(splat)(float_from_bits(E8M0_BITS[scale])));
}

/* What load_part has to know of a block of 32 values of a row besides the values; nothing for single values. */
INLINE TARGET V(vec) V(load_scale)(enum weight_format format, const uint8_t *row, const uint8_t *scales, size_t block) {
    const uint8_t *at = row + block * format_block_nbytes(format);
    switch (format) {
    case FORMAT_Q8_0: return V(splat_f16)(at);
    case FORMAT_Q4_0: return V(scale_values)(Q4_0_VALUES, 1, V(splat_f16)(at));
    case FORMAT_MXFP4: return V(scale_mxfp4)(scales[block]);
    case FORMAT_MXFP4_GGML: return V(scale_mxfp4)(*at);
    default: return V(zero)();
    }
}

/* The values block * 32 + part * VEC_LANES ... of a row. `part` is a constant. */
INLINE TARGET V(vec) V(load_part)(enum weight_format format, const uint8_t *row, size_t block, const int part,
                                  V(vec) scale) {
    size_t i = block * BLOCK_VALUES + part * VEC_LANES;
    const uint8_t *at = row + block * format_block_nbytes(format), *values = at + BLOCK_SCALE_NBYTES;
    switch (format) {
    case FORMAT_FLOAT16: return V(load_f16)((const uint16_t *)row + i);
    case FORMAT_BFLOAT16: return V(load_bf16)((const uint16_t *)row + i);
    case FORMAT_Q8_0: return V(mul)(V(load_int8)((const int8_t *)values + part * VEC_LANES), scale);
    case FORMAT_Q4_0: return V(look_up)(Q4_0_VALUES, scale, V(load_nibbles)(values, part));
    case FORMAT_MXFP4: return V(look_up)(MXFP4_VALUES, scale, V(load_paired_nibbles)(at, part));
    case FORMAT_MXFP4_GGML: return V(look_up)(MXFP4_VALUES, scale, V(load_nibbles)(at + MXFP4_SCALE_NBYTES, part));
    default: return V(load)((const float *)row + i);
    }
}
