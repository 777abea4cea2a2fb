"""Bit for bit, a row's result depends on nothing but its own sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process_model import NEVER_WRITTEN, InProcessModel
from model_factory import make_model
from numpy.typing import NDArray
from stored_weights import FORMATS, SINGLE_VALUES, StoredWeights

from hotset.shm.kv_page_format import KvFormat
from hotset.shm.layout import WeightFormat
from hotset.workers.compute import _kernels
from hotset.workers.compute.transformer import Batch

EACH_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)


@pytest.fixture(params=_kernels.instruction_sets(), autouse=True, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    _kernels.use_instruction_set(request.param)
    yield
    _kernels.use_instruction_set(_kernels.instruction_sets()[-1])


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    _kernels.set_num_threads(1)


@pytest.fixture(
    params=itertools.product(("olmoe", "deepseek_v3"), KvFormat),
    ids=lambda param: f"{param[0]}-{param[1].value}",
    scope="module",
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InProcessModel:
    family, kv_format = request.param
    options = {"num_kv_heads": 2} if family == "olmoe" else {"num_kv_heads": 6}
    folder = make_model(
        tmp_path_factory.mktemp("model"), family=family, hidden_size=48, num_heads=6, intermediate_size=40, **options
    )
    return InProcessModel(folder, num_pages=64, block_size=4, kv_format=kv_format)


@given(
    rows=st.integers(1, 12),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 30),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
)
def test_a_product_row_alone_equals_the_row_in_a_batch(
    rows: int, inputs: int, outputs: int, format: WeightFormat, seed: int
) -> None:
    inputs = inputs if format in SINGLE_VALUES else -(-inputs // 32) * 32
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, inputs), dtype=np.float32)
    weight = StoredWeights.of(random.standard_normal((outputs, inputs), dtype=np.float32), format).array
    together, alone = np.empty((rows, outputs), np.float32), np.empty((1, outputs), np.float32)
    _kernels.linear(x, weight, together, int(format))
    for row in range(rows):
        _kernels.linear(x[row : row + 1], weight, alone, int(format))
        np.testing.assert_array_equal(together[row], alone[0])


def random_expert(format: WeightFormat, width: int, inner: int, seed: int = 3) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    shapes = (inner, width), (inner, width), (width, inner)
    matrices = [random.standard_normal(shape, dtype=np.float32) / 10 for shape in shapes]
    return np.concatenate([StoredWeights.of(matrix, format).bytes for matrix in matrices])


@EACH_FORMAT
def test_an_expert_computes_a_row_alone_as_in_a_batch(format: WeightFormat) -> None:
    hidden = np.random.default_rng(4).standard_normal((11, 96), dtype=np.float32)
    slot = random_expert(format, 96, 64)
    together = np.empty((11, 1, 96), np.float32)
    _kernels.experts(hidden, [np.arange(11)], [slot], [int(format)], 64, together)
    for row in range(11):
        alone = np.full_like(together, np.nan)
        _kernels.experts(hidden, [np.array([row])], [slot], [int(format)], 64, alone)
        np.testing.assert_array_equal(alone[row], together[row])


@EACH_FORMAT
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("inner", [64, 96])
def test_experts_give_together_what_each_gives_alone(format: WeightFormat, threads: int, inner: int) -> None:
    """40 of them of one row each, one of 50 rows, one of none, as they come in a batch."""
    random = np.random.default_rng(5)
    hidden = random.standard_normal((46, 96), dtype=np.float32)
    places = random.permutation(92)
    assignments = [*places[:40].reshape(40, 1), places[40:90], places[90:90], places[90:]]
    slots = [random_expert(format, 96, inner, seed) for seed in range(len(assignments))]
    _kernels.set_num_threads(threads)
    together, alone = (np.full((46, 2, 96), np.nan, np.float32) for _ in range(2))
    _kernels.experts(hidden, assignments, slots, [int(format)] * len(slots), inner, together)
    for which, slot in zip(assignments, slots, strict=True):
        _kernels.experts(hidden, [which], [slot], [int(format)], inner, alone)
    np.testing.assert_array_equal(together, alone)
    assert np.isfinite(together).all()


@EACH_FORMAT
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 33])
def test_the_number_of_threads_does_not_show(rows: int, format: WeightFormat) -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((rows, 1024), dtype=np.float32)
    weight = StoredWeights.of(random.standard_normal((1003, 1024), dtype=np.float32), format).array
    slot = random_expert(format, 1024, 480)
    products, experts = [], []
    for threads in (1, 2, 3, 8):
        _kernels.set_num_threads(threads)
        products.append(np.full((rows, 1003), np.nan, np.float32))
        _kernels.linear(x, weight, products[-1], int(format))
        experts.append(np.full((rows, 1, 1024), np.nan, np.float32))
        _kernels.experts(x, [np.arange(rows)], [slot], [int(format)], 480, experts[-1])
    for results in (products, experts):
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_prefill_in_any_chunks_equals_token_by_token(model: InProcessModel, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 40), label="length")
    token_ids = np.array(data.draw(st.lists(st.integers(0, 259), min_size=length, max_size=length)), np.int32)
    chunks = []
    while sum(chunks) < length:
        chunks.append(data.draw(st.integers(1, length - sum(chunks)), label="chunk"))
    one_by_one = model.logits(token_ids, [1] * length)
    np.testing.assert_array_equal(model.logits(token_ids, chunks), one_by_one)
    assert np.isfinite(one_by_one).all()


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_show_in_logits(tmp_path: Path) -> None:
    """With rows enough that products and attention are split."""
    model = InProcessModel(make_model(tmp_path / "model", hidden_size=192, num_heads=6, num_kv_heads=2))
    token_ids = np.arange(200, dtype=np.int32)
    alone = model.logits(token_ids)
    for threads in (2, 5):
        _kernels.set_num_threads(threads)
        np.testing.assert_array_equal(model.logits(token_ids), alone)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_sequences_together_equal_each_alone(model: InProcessModel, data: st.DataObject) -> None:
    """Each sequence has some rows written before, and the rest in one batch with the others, in pages of any order."""
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5), label="lengths")
    befores = [data.draw(st.integers(0, length - 1), label="before") for length in lengths]
    random = np.random.default_rng(data.draw(st.integers(0, 1000), label="seed"))
    prompts = [random.integers(0, 260, length).astype(np.int32) for length in lengths]
    alone = [model.logits(prompt) for prompt in prompts]

    pages = iter(1 + random.permutation(len(model.kv_pages) - 1))
    tables = [[next(pages) for _ in range(-(-length // 4))] for length in lengths]
    model.kv_pages[:] = NEVER_WRITTEN
    for prompt, before, table in zip(prompts, befores, tables, strict=True):
        if before:
            positions = np.arange(before, dtype=np.int32)
            model.transformer.forward(Batch(prompt[:before], positions, [model.sequence(0, before, table)]))
    new = [prompt[before:] for prompt, before in zip(prompts, befores, strict=True)]
    starts = np.cumsum([0, *map(len, new)]).tolist()
    batch = Batch(
        np.concatenate(new),
        np.concatenate([np.arange(b, n, dtype=np.int32) for b, n in zip(befores, lengths, strict=True)]),
        [model.sequence(start, len(ids), table) for start, ids, table in zip(starts, new, tables, strict=False)],
    )
    together = model.transformer.forward(batch)
    assert together.shape == (len(lengths), 260)
    for row, logits in zip(together, alone, strict=True):
        np.testing.assert_array_equal(row, logits[-1])


@pytest.mark.parametrize("block_sizes", [(4, 16), (1, 7)])
def test_the_page_size_does_not_show(tmp_path: Path, block_sizes: tuple[int, int]) -> None:
    folder = make_model(tmp_path / "model")
    token_ids = np.arange(50, dtype=np.int32)
    one, other = (InProcessModel(folder, block_size=size).logits(token_ids) for size in block_sizes)
    np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("threads")
def test_callers_at_once_do_not_mix() -> None:
    """The pool runs one caller's loop; the other caller computes its own alone."""
    _kernels.set_num_threads(3)
    random = np.random.default_rng(2)
    weight = random.standard_normal((500, 1000), dtype=np.float32)
    rows = random.standard_normal((2, 2, 1000), dtype=np.float32)

    def product(x: NDArray[np.float32]) -> NDArray[np.float32]:
        out = np.full((2, 500), np.nan, np.float32)
        _kernels.linear(x, weight, out)
        return out

    expected = [product(x) for x in rows]
    with ThreadPoolExecutor(2) as executor:
        for _ in range(50):
            for result, wanted in zip(executor.map(product, rows), expected, strict=True):
                np.testing.assert_array_equal(result, wanted)
