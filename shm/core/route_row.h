/* A row on its way from logits to ids and weights, and the steps that concern it alone.
 *
 * Rows go through the steps side by side, a tile of them at a time: each step has a long chain of results that wait for
 * each other, and the processor looks ahead far enough to overlap rows within a step, but not across a whole row.
 *
 * ROUTE_VECTOR is 1 in a kernel that has lanes, else 0. */
#ifndef HOTSET_ROUTE_ROW_H
#define HOTSET_ROUTE_ROW_H

#include "route_plain.h"
#if ROUTE_VECTOR
#include "route_vector.h"
#endif

#define TILE_ROWS 8u
#define TILE_FLOATS 2176u /* of each array of a tile: 8 rows of up to 256 experts, or 2 of 1,024, padded */
#define TILE_LANES (ROUTE_MAX_EXPERTS + 64)

struct route_row {
    const float *logits;
    float *share;    /* gate probability times a factor common to the row */
    float *adjusted; /* the scores that were selected from */
    float scale;     /* the factor that makes share probabilities; 0 = not computed yet */
    int vector;      /* the vector steps apply: softmax gate, all logits finite, and these padded with -inf */
    struct row_statistics statistics;
    int32_t ids[ROUTE_MAX_TOP_K];   /* the selection, best first */
    int32_t truth[ROUTE_MAX_TOP_K]; /* the true top k, where the policy needs it */
};

/* On the caller's stack, so that nothing is allocated. */
struct route_tile {
    const struct route_rule *rule;
    const struct route_snapshot *snapshot;
    uint32_t rows, stride; /* rows in use; floats from one row to the next */
    struct route_row row[TILE_ROWS];
    _Alignas(64) float share[TILE_FLOATS];
    _Alignas(64) float adjusted[TILE_FLOATS];
    _Alignas(64) float padded[TILE_FLOATS];                         /* logits that blocks would overrun */
    _Alignas(64) float preferred[TILE_LANES], others[TILE_LANES]; /* lanes of the preferred experts, and of the rest */
};

static inline uint32_t round_up(uint32_t value, uint32_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Once for a call. Returns how many rows fit. */
static inline uint32_t tile_begin(struct route_tile *tile, const struct route_rule *rule, const struct route_call *call,
                                  const struct route_snapshot *snapshot) {
    uint32_t experts = rule->num_experts;
    tile->rule = rule;
    tile->snapshot = snapshot;
#if ROUTE_VECTOR
    tile->stride = experts <= 8 ? BLOCK_LANES : round_up(experts, EXP_BLOCKS * BLOCK_LANES);
    vector_lanes(snapshot->preferred, tile->stride, tile->preferred);
    if (call->policy == POLICY_MASS) {
        uint64_t others[ROUTE_WORDS];
        for (uint32_t word = 0; word * 64 < experts; word++) others[word] = ~snapshot->preferred[word];
        vector_lanes(others, tile->stride, tile->others);
    }
#else
    (void)call;
    tile->stride = experts;
#endif
    return tile->stride * TILE_ROWS <= TILE_FLOATS ? TILE_ROWS : TILE_FLOATS / tile->stride;
}

static inline void row_begin(struct route_tile *tile, uint32_t index, const float *logits) {
    struct route_row *row = &tile->row[index];
    uint32_t experts = tile->rule->num_experts;
    row->logits = logits;
    row->share = tile->share + index * tile->stride;
    row->adjusted = tile->adjusted + index * tile->stride;
    row->scale = 0;
    row->vector = 0;
#if ROUTE_VECTOR
    if (tile->rule->gating != GATING_SIGMOID && vector_statistics(logits, experts, &row->statistics)) {
        row->vector = 1;
        if (experts == tile->stride) return;
        row->logits = tile->padded + index * tile->stride;
        vector_pad(logits, experts, tile->padded + index * tile->stride, tile->stride);
        return;
    }
#endif
    row->statistics = plain_statistics(logits, experts);
}

/* The factor that makes row->share probabilities; computes both when they are first needed. */
static inline float row_shares(const struct route_rule *rule, struct route_row *row) {
    if (row->scale != 0) return row->scale;
#if ROUTE_VECTOR
    if (row->vector) return row->scale = vector_shares(row->logits, rule->num_experts, row->statistics.max, row->share);
#endif
    return row->scale = plain_shares(rule, row->logits, &row->statistics, row->share);
}

#endif
