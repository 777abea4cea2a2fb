/* The routing algorithm of the original router in straightforward scalar C, for comparison only: add the bonus, sort
 * all experts, take the first k, softmax, then decay the score of every expert and boost the selected ones. It is not
 * shared between processes and counts nothing but hits. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

struct candidate {
    float score;
    int32_t id;
};

static int better_first(const void *left, const void *right) {
    const struct candidate *a = left, *b = right;
    if (a->score != b->score) return a->score > b->score ? -1 : 1;
    return a->id - b->id;
}

/* Returns the number of hits. */
uint64_t route_rows(const float *logits, int64_t rows, int32_t experts, int32_t k, const uint8_t *resident, float bonus,
                    float decay, float boost, float *affinity, int32_t *ids, float *weights) {
    struct candidate candidates[1024];
    uint64_t hits = 0;
    for (int64_t row = 0; row < rows; row++, logits += experts, ids += k, weights += k) {
        float max = -INFINITY, sum = 0;
        for (int32_t e = 0; e < experts; e++) {
            candidates[e] = (struct candidate){logits[e] + (resident[e] ? bonus : 0), e};
            if (logits[e] > max) max = logits[e];
        }
        qsort(candidates, (size_t)experts, sizeof candidates[0], better_first);
        for (int32_t e = 0; e < experts; e++) sum += expf(logits[e] - max);
        for (int32_t i = 0; i < k; i++) {
            ids[i] = candidates[i].id;
            weights[i] = expf(logits[ids[i]] - max) / sum;
            hits += resident[ids[i]];
        }
        for (int32_t e = 0; e < experts; e++) affinity[e] *= decay;
        for (int32_t i = 0; i < k; i++) affinity[ids[i]] = fminf(affinity[ids[i]] + boost, 1.0f);
    }
    return hits;
}
