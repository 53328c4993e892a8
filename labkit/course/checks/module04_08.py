"""Lab module04/08, the failure museum: a diagnosis is right when it names the exhibit and gives what was lost."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from labkit import museum
from labkit.course.compare import NotYet, close, function, raw_bytes, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr

REQUESTS, REQUESTS_SEED = 120, 101  # the house requests that the lab counts differing token ids on
QUESTION = ({"role": "user", "content": "Turn on the lights in the kitchen"},)


def _diagnosis(answer: Any, *keys: str) -> tuple[int, Mapping[str, Any]]:
    """The seed and the learner's dictionary of `keys` in (seed, dictionary)."""
    unfinished(answer)
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
        raise NotYet(tr("expected (seed, diagnosis), the diagnosis a dictionary with {keys}", keys=", ".join(keys)))
    seed, found = answer
    if missing := [key for key in keys if key not in found]:
        raise NotYet(tr("the diagnosis lacks {key!r}", key=missing[0]))
    return int(seed), found


def _exhibit(found: Mapping[str, Any], seed: int, kind: str) -> None:
    """Refuse another exhibit without naming the right one."""
    if found["exhibit"] != museum.plan(seed).number(kind) or isinstance(found["exhibit"], bool):
        raise NotYet(tr("exhibit {number} does not fit this report; compare the evidence again", number=found["exhibit"]))


def _tensors(data: Any, expected: Mapping[str, np.ndarray], block: int = 0) -> None:
    """The repaired tensors, all and only those that were damaged: bytes exactly, numbers nearly."""
    if not isinstance(data, Mapping):
        raise NotYet(tr("data: expected a dictionary from tensor name to array, got {kind}", kind=type(data).__name__))
    if extra := [name for name in data if name not in expected]:
        raise NotYet(tr("{name} is not damaged in this exhibit", name=extra[0]))
    if len(data) < len(expected):
        raise NotYet(tr("{n} damaged tensors are not repaired yet", n=len(expected) - len(data)))
    for name, right in expected.items():
        if right.dtype == np.uint8:
            raw_bytes(data[name], right.tobytes(), block=block, what=name)
        else:
            close(data[name], right, rel=1e-4, abs=1e-6, what=name)


def _good(precision: str) -> Path:
    from labkit.engines.llamacpp import FILE

    return museum.good(precision).path / FILE


def _stored(precision: str, *endings: str) -> dict[str, np.ndarray]:
    """Tensors of the good file whose name has one of the endings, as stored."""
    import gguf

    return {t.name: np.array(t.data) for t in gguf.GGUFReader(_good(precision)).tensors if t.name.endswith(endings)}


@exercise(
    "04.8.1",
    "Report A: four bits of noise",
    hints=(
        "Only one exhibit is a four-bit file. Its worst tensor in the picture is the damaged one.",
        "Unpack the first block of that tensor and of the good file: the scales agree, the codes do not. Look at the bits.",
        "Bytes 2 to 17 of every 18 hold two codes each: (b >> 4) | (b << 4) exchanges them.",
    ),
    seconds=60,
)
def _(answer: Any) -> None:
    seed, found = _diagnosis(answer, "exhibit", "data")
    _exhibit(found, seed, "nibbles")
    _tensors(found["data"], _stored("q4_0", museum.plan(seed).nibbles), block=18)


@exercise(
    "04.8.2",
    "Report B: sixteen bits are sixteen bits",
    hints=(
        "Two exhibits are eight-bit files; in one of them a single tensor is far too large.",
        "Read the first two bytes of its blocks once as float16 and once as bfloat16. Which of them is a likely scale?",
        "bfloat16 is the upper half of a float32: (bits.astype('<u4') << 16).view('<f4'), then back as float16.",
    ),
    seconds=60,
)
def _(answer: Any) -> None:
    seed, found = _diagnosis(answer, "exhibit", "data")
    _exhibit(found, seed, "scale")
    (name, data), *_ = _stored("q8_0", museum.plan(seed).scale).items()
    blocks = data.reshape(len(data), -1, 34)
    lost = museum.bf16_bits(blocks[..., :2].copy().view("<f2").astype(np.float32)).astype("<u4") << 16
    blocks[..., :2] = lost.view("<f4").astype("<f2").view(np.uint8)  # what is left of the scales
    _tensors(found["data"], {name: blocks.reshape(len(data), -1)}, block=34)


@exercise(
    "04.8.3",
    "Report C: every row is there",
    hints=(
        "Which kinds of tensor are damaged in all layers of one exhibit? Sort their rows: nothing is lost.",
        "Query and key rows stand in the checkpoint's order. llama.cpp wants row i of a head beside row i + d/2.",
        "For heads of d rows: rows.reshape(-1, 2, d // 2, columns).swapaxes(1, 2).reshape(rows.shape)",
    ),
    seconds=60,
)
def _(answer: Any) -> None:
    seed, found = _diagnosis(answer, "exhibit", "data")
    _exhibit(found, seed, "rope")
    _tensors(found["data"], _stored("f16", "attn_q.weight", "attn_k.weight"))


@exercise(
    "04.8.4",
    "Report D: the converter of another family",
    hints=(
        "All matrices are equal in one of the 16-bit exhibits, and yet its distance is large. What else is stored?",
        "Subtract the good file's norms from the exhibit's: the difference is the same everywhere.",
    ),
    seconds=60,
)
def _(answer: Any) -> None:
    seed, found = _diagnosis(answer, "exhibit", "data")
    _exhibit(found, seed, "norm")
    _tensors(found["data"], _stored("f16", "norm.weight"))


@exercise(
    "04.8.5",
    "Report E: only a lookup table",
    hints=(
        "One file is smaller than a good file of its precision. llamacpp.tensors shows the type of every tensor.",
        "Look the same tensor up in museum.good('q8_0').",
    ),
    seconds=60,
)
def _(answer: Any) -> None:
    from labkit.engines.llamacpp import tensors

    seed, found = _diagnosis(answer, "exhibit", "tensor", "bytes")
    _exhibit(found, seed, "embedding")
    if found["tensor"] != "token_embd.weight":
        raise NotYet(tr("tensor: {name} is not what was squeezed", name=found["tensor"]))
    right = next(t["bytes"] for t in tensors(_good("q8_0")) if t["name"] == "token_embd.weight")
    close(found["bytes"], right, what=tr("its bytes in a good file"))


@exercise(
    "04.8.6",
    "Report F: good marks, bad manners",
    hints=(
        "This exhibit's weights are all equal to the good file's; its prompt has another number of tokens.",
        "Compare the keys of llamacpp.metadata of the exhibit and of the good file.",
        "The ids: checkpoint.encode(checkpoint.chat(question)).",
    ),
    seconds=60,
)
def _(answer: Any) -> None:
    from labkit.checkpoint import checkpoint

    seed, found = _diagnosis(answer, "exhibit", "key", "ids")
    _exhibit(found, seed, "template")
    if found["key"] != "tokenizer.chat_template":
        raise NotYet(tr("key: {key!r} is not what this file lacks", key=found["key"]))
    house = checkpoint("edgehome")
    same(list(found["ids"]), house.encode(house.chat(QUESTION)), "ids")


@exercise(
    "04.8.7",
    "Report G: two programs, one text, two perplexities",
    hints=(
        "Weights equal, chat template there, and still llama.cpp splits some requests differently.",
        "Compare the metadata once more; the missing value is in the good file.",
        "sum(a != b for a, b in zip(ours, theirs)) over the requests.",
    ),
    seconds=60,
)
def _(answer: Any) -> None:
    from labkit.engines.llamacpp import metadata

    seed, found = _diagnosis(answer, "exhibit", "key", "value", "differing")
    _exhibit(found, seed, "pre")
    if found["key"] != "tokenizer.ggml.pre":
        raise NotYet(tr("key: {key!r} is not what this file lacks", key=found["key"]))
    if found["value"] != metadata(_good("f16"))["tokenizer.ggml.pre"]:
        raise NotYet(tr("value: {value!r} is not what the good file says", value=found["value"]))
    close(found["differing"], _differing(), what=tr("requests split differently"))


def _differing() -> int:
    """How many of the lab's requests llama.cpp splits otherwise than the checkpoint when the key is missing."""
    from labkit import house
    from labkit.checkpoint import checkpoint
    from labkit.engines.llamacpp import gguf_encode

    source = checkpoint("edgehome")
    texts = [source.chat(task.messages) for task in house.tasks(n=REQUESTS, seed=REQUESTS_SEED)]
    with tempfile.TemporaryDirectory() as folder:
        path = museum.break_gguf("pre", _good("f16"), Path(folder) / "pre.gguf")
        theirs = gguf_encode(path, texts)
    return sum(source.encode(text) != ids for text, ids in zip(texts, theirs, strict=True))


def _square(layer: int) -> tuple[str, np.ndarray]:
    from labkit.checkpoint import checkpoint

    name = museum.SQUARE.format(layer=layer)
    return name, checkpoint("edgehome").tensors()[name].float32()


@exercise(
    "04.8.8",
    "Report H: all shapes agree",
    hints=(
        "Read every float array of the IR with museum.ir_tensor and compare it with the checkpoint's tensor of that name.",
        "A matrix can be transposed without a complaint only if it is square.",
    ),
)
def _(answer: Any) -> None:
    seed, found = _diagnosis(answer, "tensor", "data")
    name, right = _square(museum.plan(seed).transposed)
    if found["tensor"] != name:
        raise NotYet(tr("tensor: {name} equals the checkpoint's", name=found["tensor"]))
    close(found["data"], right, what=name)


@exercise(
    "04.8.9",
    "Report I: a scale for every channel",
    hints=(
        "There are as many scales as rows and as columns. Which of the two did they belong to?",
        "In x @ W the output channels are the columns of W: axis 1. Set the node's attribute and run the graph again.",
        "Feed the identity matrix: the answer is the decoded weight. Compare it with the checkpoint's matrix, transposed.",
    ),
)
def _(answer: Any) -> None:
    seed, found = _diagnosis(answer, "axis", "rmse")
    _, weight = _square(museum.plan(seed).axis)
    if isinstance(found["axis"], bool) or found["axis"] not in (1, -1):
        raise NotYet(tr("axis: {axis!r} does not give each output channel its own scale", axis=found["axis"]))
    scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    right = float(np.sqrt(np.mean((np.rint(weight / scales) * scales - weight) ** 2)))
    close(found["rmse"], right, rel=1e-3, what="rmse")


@exercise(
    "04.8.10",
    "Report J: the best calibration ever",
    hints=(
        "Exact equality finds only some: the others went through a tool that changed case and spaces.",
        "Compare ' '.join(text.lower().split()) instead of the text.",
        "Count evaluation texts, each once, whose normal form is among the calibration set's.",
    ),
)
def _(answer: Any) -> None:
    tiny = (["A  b", "c d ", "e"], ["a b", "C D", "f", "g"])
    function(answer, _leaked, [tiny, museum.calibration_set(3), museum.calibration_set(4)])


def _leaked(calibration: list[str], evaluation: list[str]) -> int:
    normal = {" ".join(text.lower().split()) for text in calibration}
    return sum(" ".join(text.lower().split()) in normal for text in evaluation)


@exercise(
    "04.8.11",
    "Report K: one run, one number",
    hints=(
        "Loading and reading the prompt are over when the first token arrives.",
        "n tokens have n - 1 gaps between them.",
        "(len(stamps) - 1) / (stamps[-1] - stamps[0])",
    ),
)
def _(answer: Any) -> None:
    cases = [(0.5, [1.0, 1.1, 1.2, 1.3, 1.4]), (0.01, [0.2, 0.21]), (2.0, list(np.cumsum([3.0, 0.02, 0.03, 0.02])))]
    function(answer, lambda loaded, stamps: (len(stamps) - 1) / (stamps[-1] - stamps[0]), cases)
