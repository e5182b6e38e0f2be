"""NaN and infinities that are seen come out, as from the reference: a run that diverges must not look healthy."""

import pytest
import torch
from attention_closeness import run_attention

from hf_lmopt.attention import attention, attention_reference


def draw(*s, seed):
    return torch.randn(s, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sinks"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_that_is_seen_comes_out(name, dtype, softcap):
    a = {n: draw(1, 2, 300, 16, seed=i).to(dtype) for i, n in enumerate(("query", "key", "value"))}
    a |= {"bias": torch.zeros(1, 1, 300, 300), "sinks": torch.zeros(2)} if name in ("bias", "sinks") else {}
    a[name] = a[name].clone()
    a[name].view(-1)[a[name].numel() // 2] = torch.nan
    r, e = (run_attention(f, {**a, "softcap": softcap}) for f in (attention, attention_reference))
    for n in e:
        assert not (e[n].isnan() & ~r[n].isnan()).any(), n
