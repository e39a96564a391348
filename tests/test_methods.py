"""Every quantization step with every encoding: what `compress ls` lists applies, the rest is refused with why."""

from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError

from compress import methods, plugin
from compress.encodings import GGML_BLOCKS, GGML_NAMES, NAMES, EncodedTensor
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.quantize.rtn import RoundToNearest
from tests.recipes import recipe
from tests.tiny import tiny_model

PAIRS = [(step, name) for step in methods.STORES for name in (*NAMES, *GGML_NAMES)]
WINDOWS = [torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
HEAD, UP = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


def fields(step: str, name: str) -> dict[str, object]:
    """Those that ask a step for an encoding, beside another that it must choose from in mixed precision."""
    if step == "quantize.mixed":
        other, target = ("int8", 6.0) if name != "int8" else ("int2", 6.0)
        return {"choices": [name, other], "target_bits": target, "sensitivity_tokens": 32}
    return {"type" if step == "quantize.ggml" else "encoding": name}


def stored(model) -> dict[str, EncodedTensor]:
    assert torch.isfinite(next(model.logits([[1, 2, 3, 250]]))).all()
    return model.encoded


def fitting(name: str):
    """A model of one block of the network whose rows hold whole blocks of an encoding."""
    width = GGML_BLOCKS.get(name, (32, 0))[0]
    return tiny_model(hidden_size=width, intermediate_size=width, num_hidden_layers=1)


def test_the_table_has_a_row_for_every_step_that_chooses_codes():
    steps = {name: plugin.step(name) for name in plugin.names("step")}
    assert methods.STORES.keys() == {name for name, s in steps.items() if s.packs and not s.refines}
    assert methods.summaries().keys() == methods.STORES.keys()


@pytest.mark.parametrize(("step", "name"), [p for p in PAIRS if p[1] in methods.STORES[p[0]]])
def test_what_is_listed_applies(step, name):
    model = fitting(name)
    chosen = plugin.step(step)(**fields(step, name))
    chosen.check(model.facts)
    chosen.apply(model, Context(seed=0, calibration=WINDOWS))
    ours = GGML_NAMES.get(name, name)
    assert ours in {stored(model)[f"{linear}.weight"].encoding.name for linear in model.facts.linears}


@pytest.mark.parametrize(("step", "name"), [p for p in PAIRS if p[1] not in methods.STORES[p[0]]])
def test_what_is_not_listed_is_refused_with_the_reason(step, name):
    asked = ", ".join(f"{k}: {v}".replace("'", "") for k, v in fields(step, name).items())
    with pytest.raises(RecipeError) as caught:
        recipe(f"  - {step}: {{{asked}}}\n")
    reason = methods.refusal(step, name)
    assert reason is not None and name in reason and str(caught.value).endswith(f": {reason}")
    assert str(caught.value).startswith("recipe.yaml:9:") and caught.value.exit_code == 2
    assert f"steps[0] {step}.{next(iter(fields(step, name)))}: " in str(caught.value)
    assert any(word in reason for word in ("; use ", "; write ", "; name it under keep", "; leave the step out"))


@pytest.mark.parametrize("step", [name for name in methods.STORES if name not in ("quantize.cast", "quantize.mixed")])
def test_keep_and_embeddings_take_what_is_listed_for_them_and_nothing_else(step):
    for name in (*NAMES, *GGML_NAMES):
        for asked in ({"keep": {"*.up_proj": name}}, {"embeddings": name}):
            if name in methods.taken(step, kept=True):
                plugin.step(step)(**asked)
            else:
                reason = methods.refusal(step, name, kept=True)
                with pytest.raises(ValidationError) as caught:
                    plugin.step(step)(**asked)
                (error,) = caught.value.errors()
                assert error["loc"] == tuple(asked) and error["msg"] == f"Value error, {reason}"


@pytest.mark.parametrize(
    ("step", "name", "kept"),
    [("hqq", "q4_1", "q5_1"), ("smoothquant", "int8", "nf4"), ("rtn", "nf4", "bf16")],
)
def test_what_is_kept_apart_is_stored_so(step, name, kept):
    model = fitting(name)
    plugin.step(f"quantize.{step}")(encoding=name, keep={"*.up_proj": kept}, embeddings=kept).apply(
        model, Context(seed=0, calibration=WINDOWS)
    )
    assert {stored(model)[tensor].encoding.name for tensor in (UP, HEAD)} == {kept}


def test_mixed_precision_refuses_what_its_method_does_not_take():
    asked = "  - quantize.mixed: {method: hqq, choices: [int3, nf4], target_bits: 4}\n"
    with pytest.raises(RecipeError, match=r"method: quantize.hqq chooses integer codes, not nf4's; use quantize.rtn"):
        recipe(asked)
    with pytest.raises(RecipeError, match=r"method: quantize.hqq chooses integer codes, not mxfp4's"):
        recipe(asked.replace("nf4", "int8").replace("}", ", embeddings: mxfp4}"))


def test_a_plug_in_that_builds_on_a_step_judges_its_encodings_itself():
    class Mine(RoundToNearest):
        name: ClassVar[str] = "quantize.mine"

    assert Mine.model_validate({"encoding": "int4"}).encoding == "int4"
    with pytest.raises(ValidationError):
        Mine.model_validate({"encoding": "q4_0"})
