"""
`hf-lmopt selftest`: whether the compiled extension does on this machine what it should, in one command and one file.

| file | |
|---|---|
| `run.py` | carries the checks out one by one |
| `report.py`, `summary.py` | what is recorded of each check, and what is printed |
| `device.py` | what is tested, and why it cannot be |
| `attention_checks.py` | calls of attention beside plain PyTorch, the same bits twice, and what is refused |
| `attention_cases.py`, `closeness.py` | those calls, and how far from the exact result is near enough |
| `model_check.py` | a tiny Llama with attn_implementation="lmopt" |
| `optimizer_checks.py` | the fused step beside torch's operators |
| `speed_checks.py` | a short table: attention beside SDPA and flash-attn, and the roofline |
| `contenders.py`, `timing.py`, `roofline.py` | the measuring, which `benchmarks/` share |
| `sanitizer.py` | a quick selftest under NVIDIA's compute-sanitizer |

Nothing imports it but the command line and the benchmarks.
"""

from .device import SelfTestUnavailable
from .run import run_selftest


__all__ = ["SelfTestUnavailable", "run_selftest"]
