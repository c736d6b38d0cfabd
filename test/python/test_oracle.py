"""Every model row, compiled by command line, against transformers' block and float64 NumPy."""

import numpy as np
import oracle
import pytest
import torch
from conftest import moec_command

pytestmark = pytest.mark.parametrize("dtype", ["f32", "bf16"])
rows = pytest.mark.parametrize("row", list(oracle.ROWS))


@rows
@pytest.mark.parametrize("count", oracle.TOKENS)
def test_layers(compiled, row, dtype, level, count):
    for layer, block in compiled(row, dtype).pairs(level):
        assert layer.info.level == level
        x = oracle.tokens(count, block.hidden, dtype)
        oracle.check_layer(layer, block, x, dtype, f"{row} {block.name} {dtype} {level} T={count}")


@rows
def test_no_tokens(compiled, row, dtype, level):
    for layer, block in compiled(row, dtype).pairs(level):
        x = torch.empty(0, block.hidden, dtype=oracle.TORCH[dtype])
        assert layer(x).shape == x.shape and layer(x).dtype == x.dtype
        if block.kind == "moe":
            k = block.spec["K"]
            ids, weights = layer.route(x)
            assert ids.shape == weights.shape == (0, k)
            assert layer.experts(x, ids, weights).shape == x.shape


@rows
def test_what_the_layers_are(compiled, row, dtype):
    c = compiled(row, dtype)
    import moec

    layers = moec.load(c.path).layers
    assert [layer.name for layer in layers] == [b.name for b in c.checkpoint.blocks]
    for layer, block in zip(layers, c.checkpoint.blocks, strict=True):
        spec, info = block.spec, layer.info
        assert (info.index, info.kind, info.H, info.F) == (
            block.index,
            block.kind,
            spec["H"],
            spec["F"],
        )
        assert (info.E, info.K) == (spec.get("E", 1), spec.get("K", 1))
        assert info.format == info.compute == dtype and info.needs == ()


@pytest.mark.parametrize("row", ["mixtral", "olmoe", "qwen3_moe", "llama"])
def test_a_whole_model_through_our_layers(compiled, row, dtype, level):
    """The tensors a real forward pass hands to its blocks, not ones we made up."""
    c = compiled(row, dtype)
    seen = oracle.capture(c.checkpoint.model, torch.arange(20)[None] % 32)
    for layer, block in c.pairs(level):
        x, _ = seen[block.name]
        oracle.check_layer(layer, block, x, dtype, f"{row} {block.name} inside the model")


@pytest.mark.parametrize("row", ["mixtral", "olmoe", "qwen3_moe"])
@pytest.mark.parametrize("rewrite", [oracle.rewrite_fused, oracle.rewrite_sharded])
def test_other_ways_to_store_the_weights(compiled, row, dtype, rewrite, tmp_path):
    """Fused tensors and shards give the same packed bytes as the file transformers wrote."""
    c = compiled(row, dtype)
    other = rewrite(c.checkpoint.path, tmp_path / "checkpoint")
    moec_command("pack", other, "--for", c.path, "-o", tmp_path / "weights", "--quiet")
    import moec

    a, b = moec.load(c.path), moec.load(c.path, weights=tmp_path / "weights")
    for one, two in zip(a.layers, b.layers, strict=True):
        x = oracle.tokens(17, one.info.H, dtype)
        assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("row", ["mixtral", "llama"])
def test_numpy_and_torch_agree(compiled, row, dtype):
    c = compiled(row, dtype)
    import moec

    layer = moec.load(c.path).layers[0]
    x = oracle.tokens(17, layer.info.H, dtype)
    y = layer(x)
    array = x.numpy() if dtype == "f32" else x.view(torch.uint16).numpy()
    result = layer(array)
    assert result.dtype == array.dtype
    back = torch.from_numpy(result)
    assert torch.equal(y, back if dtype == "f32" else back.view(torch.bfloat16))
    if layer.kind == "moe":
        np.testing.assert_array_equal(layer.route(array)[0], layer.route(x)[0].numpy())


@pytest.mark.parametrize("row", ["mixtral", "olmoe", "qwen3_moe", "mixtral-gelu"])
def test_ties_go_to_the_lowest_id(compiled, row, dtype, level):
    """Experts with equal router rows have equal bits as logits."""
    c = compiled(row, dtype)
    import moec

    library = moec.load(c.path, cpu_level=level)  # weights of its own: these are changed
    layer, block = library.layers[0], c.checkpoint.blocks[0]
    e, k = block.spec["E"], block.spec["K"]
    x = oracle.tokens(33, block.hidden, dtype)

    layer.set_weight("router", block.weights["router"][:1].expand(e, -1))
    ids, weights = layer.route(x)
    assert torch.equal(ids, torch.arange(k, dtype=torch.int32).expand(33, k))
    one = 1 / k if block.reference().spec["router"]["renormalize"] == "sum" else 1 / e
    np.testing.assert_allclose(weights.numpy(), one, rtol=2e-6)

    # In pairs: whichever pair wins, its lower number comes first.
    pairs = block.weights["router"].clone()
    pairs[1::2] = pairs[0::2][: len(pairs[1::2])]
    layer.set_weight("router", pairs)
    ids, weights = layer.route(x)
    logits = oracle.wide(x) @ oracle.wide(pairs[::2]).T
    distinct = np.diff(np.sort(logits, -1), axis=-1).min(-1) > 1e-4
    assert distinct.any()
    best = np.argsort(-logits, -1) * 2
    both = np.stack([best, best + 1], -1).reshape(len(x), -1)
    expected = np.stack([row[row < e][:k] for row in both])  # with an odd E the last is alone
    np.testing.assert_array_equal(ids.numpy()[distinct], expected[distinct])
