"""One micro-batch of the real code on shapes: what is live when, what is kept for the backward, FLOPs, gathers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Both are documented by PyTorch as the way to see every operator, in spite of the underscore.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trainer.data.layout import packed_row, padded_rows
from trainer.planning.model import Models
from trainer.planning.shards import Use
from trainer.policy.logprobs import completion_token_logps, unwrap
from trainer.schema import Rows

ACTIVATIONS, LOGITS, REFERENCE, GRADIENTS = "activations", "logits", "reference forward", "gradients"


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The examples of one forward, and their `completions` each: `tokens` with the prompt, of which `completion` are
    scored.
    """

    examples: int
    completions: int
    tokens: int
    completion: int
    packed: bool = True

    def laid(self) -> Rows:
        """The rows as the data's layout gives them, every token the same."""
        prompt, completion = [0] * (self.tokens - self.completion), [0] * self.completion
        if self.packed:
            return packed_row([(prompt, [completion] * self.completions)] * self.examples)
        return padded_rows([(prompt, completion)] * self.examples * self.completions, 0)


@dataclasses.dataclass
class Trace:
    """What one micro-batch does.

    Args:
        peak: bytes at the moment of the most, by part; weights are not among them.
        saved: bytes kept for the backward pass after the policy's forward, `activations` and `logits`.
        flops: of the policy's forward, the reference's, and the backward pass (recomputation included).
        uses: parameters of each module's forward or backward, in order, as indices into policy then reference;
            empty for modules without any.
    """

    peak: Counter[str]
    saved: Counter[str]
    flops: dict[str, int]
    uses: list[Use]


class Meter(TorchDispatchMode):
    """Counts the bytes of storages from the operator that makes them to their end, by the `part` at work; and FLOPs.

    PyTorch's own `FlopCounterMode` keeps tensors of a checkpointed forward alive until the garbage collector comes, so
    its table of formulas is used without it.

    Args:
        ignored: tensors that are there anyway.
    """

    def __init__(self, ignored: Sequence[Tensor]) -> None:
        super().__init__()
        self.part, self.flops = ACTIVATIONS, 0
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._highest = self._total = 0
        self._known: dict[int, tuple[int, str]] = {}
        self._ignored = {_key(tensor) for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._known or key in self._ignored:
            return
        storage = tensor.untyped_storage()
        self._known[key] = storage.nbytes(), self.part
        weakref.finalize(storage, self._end, key)
        self._add(storage.nbytes(), self.part)

    def _add(self, size: int, part: str) -> None:
        self.live[part] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, Counter(self.live)

    def _end(self, key: int) -> None:
        self._add(*_negated(self._known.pop(key)))

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor that is live under another part from now on."""
        size, old = self._known[_key(tensor)]
        self._known[_key(tensor)] = size, part
        self.live[old] -= size
        self.live[part] += size

    def kept(self, keys: set[int]) -> Counter[str]:
        """Bytes by part of those storages that are still live."""
        found: Counter[str] = Counter()
        for key in keys & self._known.keys():
            size, part = self._known[key]
            found[part] += size
        return found


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _negated(entry: tuple[int, str]) -> tuple[int, str]:
    return -entry[0], entry[1]


def trace(models: Models, batch: MicroBatch, keep_gradients: bool, gradients_before: bool) -> Trace:
    """Run one micro-batch on shapes: policy forward, reference forward, backward.

    Args:
        keep_gradients: gradients stay on the parameters; under ZeRO-3 they move into DeepSpeed's buffer at once.
        gradients_before: an earlier micro-batch of the step has left gradients already.
    """
    rows = batch.laid()
    with models.fake as fake:
        for name, value in vars(rows).items():
            if isinstance(value, Tensor):
                setattr(rows, name, fake.from_tensor(value))
        return _Run(models, rows, keep_gradients, gradients_before).run()


class _Run:
    def __init__(self, models: Models, rows: Rows, keep_gradients: bool, gradients_before: bool) -> None:
        self.models, self.rows, self.keep_gradients = models, rows, keep_gradients
        self.parameters = list(
            dict.fromkeys(parameter for _, model in models.named() for parameter in model.parameters())
        )
        self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        buffers = [buffer for _, model in models.named() for buffer in model.buffers()]
        given = [value for value in vars(rows).values() if isinstance(value, Tensor)]
        self.meter = Meter([*self.parameters, *buffers, *given])
        self.uses = _Uses(self.parameters)
        self.saved: set[int] = set()
        for parameter in self.trained:
            parameter.grad = None
        self.gradients_before = gradients_before and keep_gradients

    def run(self) -> Trace:
        with self._hooks(), self.meter:
            self._gradients_of_before()
            totals = [0]
            loss = self._policy_forward()
            kept = self.meter.kept(self.saved)
            totals.append(self.meter.flops)
            self._reference_forward()
            totals.append(self.meter.flops)
            self.meter.part = LOGITS
            self.uses.turn()
            loss.backward()
            totals.append(self.meter.flops)
        for parameter in self.trained:
            parameter.grad = None
        spent = [after - before for before, after in itertools.pairwise(totals)]
        flops = dict(zip(("policy", "reference", "backward"), spent, strict=True))
        return Trace(self.meter.peak, kept, flops, self.uses.order)

    def _gradients_of_before(self) -> None:
        if self.gradients_before:
            self.meter.part = GRADIENTS
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)

    def _policy_forward(self) -> Tensor:
        self.meter.part = ACTIVATIONS
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            return completion_token_logps(self.models.policy, self.rows).sum()

    def _pack(self, tensor: Tensor) -> Tensor:
        self.saved.add(_key(tensor))
        return tensor

    def _reference_forward(self) -> None:
        if self.models.reference is not None:
            self.meter.part = REFERENCE
            with torch.no_grad(), self.models.reference.applied() as model:
                completion_token_logps(model, self.rows)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        """Follow which part is at work, which parameters are used, and what becomes of gradients."""
        handles: list[Any] = []
        for _, model in self.models.named():
            handles.append(unwrap(model).get_output_embeddings().register_forward_pre_hook(self._head))
            handles += self.uses.watch(model)
        for parameter in self.trained:
            handles.append(parameter.register_post_accumulate_grad_hook(self._gradient))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _head(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.meter.part = LOGITS
        if inputs[0].requires_grad:
            inputs[0].register_hook(self._head_done)

    def _head_done(self, gradient: Tensor) -> None:
        self.meter.part = ACTIVATIONS

    def _gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self.keep_gradients:
            self.meter.move(parameter.grad, GRADIENTS)
        else:
            parameter.grad = None


class _Uses:
    """The parameters that each module's forward and backward needs, in the order of the run."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.index = {parameter: index for index, parameter in enumerate(parameters)}
        # The whole module comes first in the forward, as in the backward.
        self.order: list[Use] = [Use([], False)]
        self.backwards = False

    def turn(self) -> None:
        """The backward begins: a module's forward from now on is one that is computed again."""
        self.order.append(Use([], False))
        self.backwards = True

    def watch(self, model: nn.Module) -> list[Any]:
        handles = []
        for module in model.modules():
            own = [self.index[p] for p in module._parameters.values() if p is not None]
            handles.append(module.register_forward_pre_hook(self._forward(own)))
            handles.append(module.register_forward_hook(self._backward(own)))
        return handles

    def _forward(self, own: list[int]) -> Any:
        def used(module: nn.Module, inputs: Any) -> None:
            self.order.append(Use(own, self.backwards))

        return used

    def _backward(self, own: list[int]) -> Any:
        def used(gradient: Tensor) -> None:
            self.order.append(Use(own, False))

        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled():
                    leaf.register_hook(used)

        return watch


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


# PyTorch 2.13 knows the attention kernels of CUDA only.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
