/* One copy of all kernels for the instruction set that VECTOR_ISA, VECTOR_NAME and TARGET name. Included by kernels.c
 * once for each, hence no include guard. */
#include "vector.h"

#include "stored_values.h"

#include "linear.h"

#include "linear_transposed.h"

#include "activation.h"

#include "norm.h"

#include "attention.h"

#undef VEC_LANES
#undef VEC_PARTS
#undef BLOCK_PARTS
#undef VECTOR_ISA
#undef VECTOR_NAME
#undef TARGET
#undef TILE_ROWS
#undef TILE_OUTS
