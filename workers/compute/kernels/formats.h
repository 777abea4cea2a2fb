/* How weights are stored, and single stored numbers as floats. */
#ifndef HOTSET_FORMATS_H
#define HOTSET_FORMATS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The numbers are those of WeightFormat in shm/layout.py and, for the formats that KV pages have too, of kv_format.h.
 *
 * Q8_0 and Q4_0 are GGML's: blocks of 32 values, a float16 scale and then 32 int8, or 16 bytes of which the low halves
 * are values 0 ... 15 and the high halves 16 ... 31. */
enum weight_format { FORMAT_FLOAT32, FORMAT_FLOAT16, FORMAT_BFLOAT16, FORMAT_Q8_0, FORMAT_Q4_0, FORMAT_COUNT };

static const char *const FORMAT_NAMES[FORMAT_COUNT] = {"float32", "float16", "bfloat16", "Q8_0", "Q4_0"};

#define BLOCK_VALUES 32
#define BLOCK_SCALE_NBYTES 2
#define MAX_VALUE_NBYTES 4

/* What a 4-bit number stands for, in units of its block's scale. */
static const int8_t Q4_0_VALUES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

static inline size_t format_values_per_block(enum weight_format format) {
    return format >= FORMAT_Q8_0 ? BLOCK_VALUES : 1;
}

static inline size_t format_block_nbytes(enum weight_format format) {
    switch (format) {
    case FORMAT_FLOAT32: return 4;
    case FORMAT_Q8_0: return BLOCK_SCALE_NBYTES + 32;
    case FORMAT_Q4_0: return BLOCK_SCALE_NBYTES + 16;
    default: return 2;
    }
}

/* `width` is a multiple of the values per block. */
static inline size_t format_row_nbytes(enum weight_format format, size_t width) {
    return width / format_values_per_block(format) * format_block_nbytes(format);
}

static inline float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_from_bf16(uint16_t half) { return float_from_bits((uint32_t)half << 16); }

static inline float float_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return float_from_bits(sign | 0x7f800000 | rest << 13); /* infinity, NaN */
    if (rest >= 0x0400) return float_from_bits(sign | ((rest << 13) + 0x38000000)); /* normal: exponent 15 -> 127 */
    float subnormal = (float)rest * 0x1p-24f;
    return float_from_bits(sign | bits_from_float(subnormal));
}

#endif
