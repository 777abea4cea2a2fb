/* Keys: score and id in one double in [1, 2). Its mantissa holds the score's order-preserving integer (32 bits) above
 * the inverted id (20 bits). Doubles of one exponent order like their mantissas, so all keys differ and ties go to the
 * lowest id by themselves. */
#ifndef HOTSET_ROUTE_KEYS_H
#define HOTSET_ROUTE_KEYS_H

#include <stdint.h>

#define KEY_ID_MASK 0xFFFFFu
#define KEY_SCORE_MASK 0x000FFFFFFFF00000

static inline uint64_t key_tag(uint32_t id) { return UINT64_C(0x3FF0000000000000) | (KEY_ID_MASK - id); }
/* The id of a key's bits. */
static inline uint32_t key_id(uint64_t bits) { return ~(uint32_t)bits & KEY_ID_MASK; }

#endif
