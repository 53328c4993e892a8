"""What a claim still needs before anyone can judge it: a lab, a machine, a product, or a source."""

from __future__ import annotations

LLAMACPP = "a timed run of both precisions by the lab on llama.cpp"
OLIVE = "a timed run of both precisions by the lab on Olive and ONNX Runtime"
OPENVINO = "a timed run of both precisions by the lab on OpenVINO"
SNAPDRAGON = "a Snapdragon machine with its neural processor; emulation shows correctness, not speed"
APPLE = "Apple silicon"
SOURCE = "a source: the chapter gives none"
NEEDS = {
    "C035": "a server that has the setting; the variable of the chapter is unknown to it",
    "C037": "a product with this schema; none was found",
    "C041": "the publisher's model card", "C142": "the publisher's model card",
    "C065": LLAMACPP, "C084": "a phone, and " + LLAMACPP, "C067": OLIVE, "C094": OLIVE, "C095": OLIVE,
    "C069": OPENVINO,
    "C070": "a quantized graph, made by the lab on QNN", "C071": SNAPDRAGON, "C127": SNAPDRAGON, "C128": "a Snapdragon machine; its emulation takes larger tensors in the lab on QNN", "C129": SNAPDRAGON,
    "C091": "the build file of the llama.cpp release that is compiled",
    "C098": "a checkout of the recipes' repository",
    "C116": APPLE,
    "C123": "the unit of the field the chapter's code compares; it names none",
    "C139": SOURCE, "C151": "prices of machines and power, which the chapter does not state",
    "C157": "a sweep of learning rates by the lab on fine-tuning",
    "C168": "timed runs at batch 1 and 64 by the lab on deployment",
    "C171": "a product that reads this file; Foundry Local 2.2.1 does not",
    "C175": "a machine of each kind",
}  # fmt: skip
