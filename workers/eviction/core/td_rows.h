/* The rows of W of td.h: how weights that are whole numbers of units are added up and moved. Included like td_kernel.h.
 *
 * A row active at the previous token moves by the same amount for an expert as all others active then, which is mostly
 * less than a unit. With 16 bits a weight moves by whole units, and what is beyond them is kept for the expert and added
 * to its next move: nothing is lost to rounding.
 *
 * With 8 bits a unit is larger, and if all rows moved by it at once, or none, estimates would jump. So of the rows that
 * should move by a fraction of a unit such a fraction moves by a whole one: those that the fraction is above the
 * threshold of. Thresholds lie evenly from 0 to 1, and whose is which turns with every move of the layer. A weight
 * stops at the ends of its 8 bits. */

/* The sum of the given rows of a layer's W, modulo 2^16: it is right if the sum itself is within -8 to 8. */
TD_TARGET static void TD_NAME(td_sum)(const struct td *td, uint32_t layer, const uint16_t *rows, uint32_t count,
                                      uint16_t *out) {
    typedef uint16_t lanes __attribute__((vector_size(TD_VECTOR), may_alias));
    const size_t width = td->stride * sizeof(uint16_t) / TD_VECTOR;
    lanes *sums = (lanes *)out;
    const lanes *weights = (const lanes *)(td->set_weights + layer * td_layer_nbytes(td));
    size_t v = 0;
    for (; v + 4 <= width; v += 4) {
        lanes sum[4] = {0};
        for (uint32_t i = 0; i < count; i++) {
            const lanes *row = weights + rows[i] * width + v;
            for (uint32_t j = 0; j < 4; j++) sum[j] += row[j];
        }
        for (uint32_t j = 0; j < 4; j++) sums[v + j] = sum[j];
    }
    for (; v < width; v++) {
        lanes sum = {0};
        for (uint32_t i = 0; i < count; i++) sum += weights[rows[i] * width + v];
        sums[v] = sum;
    }
}

/* Moves the given rows. */
TD_TARGET static void TD_NAME(td_move)(struct td *td, uint32_t layer, const uint16_t *rows, uint32_t count,
                                       const int16_t *moves) {
    typedef uint16_t lanes __attribute__((vector_size(TD_VECTOR), may_alias));
    const size_t width = td->stride * sizeof(uint16_t) / TD_VECTOR;
    const lanes *change = (const lanes *)moves;
    lanes *weights = (lanes *)(td->set_weights + layer * td_layer_nbytes(td));
    size_t v = 0;
    for (; v + 4 <= width; v += 4)
        for (uint32_t i = 0; i < count; i++) {
            lanes *row = weights + rows[i] * width + v;
            for (uint32_t j = 0; j < 4; j++) row[j] += change[v + j];
        }
    for (; v < width; v++)
        for (uint32_t i = 0; i < count; i++) weights[rows[i] * width + v] += change[v];
}

/* td_sum of rows of 8 bits: of the bytes at even places and of those at odd ones, each 128 too large and so never
 * negative, in the 16 bits that both together have. */
TD_TARGET static void TD_NAME(td_sum_coarse)(const struct td *td, uint32_t layer, const uint16_t *rows, uint32_t count,
                                             uint16_t *sums) {
    typedef uint16_t lanes __attribute__((vector_size(TD_VECTOR), may_alias));
    enum { BLOCK = TD_BYTES / TD_VECTOR };
    const size_t width = td->stride / TD_VECTOR;
    const lanes *weights = (const lanes *)(td->set_weights + layer * td_layer_nbytes(td));
    const uint16_t excess = (uint16_t)(128 * count);
    for (size_t v = 0; v < width; v += BLOCK) {
        lanes both[BLOCK] = {0}, odd[BLOCK] = {0};
        for (uint32_t i = 0; i < count; i++) {
            const lanes *row = weights + rows[i] * width + v;
            for (uint32_t j = 0; j < BLOCK; j++) {
                const lanes pair = row[j] ^ 0x8080;
                both[j] += pair;
                odd[j] += pair >> 8;
            }
        }
        uint16_t *sum = sums + v * TD_VECTOR;
        const uint16_t *of_both = (const uint16_t *)both, *of_odd = (const uint16_t *)odd;
        for (uint32_t i = 0; i < BLOCK * TD_VECTOR / 2; i++) {
            sum[2 * i] = (uint16_t)(of_both[i] - 256 * of_odd[i] - excess);
            sum[2 * i + 1] = (uint16_t)(of_odd[i] - excess);
        }
    }
}

/* td_move of rows of 8 bits; `change` in 256ths of a unit. */
TD_TARGET static void TD_NAME(td_move_coarse)(struct td *td, uint32_t layer, const uint16_t *rows, uint32_t count,
                                              const int16_t *change) {
    typedef int8_t lanes __attribute__((vector_size(TD_VECTOR), may_alias));
    enum { BLOCK = TD_BYTES / TD_VECTOR };
    const size_t width = td->stride / TD_VECTOR;
    lanes *weights = (lanes *)(td->set_weights + layer * td_layer_nbytes(td));
    _Alignas(TD_BYTES) int8_t whole[TD_MAX_EXPERTS], fraction[TD_MAX_EXPERTS]; /* fractions and thresholds: -128 is 0 */
    int8_t threshold[TD_SETS * TD_MAX_TOP_K];
    for (size_t e = 0; e < td->stride; e++) {
        whole[e] = (int8_t)(change[e] >> 8);
        fraction[e] = (int8_t)(change[e] ^ 0x80);
    }
    td_thresholds(td, layer, count, threshold);
    for (size_t v = 0; v < width; v += BLOCK) {
        const lanes *less = (const lanes *)whole + v, *beyond = (const lanes *)fraction + v;
        for (uint32_t i = 0; i < count; i++) {
            lanes *row = weights + rows[i] * width + v;
            for (uint32_t j = 0; j < BLOCK; j++) {
                const lanes more = (lanes)(beyond[j] > threshold[i]); /* -1: one unit more */
                row[j] = (lanes)TD_ADD_SATURATED(row[j], less[j] - more);
            }
        }
    }
}
