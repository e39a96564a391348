"""Networks as distillation runs them: body and head apart, frozen matrices held in the type of products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from compress.errors import RecipeError
from compress.numerics.capping import capped
from compress.numerics.products import working_products, working_type
from compress.steps.distill._checkpoints import restore

if TYPE_CHECKING:
    from compress.model import Model


class Network:
    """A model's body and head with matrix products of the working type (autocast) and everything else in float32.

    Autocast converts a weight at every forward. Here frozen matrices, and all of them with `learns=False`, are
    converted once, and matrices that learn once per optimizer step: products read a bfloat16 shadow, whose gradient is
    added to the float32 parameter's. Where the working type is float32, products read the parameters themselves.
    Build it after `requires_grad` is set, and `refresh` it after every change.
    """

    def __init__(self, module: Any, learns: bool):
        self.body = module.base_model
        output = module.get_output_embeddings()
        embeddings = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
        self.shadows: dict[nn.Parameter, Tensor] = {}
        # Adapters are left to autocast: peft computes with them in float32.
        self.frozen: dict[str, Tensor] = {
            name: self._converted(parameter, learns)
            for name, parameter in self.body.named_parameters()
            if parameter.ndim == 2 and parameter not in embeddings and not (learns and ".lora_" in name)
        }
        self.head_weight = self._converted(output.weight, learns)
        self.head_bias = output.bias
        self.cap: float | None = getattr(module.config, "final_logit_softcapping", None)

    def _converted(self, parameter: nn.Parameter, learns: bool) -> Tensor:
        """The parameter in the working type; where it learns, itself or a leaf that hands its gradients on."""
        if working_type() == torch.float32:
            return parameter if learns else parameter.detach()
        if not (learns and parameter.requires_grad):
            return parameter.detach().bfloat16()
        shadow = parameter.detach().bfloat16().requires_grad_()
        shadow.register_post_accumulate_grad_hook(partial(_hand_on, parameter))  # type: ignore[no-untyped-call]
        self.shadows[parameter] = shadow
        return shadow

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the shadows follow their parameters."""
        for parameter, shadow in self.shadows.items():
            shadow.copy_(parameter)

    def hidden(self, window: Tensor) -> Tensor:
        """Final hidden states (length, width) of one window (length,)."""
        with working_products():
            states: Tensor = functional_call(
                self.body, self.frozen, kwargs={"input_ids": window[None], "use_cache": False}
            ).last_hidden_state
        return states[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of the working type."""
        with working_products():
            # A cap ends in a product with a number, whose backward does not read its output either.
            return capped(linear(hidden, self.head_weight, self.head_bias), self.cap)

    def read(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits (rows, vocabulary) after new tokens (rows, n), and the key-value cache grown by them; None begins."""
        with working_products():
            arguments = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
            out = functional_call(self.body, self.frozen, kwargs=arguments)
        return self.head(out.last_hidden_state[:, -1]).float(), out.past_key_values

    def release_body(self) -> None:
        """Let go of everything but the head, which turns hidden states that were kept into logits."""
        self.body, self.frozen = None, {}


def _hand_on(parameter: nn.Parameter, shadow: Tensor) -> None:
    """Add a shadow's gradient to its parameter's, in float32."""
    assert shadow.grad is not None
    if parameter.grad is None:
        parameter.grad = shadow.grad.float()
    else:
        parameter.grad += shadow.grad
    shadow.grad = None


@contextmanager
def recomputing(model: Model, network: Network) -> Iterator[None]:
    """Keep only the inputs of the blocks for the backward pass, and compute each block's inside again there.

    Chen et al. 2016, arXiv:1604.06174.
    """
    blocks = list(model.module.get_submodule(model.facts.architecture.blocks))
    stem = model.facts.architecture.blocks.removeprefix(f"{model.module.base_model_prefix}.")
    try:
        for i, block in enumerate(blocks):
            prefix = f"{stem}.{i}."
            own = {n.removeprefix(prefix): t for n, t in network.frozen.items() if n.startswith(prefix)}
            block.forward = _recomputed(_Block(block), own)
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own again


class _Block(nn.Module):
    """A block's computation without its hooks, which must see it once."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.run = block, block.forward

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.run(*inputs, **options)


def _recomputed(block: _Block, weights: Mapping[str, Tensor]) -> Any:
    """A block's forward, computed again in the backward pass with the same weights."""
    named = {f"block.{name}": tensor for name, tensor in weights.items()}

    def run(*inputs: Any, **options: Any) -> Any:
        return functional_call(block, named, inputs, options)

    def forward(*inputs: Any, **options: Any) -> Any:
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    return forward


def trained_tensors(model: Model, train: str) -> list[str]:
    """Names of the tensors that training by `train` changes; RecipeError if one is encoded."""
    facts, names = model.facts, [name for name, _ in model.module.named_parameters()]
    if train == "norms":
        of_blocks = tuple(f".{norm}.weight" for norm in facts.architecture.norms)
        names = [n for n in names if n.endswith(of_blocks) or n == f"{facts.architecture.final_norm}.weight"]
    elif train == "lora":
        names = [f"{module}.weight" for module in facts.linears]
    elif train == "blocks":
        inside = (f"{facts.architecture.blocks}.", f"{facts.architecture.final_norm}.")
        names = [n for n in names if n.startswith(inside)]
    for name in names:
        if name in model.encoded:
            raise RecipeError(
                f"train={train} would change {name}, already stored as "
                f"{model.encoded[name].encoding}; distill before quantizing, or train its codes with distill.qat"
            )
    return names


@contextmanager
def training(model: Model, train: str, rank: int, seed: int, folder: Path) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters to train, by name; on leaving, adapters are merged and masked weights are zero.

    folder: where `learn` writes down the state at the start. If the body raises, every weight is as it was before.
    """
    tensors = trained_tensors(model, train)
    flags = {name: p.requires_grad for name, p in model.module.named_parameters()}
    adapters: Any = None
    parameters: dict[str, nn.Parameter] = {}
    try:
        model.module.requires_grad_(False)
        adapters = _add_adapters(model, rank, seed) if train == "lora" else None
        wanted = set() if adapters else set(tensors)
        parameters = {n: p for n, p in model.module.named_parameters() if n in wanted or ".lora_" in n}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
        if adapters:
            adapters.merge_and_unload()
    except BaseException:
        if adapters:
            adapters.unload()
        restore(folder, 0, parameters)
        raise
    finally:
        for name, parameter in model.module.named_parameters():
            parameter.requires_grad_(flags[name]).grad = None
        apply_masks(model.masks, dict(model.module.named_parameters()))
        model.touch()


@torch.no_grad()
def apply_masks(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Zero, in place, what the masks drop of the tensors that have one."""
    for name in masks.keys() & tensors.keys():
        tensors[name].masked_fill_(~masks[name], 0.0)


def _add_adapters(model: Model, rank: int, seed: int) -> Any:
    """A peft model around the module with low-rank adapters on the blocks' linears, masked like the weights.

    Hu et al. 2021, arXiv:2106.09685.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("train=lora needs peft: pip install 'compress-toolkit[distill]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(model.facts.linears))
        adapters = get_peft_model(model.module, config)
    for module in model.facts.linears:
        if (mask := model.masks.get(f"{module}.weight")) is not None:
            layer = model.module.get_submodule(module)
            layer.forward = _masked_forward(layer, mask)
    return adapters


def _masked_forward(layer: Any, mask: Tensor) -> Any:
    """W x + (mask ∘ B A) x: what merging into the masked weight will compute.

    The two products stay apart: a sum rounded to bfloat16 would lose a small B A beside W.
    """

    def forward(x: Tensor) -> Tensor:
        delta = layer.get_delta_weight("default") * mask
        base: Tensor = layer.base_layer(x)
        return base + linear(x, delta)

    return forward
