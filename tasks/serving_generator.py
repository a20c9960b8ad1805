"""The code MLflow serves a released language model with: prompts in, what the model writes behind them out.

Shipped as text inside every registered version (models-from-code), so it imports nothing of this project and needs only
mlflow, torch and transformers where it runs. Nothing here imports this module; `tasks.tracking` passes its path.
"""

from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE = 32


class TextGenerator(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow is untyped
    """A causal language model in Hugging Face format behind MLflow's python-function interface."""

    def load_context(self, context: Any) -> None:
        """Load model and tokenizer from the version's own folder; nothing is downloaded."""
        folder = context.artifacts["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Continue a column of prompts, one row per prompt, in order; greedy, so the same prompt gets the same text."""
        prompts = [str(prompt) for prompt in model_input.iloc[:, 0]]
        longest = int((params or {}).get("max_new_tokens", 128))
        texts = [
            text
            for start in range(0, len(prompts), BATCH_SIZE)
            for text in self._texts(prompts[start:][:BATCH_SIZE], longest)
        ]
        return pd.DataFrame({"text": texts})

    def _texts(self, prompts: list[str], longest: int) -> list[str]:
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
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _rendered(self, prompt: str) -> str:
        """The prompt as training showed it, which the tokenizer's chat template knows."""
        if self.tokenizer.chat_template is None:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


mlflow.models.set_model(TextGenerator())
