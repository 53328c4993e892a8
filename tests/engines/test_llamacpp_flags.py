"""Old llama.cpp commands in today's words."""

import pytest

from labkit.engines._llamacpp_flags import RENAMED, build_flags, modernise


@pytest.mark.parametrize(
    ("old", "today"),
    [
        ("make LLAMA_METAL=1 -j8", "cmake -B build -DGGML_METAL=ON && cmake --build build --config Release -j8"),
        ("make -j8", "cmake -B build && cmake --build build --config Release -j8"),
        ("cmake -B build -DLLAMA_CUBLAS=ON", "cmake -B build -DGGML_CUDA=ON"),
        ("python convert.py phi && ./quantize a b Q4_K_M", "python convert_hf_to_gguf.py phi && build/bin/llama-quantize a b Q4_K_M"),
        ("./main -m q4.gguf -temp 0.2 -fa", "build/bin/llama-completion -m q4.gguf --temp 0.2 -fa on"),
        ("llama-server --mlock", "llama-server --load-mode mmap+mlock"),
    ],
)
def test_old_commands_become_todays(old, today):
    assert modernise(old)["today"] == today
    assert modernise(old)["changes"]


@pytest.mark.parametrize("rule", RENAMED, ids=lambda rule: rule.old)
def test_todays_words_are_left_alone(rule):
    """What a rule writes is not rewritten by any other: modernising twice changes nothing."""
    once = modernise(rule.old)["today"]
    assert modernise(once) == {"today": once, "changes": []}


def test_the_flags_of_the_installed_library():
    pytest.importorskip("llama_cpp")
    flags = build_flags()
    assert flags["device"] and len(flags) > 2
