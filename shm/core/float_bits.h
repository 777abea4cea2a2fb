/* The bits of a float as an integer, and back. */
#ifndef HOTSET_FLOAT_BITS_H
#define HOTSET_FLOAT_BITS_H

#include <stdint.h>
#include <string.h>

static inline uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#endif
