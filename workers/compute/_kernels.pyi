"""The inner loops of the forward pass, in C (kernels/). All of them let go of the GIL.

Bit for bit, a row of a result depends only on that row's inputs: not on the other rows of the call, nor on
the number of threads. Weights are read as they are stored, in the formats of hotset.shm.layout.WeightFormat; each
stored number becomes a float32 without rounding, so the bits are those of float32 weights with the same values.
Arrays are C-contiguous; results are written into arrays of the caller. Wrong shapes are ValueErrors, wrong element
types TypeErrors.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT32: int
FLOAT16: int
BFLOAT16: int
Q8_0: int
Q4_0: int
MXFP4: int
MXFP4_GGML: int
GATE_UP_DOWN: int
INTERLEAVED_WITH_BIASES: int
GATE_UP_DOWN_WITH_BIASES: int
MAX_THREADS: int
KV_FLOAT32: int
KV_FLOAT16: int
KV_BFLOAT16: int
KV_Q8_0: int
KV_Q4_0: int

def linear(x: NDArray[np.float32], weight: NDArray[Any], out: NDArray[np.float32], format: int = ..., /) -> None:
    """out [n, outputs] = x [n, inputs] . weight [outputs, inputs] transposed.

    weight is float32, float16, or uint16 with the bits of bfloat16; or uint8 [outputs, bytes of a row] and `format` is
    Q8_0, Q4_0, MXFP4_GGML or MXFP4 (the numbers of all rows, then their scales), inputs then a multiple of 32. A format
    that contradicts the element type is refused.
    """

def linear_transposed(
    x: NDArray[np.float32], weight: NDArray[Any], out: NDArray[np.float32], format: int = ..., /
) -> None:
    """out [n, outputs] = x [n, inputs] . weight [inputs, outputs]; weight as for `linear`, but a row for each input."""

def experts(
    hidden: NDArray[np.float32],
    assignments: list[NDArray[np.int64]],
    slots: list[NDArray[np.uint8]],
    formats: list[int],
    intermediate_size: int,
    outputs: NDArray[np.float32],
    layout: int = ...,
    swiglu_limit: float = ...,
    /,
) -> None:
    """For each expert i: outputs [n, k, width] at (row, rank) = its result for hidden [n, width][row], for each
    row * k + rank of assignments[i].

    slots[i] holds its weights in formats[i]; for quantised ones width and intermediate_size are multiples of 32.
    `layout`: GATE_UP_DOWN (if left out): the three matrices one after another; INTERLEAVED_WITH_BIASES (gpt-oss): one
    matrix whose rows are gate and up in turn, its biases, down, its biases; bfloat16 biases where the weights are
    quantised; GATE_UP_DOWN_WITH_BIASES (gpt-oss in GGUF files): the three matrices, each with its biases in float32
    behind it. `swiglu_limit`: 0 (if left out) is silu(gate) * up; otherwise, as gpt-oss has it, gate is at most the
    limit, up within plus or minus it, and between them is gate * sigmoid(1.702 * gate) * (up + 1).
    """

def row_norms(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """out [n] = Euclidean norm of each row of x [n, width]."""

def combine(outputs: NDArray[np.float32], weights: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """out [n, width] = sum over rank of weights [n, k] * outputs [n, k, width], rank 0 first."""

def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float, out: NDArray[np.float32]) -> None:
    """out [n, width] = x / sqrt(mean(x^2) + eps) * weight; out may be x."""

def rotary_angles(
    positions: NDArray[np.int32],
    inverse_frequencies: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
) -> None:
    """cos, sin [n, head_dim / 2] of positions [n] times inverse_frequencies [head_dim / 2]."""

def rotate(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
    """Rotary embedding of x [n, heads, head_dim] in place, halves against each other (transformers'
    rotate_half).
    """

def write_kv(
    keys: NDArray[np.float32],
    values: NDArray[np.float32] | None,
    kv_pages: NDArray[np.uint8],
    format: int,
    layer: int,
    block_tables: NDArray[np.uint32],
    table_starts: NDArray[np.int64],
    positions: NDArray[np.int32],
) -> int:
    """Store keys and values [n, kv_heads, head_dim] in `format` (KV_...) at their positions' places in kv_pages
    [pages, layers, 2, block_size, kv_heads, bytes of a head] (shm/kv_page_format.py). block_tables is all
    sequences' tables joined; table_starts [n] is where each row's begins. Where keys are values too, `values` is None
    and the third dimension of kv_pages 1.

    Returns -1; or the first of the n rows with a value that the format cannot hold, and then nothing is written.
    """

def attention(
    queries: NDArray[np.float32],
    kv_pages: NDArray[np.uint8],
    format: int,
    layer: int,
    block_tables: NDArray[np.uint32],
    table_starts: NDArray[np.int64],
    positions: NDArray[np.int32],
    window: int,
    out: NDArray[np.float32],
    sinks: NDArray[np.float32] | None = ...,
    scale: float = ...,
    /,
) -> None:
    """out [n, heads, head_dim]: causal attention of each row over the last `window` positions up to its own, all of
    them if window is 0, scaled by `scale` (1 / sqrt(head_dim) if it is left out); consecutive query heads share a
    key-value head. With `sinks` [heads] each head sees one more key, with this logit and a value of zero. Where keys
    are values too, out may be narrower than they are: of values only the first numbers count then. Pages of positions
    before the window are not read. The bits are those of float32 pages with the same values."""

def set_num_threads(threads: int) -> None:
    """Threads that a kernel may use, the caller included: 1 at first, MAX_THREADS at most. Small calls stay in the
    calling thread; a thread that finds no work for some 20 us sleeps.
    """

def instruction_sets() -> list[str]:
    """What this processor can run, of portable, avx2 and avx512; the last is in use."""

def use_instruction_set(name: str) -> None:
    """Choose one of instruction_sets(), for tests and benchmarks."""
