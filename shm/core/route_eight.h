/* Eight experts, two of them to a token (Mixtral's gate), without a preference or with a bonus: a tile of columns that
 * stays in the registers.
 *
 * The same keys and the same operations on each number as for other tiles of columns (route_ranking.h), so the results
 * are the same bits. But of a ranking only three ranks are formed, and what a preference changed is looked for in those
 * rows alone that an expert left out might belong to: about one in ten. */
#ifndef HOTSET_ROUTE_EIGHT_H
#define HOTSET_ROUTE_EIGHT_H

#include "route_eight_sums.h"
#include "route_report.h"

static inline int eight_applies(const struct route_rule *rule, const struct route_call *call) {
    return rule->num_experts == 8 && rule->top_k == 2 && !route_is_plain(rule) && call->policy <= POLICY_BONUS &&
           !call->want_prefetch;
}

struct best_three {
    block first, second, third;
};

/* Of four keys. */
static inline struct best_three three_of_four(const block *keys) {
    block high = block_max(keys[0], keys[1]), low = block_min(keys[0], keys[1]);
    block other_high = block_max(keys[2], keys[3]), other_low = block_min(keys[2], keys[3]);
    block lost = block_min(high, other_high), won = block_max(low, other_low);
    return (struct best_three){block_max(high, other_high), block_max(lost, won), block_min(lost, won)};
}

static inline struct best_three three_of_eight(const block *keys) {
    struct best_three a = three_of_four(keys), b = three_of_four(keys + 4);
    block lost = block_min(a.first, b.first), second = block_max(a.second, b.second), third = block_max(a.third, b.third);
    return (struct best_three){block_max(a.first, b.first), block_max(lost, second),
                               block_max(block_min(lost, second), third)};
}

/* Mixing weights of the two experts `chosen` in each row, whose logits are `selected`. */
static inline void eight_weights(const struct route_rule *rule, const block *logits, const block *chosen,
                                 const block *selected, block *weights) {
    _Alignas(64) float shares[8 * BLOCK_LANES];
    _Alignas(64) int32_t ids[2][BLOCK_LANES];
    block share[8], sum;
    if (rule->renormalize) {
        block max = block_max(selected[0], selected[1]);
        for (uint32_t i = 0; i < 2; i++) weights[i] = block_exp(block_sub(selected[i], max));
        sum = block_add(weights[0], weights[1]);
    } else {
        block max = BLOCK_TREE(block_max, logits);
        for (uint32_t i = 0; i < 2; i++) block_store((float *)ids[i], chosen[i]);
#pragma GCC unroll 8
        for (uint32_t e = 0; e < 8; e++) block_store(shares + e * BLOCK_LANES, share[e] = block_exp(block_sub(logits[e], max)));
        sum = BLOCK_TREE(block_add, share);
        for (uint32_t i = 0; i < 2; i++) weights[i] = column_gather(shares, ids[i]);
    }
    block scale = block_mul(block_div(block_all(1), sum), block_all(rule->weight_scale));
    for (uint32_t i = 0; i < 2; i++) weights[i] = block_mul(weights[i], scale);
}

/* How many of the eight logits reach `least`. */
static inline block eight_reaching(const block *logits, block least) {
    block reach[8];
#pragma GCC unroll 8
    for (uint32_t e = 0; e < 8; e++) reach[e] = block_where(block_at_least(logits[e], least), block_all(1));
    return BLOCK_TREE(block_add, reach);
}

/* What a preference cost a row that one expert at least might belong to that was left out. */
static inline float eight_lost(struct route_tile *tile, const float *logits, int32_t *ids, struct route_tally *tally) {
    struct route_row *row = &tile->row[0];
    block z = block_load_padded(logits, 8, -INFINITY);
    float least = logits[ids[0]] < logits[ids[1]] ? logits[ids[0]] : logits[ids[1]];
    uint32_t outsiders = mask_bits(block_at_least(z, block_all(least))) & ~(1u << ids[0] | 1u << ids[1]);
    row->given = row->logits = row->scores = logits;
    row->step = 1;
    row->ids = ids;
    row->scale = tile->scale;
    row->share = tile->share;
    z = block_exp(block_sub(z, block_all(block_fold_max(z))));
    block_store(row->share, z);
    *row->scale = 1.0f / block_fold_sum(z);
    if (outsiders & (outsiders - 1)) return report_vector(tile, row, least, tally); /* several */
    return report_outsider(tile, row, least, __builtin_ctz(outsiders), tally);
}

/* One tile of rows, `bonus` for each; `left` rows of the call from its first one on. Sets `contested`: a bit for each row
 * that an expert left out might belong to. 0 if it has a logit that is not finite, or a row in which the keys do not tell
 * the best apart; then nothing is written. */
static inline int eight_tile(const struct route_tile *tile, block bonus, const float *logits, uint32_t left, int32_t *ids,
                             float *weights, struct eight_sums *sums, uint64_t *contested) {
    block z[8], scores[8], kept = block_all(tile->columns.kept);
    block_transpose(logits, 8, z);
#pragma GCC unroll 8
    for (uint32_t e = 0; e < 8; e++) scores[e] = block_add(z[e], block_and(block_all(tile->preferred[e]), bonus));
    block sum = BLOCK_TREE(block_add, scores); /* NaN and infinities stay in it */
    if (!block_is_zero(block_sub(sum, sum))) return 0;
#pragma GCC unroll 8
    for (uint32_t e = 0; e < 8; e++) scores[e] = block_tagged(scores[e], block_all(float_from_bits(e)), kept);
    struct best_three best = three_of_eight(scores);
    block first = block_and(best.first, kept), second = block_and(best.second, kept), third = block_and(best.third, kept);
    lane_mask sure = mask_and(block_above(first, second), block_above(second, third));
    if (mask_bits(sure) != (1u << BLOCK_LANES) - 1) return 0;
    block chosen[2] = {block_tags(best.first, kept), block_tags(best.second, kept)};
    block selected[2] = {rows_gather(logits, chosen[0]), rows_gather(logits, chosen[1])};
    block reaching = eight_reaching(z, block_min(selected[0], selected[1]));
    block mixing[2];
    eight_sums_add(sums, chosen, left);
    eight_weights(tile->rule, z, chosen, selected, mixing);
    block_store_pairs(chosen[0], chosen[1], (float *)ids);
    block_store_pairs(mixing[0], mixing[1], weights);
    *contested = mask_bits(block_above(reaching, block_all(2)));
    return 1;
}

/* As many whole tiles as there are before one that is not ordinary, at most 64 rows; how many rows. The contested ones
 * are looked at together: each end of a loop over a few of them would be mispredicted. */
static inline uint32_t eight_route(struct route_tile *tile, const struct route_call *call, const float *strengths,
                                   const float *logits, uint32_t rows, int32_t *ids, float *weights,
                                   struct eight_sums *sums, struct route_tally *tally) {
    uint64_t contested = 0, of_tile;
    uint32_t done = 0;
    tile->transposed = 0; /* the contested rows are looked at one by one */
    for (; done < 64 && done + BLOCK_LANES <= rows; done += BLOCK_LANES) {
        block bonus = call->policy == POLICY_OFF ? block_all(0)
                      : strengths                ? block_load(strengths + done)
                                                 : block_all(call->strength);
        if (!eight_tile(tile, bonus, logits + done * 8, rows - done, ids + done * 2, weights + done * 2, sums, &of_tile)) break;
        contested |= of_tile << done;
    }
    if (call->policy == POLICY_OFF) return done;
    for (; contested; contested &= contested - 1) {
        uint32_t r = (uint32_t)__builtin_ctzll(contested);
        tally->lost_mass += eight_lost(tile, logits + r * 8, ids + r * 2, tally);
    }
    return done;
}

#endif
