"""Claims about parameters, file sizes and memory, computed from published shapes and from the formats' own block sizes.

A claimed size holds when the computed one lies within 5 %, which is how coarsely the chapters round.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from labkit import _shapes
from labkit.claims import Found, computed
from labkit.standin import size_class, standin_config

GB, GIB, MB = 1e9, 2**30, 1e6
CLOSE = 0.05
Q4_0, Q4_K_M, Q8_0, MLX4, MLX8 = 4.5, 4.9, 8.5, 4.5, 8.5  # bits per weight; Q4_K_M is a mixture, near 4.9 on 7 B models
# Shapes of two models the chapters name only by size: Mistral 7B v0.3 (config.json of mistralai/Mistral-7B-v0.3) and
# Llama 3.1 8B (config.json of meta-llama/Llama-3.1-8B).
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B = MISTRAL | {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256}


def weights(model: str) -> int:
    """Parameters of a published shape, tied ones counted once."""
    return _shapes.parameters(standin_config(model))


def file_bytes(model: str, bits: float) -> float:
    """Bytes of all weights at `bits` each."""
    return weights(model) * bits / 8


def cache(model: str, tokens: int) -> int:
    """Bytes of a float16 key/value cache."""
    return _shapes.cache_bytes(standin_config(model), tokens)


def near(value: float, stated: float, close: float = CLOSE) -> bool:
    """Whether two figures agree within `close`."""
    return abs(value / stated - 1) <= close


def _count(model: str, stated: float) -> Found:
    return Found(f"{weights(model) / 1e9:.3f} billion from the shape", near(weights(model), stated))


def _file(model: str, bits: float, stated: float) -> Found:
    found = file_bytes(model, bits)
    return Found(f"{found / GB:.2f} GB at {bits:g} bits per weight", near(found, stated))


computed("C009")(partial(_count, "phi-4-mini", 3.8e9))
for _id, _model, _bits, _stated in (
    ("C014", "phi-4-mini", 16, 7.6e9), ("C015", "qwen3-0.6b", 16, 1.2e9), ("C017", "phi-4-mini", Q4_0, 2.0e9),
    ("C018", "qwen3-0.6b", Q4_0, 0.35e9), ("C020", "phi-4-mini", Q8_0, 3.9e9), ("C021", "qwen3-0.6b", Q8_0, 0.68e9),
):  # fmt: skip
    computed(_id)(partial(_file, _model, _bits, _stated))


@computed("C010")
def qwen3_sizes() -> Found:
    found = [weights(f"qwen3-{name}") for name in ("0.6b", "1.7b", "4b")]
    agree = all(near(a, b) for a, b in zip(found, (0.6e9, 1.7e9, 4e9), strict=True))
    return Found(" / ".join(f"{n / 1e9:.2f} B" for n in found) + ", tied embeddings counted once", agree)


def _gemma(bits: float, stated: float) -> Found:
    known = {name: file_bytes(name, bits) for name in ("gemma-3-270m", "gemma-3-1b")}
    said = ", ".join(f"{name} {size / GB:.2f} GB" for name, size in known.items())
    wanted = stated * 8 / bits / 1e9
    return Found(
        f"{said}; {stated / GB:g} GB would be a model of {wanted:.1f} billion", any(near(s, stated) for s in known.values())
    )


for _id, _bits, _stated in (("C016", 16, 4.8e9), ("C019", Q4_0, 1.3e9), ("C022", Q8_0, 2.5e9)):
    computed(_id)(partial(_gemma, _bits, _stated))


@computed("C028")
def small_footprint() -> Found:
    low, high = file_bytes("qwen3-0.6b", Q4_0), file_bytes("qwen3-0.6b", Q8_0)
    token = cache("qwen3-0.6b", 1)
    return Found(f"{low / GB:.2f} to {high / GB:.2f} GB of weights and {token / 1024:.0f} KiB of cache a token", high < GB)


@computed("C029")
def phi_footprint() -> Found:
    low, high, long = file_bytes("phi-4-mini", Q4_0), file_bytes("phi-4-mini", Q8_0), cache("phi-4-mini", 131_072)
    return Found(
        f"{low / GB:.1f} to {high / GB:.1f} GB of weights, {cache('phi-4-mini', 4096) / GIB:.1f} GiB of cache at 4,096 tokens but "
        f"{long / GIB:.0f} GiB at the whole context: it holds for 4 bits or a short context",
        None,
    )


@computed("C030")
def ternary_footprint() -> Found:
    sizes = {name: 2.4e9 * bits / 8 for name, bits in (("log2(3) bits", 1.585), ("TQ1_0", 1.6875), ("TQ2_0", 2.0625))}
    said = ", ".join(f"{size / GB:.2f} GB in {name}" for name, size in sizes.items())
    return Found(f"2.4 billion ternary weights: {said}, embeddings apart", sizes["TQ1_0"] < 0.5 * GB)


@computed("C033")
def container_request() -> Found:
    found = file_bytes("phi-4-mini", 16)
    return Found(
        f"16-bit weights alone are {found / GIB:.2f} GiB; 4-bit ones {file_bytes('phi-4-mini', Q4_0) / GIB:.1f} GiB",
        found < 4 * GIB,
    )


@computed("C036")
def batch_cache() -> Found:
    tokens = 4 * GIB / cache("phi-4-mini", 1)
    return Found(f"4 GiB hold {tokens:,.0f} tokens of phi-4-mini: 16 sequences of {tokens / 16:,.0f}", None)


@computed("C039")
def whole_context() -> Found:
    found = cache("phi-4-mini", 131_072)
    return Found(f"the shape allows 131,072 tokens, whose cache takes {found / GIB:.0f} GiB", found < 12 * GB)


@computed("C040")
def vocabulary() -> Found:
    config = standin_config("phi-4-mini")
    table = config["vocab_size"] * config["hidden_size"]
    return Found(
        f"{config['vocab_size']:,} tokens: {table / MB:.0f} M weights, {table / weights('phi-4-mini'):.0%} of the model",
        near(config["vocab_size"], 200e3),
    )


def _fits(limit: float, bits: float, tokens: int, what: str) -> Found:
    found = file_bytes("phi-4-mini", bits) + cache("phi-4-mini", tokens)
    return Found(
        f"{found / GB:.2f} GB for phi-4-mini at {bits:g} bits with {tokens:,} tokens of cache, against {limit / GB:g} GB {what}",
        found <= limit,
    )


for _id, _limit, _bits, _what in (
    ("C042", 6 * GB, 16, "for development"), ("C043", 8 * GB, Q8_0, "for production on a CPU"),
    ("C044", 6 * GB, 16, "of graphics memory"), ("C045", 4 * GB, Q4_0, "on the edge"),
):  # fmt: skip
    computed(_id)(partial(_fits, _limit, _bits, 4096, _what))


@computed("C052")
def memory_by_precision() -> Found:
    sizes = {bits: file_bytes("phi-4-mini", bits) + cache("phi-4-mini", 8192) for bits in (16, Q8_0, Q4_0)}
    said = ", ".join(f"{size / GB:.1f} GB at {bits:g} bits" for bits, size in sizes.items())
    return Found(f"{said}, cache of 8,192 tokens included: the order follows the precision, not the framework", None)


@computed("C053")
def vllm_container() -> Found:
    found = file_bytes("phi-4-mini", 16) + 4 * cache("phi-4-mini", 4096)
    return Found(f"16-bit weights and four caches of 4,096 tokens: {found / GIB:.1f} GiB", found <= 8 * GIB)


def _seven(bits: float, stated: float | None, low: float = 0, high: float = 0) -> Found:
    sizes = {"7.2 B": _shapes.parameters(MISTRAL) * bits / 8, "8.0 B": _shapes.parameters(LLAMA_8B) * bits / 8}
    said = ", ".join(f"{size / GB:.2f} GB for {name}" for name, size in sizes.items())
    return Found(f"{said} at {bits:g} bits per weight", any(near(s, stated, 0.10) for s in sizes.values()) if stated else None)


for _id, _bits, _stated in (
    ("C064", Q4_K_M, 4 * GB), ("C072", MLX4, 4 * GB), ("C109", 32, 14 * GB), ("C110", MLX4, 4 * GB), ("C111", MLX8, 7 * GB),
):  # fmt: skip
    computed(_id)(partial(_seven, _bits, _stated))


@computed("C066")
def olive_int4() -> Found:
    whole, config = weights("phi-4-mini"), standin_config("phi-4-mini")
    table = config["vocab_size"] * config["hidden_size"]
    body = whole - table
    bits = 4 + 16 / 32  # a block of 32 with a 16-bit scale
    shared = 1 - bits / 16
    apart = 1 - (body * bits + table * bits + table * 32) / (whole * 16)  # the head quantized, a float32 embedding beside it
    return Found(
        f"against 16 bits: {shared:.0%} when everything is quantized, {apart:.0%} for phi-4-mini when a float32 embedding stays",
        0.60 <= shared <= 0.75,
    )


@computed("C083")
def q2_k_small() -> Found:
    most = {bits: 500 * MB * 8 / bits / 1e9 for bits in (2.625, 3.16)}
    return Found("; ".join(f"up to {size:.2f} billion weights at {bits:g} bits" for bits, size in most.items()), None)


@computed("C112")
def phi3_mini() -> Found:
    found = file_bytes("phi-3.5-mini", MLX4)
    return Found(f"{found / GB:.2f} GB at {MLX4:g} bits per weight", near(found, 2 * GB, 0.10))


@computed("C120")
def ios_bundle() -> Found:
    smallest = file_bytes("smollm2-135m", MLX4)
    return Found(
        f"50 MB hold {50 * MB * 8 / MLX4 / 1e6:.0f} M weights; the smallest shape here (135 M) takes {smallest / MB:.0f} MB",
        smallest < 50 * MB,
    )


@computed("C121")
def android_package() -> Found:
    smallest = file_bytes("smollm2-135m", MLX4)
    return Found(f"100 MB hold {100 * MB * 8 / MLX4 / 1e6:.0f} M weights; 135 M take {smallest / MB:.0f} MB", smallest < 100 * MB)


@computed("C138")
def slm_size() -> Found:
    classes = {name: size_class(weights(name)) for name in ("phi-4-mini", "phi-4", "qwen3-0.6b")}
    said = ", ".join(f"{name} {weights(name) / 1e9:.1f} B ({kind})" for name, kind in classes.items())
    return Found(f"the models of the other chapters: {said}", all(weights(name) < 1e9 for name in classes))


@computed("C144")
def student_size() -> Found:
    return Found(
        f"phi-4-mini has {weights('phi-4-mini') / 1e9:.1f} billion, phi-4 {weights('phi-4') / 1e9:.1f}",
        near(weights("phi-4-mini"), 14e9),
    )


@computed("C143")
def teacher_memory() -> Found:
    sizes = [671e9 * bits / 8 / 1e12 for bits in (16, 8)]
    return Found(
        f"671 billion weights: {sizes[0]:.2f} TB at 16 bits, {sizes[1]:.2f} TB at its native 8", any(near(s, 1.2) for s in sizes)
    )


@computed("C145")
def student_memory() -> Found:
    small, large = file_bytes("phi-4-mini", 16), file_bytes("phi-4", 32)
    return Found(f"{small / GB:.1f} GB for phi-4-mini at 16 bits, {large / GB:.0f} GB for phi-4 at 32", near(small, 60 * GB))


@computed("C185")
def moe_on_a_laptop() -> Found:
    found = 41.9e9 * MLX4 / 8
    return Found(f"41.9 billion weights (stated by the model's card) take {found / GB:.1f} GB at {MLX4:g} bits", None)


def _multiple(bits: float) -> Found:
    """Memory while running, as a multiple of the file: weights and cache of phi-4-mini, working buffers apart."""
    held = file_bytes("phi-4-mini", bits)
    rows = ", ".join(f"{1 + cache('phi-4-mini', tokens) / held:.2f} x at {tokens:,} tokens" for tokens in (4096, 32768, 131072))
    return Found(f"weights and cache of phi-4-mini: {rows}; the cache is added, not multiplied", None)


for _id, _bits in (("C025", 16), ("C026", Q4_0), ("C027", Q8_0)):
    computed(_id)(partial(_multiple, _bits))


@computed("C074")
def sections() -> Found:
    from labkit.claims import claims

    found = {claim.section for claim in claims().values() if claim.section.startswith("M04-") and claim.section != "M04-00"}
    return Found(f"numbers are stated in {len(found)} sections after the overview, {min(found)} to {max(found)}", None)
