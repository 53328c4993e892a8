"""Nodes of an ONNX graph as they are collected: constants made once, the types of what flows between them."""

from __future__ import annotations

from typing import Any

import numpy as np

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
OPSET, IR = 21, 10


class Nodes:
    """A graph under construction. Values are named after the node that makes them: NAME/output_0."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.values: list[Any] = []  # types and shapes of what flows between them
        self.made: set[str] = set()  # names of what must not be made twice

    def node(self, kind: str, name: str, inputs: list[str], outputs: list[str] | None = None, domain: str = "",
             width: int | None = None, **attributes: Any) -> str:  # fmt: skip
        """Append a node; the name of its first output, (B, T, width) floats if a width is given."""
        from onnx import helper

        outputs = outputs or [f"{name}/output_0"]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        if width and outputs[0] != "logits":
            self.declare(outputs[0], width)
        return outputs[0]

    def declare(self, name: str, width: int) -> None:
        """Tell the type and shape of a value: tools that look into the graph do not know ONNX Runtime's operators."""
        self.values.append(value(name, 1, ["batch_size", "sequence_length", width]))

    def constant(self, number: Any, kind: str = "INT64") -> str:
        """A number or list of numbers as a node, made once."""
        from onnx import numpy_helper

        name = f"/model/constants/{kind}/{number}"
        if name not in self.made:
            self.made.add(name)
            array = np.array(number, dtype={"INT64": np.int64, "FLOAT": np.float32}[kind])
            tensor = numpy_helper.from_array(array, name)
            self.node("Constant", name.replace("constants", "constant_nodes"), [], [name], value=tensor)
        return name

    def finish(self, inputs: list[Any], outputs: list[Any], tensors: list[Any]) -> Any:
        """The model of all nodes so far."""
        from onnx import helper

        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, tensors, value_info=self.values)
        sets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, ir_version=IR, producer_name="labkit", opset_imports=sets)


def value(name: str, kind: int, shape: list[Any]) -> Any:
    """Name, element type and shape of a value; dimensions are numbers or names."""
    from onnx import helper

    return helper.make_tensor_value_info(name, kind, shape)
