"""The code MLflow serves a released model with: text in; a label with its score, or what the model writes, out.

Shipped as text inside every registered version (models-from-code), so it imports nothing of this project and needs only
mlflow, torch and transformers where it runs, and peft for a version that is an adapter. Such a version names its base
by id and hash and looks for it where it is served: as a folder, in a package, in the hub's cache, or at FEDPIPE_BASE.
Nothing here imports this module; `tasks.logged_model` passes its path.
"""

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

CLASSIFIER_BATCH, GENERATOR_BATCH = 64, 32
BASE_FILE = "base.json"
HASHED = ("config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class ReleasedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow is untyped
    """A classifier or a language model behind MLflow's python-function interface."""

    def load_context(self, context: Any) -> None:
        """Load model and tokenizer from the version's own folder, and from its base where it is an adapter."""
        folder = Path(context.artifacts["model"])
        self.model = _load_model(folder).eval()
        self.writes = self.model.get_output_embeddings() is not None
        side = "left" if self.writes else "right"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side=side)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_tokens = min(self.tokenizer.model_max_length, positions)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answer a column of texts, one row per text, in order; the signature makes a list of texts such a column.

        A language model writes greedily, so the same prompt gets the same text.
        """
        texts = [str(text) for text in model_input.iloc[:, 0]]
        longest = int((params or {}).get("max_new_tokens", 128))
        size = GENERATOR_BATCH if self.writes else CLASSIFIER_BATCH
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            rows += self._written(part, longest) if self.writes else self._labels(part)
        return pd.DataFrame(rows, columns=["text"] if self.writes else ["label", "label_name", "score"])

    def _labels(self, texts: list[str]) -> list[tuple[Any, ...]]:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            scores, labels = self.model(**tokens).logits.float().softmax(dim=-1).max(dim=-1)
        names = self.model.config.id2label
        return [(label, names[label], score) for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]

    def _written(self, prompts: list[str], longest: int) -> list[tuple[Any, ...]]:
        tokens = self.tokenizer(
            [self._rendered(prompt) for prompt in prompts],
            padding=True,
            add_special_tokens=self.tokenizer.chat_template is None,  # the template writes them out
            return_token_type_ids=False,
            return_tensors="pt",
        )
        with torch.inference_mode():
            found = self.model.generate(
                **tokens, max_new_tokens=longest, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
        new = found[:, tokens["input_ids"].shape[1] :]
        return [(text.strip(),) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _rendered(self, prompt: str) -> str:
        """The prompt as training showed it, which the tokenizer's chat template knows."""
        if self.tokenizer.chat_template is None:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _load_model(folder: Path) -> Any:
    """The merged model, or the base with the adapter that lies in the folder."""
    if not (folder / BASE_FILE).is_file():
        return _auto_class(json.loads((folder / "config.json").read_text())).from_pretrained(folder)
    from peft import PeftModel

    known = json.loads((folder / BASE_FILE).read_text())
    base = _base_folder(os.environ.get("FEDPIPE_BASE", known["base"]))
    found = base_sha256(base)
    if found != known["sha256"]:
        raise ValueError(
            f"the base in {base} has sha256 {found} and the adapter was trained on {known['sha256']}; set FEDPIPE_BASE "
            "to the folder of that one"
        )
    config = known["config"]
    if "id2label" in config:
        config["id2label"] = {int(label): name for label, name in config["id2label"].items()}  # JSON's keys are text
    model = _auto_class(known).from_pretrained(base, dtype=torch.float32, **config)
    return PeftModel.from_pretrained(model, str(folder))


def _auto_class(described: dict[str, Any]) -> Any:
    classifies = any(name.endswith("ForSequenceClassification") for name in described["architectures"])
    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def _base_folder(base: str) -> Path:
    if base.startswith("package:"):
        spec = importlib.util.find_spec(base.removeprefix("package:"))
        roots = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
        for config in sorted(config for root in roots for config in root.rglob("config.json")):
            if any(path for pattern in WEIGHTS for path in config.parent.glob(pattern)):
                return config.parent
    elif Path(base).is_dir():
        return Path(base)
    elif not base.startswith(("package:", ".", "/")):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(base, ignore_patterns=["*.bin", "*.h5", "*.msgpack"]))
    raise ValueError(f"the adapter's base {base} is not here; set FEDPIPE_BASE to its folder")


def base_sha256(folder: Path) -> str:
    """Hash of config, tokenizer and weights of a base, as a release computes it."""
    digest = hashlib.sha256()
    files = [path for pattern in (*HASHED, *WEIGHTS) for path in folder.glob(pattern)]
    for path in sorted(files, key=lambda path: path.name):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


mlflow.models.set_model(ReleasedModel())
