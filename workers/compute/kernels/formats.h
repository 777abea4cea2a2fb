/* How weights are stored, and single stored numbers as floats. */
#ifndef HOTSET_FORMATS_H
#define HOTSET_FORMATS_H

#include "float_bits.h" /* of shm/core */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The numbers are those of WeightFormat in shm/layout.py and, for the formats that KV pages have too, of kv_format.h.
 *
 * Q8_0 and Q4_0 are GGML's: blocks of 32 values, a float16 scale and then 32 int8, or 16 bytes of which the low halves
 * are values 0 ... 15 and the high halves 16 ... 31. MXFP4 is as in gpt-oss' checkpoints: blocks of 32 values too, 16
 * bytes of which each holds two neighbours, the first in the low half; behind all rows of a matrix follow the scales, a
 * byte for each block, powers of two (OCP Microscaling Formats: E2M1 with E8M0). MXFP4_GGML has the same numbers and
 * scales in GGML's order: the scale before each block, and halves as in Q4_0. */
enum weight_format {
    FORMAT_FLOAT32,
    FORMAT_FLOAT16,
    FORMAT_BFLOAT16,
    FORMAT_Q8_0,
    FORMAT_Q4_0,
    FORMAT_MXFP4,
    FORMAT_MXFP4_GGML,
    FORMAT_COUNT
};

static const char *const FORMAT_NAMES[FORMAT_COUNT] = {"float32", "float16", "bfloat16",  "Q8_0",
                                                       "Q4_0",    "MXFP4",   "MXFP4_GGML"};

#define BLOCK_VALUES 32
#define BLOCK_SCALE_NBYTES 2 /* of Q8_0 and Q4_0 */
#define MXFP4_SCALE_NBYTES 1
#define MAX_VALUE_NBYTES 4

/* What a 4-bit number stands for, in units of its block's scale; for MXFP4 in halves of it, so that they are integers. */
static const int8_t Q4_0_VALUES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const int8_t MXFP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static inline size_t format_values_per_block(enum weight_format format) {
    return format >= FORMAT_Q8_0 ? BLOCK_VALUES : 1;
}

/* Without a scale that lies elsewhere. */
static inline size_t format_block_nbytes(enum weight_format format) {
    switch (format) {
    case FORMAT_FLOAT32: return 4;
    case FORMAT_Q8_0: return BLOCK_SCALE_NBYTES + 32;
    case FORMAT_Q4_0: return BLOCK_SCALE_NBYTES + 16;
    case FORMAT_MXFP4: return 16;
    case FORMAT_MXFP4_GGML: return MXFP4_SCALE_NBYTES + 16;
    default: return 2;
    }
}

struct matrix { /* rows of stored values, row_stride bytes from one to the next */
    enum weight_format format;
    const uint8_t *bytes;
    size_t row_stride;
    const uint8_t *scales; /* of MXFP4 */
    size_t scale_stride;
};

/* `width` is a multiple of the values per block. */
static inline size_t matrix_nbytes(enum weight_format format, size_t rows, size_t width) {
    size_t blocks = rows * (width / format_values_per_block(format));
    return blocks * (format_block_nbytes(format) + (format == FORMAT_MXFP4 ? MXFP4_SCALE_NBYTES : 0));
}

static inline struct matrix matrix_at(enum weight_format format, const uint8_t *bytes, size_t rows, size_t width) {
    size_t blocks = width / format_values_per_block(format), stride = blocks * format_block_nbytes(format);
    return (struct matrix){format, bytes, stride, bytes + rows * stride, blocks};
}

static inline struct matrix matrix_from_row(struct matrix matrix, size_t row) {
    matrix.bytes += row * matrix.row_stride;
    matrix.scales += row * matrix.scale_stride;
    return matrix;
}

/* Rows 0, 2, 4 ... of it. */
static inline struct matrix matrix_every_other_row(struct matrix matrix) {
    matrix.row_stride *= 2;
    matrix.scale_stride *= 2;
    return matrix;
}

static inline float float_from_bf16(uint16_t half) { return float_from_bits((uint32_t)half << 16); }

static inline float float_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return float_from_bits(sign | 0x7f800000 | rest << 13); /* infinity, NaN */
    if (rest >= 0x0400) return float_from_bits(sign | ((rest << 13) + 0x38000000)); /* normal: exponent 15 -> 127 */
    float subnormal = (float)rest * 0x1p-24f;
    return float_from_bits(sign | bits_from_float(subnormal));
}

/* The bits of 2^(byte - 127), the smallest of which is subnormal; 255 stands for no number and is infinity here. A table,
 * because vectors of one value are had most cheaply from memory. */
#define E8M0(byte) ((byte) ? (uint32_t)(byte) << 23 : 0x00400000u)
#define E8M0_4(byte) E8M0(byte), E8M0(byte + 1), E8M0(byte + 2), E8M0(byte + 3)
#define E8M0_16(byte) E8M0_4(byte), E8M0_4(byte + 4), E8M0_4(byte + 8), E8M0_4(byte + 12)
#define E8M0_64(byte) E8M0_16(byte), E8M0_16(byte + 16), E8M0_16(byte + 32), E8M0_16(byte + 48)
static const uint32_t E8M0_BITS[256] = {E8M0_64(0), E8M0_64(64), E8M0_64(128), E8M0_64(192)};

/* The value of each float16, by its bits. A model's scales are of few magnitudes: they stay in the first-level cache. */
extern float float16_values[1 << 16];

/* The `i`th of single values. */
static inline float single_value(enum weight_format format, const uint8_t *bytes, size_t i) {
    uint16_t half;
    float value;
    if (format == FORMAT_FLOAT32) return memcpy(&value, bytes + 4 * i, sizeof value), value;
    memcpy(&half, bytes + 2 * i, sizeof half);
    return format == FORMAT_FLOAT16 ? float_from_f16(half) : float_from_bf16(half);
}

#endif
