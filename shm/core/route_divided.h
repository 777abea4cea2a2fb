/* A single row with AVX-512: its preferred experts and the others are ranked apart, side by side in half of the lanes each.
 *
 * As in route_preference.h, pair i is the preferred expert of rank k - 1 - i and the other one of rank i. The better one
 * of a pair by adjusted scores is selected, the better one by logits is in the true top k. So one ranking gives the
 * selection and what the preference changed of it, and fresh logits decide no branch. */
#ifndef HOTSET_ROUTE_DIVIDED_H
#define HOTSET_ROUTE_DIVIDED_H

#include "route_report.h"
#include "route_weights.h"

#define DIVIDED_RANKS 8u         /* of each kind: half of the lanes */
#define DIVIDED_PREFERRED 0x00FF /* the lanes of the preferred experts */

/* Lane i holds the preferred expert of rank i, lane 8 + i the other one; -inf where there is none. */
struct divided_ranking {
    block keys; /* of floats, see route_ranking.h */
    block kept; /* the bits of a score that a key keeps */
    block logits, adjusted;
    __m512i ids;
};

/* Sorted keys of the experts from `first` on, 64 or as many as there are. */
static inline void divided_load(const float *logits, uint32_t first, uint32_t experts, const uint64_t *preferred, block kept,
                                block *r) {
    const __m512i twice = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    uint64_t all = experts - first < 64 ? (UINT64_C(1) << (experts - first)) - 1 : UINT64_MAX, set = preferred[first / 64];
    _Alignas(16) uint16_t lanes[NETWORK_ROWS]; /* by eight experts: the preferred among them, the others in the upper half */
    __m128i low = _mm_cvtsi64_si128((int64_t)(set & all)), high = _mm_cvtsi64_si128((int64_t)(~set & all));
    _mm_store_si128((__m128i *)lanes, _mm_unpacklo_epi8(low, high));
    __m512i tags = _mm512_add_epi32(twice, _mm512_set1_epi32((int32_t)first));
#pragma GCC unroll 8
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) {
        block scores = _mm512_broadcast_f32x8(_mm256_loadu_ps(logits + first + i * DIVIDED_RANKS));
        block tagged = block_tagged(scores, _mm512_castsi512_ps(tags), kept);
        r[i] = block_choose(mask_from_bits(lanes[i]), tagged, block_all(-INFINITY));
        tags = _mm512_add_epi32(tags, _mm512_set1_epi32((int32_t)DIVIDED_RANKS));
    }
    block_sort(r);
}

/* Lanes 0 and 8 of eight rows. */
static inline block divided_firsts(const block *r) {
    const __m512i places = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    __m512d pairs[4], quads[2];
    for (uint32_t i = 0; i < 4; i++) pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]));
    for (uint32_t i = 0; i < 2; i++) quads[i] = _mm512_unpacklo_pd(pairs[2 * i], pairs[2 * i + 1]);
    return _mm512_castpd_ps(_mm512_permutex2var_pd(quads[0], places, quads[1]));
}

/* Returns vector_shares()'s factor if it is wanted. That does not depend on the ranking, whose steps wait for each other:
 * computed between them, it takes half of the time. Logits are padded to a multiple of 64. */
static inline float divided_rank(const struct route_tile *tile, const struct route_row *row, float strength, int want_scale,
                                 struct divided_ranking *ranking) {
    const uint64_t *preferred = tile->snapshot->preferred;
    uint32_t experts = tile->rule->num_experts, id_mask = 63;
    block best[NETWORK_ROWS], other[NETWORK_ROWS], none = block_all(-INFINITY);
    while (id_mask < experts - 1) id_mask = id_mask * 2 + 1;
    ranking->kept = block_all(float_from_bits(~id_mask));
    divided_load(row->logits, 0, experts, preferred, ranking->kept, best);
    for (uint32_t first = 64; first < experts; first += 64) {
        divided_load(row->logits, first, experts, preferred, ranking->kept, other);
        block_merge(best, other);
    }
    float scale = want_scale ? vector_shares(row->logits, experts, row->statistics.max, NULL) : 0;
    for (uint32_t distance = DIVIDED_RANKS / 2; distance > 0; distance /= 2) block_fold(best, distance);
    ranking->keys = divided_firsts(best);
    ranking->ids = _mm512_castps_si512(block_tags(ranking->keys, ranking->kept));
    ranking->logits = _mm512_mask_i32gather_ps(none, block_above(ranking->keys, none), ranking->ids, row->logits, 4);
    ranking->adjusted = block_add(ranking->logits, block_where(DIVIDED_PREFERRED, block_all(strength)));
    return scale;
}

/* How many of the experts in `set`, its bits flipped by `flipped`, reach `least` when `strength` is added. */
static inline uint32_t divided_reaching(const struct route_row *row, uint32_t experts, const uint64_t *set, uint64_t flipped,
                                        float strength, float least) {
    uint32_t reaching = 0;
    for (uint32_t e = 0; e < experts; e += BLOCK_LANES) {
        uint32_t lanes = (uint32_t)((set[e / 64] ^ flipped) >> (e % 64));
        block adjusted = block_add(block_load(row->logits + e), block_all(strength));
        reaching += (uint32_t)__builtin_popcount(mask_bits(block_at_least(adjusted, block_all(least))) & lanes);
    }
    return reaching;
}

/* Keys leave some bits of the scores out. Whether the first k of each kind are its best and in their order all the same. */
static inline int divided_sure(const struct route_tile *tile, const struct route_row *row, float strength,
                               const struct divided_ranking *ranking) {
    const __m512i next = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 7, 9, 10, 11, 12, 13, 14, 15, 15);
    const __mmask16 others = (__mmask16)~DIVIDED_PREFERRED;
    const uint64_t *preferred = tile->snapshot->preferred;
    uint32_t experts = tile->rule->num_experts, k = tile->rule->top_k;
    block none = block_all(-INFINITY), adjusted = ranking->adjusted, after = _mm512_permutexvar_ps(next, adjusted);
    uint32_t eighths = 1u << 7 | 1u << 15, compared = mask_bits(block_above(adjusted, none)) & ~eighths;
    if (compared & ~mask_bits(block_above(adjusted, after))) return 0; /* all eight: those behind the k-th may exceed it */
    /* Those of a kind that are not among its eight have at most the largest score with the kept bits of the eighth one's.
     * That must be less than the k-th has. With k = 8 the seventh will do, if the eighth loses against the other kind's
     * best: then so do they. */
    block left_out = _mm512_andnot_ps(ranking->kept, block_all(float_from_bits(UINT32_MAX)));
    block most = block_max(block_or(ranking->keys, left_out), block_and(ranking->keys, ranking->kept)); /* -inf: not NaN */
    most = block_add(most, block_where(DIVIDED_PREFERRED, block_all(strength)));
    int32_t last = k < DIVIDED_RANKS ? (int32_t)k - 1 : 6;
    block enough = _mm512_permutexvar_ps(_mm512_mask_set1_epi32(_mm512_set1_epi32(last), others, last + 8), adjusted);
    block rival = _mm512_permutexvar_ps(_mm512_mask_set1_epi32(_mm512_set1_epi32(8), others, 0), ranking->logits);
    if (k == DIVIDED_RANKS) enough = block_min(enough, rival);
    uint32_t sure = mask_bits(mask_or(block_above(enough, most), block_equal(most, none)));
    if ((sure & eighths) == eighths) return 1;
    float eighth[BLOCK_LANES];
    block_store(eighth, adjusted);
    return (sure & 1u << 7 || divided_reaching(row, experts, preferred, 0, strength, eighth[7]) == DIVIDED_RANKS) &&
           (sure & 1u << 15 || divided_reaching(row, experts, preferred, UINT64_MAX, 0, eighth[15]) == DIVIDED_RANKS);
}

/* Keys of doubles (route_keys.h), but with the expert's lane in the ranking below its id. */
static inline keys divided_keys(__m256 adjusted, __m256i ids, __m256i lanes) {
    __m256i bits = _mm256_castps_si256(adjusted);
    __m256i ordered = _mm256_xor_si256(bits, _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MIN)));
    __m256i tags = _mm256_or_si256(_mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(0xFFFF), ids), 4), lanes);
    __m512i placed = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(ordered), 20), _mm512_cvtepu32_epi64(tags));
    return _mm512_castsi512_pd(_mm512_or_si512(placed, _mm512_set1_epi64(0x3FF0000000000000)));
}
static inline __m256i divided_key_ids(__m256i low) { return _mm256_andnot_si256(_mm256_srli_epi32(low, 4), _mm256_set1_epi32(0xFFFF)); }
static inline __m256i divided_key_lanes(__m256i low) { return _mm256_and_si256(low, _mm256_set1_epi32(15)); }

/* Keys that fall, then rise, sorted. */
static inline keys divided_sort(keys pairs) {
    keys y = keys_exchange(pairs, 4);
    pairs = _mm512_mask_min_pd(keys_max(pairs, y), 0xF0, pairs, y);
    y = keys_exchange(pairs, 2);
    pairs = _mm512_mask_min_pd(keys_max(pairs, y), 0xCC, pairs, y);
    y = keys_exchange(pairs, 1);
    return _mm512_mask_min_pd(keys_max(pairs, y), 0xAA, pairs, y);
}

static inline __m256 divided_lanes(__m256i lanes, block a) {
    return _mm512_castps512_ps256(_mm512_permutexvar_ps(_mm512_castsi256_si512(lanes), a));
}
static inline __m256 divided_others(block a) { return _mm512_extractf32x8_ps(a, 1); }

/* Reports the pairs of `changed`, each of which lost so much; `out` went out of them. Returns the mass lost. */
static inline float divided_report(uint32_t changed, __m256 lost, __m256i out, uint32_t experts, struct route_tally *tally) {
    float by_pair[DIVIDED_RANKS], sum = 0;
    __m512i shifts = _mm512_cvtepu32_epi64(out);
    tally->changed += (uint32_t)__builtin_popcount(changed);
    for (uint32_t word = 0; word * 64 < experts; word++) { /* a shift of 64 or more leaves no bit */
        __m512i bits = _mm512_maskz_sllv_epi64((__mmask8)changed, _mm512_set1_epi64(1), shifts);
        tally->displaced[word] |= (uint64_t)_mm512_reduce_or_epi64(bits);
        shifts = _mm512_sub_epi64(shifts, _mm512_set1_epi64(64));
    }
    _mm256_storeu_ps(by_pair, _mm256_maskz_mov_ps((__mmask8)changed, lost));
    for (uint32_t i = 0; i < DIVIDED_RANKS; i++) sum += by_pair[i]; /* zeros do not round: as if one by one */
    return sum;
}

/* Selection, weights and report of a row that is otherwise set up. 0 if its scores are too close: nothing is written. */
static inline int divided_route(struct route_tile *tile, struct route_row *row, float strength, float *weights,
                                struct route_tally *tally) {
    static const int32_t descending[2 * DIVIDED_RANKS] = {7, 6, 5, 4, 3, 2, 1, 0};
    const struct route_rule *rule = tile->rule;
    uint32_t k = rule->top_k, pairs = (1u << k) - 1;
    struct divided_ranking ranking;
    float scale = divided_rank(tile, row, strength, !rule->renormalize, &ranking);
    if (!divided_sure(tile, row, strength, &ranking)) return 0;
    __m256i from_last = _mm256_loadu_si256((const __m256i *)(descending + DIVIDED_RANKS - k));
    __m256i in_ids = _mm512_castsi512_si256(_mm512_permutexvar_epi32(_mm512_castsi256_si512(from_last), ranking.ids));
    __m256i out_ids = _mm512_extracti32x8_epi32(ranking.ids, 1);
    keys in = divided_keys(divided_lanes(from_last, ranking.adjusted), in_ids, from_last);
    keys out = divided_keys(divided_others(ranking.adjusted), out_ids, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
    uint32_t came_in = _mm512_cmp_pd_mask(in, out, _CMP_GT_OQ) & pairs;
    /* What lies beyond the k pairs comes first of all, so that the sequence goes on rising. */
    keys chosen = divided_sort(_mm512_mask_max_pd(_mm512_set1_pd(2), (__mmask8)pairs, in, out));
    __m256i ranks = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int32_t)(DIVIDED_RANKS - k)));
    __m256i low = _mm256_permutexvar_epi32(ranks, _mm512_cvtepi64_epi32(_mm512_castpd_si512(chosen)));
    _mm256_mask_storeu_epi32(row->ids, (__mmask8)pairs, divided_key_ids(low));

    __m256 in_logits = divided_lanes(from_last, ranking.logits), out_logits = divided_others(ranking.logits);
    uint32_t truly_in = _mm256_cmp_ps_mask(in_logits, out_logits, _CMP_GT_OQ) |
                        (_mm256_cmp_ps_mask(in_logits, out_logits, _CMP_EQ_OQ) & _mm256_cmplt_epi32_mask(in_ids, out_ids));
    uint32_t changed = came_in & ~truly_in;
    if (rule->renormalize) {
        vector_softmax(vector_selected(row->logits, row->ids, k), k, rule->weight_scale, weights);
        if (!changed) return 1;
        scale = vector_shares(row->logits, rule->num_experts, row->statistics.max, NULL);
    }
    block shares = block_exp(block_sub(ranking.logits, block_all(row->statistics.max)));
    if (!rule->renormalize) {
        __m256 factor = _mm256_set1_ps(scale * rule->weight_scale);
        _mm256_mask_storeu_ps(weights, (__mmask8)pairs, _mm256_mul_ps(divided_lanes(divided_key_lanes(low), shares), factor));
    }
    __m256 lost = _mm256_sub_ps(divided_others(shares), divided_lanes(from_last, shares));
    tally->lost_mass += divided_report(changed, _mm256_mul_ps(lost, _mm256_set1_ps(scale)), out_ids, rule->num_experts, tally);
    return 1;
}

#endif
