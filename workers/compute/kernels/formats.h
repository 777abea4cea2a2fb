/* How weights are stored, and single elements of them as floats. */
#ifndef HOTSET_FORMATS_H
#define HOTSET_FORMATS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum weight_format { FORMAT_FLOAT32, FORMAT_FLOAT16, FORMAT_BFLOAT16, FORMAT_COUNT };

static inline size_t format_nbytes(enum weight_format format) { return format == FORMAT_FLOAT32 ? 4 : 2; }

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
