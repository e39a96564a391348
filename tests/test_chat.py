"""Chat templates: the prompt of a model is the prompt of its artifacts, rendered from what they ship."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress import plugin
from compress.errors import Corrupt, RecipeError
from compress.model import Model
from tests import tiny_gguf, tiny_onnx
from tests.tiny import tiny_model

TEMPLATE = (
    "{%- for message in messages %}\n"
    "    {%- if loop.index > 8 %}{% break %}{% endif %}\n"
    "{{ bos_token }}[{{ message.role }}] {{ message['content'] | tojson }}{{ eos_token }}\n"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}[answer] {% endif %}"
) + "{# long enough for a second call #}" * 40
MESSAGES = ["Hello!", 'It\'s "5 < 6" & naïve\n\n東京 🙂', "{{ 1 + 1 }}"]
MODELS = {"gguf": lambda: tiny_gguf.tiny(), "onnx": lambda: tiny_onnx.tiny("llama", True)}


def templated(name: str, template: str | None = TEMPLATE) -> Model:
    model: Model = MODELS[name]()
    model.tokenizer.chat_template = template
    return model


def opened(name: str, model: Model, folder: Path) -> Any:
    exporter = plugin.exporter(name)()
    exporter.write(model, folder)
    return exporter.open(folder)


@pytest.mark.parametrize("name", MODELS)
def test_an_artifact_renders_its_own_template_as_transformers_renders_the_models(name, tmp_path):
    model = templated(name)
    if name == "onnx":
        model.tokenizer.add_special_tokens({"bos_token": "A", "eos_token": "B"})
    runtime = opened(name, model, tmp_path)
    for message in MESSAGES:
        ids = model.encode_chat(message)
        assert runtime.encode_chat(message) == ids != model.encode(message)
        text = model.decode(ids)
        assert text.endswith("[answer] ") and json.dumps(message, ensure_ascii=False) in text
        assert model.tokenizer.eos_token in text  # the special tokens reach the template
    runtime.close()


@pytest.mark.parametrize("name", MODELS)
def test_without_a_template_the_plain_text_is_continued(name, tmp_path):
    model = templated(name, None)
    runtime = opened(name, model, tmp_path)
    assert runtime.encode_chat("Once upon") == model.encode_chat("Once upon") == model.encode("Once upon")
    runtime.close()


BROKEN = ["{{ raise_exception('only tools') }}", "{% if %}", "{{ messages[0].content.__class__.__mro__[1] }}"]


@pytest.mark.parametrize("template", BROKEN)
def test_a_broken_template_is_an_error_of_one_line(template):
    model = tiny_model()
    model.tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=r"^model: its chat template cannot be rendered \("):
        model.encode_chat("Hi")


@pytest.mark.parametrize("template", BROKEN)
@pytest.mark.parametrize("name", MODELS)
def test_a_broken_template_in_an_artifact_is_corruption_that_names_it(name, template, tmp_path):
    runtime = opened(name, templated(name, template), tmp_path)
    with pytest.raises(Corrupt, match=rf"{tmp_path.name}.*: its chat template cannot be rendered \("):
        runtime.encode_chat("Hi")
    runtime.close()


def test_a_template_in_the_tokenizers_config_counts_too(tmp_path):
    runtime = opened("onnx", templated("onnx"), tmp_path)
    wanted = runtime.encode_chat("Hi")
    file, config = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    facts = json.loads(config.read_text())
    for held in (TEMPLATE, [{"name": "tools", "template": "t"}, {"name": "default", "template": TEMPLATE}]):
        config.write_text(json.dumps({**facts, "chat_template": held}))
        file.unlink(missing_ok=True)
        assert runtime.encode_chat("Hi") == wanted
    config.write_text("[]")
    with pytest.raises(Corrupt, match="tokenizer_config.json cannot be read"):
        runtime.encode_chat("Hi")
    runtime.close()
