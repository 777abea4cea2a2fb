/* A demand: which experts one step of one layer wanted, by the gate alone. What eviction learns from and what replays are
 * made of. What the step then used, where routing prefers experts in memory, would teach that these are the useful ones.
 *
 * A record is a run of 16-bit words: the header below, then `rows` times [stream, expert, expert, ...], one row per
 * token. The stream is whose token it was (a sequence's row in the arena, or a position in a replayed batch);
 * DEMAND_NO_STREAM marks a set of experts that many tokens used together, such as a prefill's. */
#ifndef HOTSET_DEMANDS_H
#define HOTSET_DEMANDS_H

#include <stddef.h>
#include <stdint.h>

#define DEMAND_NO_STREAM 0xFFFFu
#define DEMAND_HEADER_WORDS 8u

enum demand_word {
    DEMAND_LENGTH = 0, /* words of the whole record */
    DEMAND_LAYER = 1,
    DEMAND_ROWS = 2,
    DEMAND_EXPERTS = 3, /* per row */
    DEMAND_STAMP = 4    /* four words, low first: CLOCK_MONOTONIC in ns, by which readers merge several writers */
};

/* Why `words` from a record's first on are not a record of `num_layers` layers of `num_experts`, or NULL. */
static inline const char *demand_problem(const uint16_t *record, size_t words, uint32_t num_layers,
                                         uint32_t num_experts) {
    if (words < DEMAND_HEADER_WORDS) return "ends within a record's header";
    size_t width = (size_t)record[DEMAND_EXPERTS] + 1;
    if (record[DEMAND_LENGTH] != DEMAND_HEADER_WORDS + record[DEMAND_ROWS] * width) return "has a record of wrong length";
    if (record[DEMAND_LENGTH] > words) return "ends within a record";
    if (record[DEMAND_LAYER] >= num_layers) return "names a layer that is not there";
    const uint16_t *row = record + DEMAND_HEADER_WORDS;
    for (uint32_t i = 0; i < record[DEMAND_ROWS]; i++, row += width)
        for (size_t j = 1; j < width; j++)
            if (row[j] >= num_experts) return "names an expert that is not there";
    return NULL;
}

#endif
