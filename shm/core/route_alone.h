/* The common case of a row that comes alone: nothing is set up that one row does not need. */
#ifndef HOTSET_ROUTE_ALONE_H
#define HOTSET_ROUTE_ALONE_H

#if ROUTE_AVX512
#include "route_divided.h"
#else
#include "route_report.h"
#include "route_weights.h"
#endif

static inline int alone_applies(const struct route_rule *rule, const struct route_call *call) {
    return call->policy <= POLICY_BONUS && !route_is_plain(rule) && rule->top_k <= NETWORK_ROWS &&
           !call->want_prefetch;
}

/* The same steps as for a row of a tile. 0 if a logit is not finite. */
static inline int route_alone(struct route_tile *tile, const struct route_rule *rule, const struct route_call *call,
                              const struct route_snapshot *snapshot, const float *logits, int32_t *ids, float *weights,
                              struct route_tally *tally) {
    struct route_row *row = &tile->row[0];
    uint32_t experts = rule->num_experts, k = rule->top_k;
    float strength = call->policy == POLICY_OFF ? 0 : call->strengths ? call->strengths[0] : call->strength;
    tile->rule = rule;
    tile->snapshot = snapshot;
    tile->stride = tile_stride(experts);
    tile->transposed = 0;
    row->given = row->logits = logits;
    row->step = 1;
    row->vector = 1;
    row->share = tile->share;
    row->scale = tile->scale;
    row->ids = ids;
    tile->scale[0] = 0;
    if (!vector_max(logits, experts, &row->statistics.max)) return 0;
    if (experts != tile->stride) {
        vector_pad(logits, experts, tile->logits, tile->stride);
        row->logits = tile->logits;
    }
    row->scores = row->logits;
#if ROUTE_AVX512
    if (experts > NETWORK_ROWS && divided_route(tile, row, strength, weights, tally)) return 1;
#endif
    vector_prefer(row->logits, snapshot->preferred, strength, tile->stride, tile->adjusted);
    vector_select(tile->adjusted, experts, k, ids);
    block selected = vector_selected(row->logits, ids, k);
    if (rule->renormalize) vector_softmax(selected, k, rule->weight_scale, weights);
    else row_weights(tile, row, weights);
    if (call->policy == POLICY_BONUS) tally->lost_mass += report_vector(tile, row, eight_fold_min(selected), tally);
    return 1;
}

#endif
