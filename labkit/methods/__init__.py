"""Advanced quantization from scratch: one method a file, each under 60 lines of numpy on plain arrays.

| module | the idea in a phrase | changes |
|---|---|---|
| `gptq` | later columns make up for the rounding of earlier ones | codes |
| `imatrix` | weights that meet large inputs are rounded with more care | codes and scales |
| `hqq` | zero points that leave a few large errors and many small ones, without data | zero points |
| `awq` | columns that meet large inputs get finer steps | scale of columns |
| `smoothquant` | hand the outliers of inputs to the weights | scale of columns |
| `hadamard` | turn the axes so that no direction holds an outlier | the basis |
| `kvcache` | keys by channel, values by token | what attention remembers |

W is (out, in) float32, calibration inputs X are (n, in) float32, outputs are X @ W.T. `forward` runs a whole Llama on such
arrays, `compare` puts all methods into one table and `chart` draws it.
"""

from __future__ import annotations

METHODS = ("gptq", "imatrix", "hqq", "awq", "smoothquant", "hadamard", "kvcache")
