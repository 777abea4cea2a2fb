/* After the xxHash specification, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md (XXH3). */
#include "xxh3.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_VECTORS 1
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian processors"
#endif

#define STRIPES 16          /* of a block, 64 bytes each */
#define SCRAMBLE_SECRET 128 /* where the secrets for the ends of things begin */
#define LAST_STRIPE_SECRET 121
#define MERGE_SECRET 11
#define SHORT_NBYTES 240      /* up to which an input is hashed in another way, and in others again up to 128, 16, 8, 3 */
#define SHORT_LAST_SECRET 119 /* of the last 16 bytes of 129 to 240 */

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u
#define PRIME_MIX 0x165667919E3779F9u
#define PRIME_MIX_SHORT 0x9FB21C651E98DF25u

static const uint64_t SECRET[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb,
    0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088,
    0x4ef90da297486471, 0xd8acdea946ef1938, 0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a,
    0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};

static uint64_t word(const void *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t secret_word(size_t at) { return word((const uint8_t *)SECRET + at); }

static void add_stripe(uint64_t *sums, const uint8_t *stripe, size_t secret) {
    for (size_t i = 0; i < 8; i++) {
        uint64_t value = word(stripe + 8 * i), key = value ^ secret_word(secret + 8 * i);
        sums[i ^ 1] += value;
        sums[i] += (key & 0xFFFFFFFFu) * (key >> 32);
    }
}

static void blocks_portable(uint64_t *sums, const uint8_t *data, size_t count) {
    for (; count; count--, data += XXH3_BLOCK) {
        for (size_t stripe = 0; stripe < STRIPES; stripe++) add_stripe(sums, data + 64 * stripe, 8 * stripe);
        for (size_t i = 0; i < 8; i++)
            sums[i] = (sums[i] ^ sums[i] >> 47 ^ secret_word(SCRAMBLE_SECRET + 8 * i)) * PRIME32_1;
    }
}

static int always(void) { return 1; }

#ifdef HAVE_X86_VECTORS
#define NAME blocks_sse2
#define TARGET
#define VECTOR_NBYTES 16
#define MULTIPLY(a, b) ((vector)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#define SWAP(a) ((vector)_mm_shuffle_epi32((__m128i)(a), 0x4E))
#include "xxh3_blocks.h"

#define NAME blocks_avx2
#define TARGET __attribute__((target("avx2")))
#define VECTOR_NBYTES 32
#define MULTIPLY(a, b) ((vector)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#define SWAP(a) ((vector)_mm256_shuffle_epi32((__m256i)(a), 0x4E))
#include "xxh3_blocks.h"

#define NAME blocks_avx512
#define TARGET __attribute__((target("avx512f")))
#define VECTOR_NBYTES 64
#define MULTIPLY(a, b) ((vector)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#define SWAP(a) ((vector)_mm512_shuffle_epi32((__m512i)(a), (_MM_PERM_ENUM)0x4E))
#include "xxh3_blocks.h"

static int has_avx2(void) { return __builtin_cpu_init(), __builtin_cpu_supports("avx2"); }
static int has_avx512(void) { return __builtin_cpu_init(), __builtin_cpu_supports("avx512f"); }
#endif

const struct xxh3_kernel xxh3_kernels[] = {
    {"portable", always, blocks_portable},
#ifdef HAVE_X86_VECTORS
    {"sse2", always, blocks_sse2},
    {"avx2", has_avx2, blocks_avx2},
    {"avx512", has_avx512, blocks_avx512},
#endif
};
const size_t xxh3_kernel_count = sizeof xxh3_kernels / sizeof *xxh3_kernels;

const struct xxh3_kernel *xxh3_best(void) {
    const struct xxh3_kernel *best = xxh3_kernels;
    for (size_t i = 0; i < xxh3_kernel_count; i++)
        if (xxh3_kernels[i].supported()) best = &xxh3_kernels[i];
    return best;
}

void xxh3_begin(struct xxh3 *state) {
    *state = (struct xxh3){{PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1}};
}

static uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t avalanche(uint64_t value) {
    value = (value ^ value >> 37) * PRIME_MIX;
    return value ^ value >> 32;
}

static uint64_t rotated(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

static uint32_t half_word(const void *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t mixed_16(const uint8_t *data, size_t secret) {
    return fold(word(data) ^ secret_word(secret), word(data + 8) ^ secret_word(secret + 8));
}

static uint64_t up_to_3(const uint8_t *data, size_t nbytes) {
    uint64_t value = (uint64_t)data[0] << 16 | (uint64_t)data[nbytes / 2] << 24 | data[nbytes - 1] | nbytes << 8;
    value ^= half_word(SECRET) ^ half_word((const uint8_t *)SECRET + 4);
    value = (value ^ value >> 33) * PRIME64_2;
    value = (value ^ value >> 29) * PRIME64_3;
    return value ^ value >> 32;
}

static uint64_t up_to_8(const uint8_t *data, size_t nbytes) {
    uint64_t value = half_word(data + nbytes - 4) + ((uint64_t)half_word(data) << 32);
    value ^= secret_word(8) ^ secret_word(16);
    value = (value ^ rotated(value, 49) ^ rotated(value, 24)) * PRIME_MIX_SHORT;
    value = (value ^ ((value >> 35) + nbytes)) * PRIME_MIX_SHORT;
    return value ^ value >> 28;
}

static uint64_t up_to_16(const uint8_t *data, size_t nbytes) {
    uint64_t low = word(data) ^ secret_word(24) ^ secret_word(32);
    uint64_t high = word(data + nbytes - 8) ^ secret_word(40) ^ secret_word(48);
    return avalanche(nbytes + __builtin_bswap64(low) + high + fold(low, high));
}

/* Pairs of 16 bytes from both ends towards the middle. */
static uint64_t up_to_128(const uint8_t *data, size_t nbytes) {
    uint64_t sum = nbytes * PRIME64_1;
    for (size_t pair = 0; 32 * pair < nbytes; pair++)
        sum += mixed_16(data + 16 * pair, 32 * pair) + mixed_16(data + nbytes - 16 * (pair + 1), 32 * pair + 16);
    return avalanche(sum);
}

static uint64_t up_to_240(const uint8_t *data, size_t nbytes) {
    uint64_t sum = nbytes * PRIME64_1;
    for (size_t i = 0; i < 8; i++) sum += mixed_16(data + 16 * i, 16 * i);
    sum = avalanche(sum);
    for (size_t i = 8; i < nbytes / 16; i++) sum += mixed_16(data + 16 * i, 16 * (i - 8) + 3);
    return avalanche(sum + mixed_16(data + nbytes - 16, SHORT_LAST_SECRET));
}

uint64_t xxh3_end(const struct xxh3 *state, const uint8_t *data, size_t nbytes) {
    if (nbytes <= 3) return up_to_3(data, nbytes);
    if (nbytes <= 8) return up_to_8(data, nbytes);
    if (nbytes <= 16) return up_to_16(data, nbytes);
    if (nbytes <= 128) return up_to_128(data, nbytes);
    if (nbytes <= SHORT_NBYTES) return up_to_240(data, nbytes);
    struct xxh3 last = *state;
    size_t hashed = xxh3_whole_blocks(nbytes) * XXH3_BLOCK;
    for (size_t stripe = 0; stripe < (nbytes - 1 - hashed) / 64; stripe++)
        add_stripe(last.sums, data + hashed + 64 * stripe, 8 * stripe);
    add_stripe(last.sums, data + nbytes - 64, LAST_STRIPE_SECRET);
    uint64_t result = nbytes * PRIME64_1;
    for (size_t i = 0; i < 8; i += 2)
        result += fold(last.sums[i] ^ secret_word(MERGE_SECRET + 8 * i),
                       last.sums[i + 1] ^ secret_word(MERGE_SECRET + 8 * i + 8));
    return avalanche(result);
}
