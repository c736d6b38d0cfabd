"""Models of transformers that moec does not take over: quantized, distributed, adapted."""

import moec
import moec.transformers as mt
import oracle
import pytest
import torch
import transformers
from test_transformers import cache, ids_of, logits  # noqa: F401


@pytest.fixture
def make(tmp_path):
    """make(): a tiny Mixtral."""
    return lambda: oracle.make_checkpoint("mixtral", "f32", tmp_path / "mixtral").model


@pytest.fixture
def model(make):
    return make()


def refused(model):
    model.set_experts_implementation("moec")
    with pytest.raises(moec.Error) as caught:
        logits(model, ids_of(model))
    assert caught.value.name == "E-UNSUPPORTED"
    return str(caught.value)


def test_experts_that_are_refused(make):
    model = make()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    assert "distributed" in refused(model)
    model = make()
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = type("Strange", (type(experts),), {"__module__": "elsewhere"})
    assert "elsewhere.Strange" in refused(model)
    model = make()
    experts = model.model.layers[0].mlp.experts
    torch.nn.utils.parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
    assert "parametrized" in refused(model)
    assert "float16" in refused(make().half())


class Halves(torch.Tensor):
    """A tensor kept in eight bits, as quantization libraries make them: a subclass that decodes
    itself for every operation."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(a):
            return a.codes.float() * a.scale if isinstance(a, cls) else a

        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        return function(*map(plain, args), **(kwargs or {}))


def in_eight_bits(model):
    for layer in model.model.layers:
        for name, weight in list(layer.mlp.experts.named_parameters()):
            scale = weight.abs().amax() / 127
            tensor = Halves((weight / scale).round().to(torch.int8), scale)
            layer.mlp.experts._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)


def by_fp8_experts(model):
    """As transformers loads a checkpoint with fp8 weights."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    config = transformers.FineGrainedFP8Config()
    rest = ["lm_head", "gate", "q_proj", "k_proj", "v_proj", "o_proj"]
    replace_with_fp8_linear(model, rest, config)
    for layer in model.model.layers:
        layer.mlp.experts.to_empty(device="cpu")


def by_torch_quantization(model):
    for layer in model.model.layers:
        down = layer.mlp.experts.down_proj
        codes = torch.quantize_per_tensor(down, 0.01, 0, torch.qint8)
        layer.mlp.experts.down_proj = torch.nn.Parameter(codes, requires_grad=False)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "quantize, says",
    [
        (in_eight_bits, "Halves"),
        (by_fp8_experts, "float8_e4m3fn"),
        (by_torch_quantization, "qint8"),
    ],
)
def test_quantized_models_are_refused(model, quantize, says):
    quantize(model)
    assert says in refused(model)
    report = mt.accelerate(model)
    assert not report.done and len(report) == len(model.model.layers)
    assert all("E-UNSUPPORTED" in text for text in report.values()), str(report)
    if quantize is in_eight_bits:  # and the model still runs as torch has it
        model.set_experts_implementation("eager")
        assert logits(model, ids_of(model)).isfinite().all()


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as distributed
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded_by_fsdp(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer.mlp.experts, mesh=mesh)


def distributed_tensors(model, mesh):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    def split(name, module, mesh):
        for key, weight in list(module._parameters.items()):
            part = distribute_tensor(weight, mesh, [Shard(0)])
            module.register_parameter(key, torch.nn.Parameter(part, requires_grad=False))

    for layer in model.model.layers:
        distribute_module(layer.mlp.experts, mesh, split)


@pytest.mark.parametrize("distribute", [sharded_by_fsdp, distributed_tensors])
def test_distributed_models_are_refused(model, mesh, distribute):
    distribute(model, mesh)
    report = mt.accelerate(model)
    assert not report.done
    assert all("DTensor" in text or "FSDP" in text for text in report.values()), str(report)
    assert "DTensor" in (text := refused(model)) or "FSDP" in text


class LowRank(torch.nn.Module):
    """A low-rank update, as adapters make them."""

    def __init__(self, weight):
        super().__init__()
        e, n, k = weight.shape
        self.a = torch.nn.Parameter(torch.randn(e, 2, k) * 0.1)
        self.b = torch.nn.Parameter(torch.randn(e, n, 2) * 0.1)

    def forward(self, weight):
        return weight + self.b @ self.a


def test_adapters_are_refused_until_they_are_merged(model):
    from torch.nn.utils import parametrize

    ids = ids_of(model)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(experts, name, LowRank(getattr(experts, name)))
    model.requires_grad_(False)
    want = logits(model, ids)
    assert "parametrized" in (text := refused(model)) and "merge" in text
    report = mt.accelerate(model)
    assert not report.done and all("parametrized" in text for text in report.values())
    model.set_experts_implementation("eager")
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.remove_parametrizations(layer.mlp.experts, name)
    assert mt.accelerate(model).done
    assert oracle.relative(logits(model, ids), want) < 2e-6
