"""The code MLflow serves a released classifier with: text in, label, label name and score out.

Shipped as text inside every registered version (models-from-code), so it imports nothing of this project and needs only
mlflow, torch and transformers where it runs. Nothing here imports this module; `tasks.tracking` passes its path.
"""

from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH_SIZE = 64


class TextClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow is untyped
    """A sequence classifier in Hugging Face format behind MLflow's python-function interface."""

    def load_context(self, context: Any) -> None:
        """Load model and tokenizer from the version's own folder; nothing is downloaded."""
        folder = context.artifacts["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_tokens = min(self.tokenizer.model_max_length, positions)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify a column of texts, one row per text, in order; the signature makes a list of texts such a column."""
        texts = [str(text) for text in model_input.iloc[:, 0]]
        rows = [row for start in range(0, len(texts), BATCH_SIZE) for row in self._rows(texts[start:][:BATCH_SIZE])]
        return pd.DataFrame(rows, columns=["label", "label_name", "score"])

    def _rows(self, texts: list[str]) -> list[tuple[int, str, float]]:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            scores, labels = self.model(**tokens).logits.float().softmax(dim=-1).max(dim=-1)
        names = self.model.config.id2label
        return [(label, names[label], score) for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]


mlflow.models.set_model(TextClassifier())
