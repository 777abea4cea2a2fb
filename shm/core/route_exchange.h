/* The policies that let preferred experts take the places of others (mass, resnorm, substitute), in columns.
 *
 * As in route_preference.h the preferred experts and the others are ranked apart, here by their logits alone. Pair i is
 * the preferred expert of rank k - 1 - i and the other one of rank i. The better one of each pair is in the true top k;
 * where that is the other one, the policy decides whether the preferred one takes its place. From the last pair on, that
 * is best substitute first and worst expert out first. POLICY_SUBSTITUTE puts another preferred one in its place. */
#ifndef HOTSET_ROUTE_EXCHANGE_H
#define HOTSET_ROUTE_EXCHANGE_H

#include "route_policy.h"

struct exchange_pair {
    block in, out;             /* keys: the preferred expert, and the other one */
    block share_in, share_out;
    lane_mask possible;        /* the other one is in the true top k, and there is a preferred one */
    lane_mask taken;           /* the policy lets the preferred one take its place */
};

static inline lane_mask no_lane(void) { return block_above(block_all(0), block_all(0)); }

/* Shares of the experts that keys name; of a missing one, some share. */
static inline block exchange_shares(const struct route_tile *tile, block keys) {
    _Alignas(64) int32_t ids[BLOCK_LANES];
    block_store((float *)ids, block_tags(keys, block_all(tile->columns.kept)));
    return column_gather(tile->share, ids);
}

/* Rows in which two neighbours of a ranking may be the other way round. */
static inline lane_mask exchange_tied(const struct route_tile *tile, const struct column_ranking *ranking) {
    lane_mask tied = no_lane();
    for (uint32_t i = 0; i < tile->rule->top_k; i++) {
        block rank = ranking_kept(tile, ranking, i), next = ranking_kept(tile, ranking, i + 1);
        tied = mask_or(tied, mask_and(block_equal(rank, next), block_above(next, block_all(-INFINITY))));
    }
    return tied;
}

/* The pairs, before the policy. Returns the rows in which they are not certain. */
static inline lane_mask exchange_begin(struct route_tile *tile, struct exchange_pair *pairs) {
    const struct route_columns *columns = &tile->columns;
    struct column_ranking preferred, others;
    uint32_t k = tile->rule->top_k;
    block kept = block_all(columns->kept);
    ranking_of(tile, tile->logits, 0, columns->num_preferred, (struct ranking_scores){NULL}, k == NETWORK_ROWS, &preferred);
    ranking_of(tile, tile->logits, columns->num_preferred, columns->num_all, (struct ranking_scores){NULL}, k == NETWORK_ROWS, &others);
    lane_mask unsure = mask_or(exchange_tied(tile, &preferred), exchange_tied(tile, &others));
    for (uint32_t i = 0; i < k; i++) {
        struct exchange_pair *pair = &pairs[i];
        pair->in = preferred.best[k - 1 - i];
        pair->out = others.best[i];
        pair->share_in = exchange_shares(tile, pair->in);
        pair->share_out = exchange_shares(tile, pair->out);
        pair->possible = mask_and(block_above(pair->out, pair->in), block_above(pair->in, block_all(-INFINITY)));
        pair->taken = no_lane();
        unsure = mask_or(unsure, block_equal(block_and(pair->in, kept), block_and(pair->out, kept)));
    }
    return unsure;
}

/* POLICY_MASS: worst first, while the mass lost in all stays within `budget`. */
static inline void exchange_within_mass(const struct route_tile *tile, struct exchange_pair *pairs, block budget) {
    block scale = block_load(tile->scale), lost = block_all(0);
    lane_mask open = block_at_least(budget, lost);
    for (uint32_t i = tile->rule->top_k; i-- > 0;) {
        struct exchange_pair *pair = &pairs[i];
        block mass = block_mul(block_sub(pair->share_out, pair->share_in), scale);
        lost = block_add(lost, block_where(pair->possible, mass));
        open = mask_and(open, block_at_least(budget, lost));
        pair->taken = mask_and(pair->possible, open);
    }
}

/* row_weight_scale() of each row. */
static inline block exchange_weight_scale(const struct route_tile *tile, const struct exchange_pair *pairs) {
    uint32_t k = tile->rule->top_k;
    block truth[NETWORK_ROWS], shares[SUM_LANES];
    if (!tile->rule->renormalize) return block_load(tile->scale);
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) truth[i] = i < k ? block_max(pairs[i].in, pairs[i].out) : block_all(-INFINITY);
    block_sort(truth);
    for (uint32_t i = 0; i < k; i++) shares[i] = exchange_shares(tile, truth[i]);
    return block_div(block_all(1), columns_fold(shares, k));
}

/* Of each row, the entry whose number `counts` holds. */
static inline block exchange_entry(const struct route_tile *tile, float (*entries)[BLOCK_LANES], block counts) {
    _Alignas(64) int32_t numbers[BLOCK_LANES];
    block_store((float *)numbers, block_tags(block_add(counts, block_all(1 << 23)), block_all(tile->columns.kept)));
    return column_gather(entries[0], numbers);
}

/* POLICY_SUBSTITUTE: while it changes the residual by less than `limit`, worst first. Those that come are the residents of
 * the last ranks, as far as they are not in the true top k, where residents have the first ranks of their kind. Returns
 * the rows in which they are not certain. */
static inline lane_mask exchange_for_last(const struct route_tile *tile, struct exchange_pair *pairs, block limit) {
    const struct route_columns *columns = &tile->columns;
    uint32_t k = tile->rule->top_k;
    struct column_ranking last;
    _Alignas(64) float keys[NETWORK_ROWS][BLOCK_LANES], shares[NETWORK_ROWS][BLOCK_LANES];
    block sign = block_all(-0.0f), none = block_all(0), one = block_all(1), scale = exchange_weight_scale(tile, pairs);
    ranking_of(tile, tile->logits, columns->num_all, columns->end_resident, (struct ranking_scores){.flipped = &sign},
               k == NETWORK_ROWS, &last);
    for (uint32_t i = 0; i < k; i++) {
        block key = block_xor(last.best[i], sign);
        block_store(keys[i], key);
        block_store(shares[i], exchange_shares(tile, key));
    }
    /* How many residents are not in the true top k: see columns_go_by_row(). */
    block count = none, spare = block_all((float)columns->num_resident - (float)k);
    for (uint32_t i = 0; i < k; i++) spare = block_add(spare, block_where(block_above(pairs[i].out, pairs[i].in), one));
    lane_mask open = block_above(limit, none);
    for (uint32_t i = k; i-- > 0;) {
        struct exchange_pair *pair = &pairs[i];
        lane_mask missing = block_above(pair->out, pair->in); /* and in the true top k */
        block p = block_mul(pair->share_out, scale), q = block_mul(exchange_entry(tile, shares, count), scale);
        lane_mask little = block_above(block_mul(limit, limit), block_add(block_mul(p, p), block_mul(q, q)));
        lane_mask pass = mask_and(little, block_above(spare, count));
        open = mask_and(open, mask_or(pass, block_at_least(pair->in, pair->out)));
        pair->taken = mask_and(missing, open);
        count = block_add(count, block_where(missing, one));
    }
    /* The last rank of all is reported for the best expert that went, as report_against_truth() does. */
    count = none;
    for (uint32_t i = 0; i < k; i++) {
        struct exchange_pair *pair = &pairs[i];
        pair->in = block_choose(pair->taken, exchange_entry(tile, keys, count), pair->in);
        count = block_add(count, block_where(pair->taken, one));
    }
    return exchange_tied(tile, &last);
}

/* The bits of a key of POLICY_RESNORM's order: the kind, and the rank within it upside down. */
#define EXCHANGE_PREFERRED 8u
#define EXCHANGE_TAG 15u

/* POLICY_RESNORM: where the share with the amount is larger. Returns the rows in which the experts' order by the larger of
 * both is not certain; `sorted` are keys of that order. */
static inline lane_mask exchange_by_share(const struct route_tile *tile, struct exchange_pair *pairs, block amount,
                                          block *sorted) {
    uint32_t k = tile->rule->top_k;
    block kept = block_all(float_from_bits(~EXCHANGE_TAG)), one = block_all(1);
    block kind = block_all(float_from_bits(EXCHANGE_PREFERRED)), closeness = block_all(1.0f / (1 << 18));
    lane_mask unsure = block_equal(amount, block_all(0)); /* then logits decide */
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) sorted[i] = block_all(-INFINITY);
    for (uint32_t i = 0; i < k; i++) {
        struct exchange_pair *pair = &pairs[i];
        block with_amount = block_add(pair->share_in, amount);
        pair->taken = mask_and(pair->possible, block_above(with_amount, pair->share_out));
        lane_mask preferred = mask_or(pair->taken, block_above(pair->in, pair->out));
        block of_in = block_tagged(with_amount, block_all(float_from_bits(EXCHANGE_PREFERRED + 8 - k + i)), kept);
        block of_out = block_tagged(pair->share_out, block_all(float_from_bits(7 - i)), kept);
        sorted[i] = block_choose(preferred, of_in, of_out);
        if (i == 0) continue; /* rounding may have turned the order of shares round, which the pairs rest on */
        unsure = mask_or(unsure, mask_or(block_above(pairs[i - 1].share_in, pair->share_in),
                                         block_above(pair->share_out, pairs[i - 1].share_out)));
    }
    block_sort(sorted);
    for (uint32_t i = 1; i < k; i++) {
        block better = sorted[i - 1], worse = sorted[i];
        lane_mask close = block_at_least(block_mul(better, closeness), block_sub(better, worse));
        block kinds = block_and(block_xor(better, worse), kind);
        unsure = mask_or(unsure, mask_and(close, block_above(block_or(kinds, one), one)));
    }
    return unsure;
}

/* The ids behind keys of that order, best first, into columns->chosen. */
static inline void exchange_ids_by_share(struct route_tile *tile, const struct exchange_pair *pairs, const block *sorted) {
    uint32_t k = tile->rule->top_k;
    _Alignas(64) float keys[EXCHANGE_TAG + 1][BLOCK_LANES];
    block tag = block_all(float_from_bits(~EXCHANGE_TAG)), kept = block_all(tile->columns.kept);
    for (uint32_t i = 0; i < k; i++) {
        block_store(keys[EXCHANGE_PREFERRED + 8 - k + i], pairs[i].in);
        block_store(keys[7 - i], pairs[i].out);
    }
    for (uint32_t i = 0; i < k; i++) {
        int32_t *chosen = tile->columns.chosen[i];
        block_store((float *)chosen, block_tags(sorted[i], tag));
        block_store((float *)chosen, block_tags(column_gather(keys[0], chosen), kept));
    }
}

/* The same for the other policies, where the order is that of the logits. Returns the rows in which it is not certain. */
static inline lane_mask exchange_ids_by_logit(struct route_tile *tile, const struct exchange_pair *pairs) {
    uint32_t k = tile->rule->top_k;
    struct column_ranking ranking = {.ninth = block_all(-INFINITY)};
    for (uint32_t i = 0; i < NETWORK_ROWS; i++)
        ranking.best[i] = i < k ? block_choose(pairs[i].taken, pairs[i].in, block_max(pairs[i].in, pairs[i].out))
                                : block_all(-INFINITY);
    block_sort(ranking.best);
    ranking_ids(tile, &ranking, 0, NULL, NULL, tile->columns.chosen);
    return exchange_tied(tile, &ranking);
}

/* One row, exactly. */
static inline void exchange_row(struct route_tile *tile, uint32_t policy, uint32_t r, float strength) {
    const struct route_rule *rule = tile->rule;
    const uint64_t *preferred_mask = tile->snapshot->preferred;
    const float *given = tile->given + (size_t)r * rule->num_experts;
    int32_t ids[ROUTE_MAX_TOP_K];
    struct ranking preferred, others;
    struct route_row row = {.logits = tile->logits + r, .scores = tile->logits + r, .adjusted = tile->logits + r,
                            .step = BLOCK_LANES, .vector = 1, .share = tile->share + r, .scale = &tile->scale[r], .ids = ids};
    preferred.count = select_of_kind(given, rule->num_experts, rule->top_k, preferred_mask, 1, preferred.ids);
    others.count = select_of_kind(given, rule->num_experts, rule->top_k, preferred_mask, 0, others.ids);
    row_merge(&row, rule, &preferred, &others, 0, row.truth);
    if (policy == POLICY_RESNORM) row_merge(&row, rule, &preferred, &others, strength, ids);
    else if (policy == POLICY_SUBSTITUTE) row_substitute(tile, &row, strength);
    else {
        for (uint32_t i = 0; i < rule->top_k; i++) ids[i] = i < preferred.count ? preferred.ids[i] : others.ids[0];
        row_exchange_within_mass(tile, &row, strength);
    }
    for (uint32_t i = 0; i < rule->top_k; i++) tile->columns.chosen[i][r] = ids[i];
}

/* Selects into columns->chosen, and tells columns_report() what took whose place. */
static inline void columns_exchange(struct route_tile *tile, uint32_t policy, const float *strengths) {
    struct route_columns *columns = &tile->columns;
    struct exchange_pair pairs[NETWORK_ROWS];
    block sorted[NETWORK_ROWS], limit = block_load(strengths);
    columns_shares(tile);
    lane_mask unsure = exchange_begin(tile, pairs);
    if (policy == POLICY_RESNORM) {
        unsure = mask_or(unsure, exchange_by_share(tile, pairs, limit, sorted));
        exchange_ids_by_share(tile, pairs, sorted);
    } else {
        if (policy == POLICY_SUBSTITUTE) unsure = mask_or(unsure, exchange_for_last(tile, pairs, limit));
        else exchange_within_mass(tile, pairs, limit);
        unsure = mask_or(unsure, exchange_ids_by_logit(tile, pairs));
    }
    columns->unsure = mask_bits(unsure) & tile_all_rows(tile);
    for (uint32_t word = 0; word < COLUMN_WORDS; word++) columns->changed[word] = 0;
    for (uint32_t i = 0; i < tile->rule->top_k; i++) {
        block_store((float *)columns->in[i], pairs[i].in);
        block_store((float *)columns->out[i], pairs[i].out);
        columns->changed[i * BLOCK_LANES / 64] |= (uint64_t)mask_bits(pairs[i].taken) << (i * BLOCK_LANES % 64);
    }
    for (uint32_t left = columns->unsure; left; left &= left - 1) {
        uint32_t r = (uint32_t)__builtin_ctz(left);
        exchange_row(tile, policy, r, strengths[r]);
    }
}

#endif
