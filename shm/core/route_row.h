/* A row on its way from logits to ids and weights, and the tile of rows that go through the steps together.
 *
 * A tile of columns holds its rows transposed: a block is one expert of as many rows as it has lanes, and every step
 * does all rows at once. The others hold row after row: single rows, and what columns cannot do.
 *
 * ROUTE_VECTOR is 1 in a kernel that has lanes, else 0. */
#ifndef HOTSET_ROUTE_ROW_H
#define HOTSET_ROUTE_ROW_H

#include "route_plain.h"
#if ROUTE_VECTOR
#include "route_vector.h"
#define TILE_ROWS BLOCK_LANES
#else
#define TILE_ROWS 8u
#endif

#define COLUMN_EXPERTS 512u
#define TILE_FLOATS (TILE_ROWS * (COLUMN_EXPERTS + 8)) /* of each array of a tile; its rows are fewer above 512 experts */
#define TILE_LANES (ROUTE_MAX_EXPERTS + 64)

#if ROUTE_VECTOR
#define COLUMN_WORDS (NETWORK_ROWS * BLOCK_LANES / 64) /* a bit per rank and row */

/* Where an expert's column is in an array of them; what its keys are tagged with: its id. */
struct ordered_column {
    uint32_t at;
    float tag; /* as bits */
};

/* What only tiles of columns need. */
struct route_columns {
    /* Of a call. The preferred experts, then the others, each filled up to a multiple of eight with a column of -inf.
     * For POLICY_SUBSTITUTE the resident ones follow, filled up with a column of +inf: they are ranked from below. */
    struct ordered_column order[2 * COLUMN_EXPERTS + 3 * NETWORK_ROWS];
    uint32_t num_preferred, num_all, end_resident; /* where each set ends */
    uint32_t num_resident;
    int some_loading; /* preferred, but not resident */
    float kept;       /* the bits of a score that its key keeps; not a number */
    float resolution; /* two scores that a key does not tell apart differ by less than their magnitude times this */
    int32_t id_mask;  /* the bits of a key that hold the id */
    /* Of a tile. */
    _Alignas(64) float max[BLOCK_LANES], min[BLOCK_LANES]; /* of each row's logits; min only for POLICY_RANGE */
    _Alignas(64) int32_t chosen[NETWORK_ROWS][BLOCK_LANES]; /* chosen[i][r] has rank i in row r */
    /* POLICY_BONUS. Pair i is the preferred expert of rank k - 1 - i, which came in if its bit i * BLOCK_LANES + r of
     * `changed` is set, and the other of rank i, which went out; as bits of keys. */
    uint64_t changed[COLUMN_WORDS];
    uint32_t unsure; /* rows of which `changed` may be wrong */
    _Alignas(64) int32_t in[NETWORK_ROWS][BLOCK_LANES], out[NETWORK_ROWS][BLOCK_LANES];
};
#endif

struct route_row {
    const float *given;  /* the caller's logits */
    const float *logits; /* the same, `step` apart and padded with -inf */
    const float *scores; /* what the true top k is of, `step` apart: the logits, or see plain_adjust */
    float *adjusted;     /* the scores that were selected from, `step` apart */
    uint32_t step;       /* 1, or TILE_ROWS in columns */
    int vector;   /* the vector steps apply: softmax gate without groups, all logits finite */
    float *share; /* gate probability times a factor common to the row, `step` apart; row_scale() fills it */
    float *scale; /* the factor that makes shares probabilities; 0 = not computed yet */
    struct row_statistics statistics;
    int32_t *ids;                   /* the selection, best first: the caller's array */
    int32_t truth[ROUTE_MAX_TOP_K]; /* the true top k, where the policy needs it */
};

/* On the caller's stack, so that nothing is allocated. */
struct route_tile {
    const struct route_rule *rule;
    const struct route_snapshot *snapshot;
    const float *selection_bias; /* of the call */
    uint32_t rows, stride; /* rows in use; floats from one row to the next */
    int transposed; /* columns */
    int shared;     /* columns: their shares and scales are computed */
    const float *given; /* columns: the caller's logits */
    struct route_row row[TILE_ROWS];
    _Alignas(64) float logits[TILE_FLOATS]; /* where the caller's do not do: columns, rows that blocks would overrun; scores */
    _Alignas(64) float share[TILE_FLOATS];
    _Alignas(64) float adjusted[TILE_FLOATS];
    _Alignas(64) float scale[TILE_ROWS];
    _Alignas(64) float preferred[TILE_LANES], others[TILE_LANES]; /* lanes of the preferred experts, and of the rest */
#if ROUTE_VECTOR
    struct route_columns columns;
#endif
};

static inline uint32_t round_up(uint32_t value, uint32_t multiple) { return (value + multiple - 1) / multiple * multiple; }

#if ROUTE_VECTOR
/* Logits of a row, padded so that every loop over blocks ends with it. */
static inline uint32_t tile_stride(uint32_t experts) {
    return experts <= 8 ? BLOCK_LANES : round_up(experts, EXP_BLOCKS * BLOCK_LANES);
}
#endif

/* Once for a call. Returns how many rows fit. */
static inline uint32_t tile_begin(struct route_tile *tile, const struct route_rule *rule, const struct route_call *call,
                                  const struct route_snapshot *snapshot) {
    uint32_t experts = rule->num_experts;
    tile->rule = rule;
    tile->snapshot = snapshot;
    tile->selection_bias = call->selection_bias;
#if ROUTE_VECTOR
    tile->stride = tile_stride(experts);
    vector_lanes(snapshot->preferred, tile->stride, tile->preferred);
    if (call->policy == POLICY_MASS || call->policy == POLICY_RESNORM) {
        uint64_t others[ROUTE_WORDS];
        for (uint32_t word = 0; word * 64 < experts; word++) others[word] = ~snapshot->preferred[word];
        vector_lanes(others, tile->stride, tile->others);
    }
#else
    tile->stride = experts;
#endif
    return tile->stride * TILE_ROWS <= TILE_FLOATS ? TILE_ROWS : TILE_FLOATS / tile->stride;
}

/* `logits`: of all rows of the tile. */
static inline void row_begin(struct route_tile *tile, uint32_t index, const float *logits) {
    struct route_row *row = &tile->row[index];
    uint32_t experts = tile->rule->num_experts;
    row->given = row->logits = logits + (size_t)index * experts;
    row->adjusted = tile->adjusted + index * tile->stride;
    row->step = 1;
    row->vector = 0;
    row->share = tile->share + index * tile->stride;
    row->scale = &tile->scale[index];
    *row->scale = 0;
#if ROUTE_VECTOR
    row->vector = !route_is_plain(tile->rule) && vector_statistics(row->given, experts, &row->statistics);
    if (row->vector && experts != tile->stride) {
        float *padded = tile->logits + index * tile->stride;
        vector_pad(row->given, experts, padded, tile->stride);
        row->logits = padded;
    }
#endif
    row->scores = row->logits;
    if (row->vector) return;
    row->statistics = plain_statistics(row->given, experts);
    if (route_is_plain(tile->rule)) {
        float *scores = tile->logits + index * tile->stride;
        plain_adjust(tile->rule, tile->selection_bias, row->logits, tile->snapshot->preferred, 0, scores);
        row->scores = scores;
    }
}

static inline float row_logit(const struct route_row *row, int32_t expert) { return row->logits[(uint32_t)expert * row->step]; }

static inline float row_score(const struct route_row *row, int32_t expert) { return row->scores[(uint32_t)expert * row->step]; }

static inline uint64_t row_rank(const struct route_row *row, int32_t expert) {
    return rank_key(row_score(row, expert), (uint32_t)expert);
}

static inline float row_share(const struct route_row *row, int32_t expert) { return row->share[(uint32_t)expert * row->step]; }

#endif
