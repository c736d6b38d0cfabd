"""Within one library and one level: equal bits however a token gets there.

Every comparison is exact. The rows are those of different kinds of code: two activations, dense
and not, few and many experts.
"""

import multiprocessing
import threading

import moec
import numpy as np
import oracle
import pytest
import torch

ROWS = ("mixtral", "olmoe", "qwen3_moe", "llama")
COUNT = 97

pytestmark = [
    pytest.mark.parametrize("dtype", ["f32", "bf16"]),
    pytest.mark.parametrize("row", ROWS),
]


@pytest.fixture
def base(compiled, row, dtype, level):
    """The library on the calling thread alone, and what each layer makes of the same tokens."""
    c = compiled(row, dtype)
    library = c.load(level, threads=1)
    xs = [oracle.tokens(COUNT, layer.info.H, dtype) for layer in library.layers]
    ys = [layer(x) for layer, x in zip(library.layers, xs, strict=True)]
    for y in ys:
        assert y.isfinite().all()
    return c, library, xs, ys


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits: unlike ==, tells -0 from 0."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize("threads", [2, 7])
def test_threads(base, level, threads):
    c, _, xs, ys = base
    library = moec.load(c.path, cpu_level=level, threads=threads)
    for _ in range(3):
        for layer, x, y in zip(library.layers, xs, ys, strict=True):
            assert same(layer(x), y)


@pytest.mark.parametrize("lanes", [1, 2, 7])
def test_an_executor_that_promises_nothing(base, level, lanes):
    c, _, xs, ys = base
    library = moec.load(c.path, cpu_level=level, threads=moec.Serial(lanes))
    for layer, x, y in zip(library.layers, xs, ys, strict=True):
        assert same(layer(x), y)


def test_repetition(base):
    _, library, xs, ys = base
    for layer, x, y in zip(library.layers, xs, ys, strict=True):
        for _ in range(3):
            assert same(layer(x, out=oracle.poisoned(x.shape, x.dtype)), y)


def test_a_token_alone_and_in_a_batch(base):
    _, library, xs, ys = base
    for layer, x, y in zip(library.layers, xs, ys, strict=True):
        for t in (0, 1, 50, COUNT - 1):
            assert same(layer(x[t : t + 1]), y[t : t + 1])
        for first, last in ((0, 2), (5, 18), (30, COUNT)):
            assert same(layer(x[first:last]), y[first:last])


def test_permuted_rows(base):
    _, library, xs, ys = base
    order = torch.from_numpy(np.random.default_rng(0).permutation(COUNT))
    for layer, x, y in zip(library.layers, xs, ys, strict=True):
        assert same(layer(x[order]), y[order])


@pytest.mark.parametrize("max_tokens", [1, 2, 13, 64])
def test_chunks(base, level, max_tokens):
    c, _, xs, ys = base
    library = moec.load(c.path, cpu_level=level, threads=2, max_tokens=max_tokens)
    for layer, x, y in zip(library.layers, xs, ys, strict=True):
        assert same(layer(x), y)


def test_strided_rows(base):
    """Rows with a gap between them, in and out."""
    _, library, xs, ys = base
    for layer, x, y in zip(library.layers, xs, ys, strict=True):
        wide_x = oracle.poisoned((COUNT, x.shape[1] + 5), x.dtype)
        wide_y = oracle.poisoned((COUNT, x.shape[1] + 3), x.dtype)
        wide_x[:, 2:-3] = x
        layer(wide_x[:, 2:-3], out=wide_y[:, 1:-2])
        assert same(wide_y[:, 1:-2].contiguous(), y)
        assert wide_y[:, 0].isnan().all() and wide_y[:, -2:].isnan().all()


def test_router_and_experts_apart(base):
    """forward = route, then experts with what route gave."""
    _, library, xs, ys = base
    for layer, x, y in zip(library.layers, xs, ys, strict=True):
        if layer.kind == "moe":
            ids, weights = layer.route(x)
            assert same(layer.experts(x, ids, weights), y)
            assert same(layer.experts(x, ids.long(), weights), y)
            with_logits = layer.route(x, logits=True)
            assert torch.equal(with_logits[0], ids) and same(with_logits[1], weights)
            # A slot more that is nobody changes nothing; nor does the order of the slots.
            none = torch.full((COUNT, 1), -1, dtype=torch.int32)
            wider = torch.cat([none, ids], 1), torch.cat([torch.ones(COUNT, 1), weights], 1)
            assert same(layer.experts(x, *wider), y)
            assert same(layer.experts(x, ids.flip(1), weights.flip(1)), y)


def test_other_tensors_around_the_same_numbers(base, dtype):
    """f32 or bf16 in and out: the arithmetic between is the same."""
    _, library, xs, ys = base
    for layer, x, y in zip(library.layers, xs, ys, strict=True):
        full = layer(x.float(), out=oracle.poisoned(x.shape, torch.float32))
        assert same(full.to(x.dtype), y)
        if dtype == "f32":
            out = layer(x, out=oracle.poisoned(x.shape, torch.bfloat16))
            assert same(out, y.bfloat16())
        else:  # what is finer than bf16 is rounded, to nearest, when it is read
            fine = oracle.tokens(COUNT, x.shape[1], "f32")
            assert same(layer(fine).bfloat16(), layer(fine.bfloat16()))


def test_rows_are_rounded_and_added_in_order(base, dtype, level):
    c, library, xs, _ = base
    for layer, block, x in zip(library.layers, c.checkpoint.blocks, xs, strict=True):
        if layer.kind == "moe":
            oracle.check_combine(layer, block, x[:5], dtype, f"{layer.name} {level}")


def test_callers_at_the_same_time(base, level):
    c, _, xs, ys = base
    library = moec.load(c.path, cpu_level=level, threads=2)
    wrong = []

    def work():
        for _ in range(5):
            for layer, x, y in zip(library.layers, xs, ys, strict=True):
                if not same(layer(x), y):
                    wrong.append(layer.name)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def _child(queue, library, x, y):
    queue.put(all(same(layer(x), y) for layer in library.layers[:1] for _ in range(3)))


def test_after_fork(base, level):
    """A pool that was running when the process forked works in parent and child."""
    c, _, xs, ys = base
    library = moec.load(c.path, cpu_level=level, threads=3)
    assert same(library.layers[0](xs[0]), ys[0])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, library, xs[0], ys[0]))
    child.start()
    assert queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert same(library.layers[0](xs[0]), ys[0])
