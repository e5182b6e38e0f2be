"""Which layer a parameter belongs to, and how many blocks lie between it and the head.

Layer-wise learning-rate decay (Howard and Ruder 2018, https://arxiv.org/abs/1801.06146; Clark et al. 2020,
https://arxiv.org/abs/2003.10555) needs the depth of every parameter. Here it is read from the structure of the
module tree: the repeated blocks of a model stand in a list, and the rest stands on the input or the output side of
that list. No model, adapter or wrapper is known by name, so a new architecture needs no change.

Left out: the order of execution, which would need example inputs. Stacks that run one after the other (encoder and
decoder, vision tower and language model) therefore count their depth separately.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn


Path = tuple[str, ...]  # ("transformer", "h", "0"): a module's or a parameter's name, split at the dots

HEAD = "head"
FINAL = "final"
EMBEDDINGS = "embeddings"

# Registration order tells input from output in most models. These words overrule it where it misleads: OPT registers
# its final norm and `project_out` before the layers, BART its `layernorm_embedding` after them. They are looked for
# in one segment of a path at a time, output first (GPT-NeoX calls its head `embed_out`).
OUTPUT_WORDS = re.compile(r"final|ln_f|head|classif|pooler|score|logit|predict|summary|unembed|(project|embed)_out")
INPUT_WORDS = re.compile(r"embed|emb$|wte|wpe|(^|_)pos(_|ition)|patch|(^|_)stem|project_in|feature")

NORM_NAME = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


@dataclass(frozen=True)
class LayerDepth:
    """
    The place of a parameter in its model.

    Args:
        layer (`str`):
            `"head"`, `"final"` (the last norm, BERT's pooler), the path of a block such as `"transformer.h.3"`, or
            `"embeddings"` for the input side (`"encoder.embeddings"` if it belongs to one of several stacks).
        distance (`int`):
            Blocks between the parameter and the head: 0 for head and final norm, 1 for the last of n blocks, n for
            the first, n + 1 for the input side.
    """

    layer: str
    distance: int


@dataclass(frozen=True)
class _Stack:
    """A container of repeated blocks; `number` counts them from the input, shared blocks once."""

    path: Path
    number: dict[Path, int]

    @property
    def num_blocks(self) -> int:
        return max(self.number.values()) + 1

    def block_of(self, path: Path) -> Path | None:
        """The block that holds the parameter, or None."""
        return next((path[:end] for end in range(len(path)) if path[:end] in self.number), None)


def layer_depths(model: nn.Module) -> dict[str, LayerDepth]:
    """
    Find the layer of every parameter, trainable or not.

    A tied parameter is placed by all its names, and the deepest place wins: a head tied to the embedding is embedding.
    A model without repeated blocks has one layer, the head, at distance 0.

    Args:
        model (`nn.Module`):
            Any model, also wrapped (PEFT, DDP, `torch.compile`).

    Returns:
        `dict[str, LayerDepth]`: one entry for every name of `model.named_parameters()`, in that order.
    """
    names = [name for name, _ in model.named_parameters()]
    stacks = _find_stacks(model)
    if not stacks:
        return dict.fromkeys(names, LayerDepth(HEAD, 0))

    aliases: dict[int, list[Path]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(tuple(name.split(".")))
    places = _place([path for paths in aliases.values() for path in paths], model, stacks)
    deepest = (max((places[path] for path in paths), key=lambda place: place.distance) for paths in aliases.values())
    return dict(zip(names, deepest, strict=True))


def is_norm_parameter(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a normalisation layer, by the layer's class (`LlamaRMSNorm`) or name (`ln_1`)."""
    path = name.split(".")[:-1]
    return bool("norm" in type(_module(model, path)).__name__.lower() or (path and NORM_NAME.search(path[-1])))


def is_embedding_parameter(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the table of an embedding."""
    return isinstance(_module(model, name.split(".")[:-1]), nn.Embedding | nn.EmbeddingBag)


def stack_of(layer: str) -> str | None:
    """
    The list of blocks that a layer stands in, by the layer's name: `"model.layers"` for `"model.layers.3"`.

    `""` for a model that is a list itself, `None` for a layer that is no numbered block. Blocks in a list in a list
    (`"blocks.0.1"`) stand in the outer one.
    """
    numbers = re.search(r"(^|\.)\d+(\.\d+)*$", layer)
    return layer[: numbers.start()] if numbers else None


def order_layers(layers: Iterable[str]) -> list[str]:
    """
    Sorts names of layers from the input to the head: embeddings, blocks by number, final norm, head.

    Of several stacks, those of a decoder come behind the others, which they read.
    """
    sides = {EMBEDDINGS: 0, FINAL: 2, HEAD: 3}

    def place(layer: str) -> tuple[Any, ...]:
        parts = [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", layer)]
        return (sides.get(layer.rpartition(".")[2], 1), "decoder" in layer, parts)

    return sorted(layers, key=place)


def _find_stacks(model: nn.Module) -> list[_Stack]:
    """The stacks of a model, without lists in a head or a feature extractor unless there are no others."""
    stacks = list(_outermost_stacks(model, ()))
    return [stack for stack in stacks if _side_by_name(stack.path) is None] or stacks


def _outermost_stacks(module: nn.Module, path: Path) -> Iterable[_Stack]:
    if blocks := _blocks(module):
        ids = list(dict.fromkeys(id(block) for block in blocks.values()))
        yield _Stack(path, {(*path, *name): ids.index(id(block)) for name, block in blocks.items()})
        return
    found: list[_Stack] = []
    for name, child in module.named_children():
        found.extend(_outermost_stacks(child, (*path, name)))
    yield from found
    for stack in found:
        if len(stack.path) == len(path) + 1:
            stack.number.update(_parallel_blocks(module, path, stack.num_blocks))


def _blocks(container: nn.Module) -> dict[Path, nn.Module]:
    """The repeated blocks of a container by relative path, from the input on; empty if it is no stack."""
    children: dict[Path, nn.Module] = {
        (name,): child for name, child in container._modules.items() if child is not None and _has_parameters(child)
    }
    if isinstance(container, nn.ModuleList):
        if not all(_is_composite(child) for child in children.values()):
            return {}
        return {(*name, *rest): block for name, child in children.items() for rest, block in _flatten(child)}

    numbered = all(name.isdigit() for name in container._modules)
    if isinstance(container, nn.Sequential) or (isinstance(container, nn.ModuleDict) and numbered):
        return _repeated(children)
    return {}


def _flatten(child: nn.Module) -> list[tuple[Path, nn.Module]]:
    """A list of like blocks in a list is several blocks (Funnel); one of different parts is one block."""
    inner = _blocks(child) if isinstance(child, nn.ModuleList) else {}
    alike = len({type(block) for block in inner.values()}) == 1
    return list(inner.items()) if alike else [((), child)]


def _repeated(children: dict[Path, nn.Module]) -> dict[Path, nn.Module]:
    """Children of the class that occurs most, if at least twice and no other child holds the real stack."""
    classes = Counter(type(child) for child in children.values() if _is_composite(child))
    if not classes or max(classes.values()) < 2:
        return {}
    repeated = classes.most_common(1)[0][0]
    others = [child for child in children.values() if type(child) is not repeated]
    if any(True for other in others for _ in _outermost_stacks(other, ())):
        return {}
    return {name: child for name, child in children.items() if type(child) is repeated}


def _parallel_blocks(parent: nn.Module, path: Path, num_blocks: int) -> dict[Path, int]:
    """Lists beside a stack with one simple module per block (XLM's `layer_norm1`)."""
    return {
        (*path, name, str(number)): number
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_blocks and not _blocks(child)
        for number in range(num_blocks)
        if not isinstance(child[number], nn.Embedding)
    }


def _place(paths: list[Path], model: nn.Module, stacks: list[_Stack]) -> dict[Path, LayerDepth]:
    """Blocks and the input side first: what they leave is the output side, which shows where the head begins."""
    start = len(_wrappers(model, stacks))
    places: dict[Path, LayerDepth] = {}
    for path in paths:
        if place := _place_in_block(path, stacks, start) or _place_on_input(path, model, stacks, start):
            places[path] = place
    output = [path for path in paths if path not in places]
    top = reduce(_common, [stack.path for stack in stacks] + [path[:-1] for path in output])
    for path in output:
        places[path] = LayerDepth(_output_layer(path, model, stacks, top), 0)
    return places


def _place_in_block(path: Path, stacks: list[_Stack], start: int) -> LayerDepth | None:
    for stack in stacks:
        if block := stack.block_of(path):
            return LayerDepth(".".join(block[start:]), stack.num_blocks - stack.number[block])
    return None


def _place_on_input(path: Path, model: nn.Module, stacks: list[_Stack], start: int) -> LayerDepth | None:
    """The place of a parameter before the stacks nearest to it, or None if it comes after them."""
    depth = max(len(_common(path, stack.path)) for stack in stacks)
    nearest = [stack for stack in stacks if len(_common(path, stack.path)) == depth]
    side = EMBEDDINGS if is_embedding_parameter(model, ".".join(path)) else _side_by_name(path[depth:])
    beside_stack = any(len(stack.path) == depth + 1 for stack in nearest)
    if side == HEAD or (beside_stack and path[depth] == "norm"):  # T5Gemma registers its final norm before the layers
        return None
    fed = nearest if side else [stack for stack in nearest if _is_before(path, stack, depth, model)]
    if not fed:
        return None
    prefix = nearest[0].path[start:-1] if len(nearest) == 1 and len(stacks) > 1 else ()
    return LayerDepth(".".join((*prefix, EMBEDDINGS)), max(stack.num_blocks for stack in fed) + 1)


def _output_layer(path: Path, model: nn.Module, stacks: list[_Stack], top: Path) -> str:
    """Final in a child of `top` that has a stack (Llama's `model.norm`) and for a norm beside a stack, else head."""
    in_body = any(len(_common(path, stack.path)) > len(top) for stack in stacks)
    beside_stack = len(path) == len(top) + 2 and any(len(stack.path) <= len(top) + 1 for stack in stacks)
    return FINAL if in_body or (beside_stack and is_norm_parameter(model, ".".join(path))) else HEAD


def _side_by_name(path: Path) -> str | None:
    """The side that the outermost telling segment names."""
    for segment in path:
        if OUTPUT_WORDS.search(segment):
            return HEAD
        if INPUT_WORDS.search(segment):
            return EMBEDDINGS
    return None


def _is_before(path: Path, stack: _Stack, depth: int, model: nn.Module) -> bool:
    """Whether it is registered before the stack in their common ancestor; its own parameters (`cls_token`) are."""
    order = list(_module(model, path[:depth])._modules)
    if path[depth] not in order:
        return True
    marker = stack.path[depth] if len(stack.path) > depth else next(iter(stack.number))[depth]
    return order.index(path[depth]) < order.index(marker)


def _wrappers(model: nn.Module, stacks: list[_Stack]) -> Path:
    """The path from the root to the model proper: modules with one child and no parameters of their own."""
    path: Path = ()
    while len(children := list(_module(model, path)._modules)) == 1 and not _module(model, path)._parameters:
        if any(stack.path[: len(path) + 1] == stack.path for stack in stacks):
            break
        path = (*path, children[0])
    return path


def _common(one: Path, other: Path) -> Path:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _module(model: nn.Module, path: Iterable[str]) -> nn.Module:
    return model.get_submodule(".".join(path))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None
