"""Who keeps what of the weights that learn, where several processes share a training: every rank all of it
(`Replicas`), or each its rows (`Shards`).

`Replicas`: each rank holds every weight, gradient and moment; what the ranks found is summed after the backward passes.
`Shards`, FSDP2 (`torch.distributed.fsdp.fully_shard`; arXiv 1910.02054, 2304.11277): of each weight, its gradient and
its moments a rank holds a part of the rows. A layer's weights are gathered before it is computed and given back behind
it, forward and backward; its gradients are summed over the ranks and scattered. The optimiser moves each rank's rows.

Whole tensors go into a checkpoint and come out of one in either way, so a run may go on in the other.
Not here: which rows of a step are whose (`ranks`), the optimisers (`optim`: element by element, so they need not know).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prairie.errors import TrainingError
from prairie.models.transformer import Transformer
from prairie.train.objective import Learner
from prairie.train.ranks import Ranks, meeting


class Keeping(Protocol):
    """What the trainer asks of either way."""

    own: Mapping[str, nn.Parameter]
    """What the optimiser of this rank moves."""
    even: bool
    """Whether every rank must go through the model equally often."""

    def computing(self) -> AbstractContextManager[None]:
        """Around the forward and backward passes of a step."""
        ...

    def collect(self) -> None:
        """After the backward passes of a step: `.grad` of what is `own` becomes that of all ranks."""
        ...

    def norm(self, own: Tensor) -> Tensor:
        """The 2-norm over all that is trained, from that over what is `own`."""
        ...

    def whole(self, named: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The whole tensors that `named` (weights, or moments as NAME or KIND/NAME) are parts of, on rank 0."""
        ...

    def parts(self, named: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The inverse: of whole tensors this rank's part."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Inside this context the model of each rank has all its weights and may be used, or read, by one rank alone.
        All ranks enter it together."""
        ...


class Replicas:
    """Every rank keeps all."""

    even = False

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks) -> None:
        self.own, self.ranks = parameters, ranks

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def collect(self) -> None:
        self.ranks.add_gradients(self.own.values())

    def norm(self, own: Tensor) -> Tensor:
        return own

    def whole(self, named: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return named

    def parts(self, named: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return named

    @contextmanager
    def gathered(self) -> Iterator[None]:
        yield


class Shards:
    """Each rank keeps its part of the rows; `model` is one of those that are called as a whole, layer by layer.

    Takes hold of the model: outside `gathered` its parameters are parts. Raises TrainingError for an encoder-decoder,
    whose encoder is used apart from it.
    """

    even = True

    def __init__(self, model: Learner, ranks: Ranks, device: str) -> None:
        if not isinstance(model, Transformer) or model.encoder is not None:
            raise TrainingError(
                "`shard` is for decoders and encoders", got="an encoder-decoder, or no Transformer",
                mend="leave `shard` out", param="shard",
            )  # fmt: skip
        # Imported here: they bring torch's compiler along, a second and 70 MB that other trainings do not need.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.model, self.ranks = model, ranks
        mesh = init_device_mesh(torch.device(device).type, (ranks.count,))
        self._modules: list[Any] = [*model.layers, model]
        for module in self._modules:
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)  # a step is a sum; FSDP's own way is a mean over the ranks
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        self._sharded: dict[str, Any] = dict(model.named_parameters())
        self.own: Mapping[str, nn.Parameter] = {
            name: nn.Parameter(p.to_local().detach()) for name, p in self._sharded.items()
        }
        """The same memory as the model's, as plain tensors: what fused kernels want."""

    def computing(self) -> AbstractContextManager[None]:
        return meeting(self.ranks.rank)  # a layer's weights are fetched from the others

    def collect(self) -> None:
        for name, own in self.own.items():
            sharded = self._sharded[name]
            own.grad = None if sharded.grad is None else sharded.grad.to_local()
            sharded.grad = None

    def norm(self, own: Tensor) -> Tensor:
        return self.ranks.add(own.double().square()).sqrt().to(own.dtype)

    def whole(self, named: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        from torch.distributed.tensor import DTensor

        found: dict[str, Tensor] = {}
        for name, tensor in named.items():
            of = self._sharded.get(name.rpartition("/")[2])
            if of is not None:
                shape = {"shape": of.shape, "stride": of.stride()}
                part = DTensor.from_local(tensor.detach(), of.device_mesh, of.placements, run_check=False, **shape)
                with meeting(self.ranks.rank):
                    tensor = part.full_tensor()
            if self.ranks.leads:
                found[name] = tensor.cpu()
        return found

    def parts(self, named: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {
            name: self._part(tensor) if name.rpartition("/")[2] in self._sharded else tensor
            for name, tensor in named.items()
        }

    def _part(self, whole: Tensor) -> Tensor:
        parts = whole.chunk(self.ranks.count)
        return parts[self.ranks.rank] if self.ranks.rank < len(parts) else whole[:0]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """FSDP's hooks rest meanwhile, and plain tensors stand in for its own, which it wants back as it gave them."""
        hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in self._modules]
        for module in self._modules:
            module.reshard()  # the root keeps its weights after a forward pass
        try:
            for name, sharded in self._sharded.items():
                with meeting(self.ranks.rank):
                    whole = sharded.detach().full_tensor()
                self._register(name, nn.Parameter(whole, requires_grad=sharded.requires_grad))
            for module in self._modules:
                module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
            yield
        finally:
            for module, before, behind in hooks:
                module._forward_pre_hooks, module._forward_hooks = before, behind
            for name, sharded in self._sharded.items():
                self._register(name, sharded)

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        self.model.get_submodule(path).register_parameter(leaf, parameter)
