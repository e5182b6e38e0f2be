"""
What an optimizer wants to know of a parameter that the parameter itself does not tell, as keys of its group.

[`build_param_groups`] calls one function for every parameter, with its place in the model, and puts parameters with
different answers into different groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..layer_depth import EMBEDDINGS, FINAL, HEAD, LayerDepth, is_embedding_parameter, is_norm_parameter


GroupKeys = Callable[[nn.Module, str, LayerDepth], dict[str, Any]]


def hidden_matrices(model: nn.Module, name: str, depth: LayerDepth) -> dict[str, Any]:
    """
    `algorithm="muon"` for the weights of linear layers inside the repeated blocks, else `"adamw"`.

    Matrices that map one hidden vector to another, whatever the class of their layer; `Conv1D` of GPT-2, which keeps
    its weight as `[inputs, outputs]`, also gets `is_transposed=True`. Embeddings inside blocks (T5's position bias),
    vectors with a dimension of 1 beside (IA3) and the state matrices of state space models are none.
    """
    module_name, _, parameter_name = name.rpartition(".")
    module, parameter = model.get_submodule(module_name), model.get_parameter(name)
    is_outside = depth.layer in (HEAD, FINAL) or depth.layer.split(".")[-1] == EMBEDDINGS
    is_other = is_embedding_parameter(model, name) or is_norm_parameter(model, name) or parameter_name == "A_log"
    if parameter.ndim != 2 or min(parameter.shape) == 1 or is_outside or is_other or "bias" in parameter_name:
        return {"algorithm": "adamw"}
    return {"algorithm": "muon", "is_transposed": type(module).__name__ == "Conv1D"}


def embeddings_in_32_bits(model: nn.Module, name: str, depth: LayerDepth) -> dict[str, Any]:
    """`state_bits=32` for embeddings, where 8 bits make training unstable (Dettmers et al. 2022, section 2.3)."""
    return {"state_bits": 32} if is_embedding_parameter(model, name) else {}
