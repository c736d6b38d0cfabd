"""The float64 reference against transformers' blocks: two writings of the same formula by different
people."""

import numpy as np
import oracle
import pytest
import torch
from moec.reference import reference, round_bf16


@pytest.fixture(scope="module", params=list(oracle.ROWS))
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return oracle.make_checkpoint(request.param, "f32", folder)


@pytest.mark.parametrize("count", oracle.TOKENS)
def test_against_float64_block(checkpoint, count):
    model = checkpoint.model.double()  # the block in float64: what is left is the order of adding
    for block in oracle.blocks_of(model):
        x = oracle.tokens(count, block.hidden).double()
        ref = block.reference()
        own = block(x)
        if block.kind == "moe":
            routing = ref.routing(x)
            ids, weights = block.route(x)
            # The router scores in float32 even here, so equal to within that.
            order = np.argsort(routing.experts, -1)
            theirs = np.argsort(ids.numpy(), -1)
            clear = routing.logit_gap > 1e-5
            assert clear.mean() > 0.9
            np.testing.assert_array_equal(
                np.take_along_axis(routing.experts, order, -1)[clear],
                np.take_along_axis(ids.numpy(), theirs, -1)[clear],
            )
            np.testing.assert_allclose(
                np.take_along_axis(routing.weights, order, -1)[clear],
                np.take_along_axis(weights.double().numpy(), theirs, -1)[clear],
                rtol=2e-6,
            )
            given = ref.experts(x, ids, weights)
            np.testing.assert_allclose(given, block.experts(x, ids, weights), rtol=0, atol=2e-6)
            assert oracle.relative(ref(x)[clear], own[clear]) < 1e-6
        else:
            assert oracle.relative(ref(x), own) < 1e-12
    checkpoint.model.float()


def test_routing_is_uneven_and_outputs_are_of_order_one(checkpoint):
    for block in oracle.blocks_of(checkpoint.model):
        x = oracle.tokens(257, block.hidden)
        assert 0.2 < np.std(block.reference()(x)) < 20
        if block.kind == "moe":
            counts = np.bincount(
                block.reference().routing(x).experts.ravel(), minlength=block.spec["E"]
            )
            assert counts.max() > 2 * max(counts.min(), 1)


def test_whole_model_hooks_see_the_same_block(checkpoint):
    seen = oracle.capture(checkpoint.model, torch.arange(12)[None] % 32)
    for block in oracle.blocks_of(checkpoint.model):
        x, y = seen[block.name]
        oracle.check_close(
            y, block.reference()(x), None, "f32", block.hidden, block.spec["F"], block.name
        )


def tiny(**spec):
    rng = np.random.default_rng(0)
    s = {"H": 6, "F": 5, "E": 4, "K": 2, **spec}
    weights = {
        "router": rng.standard_normal((s["E"], s["H"])),
        "gate_up": rng.standard_normal((s["E"], 2, s["F"], s["H"])),
        "down": rng.standard_normal((s["E"], s["H"], s["F"])),
    }
    return reference(s, weights), rng.standard_normal((9, s["H"]))


def test_post_softmax_is_pre_softmax_renormalised():
    pre, x = tiny(router={"renormalize": "sum"})
    post, _ = tiny(router={"order": "select_then_score"})
    np.testing.assert_allclose(pre(x), post(x), rtol=1e-13)


def test_scale_and_eps():
    plain, x = tiny()
    scaled, _ = tiny(router={"scale_value": 2.5})
    np.testing.assert_allclose(scaled(x), 2.5 * plain(x), rtol=1e-13)
    eps, _ = tiny(router={"renormalize": "sum", "epsilon": 0.5})
    w = plain.routing(x).weights
    np.testing.assert_allclose(
        eps.routing(x).weights, w / (w.sum(-1, keepdims=True) + 0.5), rtol=1e-14
    )


def test_ties_go_to_the_lowest_id_and_scores_fall():
    weights = {
        "router": np.array([[1.0, 0], [2, 0], [2, 0], [1, 0], [2, 0]]),
        "gate_up": np.ones((5, 2, 2)),
        "down": np.ones((5, 2, 1)),
    }
    r = reference({"H": 2, "F": 1, "E": 5, "K": 4}, weights).routing(np.array([[1.0, 0]]))
    assert r.experts.tolist() == [[1, 2, 4, 0]]
    assert r.gap[0] == 0 and r.logit_gap[0] == 0
    assert (np.diff(r.weights) <= 0).all()


def test_every_expert_chosen_leaves_no_gap():
    ref, x = tiny(K=4)
    assert np.isinf(ref.routing(x).gap).all()


def test_minus_one_is_no_expert_and_slots_need_not_be_k():
    ref, x = tiny()
    idx = np.array([[3, -1, 0, 3]] * len(x))
    w = np.array([[0.5, 9.0, 1.5, 0.25]] * len(x))
    expected = 0.75 * ref._expert(3, x) + 1.5 * ref._expert(0, x)
    np.testing.assert_allclose(ref.experts(x, idx, w), expected, rtol=1e-13)


def test_nan_stays_in_its_row():
    ref, x = tiny()
    bad = x.copy()
    bad[4, 1] = np.nan
    y, good = ref(bad), ref(x)
    assert np.isnan(y[4]).all()
    np.testing.assert_array_equal(np.delete(y, 4, 0), np.delete(good, 4, 0))


def test_leading_dimensions_and_no_tokens():
    ref, x = tiny()
    np.testing.assert_array_equal(ref(x.reshape(3, 3, 6)), ref(x).reshape(3, 3, 6))
    assert ref(x[:0]).shape == (0, 6)


def test_round_bf16_is_torchs():
    rng = np.random.default_rng(1)
    a = rng.standard_normal(4000).astype(np.float32) * np.float32(10.0) ** rng.integers(
        -44, 38, 4000
    )
    a = np.concatenate([a, [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 1.00390625]])
    a = a.astype(np.float32)
    expected = torch.from_numpy(a).bfloat16().double().numpy()
    np.testing.assert_array_equal(round_bf16(a), expected)
    bits = torch.from_numpy(a).bfloat16().view(torch.uint16).numpy()
    from moec._formula import wide

    np.testing.assert_array_equal(wide(bits), expected)


def test_bf16_rounding_mode_rounds_inputs_and_weights():
    ref, x = tiny()
    rounded = reference(ref.spec, ref.weights, rounding="bf16")
    by_hand = reference(ref.spec, {k: round_bf16(v) for k, v in ref.weights.items()})
    np.testing.assert_array_equal(rounded(x), by_hand(round_bf16(x)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"K": 5}, "K: expected at most E = 4, but got 5"),
        ({"F": 0}, "F: expected at least 1, but got 0"),
        ({"expert": {"activation": "swish"}}, "expert.activation: expected one of silu"),
        ({"router": {"topk": 2}}, "router.topk: expected one of input"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


def test_a_missing_or_misshapen_weight_is_refused_by_name():
    ref, _ = tiny()
    with pytest.raises(ValueError, match="expected gate_up, down, router, but got gate_up"):
        reference(ref.spec, {"gate_up": ref.weights["gate_up"]})
    with pytest.raises(ValueError, match=r"weights\['down'\]: expected \[4, 6, 5\]"):
        reference(ref.spec, {**ref.weights, "down": np.ones((4, 5, 5))})
