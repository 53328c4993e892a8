"""Training small models, each idea in one file that can be read at one sitting; needs `pip install "labkit[train]"`.

| module | what is in it |
|---|---|
| `data` | conversations from JSON Lines, Hugging Face data sets and the house language; bad lines refused by file and line |
| `splits` | stratified splits without leakage; repeated and leaked questions refused |
| `rows` | token ids in the checkpoint's own template, loss on answers only, packing, batches |
| `llama`, `generate` | a plain Llama (and Qwen) in torch; greedy and drawn answers |
| `folder` | a Hugging Face folder in and out, byte for byte |
| `loop`, `state` | the training loop; a killed run resumes to bit-identical weights |
| `lora`, `adapters` | LoRA and DoRA from scratch; PEFT's own files |
| `bottleneck` | adapters behind the blocks of a frozen model, which cannot be merged |
| `qlora` | a frozen base in NF4 with double quantization |
| `memory` | what a training step holds: weights, gradients, optimizer, activations; estimated and measured |
| `qat` | training with the rounding in the loop; ternary models, exported to TQ2_0 without loss |
| `distil`, `teacher` | distillation losses; data from a teacher; a student learning on its own answers |
| `student`, `licences`, `azure` | small students, what one keeps of its teacher; a teacher's terms; a cloud job, checked before it costs |
| `search` | random search, TPE and successive halving with a budget |
| `scores` | exact match, F1, perplexity, BLEU and ROUGE from scratch |
| `track` | every run to MLflow, through one file |

    rows  = pack(encode_all(checkpoint, read_jsonl("train.jsonl"), 512), 512)
    model = load(checkpoint); lora.add(model, rank=8)
    run   = train(model, batches(rows, 8), Settings(steps=100, warmup=10), work="work")
    lora.merge(model); save(model, "tuned", like=checkpoint)
"""

from __future__ import annotations

import importlib.util

from labkit.types import NotInstalled


def need_torch() -> None:
    """A clear sentence instead of an import error: of these modules only `data`, `splits`, `scores`, `search` and `track` do without."""
    if importlib.util.find_spec("torch") is None:
        raise NotInstalled('torch is not installed; training and scoring in torch need it. Try:  pip install "labkit[train]"')
