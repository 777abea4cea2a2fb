/* Encoding of KV rows: float32 values to the formats of shm/kv_page_format.py, the same bytes as there and, for Q8_0
 * and Q4_0, as GGML. No Python here.
 *
 * Every step is a separate float32 operation, as in gguf-py: compile without contraction to fused multiply-add. A row
 * is the values of one head; its last block is padded with zeros, so no block spans two heads or tokens. */
#ifndef HOTSET_KV_FORMAT_H
#define HOTSET_KV_FORMAT_H

#include "float_bits.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum kv_format { KV_FLOAT32, KV_FLOAT16, KV_BFLOAT16, KV_Q8_0, KV_Q4_0, KV_FORMAT_COUNT };

#define KV_QUANT_BLOCK 32u
#define KV_Q8_0_NBYTES 34u
#define KV_Q4_0_NBYTES 18u

static inline size_t kv_values_per_block(enum kv_format format) { return format >= KV_Q8_0 ? KV_QUANT_BLOCK : 1; }

static inline size_t kv_block_nbytes(enum kv_format format) {
    switch (format) {
    case KV_FLOAT32: return 4;
    case KV_Q8_0: return KV_Q8_0_NBYTES;
    case KV_Q4_0: return KV_Q4_0_NBYTES;
    default: return 2;
    }
}

static inline size_t kv_row_nbytes(enum kv_format format, size_t width) {
    size_t per_block = kv_values_per_block(format);
    return (width + per_block - 1) / per_block * kv_block_nbytes(format);
}

/* The least magnitude that the format cannot hold, as bits: magnitudes order like their bits, and the bits of infinity
 * and NaN lie above those of all finite numbers. 65520 is where float16 rounds to infinity. */
static inline uint32_t kv_refused_bits(enum kv_format format) {
    switch (format) {
    case KV_FLOAT16: return bits_from_float(65520.0f);
    case KV_BFLOAT16: return 0x7f7f8000;
    case KV_Q8_0: return bits_from_float(65520.0f * 127);
    case KV_Q4_0: return bits_from_float(65520.0f * 8);
    default: return 0x7f800000;
    }
}

/* Round to nearest even; the value is below kv_refused_bits(KV_FLOAT16). */
static inline uint16_t kv_float16(float value) {
    uint32_t bits = bits_from_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude < 0x38800000) /* below the normal range: let the addition of 0.5 round to multiples of 2^-24 */
        return (uint16_t)(sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f)));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static inline uint16_t kv_bfloat16(float value) {
    uint32_t bits = bits_from_float(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void kv_store_u16(uint8_t *out, uint16_t value) { memcpy(out, &value, sizeof value); }

/* 1 / scale; 0 where that is infinite: such a scale is stored as zero, so the block reads as zeros anyway. */
static inline float kv_inverse(float scale) {
    float inverse = 1.0f / scale;
    return isinf(inverse) ? 0.0f : inverse;
}

/* roundf for magnitudes within int: the fraction that truncation leaves is exact, and twice it truncates to what has to
 * be added. */
static inline int kv_round_plain(float x) {
    int whole = (int)x;
    float fraction = x - (float)whole;
    return whole + (int)(fraction + fraction);
}

static inline void kv_encode_q8_0_plain(const float *x, uint8_t *out) {
    float largest = 0;
    for (size_t i = 0; i < KV_QUANT_BLOCK; i++)
        if (fabsf(x[i]) > largest) largest = fabsf(x[i]);
    float scale = largest / 127.0f, inverse = kv_inverse(scale);
    kv_store_u16(out, kv_float16(scale));
    for (size_t i = 0; i < KV_QUANT_BLOCK; i++) out[2 + i] = (uint8_t)kv_round_plain(x[i] * inverse);
}

static inline void kv_encode_q4_0_plain(const float *x, uint8_t *out) {
    float largest = x[0];
    for (size_t i = 1; i < KV_QUANT_BLOCK; i++)
        if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
    float scale = largest / -8.0f, inverse = kv_inverse(scale);
    uint8_t number[KV_QUANT_BLOCK];
    for (size_t i = 0; i < KV_QUANT_BLOCK; i++) {
        number[i] = (uint8_t)(x[i] * inverse + 8.5f);
        if (number[i] > 15) number[i] = 15;
    }
    kv_store_u16(out, kv_float16(scale));
    for (size_t i = 0; i < KV_QUANT_BLOCK / 2; i++)
        out[2 + i] = (uint8_t)(number[i] | number[i + KV_QUANT_BLOCK / 2] << 4);
}

/* `count` values in whole blocks. */
static inline void kv_encode_blocks_plain(enum kv_format format, const float *values, size_t count, uint8_t *out) {
    switch (format) {
    case KV_FLOAT32: memcpy(out, values, count * sizeof *values); break;
    case KV_FLOAT16:
        for (size_t i = 0; i < count; i++) kv_store_u16(out + 2 * i, kv_float16(values[i]));
        break;
    case KV_BFLOAT16:
        for (size_t i = 0; i < count; i++) kv_store_u16(out + 2 * i, kv_bfloat16(values[i]));
        break;
    case KV_Q8_0:
        for (size_t i = 0; i < count; i += KV_QUANT_BLOCK, out += KV_Q8_0_NBYTES) kv_encode_q8_0_plain(values + i, out);
        break;
    default:
        for (size_t i = 0; i < count; i += KV_QUANT_BLOCK, out += KV_Q4_0_NBYTES) kv_encode_q4_0_plain(values + i, out);
    }
}

/* The position of the first value that the format cannot hold, -1 if it can hold all. */
static inline ptrdiff_t kv_find_refused(enum kv_format format, const float *values, size_t count) {
    uint32_t refused = kv_refused_bits(format);
    for (size_t i = 0; i < count; i++)
        if ((bits_from_float(values[i]) & 0x7fffffff) >= refused) return (ptrdiff_t)i;
    return -1;
}

static inline int kv_any_refused_plain(enum kv_format format, const float *values, size_t count) {
    return kv_find_refused(format, values, count) >= 0;
}

/* One way to do it for each instruction set; all give the same bytes. */
struct kv_codec {
    int (*any_refused)(enum kv_format, const float *, size_t);
    void (*encode_blocks)(enum kv_format, const float *, size_t, uint8_t *);
};

static const struct kv_codec KV_CODEC_PLAIN = {kv_any_refused_plain, kv_encode_blocks_plain};

#if defined(__x86_64__)
#include "kv_format_avx2.h"
static const struct kv_codec KV_CODEC_AVX2 = {kv_any_refused_avx2, kv_encode_blocks_avx2};
#endif

static inline const struct kv_codec *kv_fastest_codec(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return &KV_CODEC_AVX2;
#endif
    return &KV_CODEC_PLAIN;
}

/* Encodes `rows` rows of `width` values each, which the format can hold, into consecutive rows of
 * kv_row_nbytes(format, width) bytes. */
static inline void kv_encode(const struct kv_codec *codec, enum kv_format format, const float *values, size_t rows,
                             size_t width, uint8_t *out) {
    size_t per_block = kv_values_per_block(format), beyond = width % per_block;
    if (!beyond) {
        codec->encode_blocks(format, values, rows * width, out);
        return;
    }
    size_t whole = width - beyond, whole_nbytes = whole / per_block * kv_block_nbytes(format);
    for (size_t row = 0; row < rows; row++, values += width, out += kv_row_nbytes(format, width)) {
        float last[KV_QUANT_BLOCK] = {0};
        memcpy(last, values + whole, beyond * sizeof *values);
        codec->encode_blocks(format, values, whole, out);
        codec->encode_blocks(format, last, KV_QUANT_BLOCK, out + whole_nbytes);
    }
}

#endif
