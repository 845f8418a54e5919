"""A tiny model of random weights where the demo has a real one."""

import torch

from demo.model import LanguageModel
from tests.integrations.models import VOCAB, make_model


class Tokenizer:
    """As much of one as the demo asks for; a prompt is its tokens as numbers."""

    def __call__(self, prompts, padding, padding_side, return_tensors):
        rows = [[int(word) for word in prompt.split()] for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def get_vocab(self):
        return {f"Ċ{token}" if token in (5, 6) else f"{token}": token for token in range(VOCAB)}

    def encode(self, text, add_special_tokens):
        return [7, 8]

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens.tolist()))


def make_policy(fused_linear: bool = False) -> LanguageModel:
    """In float64, where another order of summation changes next to nothing."""
    return LanguageModel(make_model().double(), Tokenizer(), fused_linear)
