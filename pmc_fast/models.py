"""A transformers causal language model as a backbone and an output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pmc_fast.errors import UserError
from pmc_fast.ops import collapse_loss, linear_logprob, linear_sample
from pmc_fast.sharding import gathered, refuse_parts


@dataclass(frozen=True)
class Head:
    """The output head: logits = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    def sample(self, hidden: Tensor, **options):
        return linear_sample(hidden, self.weight, **self._options, **options)

    def logprob(self, hidden: Tensor, target: Tensor, **options) -> Tensor:
        return linear_logprob(hidden, self.weight, target, **self._options, **options)

    def collapse_loss(self, hidden: Tensor, target: Tensor, token_weight: Tensor, **options):
        return collapse_loss(hidden, self.weight, target, token_weight, **self._options, **options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


class LanguageModel:
    """Splits a model into the part that makes hidden states and the head that turns them into logits.

    Under torch.autocast both are given in its dtype, as the model's own head would take them.

    Args:
        model: a transformers causal language model with a dense linear head, or one with PEFT adapters on layers other
            than the head. It is used as it is: the same parameters, nothing copied.
        check: whether to compare head(backbone(ids)) with the model's own logits, in a forward pass of three tokens.

    Raises:
        UserError: the model has no such head, or its logits are not what this class takes them to be.
    """

    def __init__(self, model: nn.Module, check: bool = True) -> None:
        self.model = model
        # Where weights are shared out among processes, the module that holds all of them: a wrapper may put itself here.
        self.root = model
        if any(config.is_prompt_learning for config in (getattr(model, "peft_config", None) or {}).values()):
            raise UserError(
                "model: got adapters that learn prompts, which head(backbone(ids)) would leave out; expected adapters "
                "on layers, such as LoRA"
            )
        # PEFT puts its adapters into the layers of the model that it wraps.
        self._causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.backbone = getattr(self._causal_lm, "base_model", None)
        if self.backbone is self._causal_lm:
            self.backbone = None
        self._linear()
        config = model.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        divisor = getattr(config, "logits_scaling", None)  # Granite
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(divisor or 1.0)
        if check:
            self._check()

    @property
    def head(self) -> Head:
        self.check_whole()
        linear = self._linear()
        bias = None if linear.bias is None else self._autocast(linear.bias)
        return Head(self._autocast(linear.weight), bias, self._softcap, self._scale)

    @property
    def device(self) -> torch.device:
        return self._linear().weight.device

    def hidden(self, input_ids: Tensor, **options) -> Tensor:
        """The last hidden states, [..., D]."""
        self.check_whole()
        return self._autocast(self.backbone(input_ids=input_ids, **options).last_hidden_state)

    def check_whole(self) -> None:
        """A UserError if this rank holds only a part of the weights."""
        refuse_parts(self._linear().weight)

    def _linear(self) -> nn.Linear:
        """The head, looked up each time: an adapter put on it later must not go unnoticed."""
        found = getattr(self._causal_lm, "get_output_embeddings", lambda: None)()
        if self.backbone is None or type(found) is not nn.Linear:
            raise UserError(
                f"model: got {type(self.model).__name__} with output head {type(found).__name__}, expected a "
                "transformers causal language model with an nn.Linear head (adapters on the head are not supported: "
                "leave it out of target_modules and modules_to_save; nor is fully_shard of the head by itself)"
            )
        return found

    @staticmethod
    def _autocast(values: Tensor) -> Tensor:
        device = values.device.type
        return values.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else values

    @torch.no_grad()
    def _check(self) -> None:
        """That head(backbone(ids)) is what the model itself computes, on three tokens."""
        with gathered(self.model), evaluating(self.model):
            ids = torch.tensor([[1, 2, 3]], device=self.device) % self._linear().weight.shape[0]
            expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
            hidden = self.hidden(ids, use_cache=False)[0]
            head = self.head
            z = nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
        logits = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        error = (logits - expected).abs().max()
        if not error <= 0.02 * expected.abs().max() + 1e-3:
            raise UserError(
                f"model: {type(self.model).__name__} computes its logits in a way this version does not know (they "
                f"differ by {float(error):.3g} from head(backbone(ids)))"
            )


class evaluating:  # noqa: N801
    """Evaluation mode within a with block; afterwards every module is as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._training = [module for module in self._model.modules() if module.training]
        for module in self._training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True
