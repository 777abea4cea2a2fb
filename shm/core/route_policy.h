/* The policies of selection, on a tile. */
#ifndef HOTSET_ROUTE_POLICY_H
#define HOTSET_ROUTE_POLICY_H

#include "route_resnorm.h"
#include "route_substitute.h"

/* Moves the running mean of max - min by one row. The first row seeds it. */
static inline void range_update(struct route_tally *tally, const struct row_statistics *statistics) {
    float spread = statistics->max - statistics->min;
    if (!statistics->finite || !isfinite(spread)) return;
    int seeds = tally->range == 0;
    float rate = seeds ? 1.0f : ROUTE_RANGE_RATE;
    tally->range = seeds ? spread : tally->range + rate * (spread - tally->range);
    tally->range_gain *= 1.0f - rate;
    tally->range_shift = tally->range_shift * (1.0f - rate) + rate * spread;
    tally->range_updates++;
}

/* Cache-Prior's top J: the row's own best `keep_top` get the amount too. */
static inline void row_keep_top(const struct route_tile *tile, struct route_row *row, float amount) {
    for (uint32_t i = 0; i < tile->rule->keep_top; i++) {
        uint32_t expert = (uint32_t)row->truth[i], at = expert * row->step;
        if (!isnan(row->adjusted[at]))
            row->adjusted[at] = plain_score(tile->rule, tile->selection_bias, expert, row->logits[at] + amount);
    }
}

/* POLICY_MASS, one row, whose best preferred experts are in `ids`: best first they take the places of those in the true
 * top k that are not preferred, worst first, while the mass lost in all stays within `budget`. No other exchange of as
 * many experts loses less. Those that stay keep their order and the others follow, for none of them ranks higher. */
static inline void row_exchange_within_mass(struct route_tile *tile, struct route_row *row, float budget) {
    const uint64_t *preferred = tile->snapshot->preferred;
    uint32_t k = tile->rule->top_k, count = 0, next = 0, kept = 0, removed = 0 /* bits of positions in truth */;
    int32_t substitutes[ROUTE_MAX_TOP_K], taken[ROUTE_MAX_TOP_K];
    float scale = row_scale(tile, row), lost = 0;
    memcpy(substitutes, row->ids, k * sizeof *substitutes);
    for (uint32_t i = k; i-- > 0;) {
        if (bit_test(preferred, (uint32_t)row->truth[i])) continue;
        while (next < k && contains(row->truth, k, substitutes[next])) next++;
        if (next == k || !bit_test(preferred, (uint32_t)substitutes[next])) break;
        if (!(row->adjusted[(uint32_t)substitutes[next] * row->step] > -INFINITY)) break; /* NaN, masked out, or in a group left out */
        lost += (row_share(row, row->truth[i]) - row_share(row, substitutes[next])) * scale;
        if (!(lost <= budget)) break;
        taken[count++] = substitutes[next++];
        removed |= UINT32_C(1) << i;
    }
    for (uint32_t i = 0; i < k; i++)
        if (!(removed >> i & 1)) row->ids[kept++] = row->truth[i];
    for (uint32_t i = 0; i < count; i++) row->ids[kept + i] = taken[i];
}

/* `strengths`: of each row. */
static inline void tile_apply_policy(struct route_tile *tile, uint32_t policy, const float *strengths,
                                     struct route_tally *tally) {
    const float none[TILE_ROWS] = {0};
    float amounts[TILE_ROWS] = {0};
    switch (policy) {
    case POLICY_BONUS:
        tile_adjust(tile, strengths);
        tile_select(tile, 0);
        break;
    case POLICY_RANGE:
        tile_adjust(tile, none);
        tile_select(tile, 1);
        for (uint32_t r = 0; r < tile->rows; r++) {
            range_update(tally, &tile->row[r].statistics);
            amounts[r] = strengths[r] * tally->range;
        }
        tile_adjust(tile, amounts);
        for (uint32_t r = 0; r < tile->rows; r++) row_keep_top(tile, &tile->row[r], amounts[r]);
        tile_select(tile, 0);
        break;
    case POLICY_MASS:
        tile_adjust(tile, none);
        tile_select(tile, 1);
        tile_restrict(tile);
        tile_select(tile, 0);
        for (uint32_t r = 0; r < tile->rows; r++)
            if (tile->row[r].statistics.finite) row_exchange_within_mass(tile, &tile->row[r], strengths[r]);
        break;
    case POLICY_SUBSTITUTE:
        tile_adjust(tile, none);
        tile_select(tile, 1);
        for (uint32_t r = 0; r < tile->rows; r++)
            if (tile->row[r].statistics.finite) row_substitute(tile, &tile->row[r], strengths[r]);
        break;
    case POLICY_RESNORM:
        tile_resnorm(tile, strengths);
        break;
    default:
        tile_adjust(tile, none);
        tile_select(tile, 0);
    }
}

#endif
