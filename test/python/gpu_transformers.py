"""Models of transformers on a GPU that is none: moec's side of it, on the stub of the driver with
the executor behind it. A process of its own.

    python gpu_transformers.py BUILD FOLDER

torch has no CUDA here. Its tensors stay on the CPU; where moec asks a parameter for its device it
is told of one, and around a layer's call tensors are copied to the stub's memory and back. What
torch itself does with CUDA tensors (allocation, streams, copies from the device) is not shown.
"""

import sys
from pathlib import Path

import gpu_binding
import moec
import moec.transformers as mt
import torch
import transformers
from gpu_call import Machine
from moec import _live

H, F, E, K = 40, 24, 5, 2


class Bridge:
    """A layer on the device, called with tensors of the CPU."""

    def __init__(self, layer, machine):
        self.__dict__.update(layer=layer, machine=machine, calls=0)

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __setattr__(self, name, value):
        setattr(self.layer, name, value)

    def array(self, tensor, kind):
        return gpu_binding.CudaArray(self.machine, tensor.float().numpy(), kind)

    def run(self, call, x, *more, **options):
        self.__dict__["calls"] += 1
        flat = x.reshape(-1, x.shape[-1])
        out = self.array(torch.zeros(flat.shape), "bf16")
        call(self.array(flat, "bf16"), *more, out=out, **options)
        return torch.from_numpy(out.read().copy()).to(torch.bfloat16).reshape(x.shape)

    def experts(self, x, ids, weights):
        given = self.array(ids, "i64"), self.array(weights.float(), "f32")
        return self.run(self.layer.experts, x, *given)

    def __call__(self, x, routing=False):
        return self.run(self.layer, x)


def main(build, folder):
    machine = Machine(Path(build))
    compiled, wrong, bridges = [], [], []
    compile_, take = moec.compile, _live._Shelf.take

    def compile_and_keep(spec, out, options, load):
        phases = Path(folder) / f"phases{len(compiled)}"
        compiled.append((options["target"], options["gpu"], load["device"]))
        library = compile_(spec, out=out, options={**options, "dump-phases": phases}, load=load)
        machine.load(phases / "07-kernels.mlir")
        return library

    def take_and_bridge(shelf):
        bridges.append(Bridge(take(shelf), machine))
        return bridges[-1]

    moec.compile = compile_and_keep
    _live.device_of = lambda tensor: "cuda:0"
    _live._Shelf.take = take_and_bridge

    config = transformers.MixtralConfig(
        hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 3:
            parameter.mul_(12)
    x = torch.randn(1, 7, H).to(torch.bfloat16)

    def blocks():
        """What every block makes of the same x: a whole model would choose other experts where
        its states round differently."""
        return torch.cat([layer.mlp(x) for layer in model.model.layers])

    def check(what, got, want):
        error = float((got.float() - want.float()).norm() / want.float().norm())
        if not error < 2e-2:
            wrong.append(f"{what}: relative error {error}")

    with torch.no_grad():
        want = blocks()
        model.set_experts_implementation("moec")
        check("experts_implementation", blocks(), want)
        if compiled != [("cuda", "sm_80", "cuda:0")]:
            wrong.append(f"compiled for {compiled}")
        if len(bridges) != 2 or any(b.calls != 1 or b.info.level != "sm_80" for b in bridges):
            wrong.append(f"layers: {[(b.calls, b.info.level) for b in bridges]}")
        # Weights that change are packed again, onto the device.
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(-1.5)
        changed = blocks()
        model.set_experts_implementation("eager")
        check("changed weights", changed, blocks())
        if torch.equal(changed, want):
            wrong.append("changed weights: expected other results")

        want = blocks()
        report = mt.accelerate(model, weights="keep")
        if not all(str(text).startswith("done") for text in report.values()):
            wrong.append(f"accelerate: {dict(report)}")
        check("accelerate", blocks(), want)
        mt.restore(model)
        if not torch.equal(blocks(), want):
            wrong.append("restore: expected torch's own results")
    if machine.fault():
        wrong.append(machine.fault())
    print(f"{machine.simt.moe_simt_launches()} launches")
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
