"""The matrices of a block: which can be pruned, what each of them reads, and the MLP neurons between them.

A matrix is the weight of an `nn.Linear` or GPT-2's `Conv1D` within the attention or the MLP, or one expert's slice of a fused
``(experts, out, in)`` weight. Routers are left out: in an MLP with experts, whatever has as many outputs as there are experts, or one.
What a matrix reads is seen while the block runs; matrices that are given the very same tensor share their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from prunescope.errors import UserError
from prunescope.models.anatomy import Block, Kind
from prunescope.models.finding import first_tensor, hooks

__all__ = ["MLP_SIZES", "Matrix", "Neurons", "find_matrices", "find_neurons", "reading", "remove_neurons"]

MLP_SIZES = (  # config fields that give the number of neurons of an MLP, of an expert, of shared experts
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
)


@dataclass(frozen=True)
class Matrix:
    """A matrix that can be pruned, ``(out, in)`` however the module lays it out. Tensors are read anew at each use."""

    name: str  # of the parameter in the model; of an expert with its number, `...experts.down_proj[3]`
    kind: Kind
    module: nn.Module
    attribute: str
    expert: int | None
    transposed: bool  # the module keeps it as (in, out)

    @property
    def parameter(self) -> str:
        """Name of the model's parameter that holds it."""
        return self.name.partition("[")[0]

    @property
    def weight(self) -> Tensor:
        """A view ``(out, in)`` of the live parameter."""
        whole = getattr(self.module, self.attribute).detach()
        part: Tensor = whole if self.expert is None else whole[self.expert]
        return part.T if self.transposed else part

    def set(self, value: Tensor) -> None:
        """Write new values ``(out, in)`` into the live parameter."""
        self.weight.copy_(value)

    @property
    def fused(self) -> bool:
        return self.expert is not None


@dataclass(frozen=True)
class Neurons:
    """The neurons of one MLP or expert: matrices that make them, and the one that reads them."""

    makers: tuple[Matrix, ...]
    reader: Matrix

    @property
    def count(self) -> int:
        return self.reader.weight.shape[1]

    @property
    def name(self) -> str:
        return self.reader.name


def find_matrices(block: Block, prefix: str) -> list[Matrix]:
    """The matrices of ``block`` that can be pruned, in the order of its modules. ``prefix`` is the block's name in the model.

    Raises:
        UserError: there is none.
    """
    where = {id(module): name for name, module in block.module.named_modules()}
    found: list[Matrix] = []
    for part in (block.attn, block.mlp):
        experts = _expert_count(part.modules)
        for module in (inner for outer in part.modules for inner in outer.modules()):
            name = ".".join(filter(None, (prefix, where[id(module)])))
            if isinstance(module, (nn.Linear, Conv1D)):
                transposed = isinstance(module, Conv1D)
                outputs = module.weight.shape[1 if transposed else 0]
                if not (experts and outputs in (1, experts)):
                    found.append(Matrix(f"{name}.weight", part.kind, module, "weight", None, transposed))
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and parameter.shape[0] == experts:
                    by_inputs = bool(getattr(module, "is_transposed", False))  # transformers: (experts, in, out)
                    found += [
                        Matrix(f"{name}.{attribute}[{i}]", part.kind, module, attribute, i, by_inputs)
                        for i in range(experts)
                    ]
    if not found:
        raise UserError(f"{prefix}: no linear layer was found in this block; this architecture is not supported")
    return found


def _expert_count(modules: Sequence[nn.Module]) -> int:
    """Experts of an MLP: fused 3-D weights, or a list of alike modules with matrices; 0 where there are none."""
    for module in (inner for outer in modules for inner in outer.modules()):
        fused = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]
        if fused and len(set(fused)) == 1 and not isinstance(module, nn.modules.conv._ConvNd):
            return fused[0]
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(list(child.parameters()) for child in module):
            return len(module)
    return 0


@contextmanager
def reading(matrices: Sequence[Matrix], see: Callable[[Matrix, Tensor, Matrix], None]) -> Iterator[Callable[[], None]]:
    """Call ``see(matrix, input, first)`` whenever a matrix is applied inside the block.

    ``input`` is ``(..., in)`` in the model's dtype; ``first`` is the first matrix of the same run that was given the very same tensor
    (the matrix itself, if it is the first). Call the function that this gives before each run of the block.
    """
    seen: dict[tuple[int, int, torch.Size], tuple[Tensor, Matrix]] = {}

    def tell(matrix: Matrix, entering: Tensor) -> None:
        if not entering.numel():  # an expert that no token reached this time
            return
        key = (entering.data_ptr(), entering._version, torch.Size((entering.numel(), entering.shape[-1])))
        _, first = seen.setdefault(key, (entering, matrix))  # kept alive, so that its storage names it
        see(matrix, entering, first)

    fused = [matrix for matrix in matrices if matrix.fused]
    with hooks() as handles, _Products(fused, tell) if fused else _nothing():
        for matrix in matrices:
            if not matrix.fused:

                def hook(_: nn.Module, args: Any, kwargs: Any, matrix: Matrix = matrix) -> None:
                    tell(matrix, first_tensor(args, kwargs) if args or "input" not in kwargs else kwargs["input"])

                handles.append(matrix.module.register_forward_pre_hook(hook, with_kwargs=True))
        yield seen.clear
        seen.clear()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Products(TorchFunctionMode):
    """Sees the products of fused expert weights, known by their storage: ``linear(x, weight[expert])`` or ``x @ weight[expert]``."""

    def __init__(self, matrices: Sequence[Matrix], tell: Callable[[Matrix, Tensor], None]) -> None:
        super().__init__()
        self.by_place = {(m.weight.data_ptr(), m.weight.shape): m for m in matrices}
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and len(args) >= 2:
            self._see(args[0], args[1])
        elif func in _PRODUCTS and len(args) == 2 and isinstance(args[1], Tensor) and args[1].dim() == 2:
            self._see(args[0], args[1].T)
        return func(*args, **kwargs)

    def _see(self, entering: Tensor, weight: Tensor) -> None:
        matrix = self.by_place.get((weight.data_ptr(), weight.shape))
        if matrix is not None:
            self.tell(matrix, entering)


_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


def find_neurons(matrices: Sequence[Matrix]) -> list[Neurons]:
    """The neurons of the MLP's matrices: of a dense MLP, of each expert, of shared experts.

    Matrices of one owner (module or expert) belong together; one of them reads the neurons that the others make. Shapes tell which, and
    where they do not (as many neurons as hidden states), it is the last.

    Raises:
        UserError: the shapes do not fit that picture.
    """
    owners: dict[tuple[str, int | None], list[Matrix]] = {}
    for matrix in matrices:
        if matrix.kind == "mlp":
            path = matrix.parameter.rpartition(".")[0]
            owner = path if matrix.fused else path.rpartition(".")[0]
            owners.setdefault((owner, matrix.expert), []).append(matrix)
    found = []
    for (owner, expert), group in owners.items():
        place = owner if expert is None else f"{owner}, expert {expert}"
        readers = [matrix for matrix in group if _reads(matrix, [other for other in group if other is not matrix])]
        if not readers:
            raise UserError(
                f"{place}: its matrices are not an MLP of one hidden layer, so it has no neurons to remove; use another method"
            )
        neurons = Neurons(tuple(matrix for matrix in group if matrix is not readers[-1]), readers[-1])
        found.append(neurons)
    return found


def _reads(matrix: Matrix, others: Sequence[Matrix]) -> bool:
    outputs, neurons = matrix.weight.shape
    shapes = [other.weight.shape for other in others]
    return bool(shapes) and all(made in (neurons, 2 * neurons) and read == outputs for made, read in shapes)


def remove_neurons(all_neurons: Sequence[Neurons], kept: Sequence[Tensor]) -> None:
    """Take neurons out of live modules: rows (and biases) of their makers, columns of their readers.

    Args:
        kept: for each of ``all_neurons`` the indices ``(k,)`` that stay. All experts of a fused weight must be given, with the same k.
    """
    fused: dict[tuple[int, str], tuple[nn.Module, list[Tensor]]] = {}
    for neurons, stay in zip(all_neurons, kept, strict=True):
        for matrix in (*neurons.makers, neurons.reader):
            if matrix is neurons.reader:
                new = matrix.weight.index_select(1, stay)
            else:  # gate and up in one matrix: gates first
                rows = stay if matrix.weight.shape[0] == neurons.count else torch.cat([stay, neurons.count + stay])
                new = matrix.weight.index_select(0, rows)
                bias = None if matrix.fused else matrix.module.bias
                if isinstance(bias, Tensor):
                    matrix.module.bias = nn.Parameter(bias.detach().index_select(0, rows), requires_grad=False)
            if matrix.fused:
                fused.setdefault((id(matrix.module), matrix.attribute), (matrix.module, []))[1].append(
                    new.T.contiguous() if matrix.transposed else new
                )
            else:
                _replace(matrix, new)
    for (_, attribute), (module, slices) in fused.items():
        setattr(module, attribute, nn.Parameter(torch.stack(slices), requires_grad=False))


def _replace(matrix: Matrix, new: Tensor) -> None:
    value = (new.T if matrix.transposed else new).contiguous()
    matrix.module._parameters[matrix.attribute] = nn.Parameter(value, requires_grad=False)
    sizes = {"out_features": new.shape[0], "in_features": new.shape[1], "nf": new.shape[0], "nx": new.shape[1]}
    for key, size in sizes.items():
        if hasattr(matrix.module, key):
            setattr(matrix.module, key, size)
