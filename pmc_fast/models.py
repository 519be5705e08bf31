"""A transformers causal language model as a backbone and an output head."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pmc_fast import attention, ops
from pmc_fast.cache import SampleCache, argument_of
from pmc_fast.errors import BackendUnavailable, UserError, described
from pmc_fast.ops._autograd import in_transform
from pmc_fast.positions import Positions
from pmc_fast.sharding import SHARDERS, gathered, is_dtensor, is_tensor_parallel, kind, refuse_parts

if TYPE_CHECKING:
    from pmc_fast.parallel_head import VocabShards


# What errors call the head's parameters.
WEIGHT, BIAS = "model: the weight of its head", "model: the bias of its head"


# Who may change what a model's modules do for the time of a call.
_turns: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_new_turn = Lock()

# What was found out about a backbone, by what was asked, while its modules are of these classes; whoever wraps it.
_found: WeakKeyDictionary[nn.Module, dict[str, tuple[tuple[type, ...], Any]]] = WeakKeyDictionary()

# Models whose modules a thread had changed when this process was forked, which nobody here will change back.
_left: WeakSet[nn.Module] = WeakSet()


def _forked() -> None:
    global _new_turn
    _new_turn = Lock()
    for model, turn in _turns.items():
        if turn.acquire(blocking=False):
            turn.release()
        else:
            _left.add(model)


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True)
class Head:
    """The output head: logits = softcap(logit_scale * (hidden @ weight.T + bias)).

    With shards, its vocabulary is shared out among ranks: all call the same methods with the same arguments.
    """

    weight: Tensor  # [V, D]; of shards, this rank's [V_r, D]
    bias: Tensor | None  # [V] or [V_r]
    softcap: float | None
    logit_scale: float
    shards: VocabShards | None = None

    def sample(self, hidden: Tensor, *, impl: str | None = None, **options):
        """`linear_sample` of hidden [N, D] with this head; its other arguments as options."""
        if self.shards is None:
            options["impl"] = impl
        elif impl is not None:
            raise BackendUnavailable(
                f"linear_sample(impl={impl!r}): the model's head is shared out among ranks; want None"
            )
        return self._ops.linear_sample(hidden, self.weight, **self._options, **options)

    def logprob(self, hidden: Tensor, target: Tensor, **options) -> Tensor:
        """`linear_logprob` of hidden [N, D] and target [N] with this head; its other arguments as options."""
        return self._ops.linear_logprob(hidden, self.weight, target, **self._options, **options)

    def collapse_loss(self, hidden: Tensor, target: Tensor, token_weight: Tensor, **options):
        """`collapse_loss` of hidden [N, D], target [N] and token_weight [N] with this head; its other arguments as options."""
        return self._ops.collapse_loss(hidden, self.weight, target, token_weight, **self._options, **options)

    @property
    def _ops(self) -> ModuleType:
        if self.shards is None:
            return ops
        from pmc_fast import parallel_head

        return parallel_head

    @property
    def _options(self) -> dict[str, Any]:
        options = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        return options if self.shards is None else {**options, "shards": self.shards}


class LanguageModel:
    """Splits a model into the part that makes hidden states and the head that turns them into logits.

    Under torch.autocast both are given in its dtype, as the model's own head would take them.

    Args:
        model: a transformers causal language model with a dense linear head, or one with PEFT adapters on layers other
            than the head. It is used as it is: the same parameters, nothing copied. The weight of the head may be a DTensor
            sharded on dimension 0, and the layers parallelized in any way whose last hidden states are plain tensors, the
            same on every rank; all ranks then make the same calls with the same arguments.
        check: whether to compare head(backbone(ids)) with the model's own logits, in a forward pass of three tokens, and, before
            the first packed batch, two sequences with one another and with the model's own attention, in two passes of three tokens
            and two of five, one of each with their gradients.

    Attributes:
        shards: which part of the vocabulary this rank's part of the head holds; None if it holds all of it.
        positions: how many tokens it has positions for.
        unpackable: what keeps its modules from running a packed batch, which is tried when it is first asked of a model whose modules
            are of these classes; None if nothing does or nothing is to be checked. Sequences are rows with padding behind them then.
        packed_by: what ran the layers for the last packed batch: this library's kernels ("native" on a CPU, "triton" on a GPU), the
            model's "modules", or these over "padded rows".

    Raises:
        UserError: the model has no such head, it is on the meta device or a DTensor placed otherwise, or its logits are not what this
            class takes them to be.
    """

    def __init__(self, model: nn.Module, check: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model: got {described(model)}, expected a transformers causal language model, as "
                "AutoModelForCausalLM.from_pretrained returns"
            )
        self.model = model
        # Where weights are shared out among processes, the module that holds all of them: a wrapper may put itself here.
        self.root = model
        self._causal_lm = _unwrapped(model)
        self.backbone = getattr(self._causal_lm, "base_model", None)
        if self.backbone is self._causal_lm:  # of Llama 4, say, whose prefix is none of its attributes
            self.backbone = getattr(self._causal_lm, "model", None)
        self.packed_by: str | None = None
        head = self._linear_head()
        if head.weight.is_meta:
            raise UserError("model: got weights on the meta device, which hold no numbers; expected loaded ones")
        self._hooks = _hooks(head)  # if they change logits, the check refuses them
        self.shards = self._shards()
        self.positions = Positions.of(model)
        config = model.config.get_text_config()
        names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        self._softcap = next((cap for name in names if (cap := getattr(config, name, None)) is not None), None)
        divisor = getattr(config, "logits_scaling", None)  # Granite
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(divisor or 1.0)
        self._checks = check
        if check:
            self._check()

    @property
    def head(self) -> Head:
        """The head as it is now: ask again for each forward pass."""
        self.check_whole()
        weight, bias = self.head_module.weight, self.head_module.bias
        if self.shards is not None:
            weight = self.shards.local(WEIGHT, weight)
            bias = None if bias is None else self.shards.local(BIAS, bias)
        bias = None if bias is None else self._autocast(bias)
        return Head(self._autocast(weight), bias, self._softcap, self._scale, self.shards)

    @property
    def device(self) -> torch.device:
        return self.head_module.weight.device

    @property
    def turn(self) -> RLock:
        """Held around what may run in one thread at a time: one for each model, whoever wraps it.

        Raises:
            UserError: another thread held it when this process was forked.
        """
        if self._causal_lm in _left:
            raise UserError(
                "model: got one that another thread was sampling from when this process was forked; expected a fork before or "
                "after that, or a process that is spawned"
            )
        with _new_turn:
            return _turns.setdefault(self._causal_lm, RLock())

    def hidden(self, input_ids: Tensor, cache: SampleCache | None = None, **options) -> Tensor:
        """The last hidden states, [..., D], of token ids [...]; options such as attention_mask go to the backbone.

        Keys and values join the cache, if one is given.
        """
        self.check_whole()
        options = {"use_cache": cache is not None, **options}
        if cache is not None:
            options[argument_of(self.backbone)] = cache
        states = self._autocast(self.backbone(input_ids=input_ids, **options).last_hidden_state)
        if torch.is_autocast_enabled(states.device.type):
            return states
        return states.to(self.head_module.weight.dtype)  # Mamba's are float32 whatever its weights are

    def check_whole(self) -> None:
        """A UserError if this rank holds only a part of weights that are to be gathered."""
        if self.shards is None:
            refuse_parts(self.head_module.weight)

    @property
    def unpackable(self) -> str | None:
        return self._once("unpackable", self._why_not_packed) if self._checks else None

    def check_causal(self) -> None:
        """A UserError if its tokens see later ones, which is tried when it is first asked, in a pass of three tokens."""
        if self._checks and self._once("sees ahead", self._sees_ahead):
            raise UserError(f"model: {type(self.model).__name__} sees later tokens; want a causal language model")

    def try_packing(self) -> None:
        """Find out now what the first packed batch would: of weights in parts, while all ranks are here. Raises as `check_causal`."""
        self.check_causal()
        _ = self.unpackable

    @property
    def attends_as_known(self) -> bool:
        """Whether this library's attention may stand in for torch's, which is tried when it is first asked, in a pass of three tokens."""
        return not self._checks or self._once("attention", self._attends_as_known)

    def _once(self, question: str, find_out: Callable[[], Any]) -> Any:
        # To a compiler the passes of a trial would be hundreds of pieces more.
        ask = torch.compiler.disable(self._answer) if torch.compiler.is_compiling() else self._answer
        return ask(question, find_out)

    def _answer(self, question: str, find_out: Callable[[], Any]) -> Any:
        classes, answers = tuple(map(kind, self.backbone.modules())), _found.setdefault(self.backbone, {})
        of, answer = answers.get(question, (None, None))
        if of != classes:
            # Under no lock but the model's turn, which whoever samples has when they ask here: two threads may both try.
            answers[question] = classes, (answer := find_out())
        return answer

    def _shards(self) -> VocabShards | None:
        weight = self.head_module.weight
        if not (is_dtensor(weight) and is_tensor_parallel(self.model)):
            return None
        from pmc_fast.parallel_head.shards import shards_of

        return shards_of(weight, None, WEIGHT)

    @property
    def head_module(self) -> nn.Linear:
        """The head, looked up each time: adapters or hooks put there later must not go unnoticed."""
        self._refuse_adapters()
        found = self._linear_head()
        if any(hook not in self._hooks for hook in _hooks(found)):
            raise UserError(
                "model: got a hook or a forward put on its head after it was given to PMC, Sampler or LanguageModel, which do not "
                "call the head; expected none there, or one on layers"
            )
        return found

    def _linear_head(self) -> nn.Linear:
        found = getattr(self._causal_lm, "get_output_embeddings", lambda: None)()
        if self.backbone is None and type(found) is nn.Linear:
            raise UserError(
                f"model: got {type(self.model).__name__}, whose base_model does not lead to its layers without the head; this "
                "version knows no other way to their hidden states"
            )
        if self.backbone is None or type(found) is not nn.Linear:
            raise UserError(
                f"model: got {type(self.model).__name__} with output head {type(found).__name__}, expected a "
                "transformers causal language model with an nn.Linear head (adapters on the head are not supported: "
                "leave it out of target_modules and modules_to_save; nor is fully_shard of the head by itself)"
            )
        return found

    def _refuse_adapters(self) -> None:
        """A UserError if PEFT holds adapters that its own forward, which is not called, has a part in."""
        for config in (getattr(self.model, "peft_config", None) or {}).values():
            if config.is_prompt_learning:
                kind_of = "that learn prompts"
            elif getattr(config, "alora_invocation_tokens", None) is not None:
                kind_of = "that tokens invoke (Activated LoRA)"
            else:
                continue
            raise UserError(
                f"model: got adapters {kind_of}, which head(backbone(ids)) would leave out; expected adapters on layers, "
                "such as LoRA"
            )

    @staticmethod
    def _autocast(values: Tensor) -> Tensor:
        device = values.device.type
        return values.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else values

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Around a pass that only looks: alone, with whole weights, in evaluation mode."""
        with self.turn, gathered(self.root), evaluating(self.model):
            yield

    @torch.no_grad()
    def _check(self) -> None:
        """That head(backbone(ids)) is what the model itself computes, on three tokens."""
        with self.at_rest():
            ids = torch.tensor([[1, 2, 3]], device=self.device) % self.head_module.weight.shape[0]
            head = self.head
            expected = self._own_logits(ids)[0].float()
            hidden = self.hidden(ids)[0]
            given, takes = hidden.shape[1], head.weight.shape[1]
            if given != takes:
                raise UserError(
                    f"model: {type(self.model).__name__} computes its logits in a way this version does not know (its backbone gives "
                    f"{given} values, its head takes {takes})"
                )
            z = nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
        logits = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        error, largest = (logits - expected).abs().max(), expected.abs().max()
        if self.shards is not None:
            error, largest = self.shards.gather(torch.stack([error, largest])).amax(0)
        if not largest.isfinite():
            raise UserError(
                "model: its logits are NaN or infinite; want weights that are right, and a dtype that holds them"
            )
        # A soft cap far above the logits moves them by little.
        rounded = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 0.02
        if not error <= rounded * (largest + 0.05):
            raise UserError(
                f"model: {type(self.model).__name__} computes its logits in a way this version does not know (they "
                f"differ by {float(error):.3g} from head(backbone(ids)))"
            )

    @torch.no_grad()
    def _attends_as_known(self) -> bool:
        with self.at_rest(), attention.implemented_by(attention.registered(), self.model):
            try:
                self._states()
            except attention.Unknown:
                return False
        return True

    def _sees_ahead(self) -> bool:
        with self.at_rest():
            return self._reaches(self._states, slice(0, 1), slice(1, 3))

    @torch.no_grad()
    def _why_not_packed(self) -> str | None:
        """None if sequences of a packed batch see nothing of one another, and come to what they do by themselves."""
        name = type(self.model).__name__
        with self.at_rest():
            own = self._states()
            with attention.implemented_by(attention.registered(), self.model):
                try:
                    states = self._packed_states()
                except attention.LengthsLost:
                    return f"{name} hands neither keyword arguments nor masks on to its attention"
                except Exception as error:  # somebody else's modules raise what they like
                    return f"{name} fails at a packed batch ({type(error).__name__}: {error})"
                mixes = self._reaches(self._packed_states, slice(3, 5), slice(0, 3))
        first, second = states[:3], states[3:]
        if mixes or differ(first[:2], second):
            return (
                f"{name} gives a sequence in a packed batch other hidden states behind another one: it mixes tokens other than by "
                "attention, or does not ask for position_ids"
            )
        return f"{name} attends in a way this version does not know" if differ(first, own) else None

    def _reaches(self, run: Callable[[], Tensor], rows: slice, tokens: slice) -> bool:
        """Whether these rows of hidden states depend on these tokens; if not, the gradient is 0 to the bit, in any dtype.

        False where nobody can say: of layers in parts, within torch.func, of modules without a backward pass.
        """
        if is_tensor_parallel(self.model) or in_transform():
            return False
        try:
            with torch.inference_mode(False), torch.enable_grad(), _FromEmbeddings() as embedded:
                states = run()[rows]
                uneven = torch.linspace(
                    -1, 1, states.shape[1], dtype=states.dtype, device=states.device
                )  # no norm's gradient is 0
                gradients = torch.autograd.grad(states, embedded.leaves, uneven.expand_as(states), allow_unused=True)
        except Exception:  # of reentrant checkpointing, say
            return False
        return any(bool((found.flatten(0, 1)[tokens].abs() > 0).any()) for found in gradients if found is not None)

    def _states(self) -> Tensor:
        """The hidden states [3, D] of three tokens."""
        return self.hidden(self._ids(4, 5, 6))[0]

    def _packed_states(self) -> Tensor:
        """The hidden states [5, D] of these three and the first two of them again, packed."""
        lengths, positions = attention.PackedLengths(0, (3, 2)), torch.tensor([[0, 1, 2, 0, 1]], device=self.device)
        options = {"position_ids": positions, "attention_mask": None, "packed_lengths": lengths}
        with attention.packed(lengths):
            return self.hidden(self._ids(4, 5, 6, 4, 5), **options)[0]

    def _ids(self, *tokens: int) -> Tensor:
        return torch.tensor([tokens], device=self.device) % self.head_module.weight.shape[0]

    def _own_logits(self, ids: Tensor) -> Tensor:
        """What the model itself computes, of this rank's part of the vocabulary."""
        if self.shards is None:
            return self.model(input_ids=ids, use_cache=False).logits
        from pmc_fast.parallel_head.own_logits import own_logits

        return own_logits(self.model, self.backbone, ids, self.shards)


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether rows are further apart than roundings; False if they are NaN.

    Of models that can be packed, 0 was seen on a CPU. Layers magnify roundings, should a GPU's depend on the place: of SmolLM2's thirty
    in bfloat16, those of each by 35.
    """
    rounded = 1e-2 if first.dtype in (torch.float32, torch.float64) else 0.5
    first, second = first.float(), second.float()
    return bool(((first - second).norm(dim=1) > rounded * first.norm(dim=1)).any())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that PEFT wraps, into whose layers it puts its adapters."""
    if kind(model).__name__ == "PeftMixedModel":  # which has no get_base_model
        return model.base_model.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hooks(module: nn.Module) -> list[Callable]:
    """What may change what it computes, a forward in place of its own, too; but for what gathers its weights."""
    put = [*module._forward_pre_hooks.values(), *module._forward_hooks.values(), vars(module).get("forward")]
    return [hook for hook in put if hook and not getattr(hook, "__module__", "").startswith(SHARDERS)]


class _FromEmbeddings(TorchFunctionMode):
    """Within a with block, graphs begin at the leaves [1, T, D] or [T, 1, D] that embeddings give; other threads see nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: list[Tensor] = []

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is not nn.functional.embedding or made.dim() != 3:
            return made
        self.leaves.append(made.detach().requires_grad_())
        return self.leaves[-1].clone()  # which may be written to


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within a with block; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
