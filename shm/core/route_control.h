/* Adaptive strength: more cache preference while the hit rate is under its target, less when it is five points over
 * it or when the preference costs more probability mass than allowed. Local to one router, fed after every call. */
#ifndef HOTSET_ROUTE_CONTROL_H
#define HOTSET_ROUTE_CONTROL_H

#include <stdint.h>

#define CONTROL_WINDOW 1024u /* selections between two decisions */
#define CONTROL_MARGIN 0.05
#define CONTROL_STEPS 64     /* from nothing to the maximum */

struct route_control {
    int enabled;
    double target_hit_rate, max_lost_mass; /* lost mass: mean per token */
    float maximum; /* of the strength */
    uint64_t hits, selections, rows;
    double lost_mass;
};

static inline void control_observe(struct route_control *control, float *strength, uint64_t hits, uint64_t selections,
                                   uint64_t rows, double lost_mass) {
    control->hits += hits;
    control->selections += selections;
    control->rows += rows;
    control->lost_mass += lost_mass;
    if (control->selections < CONTROL_WINDOW) return;
    double hit_rate = (double)control->hits / (double)control->selections;
    float step = control->maximum / CONTROL_STEPS;
    /* Quality first: the ceiling wins over the target, and gives way twice as fast. */
    if (control->lost_mass > control->max_lost_mass * (double)control->rows) *strength -= 2 * step;
    else if (hit_rate < control->target_hit_rate) *strength += step;
    else if (hit_rate > control->target_hit_rate + CONTROL_MARGIN) *strength -= step;
    *strength = *strength < 0 ? 0 : *strength;
    *strength = *strength > control->maximum ? control->maximum : *strength;
    control->hits = control->selections = control->rows = 0;
    control->lost_mass = 0;
}

#endif
