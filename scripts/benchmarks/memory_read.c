/* What a plain read of memory gets: the sum of an array of 64-bit words, in as many vectors as the compiler likes. */
#include <stddef.h>
#include <stdint.h>

uint64_t sum_words(const uint64_t *words, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += words[i];
    return sum;
}
