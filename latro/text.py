"""From text to tokens and back: prompts, where a rationale ends, and the answer that follows it.

The seam between rationale and answer decides what is learned. A rationale ends at the last token boundary before the
stop string, and the answer's text begins with what was sampled between that boundary and the stop string, so that the
text of both together is the text that was sampled up to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True)
class Rationale:
    """The part of a sample that is scored as the rationale, and the text between it and the answer."""

    tokens: list[int]
    text: str
    separator: str


class Text:
    """What the tokenizer's user decides once: the answer's template, what stops a rationale, how an answer ends."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        answer_template: str = "The answer is {answer}.",
        separator: str = " ",
        stop_strings: Sequence[str] = ("The answer is",),
        end: int | None = None,
    ) -> None:
        """separator: between a rationale that ended by itself and the answer. end: the token that ends an answer."""
        if answer_template.count("{answer}") != 1:
            raise ValueError(f"answer_template must hold {{answer}} once, got {answer_template!r}")
        if any(not stop for stop in stop_strings):
            raise ValueError(f"stop_strings must not be empty, got {list(stop_strings)!r}")
        self.tokenizer = tokenizer
        self.answer_template = answer_template
        self.separator = separator
        self.stop_strings = tuple(stop_strings)
        self.end = end
        # Bytes that a stop string can take, each perhaps a token of its own, and a token more on either side.
        self._window = 2 + max((len(stop.encode()) for stop in stop_strings), default=0)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Text as the tokenizer begins a text; messages by the chat template, up to where the assistant speaks."""
        if isinstance(prompt, str):
            tokens = list(self.tokenizer(prompt)["input_ids"])
            # Some tokenizers end what they encode.
            return tokens[:-1] if tokens and tokens[-1] == self.tokenizer.eos_token_id else tokens
        return list(
            self.tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )

    def are_over(self, rows: list[list[int]]) -> list[bool]:
        """In which a stop string ends among the last tokens."""
        if not self.stop_strings:
            return [False] * len(rows)
        recent = self.tokenizer.batch_decode(
            [tokens[-self._window :] for tokens in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return [
            any(stop in text for stop in self.stop_strings) and self._stop(self.decode(tokens)) is not None
            for text, tokens in zip(recent, rows, strict=True)
        ]

    def _stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        found = [at for stop in self.stop_strings if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def rationale(self, tokens: list[int]) -> Rationale:
        """A sample up to the last token boundary before a stop string, or all of it."""
        text = self.decode(tokens)
        stop = self._stop(text)
        if stop is None:
            return Rationale(list(tokens), text, "" if text[-1:].isspace() else self.separator)
        # From the end, for a sample goes on little beyond its stop string; and every count, for a longer beginning may
        # be a shorter text: bytes of a character that is not whole are shown one by one.
        for count in range(len(tokens), -1, -1):
            before = self.decode(tokens[:count])
            if len(before) <= stop and text.startswith(before):
                return Rationale(list(tokens[:count]), before, text[len(before) : stop])
        raise AssertionError("the empty list decodes to the empty text")

    def answer(self, rationale: Rationale, answer: str) -> list[int]:
        """The tokens of separator and filled template behind the rationale, and the end token."""
        text = rationale.separator + self.answer_template.format(answer=answer)
        wanted = rationale.text + text
        for tokens in self._encodings(rationale, text):
            if self.decode(rationale.tokens + tokens) == wanted:
                return tokens + ([] if self.end is None else [self.end])
        raise ValueError(
            f"answer: the tokenizer must give back {wanted[-200:]!r} behind the rationale, "
            f"got {self.decode(rationale.tokens + self._plain(text))[-200:]!r}; change separator or answer_template"
        )

    def _encodings(self, rationale: Rationale, text: str) -> Any:
        """Ways to encode the text so that it follows the rationale: by itself, without the space that tokenizers put
        before a text, and behind the rationale's own text where its tokens are found again."""
        yield self._plain(text)
        yield self._plain(text[1:])
        together = self._plain(rationale.text + text)
        if together[: len(rationale.tokens)] == rationale.tokens:
            yield together[len(rationale.tokens) :]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> frozenset[int]:
    """Every token that ends what the model says."""
    configured = None if generation is None else generation.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    answer_end = end_of_answer(tokenizer)
    return frozenset(token for token in (*several, tokenizer.eos_token_id, answer_end) if token is not None)


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token by which the chat template ends what the assistant says, or the tokenizer's own end token."""
    if getattr(tokenizer, "chat_template", None):
        content = "Yes."
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        rendered = str(tokenizer.apply_chat_template(said, tokenize=False))
        after = tokenizer(rendered[rendered.rindex(content) + len(content) :], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids)
        if after and after[0] in special:
            return int(after[0])
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
