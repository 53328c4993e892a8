"""The program `serve` starts: llama-cpp-python's server, with models loaded as `open_llama` loads them."""

from labkit.engines._llamacpp_python import safe_defaults


def main() -> None:
    from llama_cpp.server.__main__ import main as serve

    with safe_defaults():
        serve()


if __name__ == "__main__":
    main()
