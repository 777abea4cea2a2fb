/* Whole blocks of xxh3-64 with vectors of one width; included by xxh3.c once for each, with these set:
 * NAME, TARGET, VECTOR_NBYTES, MULTIPLY (the lower halves of the words), SWAP (neighbouring words).
 *
 * A block adds sixteen stripes to the eight sums and scrambles them. What it adds does not depend on the sums, so it is
 * added up on its own, in two chains, while the scramble before is still under way: only that one has to wait. */
TARGET static void NAME(uint64_t *sums, const uint8_t *data, size_t count) {
    typedef uint64_t vector __attribute__((vector_size(VECTOR_NBYTES), aligned(1), may_alias));
    enum { PARTS = 64 / VECTOR_NBYTES };
    const uint8_t *secret = (const uint8_t *)SECRET;
    vector sum[PARTS];
    for (int part = 0; part < PARTS; part++) sum[part] = ((const vector *)sums)[part];
    for (; count; count--, data += XXH3_BLOCK) {
        for (int part = 0; part < PARTS; part++) {
            vector products = {0}, values = {0};
            for (int stripe = 0; stripe < STRIPES; stripe++) {
                vector value = ((const vector *)(data + 64 * stripe))[part];
                vector key = value ^ ((const vector *)(secret + 8 * stripe))[part];
                products += MULTIPLY(key, key >> 32);
                values += value;
            }
            vector mixed = sum[part] + products + SWAP(values);
            mixed ^= mixed >> 47 ^ ((const vector *)(secret + SCRAMBLE_SECRET))[part];
            vector prime = (vector){0} + PRIME32_1;
            sum[part] = MULTIPLY(mixed, prime) + (MULTIPLY(mixed >> 32, prime) << 32);
        }
    }
    for (int part = 0; part < PARTS; part++) ((vector *)sums)[part] = sum[part];
}
#undef NAME
#undef TARGET
#undef VECTOR_NBYTES
#undef MULTIPLY
#undef SWAP
