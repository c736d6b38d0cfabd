"""Models of transformers on moec: logits, generate, weights that change, what is refused.

Expected values are transformers' own: the same model in float64 and with its eager experts.
"""

import copy
import logging
import multiprocessing
import pickle
import threading

import moec
import moec.transformers as mt
import numpy as np
import oracle
import pytest
import torch
import transformers
from moec import _threads

# Rows whose models have experts; dense rows have nothing to dispatch.
ROWS = [row for row, (kind, _) in oracle.ROWS.items() if kind != "llama"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Code is compiled once for the run, and never taken from the user's cache."""
    from conftest import driver

    driver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make(tmp_path):
    """make(row, dtype): a tiny model of the row."""
    return lambda row, dtype="f32": oracle.make_checkpoint(row, dtype, tmp_path / row).model


@pytest.fixture
def model(make):
    return make("mixtral")


def ids_of(model, batch=2, length=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=g)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def clear_ids(model):
    """Token ids for which no router of the model decides by less than 1e-4."""
    for seed in range(40):
        ids = ids_of(model, seed=seed)
        seen = oracle.capture(model, ids)
        gaps = [
            block.reference().routing(seen[block.name][0]).gap.min()
            for block in oracle.blocks_of(model)
            if block.kind == "moe"
        ]
        if min(gaps) > 1e-4:
            return ids
    pytest.fail("expected a seed with clear routing among 40, but got none")


def check_logits(got, own, exact):
    """f32: at most four times as far from float64 as transformers itself is."""
    error, theirs = oracle.relative(got, exact), oracle.relative(own, exact)
    assert error <= max(4 * theirs, 5e-7), f"relative error {error:.3g}, own {theirs:.3g}"


@pytest.mark.parametrize("row", ROWS)
def test_logits(make, row):
    model = make(row)
    ids = clear_ids(model)
    own, exact = logits(model, ids), logits(copy.deepcopy(model).double(), ids)
    model.set_experts_implementation("moec")
    check_logits(logits(model, ids), own, exact)
    model.set_experts_implementation("eager")
    report = mt.accelerate(model, weights="drop")
    assert report.done, str(report)
    assert all(text == "done: whole block" for text in report.values()), str(report)
    assert report.freed > 0
    check_logits(logits(model, ids), own, exact)
    mt.restore(model)
    assert torch.equal(logits(model, ids), own)


def test_logits_bf16(make):
    model = make("mixtral", "bf16")
    ids = ids_of(model)
    exact = logits(copy.deepcopy(model).double(), ids)
    theirs = oracle.relative(logits(model, ids), exact)
    model.set_experts_implementation("moec")
    assert oracle.relative(logits(model, ids), exact) <= 1.5 * theirs


@torch.no_grad()
def test_generate(model):
    """The same tokens, from prompts for which no choice is close."""
    kwargs = dict(max_new_tokens=8, do_sample=False, output_scores=True, pad_token_id=0)
    kwargs |= dict(return_dict_in_generate=True, eos_token_id=None)
    for seed in range(40):
        ids = ids_of(model, 1, 5, seed)
        want = model.generate(ids, **kwargs)
        top = torch.stack(want.scores).float().topk(2).values
        seen = oracle.capture(model, want.sequences[:, :-1])
        gaps = [
            block.reference().routing(seen[block.name][0]).gap.min()
            for block in oracle.blocks_of(model)
        ]
        if (top[..., 0] - top[..., 1]).min() > 1e-4 and min(gaps) > 1e-4:
            break
    else:
        pytest.fail("expected a seed without close choices among 40, but got none")
    model.set_experts_implementation("moec")
    assert torch.equal(model.generate(ids, **kwargs).sequences, want.sequences)
    mt.accelerate(model, weights="drop")
    assert torch.equal(model.generate(ids, **kwargs).sequences, want.sequences)


def test_masks_batches_and_inference_mode(model):
    ids = clear_ids(model)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    own = logits(model, ids, attention_mask=mask)
    model.set_experts_implementation("moec")
    got = logits(model, ids, attention_mask=mask)
    assert oracle.relative(got[mask.bool()], own[mask.bool()]) < 2e-6
    with torch.inference_mode():
        assert torch.equal(model(ids, attention_mask=mask).logits, got)


def test_router_logits_are_recorded(model):
    ids = ids_of(model)
    want = model(ids, output_router_logits=True).router_logits
    mt.accelerate(model, weights="drop")
    before = logits(model, ids)
    got = model(ids, output_router_logits=True).router_logits
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert oracle.relative(a, b) < 1e-5
    assert torch.equal(logits(model, ids), before)


# --- live weights ---------------------------------------------------------------------------------


def halve(model):
    model.model.layers[0].mlp.experts.down_proj.mul_(0.5)


def replace(model):
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj * 1.5, requires_grad=False)


def swap_data(model):
    experts = model.model.layers[1].mlp.experts
    experts.down_proj.data = experts.down_proj.data * 2


def load_state(model):
    state = {k: v * 0.5 if "experts" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def behind_the_counter(model):
    model.model.layers[0].mlp.experts.down_proj.data.mul_(3)
    mt.refresh(model)


@pytest.mark.parametrize("change", [halve, replace, swap_data, load_state, behind_the_counter])
@pytest.mark.parametrize("how", ["implementation", "accelerate"])
@torch.no_grad()
def test_changed_weights_are_packed_again(model, change, how, caplog):
    ids = ids_of(model)
    twin = copy.deepcopy(model)
    if how == "accelerate":
        assert mt.accelerate(model, weights="keep").done
    else:
        model.set_experts_implementation("moec")
    before = logits(model, ids)
    with caplog.at_level(logging.INFO, "moec.transformers"):
        assert torch.equal(logits(model, ids), before)
        assert "packed again" not in caplog.text
        change(model)
        change(twin)
        got = logits(model, ids)
        assert "packed again" in caplog.text
    assert oracle.relative(got, before) > 1e-3
    assert oracle.relative(got, logits(twin, ids)) < 2e-6


def test_backward_raises_in_words(model):
    model.requires_grad_(True).set_experts_implementation("moec")
    out = model(ids_of(model)).logits
    assert out.requires_grad
    with pytest.raises(moec.Error, match="expected inference") as caught:
        out.sum().backward()
    assert caught.value.name == "E-UNSUPPORTED"


@pytest.fixture(params=["torch", "pool"])
def executor(request):
    """Two threads: torch's own, as by default, or a pool beside them."""
    if request.param == "torch":
        torch.set_num_threads(2)
        assert type(_threads.executor()).__name__ == "OpenMP"
    else:
        mt.use_threads(2)
    yield request.param
    torch.set_num_threads(1)
    mt.use_threads(None)


def test_threads_and_copies(model, executor):
    ids = ids_of(model)
    model.set_experts_implementation("moec")
    want = logits(model, ids)
    results = [None] * 4

    def work(i):
        results[i] = logits(model, ids)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(r, want) for r in results)
    assert torch.equal(logits(copy.deepcopy(model), ids), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), want)
    mt.accelerate(model)
    assert oracle.relative(logits(copy.deepcopy(model), ids), want) < 2e-6


def test_fork(model, executor):
    ids = ids_of(model)
    fresh = copy.deepcopy(model)  # its layers are made in the child
    fresh.set_experts_implementation("moec")
    model.set_experts_implementation("moec")
    want = logits(model, ids)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work():
        torch.set_num_threads(1)  # torch's own operations do not survive it either
        same = oracle.relative(logits(model, ids), want) < 2e-6
        if executor == "torch":
            torch.set_num_threads(2)
            assert _threads.executor() is None
            torch.set_num_threads(1)
        queue.put(same and oracle.relative(logits(fresh, ids), want) < 2e-6)

    child = context.Process(target=work)
    child.start()
    assert queue.get(timeout=60)
    child.join(60)


class Embedded(torch.utils.data.Dataset):
    """Items that a model computes, as preprocessing in workers does."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return logits(self.model, ids_of(self.model, 1, 6, i))[0]


@pytest.mark.parametrize("how", ["implementation", "accelerate"])
def test_data_loader_workers(model, how, executor):
    """Forked workers, after the parent used the same layers on its threads."""
    if how == "accelerate":
        assert mt.accelerate(model, weights="drop").done
    else:
        model.set_experts_implementation("moec")
    data = Embedded(model)
    want = torch.stack([data[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    got = torch.cat(list(loader))
    # Workers run torch's own operations on one thread, which gives them other bits.
    assert oracle.relative(got, want) < 2e-6
    assert torch.equal(data[0], want[0])


def resident(field):
    with open("/proc/self/status") as f:
        return int(dict(line.split(":", 1) for line in f)[field].split()[0]) * 1024


def test_dropping_needs_one_layer_more(tmp_path):
    """The peak of accelerate(weights="drop") and of restore: the model, one layer, and slack."""
    sizes = dict(hidden_size=512, intermediate_size=1024, num_local_experts=16)
    sizes |= dict(num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1, vocab_size=32)
    config = transformers.MixtralConfig(num_experts_per_tok=2, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    layer = 3 * 16 * 512 * 1024 * 4
    slack = 40e6
    model.set_experts_implementation("eager")
    mt.restore(model) if mt.accelerate(model, weights="drop").done else pytest.fail()  # code loaded
    ids = ids_of(model)
    want = logits(model, ids)
    for step in (lambda: mt.accelerate(model, weights="drop"), lambda: mt.restore(model)):
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak counts from here
        assert step().done
        assert resident("VmHWM") - before <= layer + slack
        assert abs(resident("VmRSS") - before) <= slack
    assert torch.equal(logits(model, ids), want)
    # The test can fail: keeping torch's copy takes all of it again.
    before = resident("VmRSS")
    assert mt.accelerate(model, weights="keep").done
    assert resident("VmRSS") - before > 4 * layer


# --- dropped weights, libraries -------------------------------------------------------------------


def test_dropped_weights(model, tmp_path):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    mt.accelerate(model, weights="drop")
    for call in (lambda: model.save_pretrained(tmp_path / "no"), lambda: copy.deepcopy(model)):
        with pytest.raises(moec.Error, match=r"restore\(model\)"):
            call()
    assert mt.restore(model).done
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path / "yes")


def test_own_library(model, compiled):
    library = compiled("mixtral", "f32").load(None)
    assert mt.accelerate(model, library=library).done
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(-1)
    report = mt.accelerate(other, library=library)
    assert "E-MISMATCH" in report["model.layers.0.mlp"]
    assert report["model.layers.1.mlp"].startswith("done")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(-1)
    with pytest.raises(moec.Error, match="weights of its own"):
        logits(model, ids_of(model))


def test_weights_that_are_refused(model, monkeypatch):
    with pytest.raises(moec.Error, match="borrow") as caught:
        mt.accelerate(model, weights="borrow")
    assert caught.value.name == "E-UNSUPPORTED"
    monkeypatch.setattr("moec._accelerate.available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match=r"expected .* of free memory.*but got 0\.00 MB"):
        mt.accelerate(model, weights="keep")


# --- the operation --------------------------------------------------------------------------------


def test_one_graph(model):
    """torch.compile keeps the whole model in one graph."""
    ids = ids_of(model)
    model.set_experts_implementation("moec")
    want = logits(model, ids)
    mt.prepare(model)
    compiled_model = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert oracle.relative(logits(compiled_model, ids), want) < 2e-6


def test_operation_by_name(compiled):
    from moec import torch_op

    layer = compiled("mixtral", "f32").load(None).layers[1]
    name = torch_op.name_of(layer)
    assert name == torch_op.name_of(layer) and name.endswith("/model.layers.1.mlp")
    x = oracle.tokens(7, layer.info.H)
    assert torch.equal(torch.ops.moec.run(x, name), layer(x))
    ids, weights = layer.route(x)
    assert torch.equal(torch.ops.moec.run(x, name, ids, weights), layer(x))
    torch.library.opcheck(torch.ops.moec.run, (x, name, ids, weights))
    with pytest.raises(moec.Error, match="a layer that is open"):
        torch.ops.moec.run(x, "0/nothing")


def test_the_torch_executor(compiled):
    x = oracle.tokens(70, 64)
    library = compiled("mixtral", "f32")
    want = library.load(None).layers[0](x)
    assert torch.equal(library.load(None, threads=mt.torch_executor(2)).layers[0](x), want)


def test_memory_is_measured():
    from moec._memory import available_bytes

    assert 10**7 < available_bytes() < 10**14
    assert np.isfinite(available_bytes()) and transformers.__version__


# --- traces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["implementation", "accelerate"])
@torch.no_grad()
def test_trace_of_generate(model, how, tmp_path):
    from conftest import moec_command
    from safetensors.numpy import load_file

    ids = ids_of(model, 1, 5)
    if how == "accelerate":
        mt.accelerate(model)
    else:
        model.set_experts_implementation("moec")
    path = tmp_path / "usage.safetensors"
    kwargs = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with moec.trace(path) as t:
        t.tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    got = load_file(path)
    assert got["tokens"].tolist() == t.tokens[0, :-1].tolist()
    seen = oracle.capture(model, t.tokens[:, :-1])
    for block in oracle.blocks_of(model):
        exact = block.reference().routing(seen[block.name][0])
        chosen = got[block.name + ".experts"]
        clear = exact.gap > 1e-4
        assert clear.sum() > 5
        np.testing.assert_array_equal(np.sort(chosen[clear]), np.sort(exact.experts[clear]))
        assert got[block.name + ".weights"].shape == (10, 2)
        counts = np.bincount(chosen.ravel(), minlength=8)
        np.testing.assert_array_equal(got[block.name + ".counts"], counts)
    shown = moec_command("inspect", "--usage", path).stdout
    assert "model.layers.1.mlp" in shown


def test_trace_is_not_written_after_an_error(tmp_path):
    with pytest.raises(KeyError), moec.trace(tmp_path / "no.safetensors"):
        raise KeyError
    with pytest.raises(moec.Error, match="a MoE layer called inside"):
        with moec.trace(tmp_path / "no.safetensors"):
            pass
    assert not (tmp_path / "no.safetensors").exists()
