"""Runs in the interpreter that has onnxruntime-qnn: open one model on the HTP backend, run it, write what came out.

Takes one JSON job on the command line: `model`, `feeds` (an .npz file), `out` (a folder), `strict`, `context` (a file to
write, or null), `options` of the provider. Knows nothing of labkit, which need not be installed there.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_qnn


def session(job: dict) -> onnxruntime.InferenceSession:
    """A session whose nodes go to the HTP backend; `strict` refuses to leave any to the CPU."""
    onnxruntime.register_execution_provider_library(onnxruntime_qnn.EP_NAME, onnxruntime_qnn.get_library_path())
    devices = [one for one in onnxruntime.get_ep_devices() if one.ep_name == onnxruntime_qnn.EP_NAME]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    entries = {"session.record_ep_graph_assignment_info": "1", "session.disable_cpu_ep_fallback": str(int(job["strict"]))}
    if job["context"]:
        entries |= {"ep.context_enable": "1", "ep.context_file_path": job["context"], "ep.context_embed_mode": "0"}
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices(devices[:1], {**backend, **job["options"]})
    return onnxruntime.InferenceSession(job["model"], sess_options=options)


def main(job: dict) -> None:
    out, said = Path(job["out"]), {"plug_in": onnxruntime_qnn.__version__, "runtime": onnxruntime.__version__}
    said["sdk"] = getattr(onnxruntime_qnn.build_and_package_info, "qnn_version", "")
    try:
        opened = session(job)
        with np.load(job["feeds"]) as feeds:
            names = [one.name for one in opened.get_outputs()]
            np.savez(out / "outputs.npz", **dict(zip(names, opened.run(None, dict(feeds)), strict=True)))
        parts = [(one.ep_name, len(one.get_nodes())) for one in opened.get_provider_graph_assignment_info()]
        said["parts"] = parts
    except Exception as error:  # whatever the runtime refuses is the finding
        said["refused"] = f"{type(error).__name__}: {error}"
    (out / "said.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
