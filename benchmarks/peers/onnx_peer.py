"""onnxruntime's MoE operator, f32. It routes from logits: they are made so that its own softmax
and top-k give the experts and weights of the input."""

from __future__ import annotations

import numpy as np
from layer import Layer
from serve import Absent


class Peer:
    def __init__(self, name: str, layer: Layer, run: dict):
        if layer.dtype != "f32":
            raise Absent("the operator is for f32 on the CPU")
        try:
            import onnxruntime
            from onnx import TensorProto, helper
        except ImportError:
            raise Absent(
                "onnxruntime is not installed", "pip install onnxruntime==1.32.0 onnx==1.23.2"
            ) from None
        self.version, self.layer = f"onnxruntime {onnxruntime.__version__}", layer
        E, F, H = layer.E, layer.F, layer.H
        node = helper.make_node(
            "MoE",
            ["x", "r", "w1", "", "w2", "", "", ""],
            ["y"],
            domain="com.microsoft",
            k=layer.K,
            activation_type="swiglu",
            normalize_routing_weights=1,
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
        )
        shapes = {"x": ["T", H], "r": ["T", E], "w1": [E, 2 * F, H], "w2": [E, H, F]}
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node],
            "moe",
            [info(key, TensorProto.FLOAT, shape) for key, shape in shapes.items()],
            [info("y", TensorProto.FLOAT, ["T", H])],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        )
        model.ir_version = 10
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = run["threads"]
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.banks = []
        for _ in range(layer.banks):
            up = np.empty((E, 2 * F, H), np.float32)
            down = np.empty((E, H, F), np.float32)
            for e in range(E):
                fused, down[e] = layer.expert(e)
                up[e, 0::2], up[e, 1::2] = np.split(fused, 2)  # gate and up take turns
            binding = self.session.io_binding()
            binding.bind_ortvalue_input("w1", value(up))
            binding.bind_ortvalue_input("w2", value(down))
            self.banks.append(binding)

    def prepare(self, x, ids, weights):
        logits = np.full((len(x), self.layer.E), -30, np.float32)
        np.put_along_axis(logits, ids.astype(np.int64), np.log(weights), axis=1)
        return x, logits

    def run(self, item, bank, keep=True):
        binding = self.banks[bank]
        binding.bind_cpu_input("x", item[0])
        binding.bind_cpu_input("r", item[1])
        binding.bind_output("y")
        self.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0] if keep else None
