/* The kernels: every_kernel.h compiled once for each instruction set. */
#include "kernels.h"

#include <math.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_VECTORS 1
#include <immintrin.h>
#endif

#define WEIGHT_BLOCK_BYTES (256 * 1024) /* about half of a second-level cache */
#define ATTENTION_TILE 16               /* positions; a multiple of 16; the rows of all heads fit the second-level cache */
#define FETCH_AHEAD 12                  /* rows (of a token, all heads) between the one read and the one fetched; at most a tile */
#define ATTENTION_FLOATS 4096           /* of queries that one pass over the pages serves: they stay in the first level */
#define ATTENTION_HEADS 64              /* query heads that one pass serves */
#define MAX_TILE_ROWS 6
#define MAX_TILE_OUTS 4

/* Keys and values are read by the loads for weights. */
_Static_assert(FORMAT_FLOAT32 == (int)KV_FLOAT32 && FORMAT_FLOAT16 == (int)KV_FLOAT16 &&
                   FORMAT_BFLOAT16 == (int)KV_BFLOAT16 && FORMAT_Q8_0 == (int)KV_Q8_0 && FORMAT_Q4_0 == (int)KV_Q4_0,
               "formats of weights and of KV pages are numbered alike");

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(name, suffix) name##_##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define V(name) JOIN(name, VECTOR_NAME)

#define VECTOR_ISA 0
#define VECTOR_NAME portable
#define TARGET
#define TILE_ROWS 1
#define TILE_OUTS 4
#include "every_kernel.h"

#ifdef HAVE_X86_VECTORS
#define VECTOR_ISA 1
#define VECTOR_NAME avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define TILE_ROWS 3 /* 3 x 2 x 2 accumulators, 2 weights, 1 activation: 15 of 16 registers */
#define TILE_OUTS 2
#include "every_kernel.h"

#define VECTOR_ISA 2
#define VECTOR_NAME avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define TILE_ROWS 6 /* 6 x 4 accumulators, 4 weights, 1 activation: 29 of 32 registers */
#define TILE_OUTS 4
#include "every_kernel.h"
#endif

#define KERNELS(isa) {#isa, linear_##isa, linear_transposed_##isa, gated_##isa, rms_norm_##isa, attention_##isa}
const struct kernels every_kernels[] = {
    KERNELS(portable),
#ifdef HAVE_X86_VECTORS
    KERNELS(avx2),
    KERNELS(avx512),
#endif
};
const size_t kernels_count = sizeof every_kernels / sizeof *every_kernels;
const struct kernels *kernels = every_kernels;

float float16_values[1 << 16];

void kernels_prepare(void) {
    for (uint32_t bits = 0; bits < 1 << 16; bits++) float16_values[bits] = float_from_f16((uint16_t)bits);
    for (size_t isa = 0; isa < kernels_count; isa++)
        if (kernels_supported(isa)) kernels = &every_kernels[isa]; /* the last is the widest */
}

int kernels_supported(size_t isa) {
#ifdef HAVE_X86_VECTORS
    __builtin_cpu_init();
    if (isa == 1)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == 2)
        return kernels_supported(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return isa == 0;
}

