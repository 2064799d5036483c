"""What the tests of engines share: small .onnx files written node by node."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting


class OnnxFile:
    """An .onnx file being written: each method adds a node and gives the name of its output."""

    def __init__(self, *shape, opset=21):
        self.nodes, self.constants, self.opset = [], [], opset
        self.shape = shape
        self.input = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *shape])

    def constant(self, value, dtype=None):
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, kind, *inputs, outputs=1, name=None, **attributes):
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        names = [f"{name}_out{i or ''}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def quantize(self, x, scale, zero_point, dtype=np.uint8, **attributes):
        parameters = self.constant(scale, np.float32), self.constant(zero_point, dtype)
        return self.node("QuantizeLinear", x, *parameters, **attributes)

    def dequantize(self, x, scale, zero_point, dtype=np.uint8, **attributes):
        parameters = self.constant(scale, np.float32), self.constant(zero_point, dtype)
        return self.node("DequantizeLinear", x, *parameters, **attributes)

    def grid(self, x, scale, zero_point, dtype=np.uint8, **attributes):
        codes = self.quantize(x, scale, zero_point, dtype, **attributes)
        return self.dequantize(codes, scale, zero_point, dtype, **attributes)

    def weight(self, codes, scale, axis=0, zero_point=None):
        zeros = np.zeros(np.shape(scale), codes.dtype) if zero_point is None else zero_point
        return self.dequantize(self.constant(codes), scale, zeros, codes.dtype, axis=axis)

    def model(self, *outputs):
        values = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "small", [self.input], values, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    def open(self, folder, *outputs):
        path = folder / "small.onnx"
        onnx.save(self.model(*outputs), path)
        return Reference().open(path, Setting(engine="reference"))

    def run_onnxruntime(self, x, *outputs):
        """What ONNX Runtime computes, node by node."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        model = self.model(*outputs).SerializeToString()
        return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"]).run(None, {"input": x})


@pytest.fixture
def File():
    """`File(*shape, opset=21)`: a file of one input ``(N, *shape)``."""
    return OnnxFile
