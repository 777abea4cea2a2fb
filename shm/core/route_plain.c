/* The routing kernel in plain C: for processors without one of their own, and the oracle of the others. */
#define ROUTE_VECTOR 0
#include "route_rows.h"

const struct route_kernel route_kernel_plain = {"plain", route_rows};
