/* Routing: which experts a token goes to, and with what weights.
 *
 *     rule + call + snapshot + logits  --kernel.rows()-->  ids, weights, tally  --route_account_*()-->  arena
 *
 * kernel.rows() is a pure function (INV-6): it reads no shared memory, so the same logits, snapshot and parameters
 * give the same selection, and it may run without the GIL. The route_account functions (route_batch.h) are the only writers.
 *
 * Selection works on adjusted scores, mixing weights always come from the unmodified gate logits. Ties go to the
 * lowest id; NaN ranks last; +inf is an ordinary largest value.
 *
 * Arithmetic is canonical: float32 without fused operations, sums in sixteen partial sums folded as a tree. Scalar and
 * vector code therefore agree bit for bit, on every instruction set and for every batch size. */
#ifndef HOTSET_ROUTE_H
#define HOTSET_ROUTE_H

#include <stdint.h>

#define ROUTE_MAX_EXPERTS 1024u
#define ROUTE_MAX_TOP_K 32u
#define ROUTE_MAX_GROUPS 64u
#define ROUTE_WORDS (ROUTE_MAX_EXPERTS / 64)
#define ROUTE_COUNT_BITS 16 /* of route_tally.selections */

enum route_gating {
    GATING_SOFTMAX_TOP_K = 0, /* probabilities over all experts, then the top k */
    GATING_TOP_K_SOFTMAX = 1, /* softmax over the selected logits; the same as the first, renormalised */
    GATING_SIGMOID = 2,       /* sigmoid scores; selected by their sums with the layer's selection bias, if it has one */
};

enum route_policy {
    POLICY_OFF = 0,   /* the true top k */
    POLICY_BONUS = 1, /* resident experts get `strength` added to their logit */
    POLICY_RANGE = 2, /* Cache-Prior: they, and the token's own top J, get strength * running mean of max - min */
    POLICY_MASS = 3,  /* they replace others while the probability mass lost stays <= strength */
    POLICY_RESNORM = 4, /* strength * the row's largest probability is added to their probability */
    POLICY_SUBSTITUTE = 5, /* others are replaced while that changes the layer's output by less than strength */
    ROUTE_POLICIES
};

/* Fixed for a router. */
struct route_rule {
    uint32_t num_experts, top_k;
    uint32_t gating;      /* enum route_gating */
    int renormalize;      /* weights of a row sum to weight_scale */
    float weight_scale;   /* factor on every weight (DeepSeek's routed_scaling_factor) */
    uint32_t num_groups, top_groups; /* of experts; only those of the best `top_groups` are selected; 1, 1: no limit */
    uint32_t keep_top;    /* POLICY_RANGE's J */
    float prefetch_threshold;
};

/* May differ from call to call. */
struct route_call {
    uint32_t policy; /* enum route_policy */
    float strength;
    const float *strengths; /* NULL, or one per row instead of `strength` */
    int want_prefetch;      /* collect experts for route_tally.prefetch */
    const float *selection_bias; /* GATING_SIGMOID: added to the experts' scores to select by; NULL: none */
};

/* What a call sees of the shared state, read once. */
struct route_snapshot {
    uint64_t resident[ROUTE_WORDS];
    uint64_t preferred[ROUTE_WORDS]; /* resident, or being loaded */
    float range;                     /* running mean of max - min of the layer's logits; 0 = no row seen */
};

/* What a selection is worth to the affinity, as the tally adds it up. */
struct route_boosts {
    const uint64_t *by_age; /* Q.36 by number of rows that follow in the call; NULL: only counted */
    uint64_t keep;          /* bits of the tally that a further selection adds to; the others it replaces */
};

/* What the rows of a call did. Sets have as many words as the experts need. */
struct route_tally {
    uint64_t selections[ROUTE_MAX_EXPERTS]; /* per expert [boosts Q.36 | count 16], or only the count: route_boosts */
    uint64_t missing[ROUTE_WORDS];          /* selected and not resident */
    uint64_t displaced[ROUTE_WORDS];        /* in some row's true top k, but not selected there, not preferred */
    uint64_t prefetch[ROUTE_WORDS]; /* not selected, not resident, gate probability >= prefetch_threshold in some row */
    uint64_t nan_logits, rows_without_finite, changed;
    double lost_mass;
    float range;                   /* the running mean after the rows */
    uint32_t range_updates;        /* rows that moved it */
    float range_gain, range_shift; /* the same as a map: mean -> gain * mean + shift */
};

/* Whether rows take the plain path whatever their logits: what the vector steps do not do. */
static inline int route_is_plain(const struct route_rule *rule) {
    return rule->gating == GATING_SIGMOID || rule->top_groups < rule->num_groups;
}

#define ROUTE_RANGE_RATE 0.05f /* weight of a new row in the running mean (Cache-Prior) */

static inline int bit_test(const uint64_t *words, uint32_t expert) { return words[expert / 64] >> (expert % 64) & 1; }
static inline void bit_set(uint64_t *words, uint32_t expert) { words[expert / 64] |= UINT64_C(1) << (expert % 64); }

#endif
