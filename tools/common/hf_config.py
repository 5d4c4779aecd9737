"""Reads the config.json of a Hugging Face folder, and refuses what would run code or never end, in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recipes.common.config.inside import outside
from recipes.common.config.json_files import JsonError, read_json
from recipes.common.config.model_sizes import size_problem
from recipes.common.model.initial_weights import build_empty
from tools.common.console import UsageError

_WITH_CODE = "config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"
_TEXT_MODEL = (
    "python -c 'from transformers import AutoModelForImageTextToText as V, AutoModelForCausalLM as C; "
    'm = V.from_pretrained("{0}"); c = m.config.get_text_config(); c.tie_word_embeddings = m.config.tie_word_embeddings; '
    't = C.from_config(c); t.model = m.model.language_model; t.lm_head = m.lm_head; t.save_pretrained("NEW")\''
)
_TEXT_CLASS = 'python -c \'from transformers import AutoModelForCausalLM as C; C.from_pretrained("{0}").save_pretrained("NEW")\''


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a model folder. Raises UsageError for one that cannot be read, has code of its own, or has no end."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UsageError(
                f"{folder} is an adapter, not a model: merge it into its base model (merge_and_unload), and give that"
            )
        raise UsageError(f"{folder} is no Hugging Face model folder: it has no config.json")
    refuse_code(folder)
    config = load_config(folder)
    if (name := getattr(config, "transformers_weights", None)) is not None:
        raise UsageError(
            f"{path}: transformers_weights={name!r} names other weights than those by their usual names; take it out, and name "
            "those that you mean model.safetensors (or its index)"
        )
    return config


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a folder that is ours, as a checkpoint's is. Raises UsageError for one that cannot be read."""
    path = folder / "config.json"
    try:
        if why := outside(folder, path.name):
            raise UsageError(f"{folder}: {why}")
        if problem := size_problem(read_json(path)):
            raise UsageError(f"{path}: {problem}")
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (UsageError, JsonError) as error:
        raise UsageError(str(error)) from None
    except Exception as error:  # whatever a family's own checks raise
        raise UsageError(f"{path}: transformers cannot read it: {first_line(error)}") from error
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        if not quantised:
            raise UsageError(f"{path}: quantization_config={quantised!r} says how, but not what is quantised; take it out")
        raise UsageError(f"{folder} is quantised, and quantised weights cannot be trained; give the original model")
    return config


def refuse_code(folder: Path) -> None:
    """Raise UsageError for a folder that brings code of its own, which is never run. A chat template is text."""
    found = [f"auto_map in {name}" for name in _WITH_CODE if "auto_map" in _content(folder / name)]
    found += sorted(path.name for path in folder.glob("*.py"))
    if found:
        raise UsageError(
            f"{folder} brings code of its own ({', '.join(found[:5])}), which is never run (trust_remote_code=False). If "
            "transformers itself has the model, delete the code and auto_map from a copy of the folder; else it cannot be trained"
        )


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, JsonError):  # what is needed of them is read, and judged, elsewhere
        return {}


def refuse_multimodal(config: PreTrainedConfig, folder: Path) -> None:
    """Raise UsageError, with how to get the text model, for a config that has one in it."""
    text = config.get_text_config()
    if text is config:
        return
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    what = f"{folder / 'config.json'} is of a multimodal model ({config.model_type}), whose text model is a {text.model_type}"
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{what}, and transformers has no causal model of its own for that: give a model of a text family")
    is_text = causal is not None and causal.config_class is type(text)
    cure = (_TEXT_CLASS if is_text else _TEXT_MODEL).format(folder)
    raise UsageError(f"{what}: save that on its own and give its folder, with\n  {cure}")


def build_model(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Return the model of a folder's config on the meta device. Raises UsageError when transformers cannot build it."""
    try:
        return build_empty(config, attention="eager")
    except Exception as error:  # whatever a family's constructor raises for sizes that do not fit
        found = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{folder / 'config.json'}: transformers cannot build a causal model of it: {found}") from error


def first_line(error: Exception) -> str:
    """Return what an error says in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
