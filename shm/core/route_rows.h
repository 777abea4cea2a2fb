/* The rows of a call; each kernel (route_*.c) compiles this for its instruction set. */
#ifndef HOTSET_ROUTE_ROWS_H
#define HOTSET_ROUTE_ROWS_H

#include "route_kernel.h"
#include "route_row.h"

static void route_rows(const struct route_rule *rule, const struct route_call *call,
                       const struct route_snapshot *snapshot, const struct route_boosts *boosts, const float *logits,
                       uint32_t rows, int32_t *ids, float *weights, struct route_tally *tally) {
    struct route_scratch scratch;
    uint32_t k = rule->top_k;
    route_scratch_begin(&scratch, rule);
    for (uint32_t row = 0; row < rows; row++, ids += k, weights += k, logits += rule->num_experts) {
        float strength = call->strengths ? call->strengths[row] : call->strength;
        route_row(rule, call, snapshot, &scratch, logits, strength, ids, weights, tally);
        if (rows == 1) return; /* its ids are its tally */
        uint64_t boost = boosts->by_age ? boosts->by_age[rows - 1 - row] << ROUTE_COUNT_BITS : 0;
        for (uint32_t i = 0; i < k; i++)
            tally->selections[ids[i]] = (tally->selections[ids[i]] & boosts->keep) + boost + 1;
    }
}

#endif
