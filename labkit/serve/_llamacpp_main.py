"""The program `serve` starts: llama-cpp-python's server, with models loaded as `open_llama` loads them.

Called with the file of its settings and the port, which whoever started it chose last.
"""

import json
import sys
from pathlib import Path

from labkit.engines._llamacpp_python import safe_defaults


def main() -> None:
    from llama_cpp.server.__main__ import main as serve

    config = Path(sys.argv[1])
    config.write_text(json.dumps({**json.loads(config.read_text()), "port": int(sys.argv[2])}))
    sys.argv[1:] = ["--config_file", str(config)]
    with safe_defaults():
        serve()


if __name__ == "__main__":
    main()
