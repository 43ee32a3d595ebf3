"""The seam between rationale and answer, and what begins and ends a text."""

import pytest

from latro.text import Text, end_of_answer, end_tokens
from tests.tiny import byte_fallback_tokenizer, byte_pair_tokenizer, character_tokenizer

THINGS = ["trees", "cats", "dogs", "pens", "maps", "cups", "owls"]
CORPUS = [f"{thing}. The answer is {n}." for n, thing in enumerate(THINGS)] * 20


@pytest.fixture(scope="module")
def merged():
    """A tokenizer of which a token goes from the rationale's last character into the stop string."""
    tokenizer = byte_pair_tokenizer(CORPUS, size=285)
    pieces = [tokenizer.decode([token]) for token in tokenizer("trees. The answer is 6.")["input_ids"]]
    assert any("." in piece and "The" in piece for piece in pieces), pieces
    return tokenizer


def test_what_is_scored_is_the_text_that_was_sampled(merged):
    text = Text(merged)
    sampled = merged("They have 6 trees. The answer is")["input_ids"]
    rationale = text.rationale(sampled)
    answer = text.answer(rationale, "6")
    assert rationale.tokens == sampled[: len(rationale.tokens)]  # sampled ids, not encoded anew
    assert "The answer" not in rationale.text
    assert text.decode(rationale.tokens + answer) == "They have 6 trees. The answer is 6."


@pytest.mark.parametrize("space", ["", " ", "\n", "\n\n"])
def test_the_sampled_separator_stays(space):
    text = Text(character_tokenizer())
    rationale = text.rationale(text.tokenizer(f"two{space}The answer is 5")["input_ids"])
    assert text.decode(rationale.tokens + text.answer(rationale, "7")) == f"two{space}The answer is 7."


def test_a_rationale_that_ended_by_itself_gets_the_separator():
    text = Text(character_tokenizer(), separator="\n")
    rationale = text.rationale(text.tokenizer("two")["input_ids"])
    assert text.decode(text.answer(rationale, "7")) == "\nThe answer is 7."
    spaced = text.rationale(text.tokenizer("two ")["input_ids"])
    assert text.decode(text.answer(spaced, "7")) == "The answer is 7."


def test_the_first_of_several_stop_strings_counts():
    text = Text(character_tokenizer(), stop_strings=["</think>", "Answer:"], answer_template="</think>{answer}")
    rationale = text.rationale(text.tokenizer("hm</think>4 Answer: 5")["input_ids"])
    assert rationale.text == "hm"
    assert text.decode(text.answer(rationale, "4")) == "</think>4"


def test_stop_strings_are_found_whatever_the_tokens(merged):
    for tokenizer in (merged, character_tokenizer()):
        text = Text(tokenizer)
        tokens = tokenizer("They have 6 trees. The answer is 6.")["input_ids"]
        over = [text.are_over([tokens[:n]])[0] for n in range(1, len(tokens) + 1)]
        first = over.index(True)
        assert "The answer is" in text.decode(tokens[: first + 1])
        assert "The answer is" not in text.decode(tokens[:first])


@pytest.mark.parametrize("said", ["😀", "so 😀😀\n數 1\n😀", "😀😀😀\n1\n😀😀\n", "so\n"])
def test_what_stands_before_the_stop_is_the_rationale_whatever_its_characters_take(said):
    text = Text(byte_fallback_tokenizer(), answer_template="#{answer}", separator="", stop_strings=["#"])
    rationale = text.rationale(text.tokenizer(said + "#1")["input_ids"])
    assert (rationale.text, rationale.separator) == (said, "")
    assert text.decode(rationale.tokens) == said


def test_no_stop_strings_never_end():
    text = Text(character_tokenizer(), stop_strings=[])
    assert text.are_over([text.tokenizer("The answer is")["input_ids"]]) == [False]


def test_an_answer_ends_with_the_models_end_token():
    tokenizer = character_tokenizer()
    text = Text(tokenizer, end=end_of_answer(tokenizer))
    assert text.answer(text.rationale([]), "7")[-1] == tokenizer.eos_token_id


CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chatty():
    """As Phi's: the template adds the beginning token and ends turns by a token that is not the tokenizer's own end."""
    tokenizer = byte_pair_tokenizer(CORPUS, bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def test_chat_prompts_begin_once_and_answers_end_as_the_template_ends_them(chatty):
    text = Text(chatty, end=end_of_answer(chatty))
    prompt = text.prompt([{"role": "user", "content": "2 + 4?"}])
    assert prompt.count(chatty.bos_token_id) == 1
    assert prompt[-1] == chatty.convert_tokens_to_ids("<|assistant|>")
    assert end_of_answer(chatty) == chatty.convert_tokens_to_ids("<|end|>")
    assert text.answer(text.rationale([]), "6")[-1] == chatty.convert_tokens_to_ids("<|end|>")
    assert end_tokens(chatty, None) == {chatty.convert_tokens_to_ids("<|end|>"), chatty.eos_token_id}


def test_text_prompts_do_not_end_what_they_begin():
    tokenizer = character_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    assert Text(tokenizer).prompt("hi")[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_template": "no place"}, "answer_template must hold {answer} once"),
        ({"stop_strings": ["ok", ""]}, "stop_strings must not be empty"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Text(character_tokenizer(), **options)


def test_an_answer_that_the_tokenizer_cannot_write_is_refused():
    text = Text(character_tokenizer())
    with pytest.raises(ValueError, match="must give back"):
        text.answer(text.rationale([]), "日本")
