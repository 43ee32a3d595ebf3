"""Sampling: from the model's own distribution, the same whatever else is in the batch, at no cost for what is over."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from latro.model import TreeModel, decoding
from latro.model.decoding import Decoder
from latro.model.verify import verify_decoding
from latro.rollout import BLOCK, LocalEngine, Sampling, _find, copy_weights, draw, sample_key, uniform, unwrapped
from latro.text import Text
from latro_kernels import pack_rationales
from latro_kernels.tree import RATIONALE
from tests.families import SUPPORTED, VOCABULARY, tiny_model
from tests.tiny import byte_pair_tokenizer, character_tokenizer, tiny_llama

FAMILIES = [family for family in SUPPORTED if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
PROMPTS = [[5, 9, 3, 17, 4, 8, 12], [7], [21, 20, 19, 18]]
ALIKE = [[5, 9, 3, 17, 4, 8, 12], [5], [5, 9, 3, 18]]  # from the beginning


def keys(counts, seed=0):
    return [[sample_key(seed, n, k) for k in range(count)] for n, count in enumerate(counts)]


def flat(samples):
    return [sample for of_prompt in samples for sample in of_prompt]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(character_tokenizer())


# Decoding


def decoded(model, prompts, counts, steps, drops):
    """Every continuation that grew, with the logits of its tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = [(list(prompt), []) for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    over = []
    decoder = Decoder(model)
    logits = decoder.start(prompts, counts)
    for step in range(steps):
        tokens = torch.randint(3, VOCABULARY, (len(rows),), generator=generator)
        for (path, seen), token, of_row in zip(rows, tokens.tolist(), logits, strict=True):
            path.append(token)
            seen.append(of_row)
        over += [rows[n] for n in drops.get(step, [])]
        alive = decoder.drop(drops.get(step, []))
        rows, tokens = [rows[n] for n in alive], tokens[alive]
        logits = decoder.step(tokens)
    return over + rows


@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_gives_the_logits_of_whole_forwards(family, prompts, monkeypatch):
    """Longer than the windows, and than there is room for at first; rows, and a prompt, end before the others."""
    monkeypatch.setattr(decoding, "ROOM", 4)
    model = tiny_model(family)
    paths = decoded(model, prompts, [3, 1, 2], 12, {2: [1], 5: [0, 2], 9: [1]})
    assert sorted(len(seen) for _, seen in paths) == [3, 6, 6, 10, 12, 12]
    for path, seen in paths:
        logits = model(input_ids=torch.tensor([path]), use_cache=False).logits[0]
        torch.testing.assert_close(torch.stack(seen), logits[-1 - len(seen) : -1], rtol=0, atol=1e-4)


def test_what_prompts_have_in_common_is_read_once():
    prompts = [[5, 9, 3], [5], [5, 9, 4, 4], [6], [5, 9, 3], [5, 9]]
    tree, rows = decoding.shared(prompts)
    assert len(tree.tokens) == len([5, 9, 3, 4, 4, 6])
    assert [tree.tokens[of_prompt].tolist() for of_prompt in rows] == prompts
    assert [tree.positions[of_prompt].tolist() for of_prompt in rows] == [list(range(len(p))) for p in prompts]
    for of_prompt in rows:
        assert tree.previous[of_prompt].tolist() == [-1, *of_prompt[:-1]]


def test_a_prompt_without_continuations_left_is_not_attended_to(model):
    decoder = Decoder(model)
    decoder.start(PROMPTS, [1, 2, 1])
    decoder.drop([0])
    assert sorted(decoder.paths.lengths) == [1, 4]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3n_text", "opt"])
def test_a_model_that_decodes_rightly_is_verified(family):
    verify_decoding(tiny_model(family), tolerance=1e-5)
    verify_decoding(tiny_model(family).to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        verify_decoding(tiny_model(family), tolerance=1e-5)


def test_how_much_decoding_may_differ_is_an_option():
    model = tiny_model("llama").to(torch.bfloat16)
    LocalEngine(model).generate([[5]], [[0]], Sampling(3))
    with pytest.raises(ValueError, match=r"verify_decoding: llama must put out .* and 1.0e-06 is tolerated"):
        LocalEngine(model, tolerance=1e-6).generate([[5]], [[0]], Sampling(3))


def test_a_model_that_decodes_otherwise_samples_nothing(model):
    model = copy.deepcopy(model)

    def without_positions(module, args, kwargs):
        return args, kwargs | ({"position_ids": None} if kwargs["input_ids"].shape[1] == 1 else {})

    model.register_forward_pre_hook(without_positions, with_kwargs=True)
    engine = LocalEngine(model)
    with pytest.raises(
        ValueError, match="verify_decoding: llama must put out token by token what it puts out for each"
    ):
        engine.generate([[5, 6]], [[0]], Sampling(3))


# Drawing


def share_of(logits, sampling):
    """The probabilities [V] that transformers would sample with."""
    logits = logits.double() / sampling.temperature
    if sampling.top_k:
        logits[logits < logits.topk(min(sampling.top_k, len(logits))).values[-1]] = -math.inf
    order = logits.argsort(descending=True)
    before = logits[order].softmax(0).cumsum(0) - logits[order].softmax(0)
    logits[order[before >= sampling.top_p]] = -math.inf
    return logits.softmax(0)


SAMPLINGS = [
    Sampling(1),
    Sampling(1, temperature=0.3),
    Sampling(1, temperature=2.5),
    Sampling(1, top_k=20),
    Sampling(1, top_p=0.6),
    Sampling(1, temperature=1.7, top_k=40, top_p=0.8),
]


def logits_of(V):
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(V, generator=generator)
    logits[V // 3] = -math.inf
    logits[-1] += 6  # in a last block that is not full
    return logits


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("V", [17, 2 * BLOCK + 88])
def test_each_token_is_drawn_by_its_share_of_the_numbers(V, sampling):
    """With numbers evenly spaced, as often as its probability says, to one more or one less."""
    n, logits = 20000, logits_of(V)
    tokens, logps = draw(logits.expand(n, -1), (torch.arange(n) + 0.5).double() / n, sampling)
    share = share_of(logits, sampling)
    assert ((tokens.bincount(minlength=V) - n * share).abs() <= 1 + 1e-5 * n).all()
    torch.testing.assert_close(logps.double(), share[tokens].log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_are_distributed_as_their_probabilities(sampling):
    """A chi-square test, with the numbers of keys."""
    n, logits = 20000, logits_of(600)
    key = torch.tensor([sample_key(0, k) for k in range(n)])
    tokens, _ = draw(logits.expand(n, -1), uniform(key, 3), sampling)
    assert_fits(tokens.bincount(minlength=600).double(), n * share_of(logits, sampling))


def assert_fits(counts, expected):
    """Within five standard deviations of chi-square's mean, what is expected less than five times taken together."""
    rare = expected < 5
    counts, expected = (torch.cat([of[~rare], of[rare].sum(0, keepdim=True)]) for of in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


def test_the_least_and_the_greatest_number_draw_tokens_that_are_possible():
    logits = torch.full((2, 3 * BLOCK), -math.inf)
    logits[:, BLOCK + 3], logits[:, BLOCK + 9] = 0.0, 1.0
    tokens, _ = draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), Sampling(1))
    assert tokens.tolist() == [BLOCK + 3, BLOCK + 9]


@pytest.mark.parametrize("share", [-1e-17, 0.0, 0.5, 1.0, 1 + 1e-15])
def test_what_has_no_weight_is_not_found_where_a_share_was_rounded(share):
    index, _ = _find(torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[share]], dtype=torch.float64))
    assert index.item() == 1


def test_temperature_0_draws_the_likeliest():
    logits = logits_of(300).expand(4, -1)
    tokens, logps = draw(logits, torch.rand(4), Sampling(1, temperature=0))
    assert tokens.tolist() == [299] * 4
    torch.testing.assert_close(logps, logits.log_softmax(-1)[:, 299])


def test_the_numbers_of_keys_are_uniform_and_unrelated():
    key = torch.tensor([sample_key(7, step, "example", k) for step in range(100) for k in range(100)])
    numbers = torch.stack([uniform(key, position) for position in range(4)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    cells = (numbers * 16).long()
    for a in range(4):
        assert_fits(cells[a].bincount(minlength=16).double(), torch.full((16,), len(key) / 16))
        for b in range(a):  # at neighbouring positions; and of neighbouring keys
            pairs = (16 * cells[a] + cells[b]).bincount(minlength=256).double()
            assert_fits(pairs, torch.full((256,), len(key) / 256))
        pairs = (16 * cells[a, 1:] + cells[a, :-1]).bincount(minlength=256).double()
        assert_fits(pairs, torch.full((256,), (len(key) - 1) / 256))


def test_a_key_names_all_its_parts():
    names = [(0, 1, "a", 2), (1, 0, "a", 2), (0, 1, "a2", 0), (0, 1, "a", 3), (0, 1, "b", 2)]
    assert len({sample_key(*name) for name in names}) == len(names)
    assert sample_key(0, 1, "a", 2) == sample_key(0, 1, "a", 2)


# Generation


def test_a_sample_depends_on_its_prompt_and_key_alone(model):
    """What else is in the batch changes logits by rounding. That changes a token only where its number falls between
    the two boundaries, about once in a million tokens: not in these."""
    sampling, counts = Sampling(20, ends=frozenset([1, 40])), [5, 3, 4]
    given = LocalEngine(model).generate(PROMPTS, keys(counts), sampling)
    one_by_one = [
        [LocalEngine(model).generate([prompt], [[key]], sampling)[0][0] for key in of_prompt]
        for prompt, of_prompt in zip(PROMPTS, keys(counts), strict=True)
    ]
    few_rows = LocalEngine(model, max_rows=6).generate(PROMPTS, keys(counts), sampling)
    backwards = LocalEngine(model).generate(PROMPTS[::-1], [of[::-1] for of in keys(counts)[::-1]], sampling)
    for others in (one_by_one, few_rows, [of[::-1] for of in backwards[::-1]]):
        assert [sample.tokens for sample in flat(others)] == [sample.tokens for sample in flat(given)]
        for other, sample in zip(flat(others), flat(given), strict=True):
            assert (other.end, other.ended_by) == (sample.end, sample.ended_by)
            assert other.logps == pytest.approx(sample.logps, abs=1e-4)
    assert len({tuple(sample.tokens) for sample in flat(given)}) == 12


@contextmanager
def forward_passes(model):
    """The (rows, tokens in each) of every one."""
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


def used_engine(model, **options):
    """One that has verified its model."""
    engine = LocalEngine(model, **options)
    engine.generate([[3]], [[0]], Sampling(1))
    return engine


def test_no_more_rows_grow_at_once_than_allowed(model):
    engine = used_engine(model, max_rows=8)
    with forward_passes(model) as shapes:
        engine.generate(PROMPTS, keys([5, 3, 9]), Sampling(3))
    assert shapes == [(1, 8), (8, 1), (8, 1), (1, 4), (9, 1), (9, 1)]


def test_finished_rows_cost_nothing(model):
    """Prompts are read once, and then there is a row for each token that is not a sample's last."""
    engine, ended = used_engine(model), []
    sampling = Sampling(30, ends=frozenset(range(0, VOCABULARY, 9)))
    with forward_passes(model) as shapes:
        samples = flat(engine.generate(PROMPTS, keys([6, 6, 6]), sampling, ended.append))
    assert shapes[0] == (1, sum(map(len, PROMPTS)))
    assert {length for _, length in shapes[1:]} == {1}
    assert sum(rows for rows, _ in shapes[1:]) == sum(len(sample.logps) - 1 for sample in samples)
    assert max(len(sample.tokens) for sample in samples) > 2 * min(len(sample.tokens) for sample in samples)
    assert sum(ended) == 18


def test_any_number_of_tokens_end_a_sample(model):
    ends = frozenset([4, 30, 41, 77])
    free = flat(LocalEngine(model).generate(PROMPTS, keys([8, 8, 8]), Sampling(40)))
    samples = flat(LocalEngine(model).generate(PROMPTS, keys([8, 8, 8]), Sampling(40, ends=ends)))
    assert {sample.end for sample in samples} == {4, 30, 41, 77, None}
    for sample, whole in zip(samples, free, strict=True):
        stop = next((n for n, token in enumerate(whole.tokens) if token in ends), 40)
        assert sample.tokens == whole.tokens[:stop]
        assert sample.end == (whole.tokens[stop] if stop < 40 else None)
        assert sample.ended_by == ("end" if stop < 40 else "length")
        assert sample.logps == pytest.approx(whole.logps[: stop + 1], abs=1e-4)


def test_stop_strings_are_found_across_tokens():
    tokenizer = byte_pair_tokenizer(["the answer is seven, and then the sum of them is eleven"] * 3, size=300)
    model = tiny_llama(tokenizer)
    free = flat(LocalEngine(model).generate([[9, 30]], keys([20]), Sampling(25)))
    texts = [[tokenizer.decode([token]) for token in sample.tokens] for sample in free]
    stops = [texts[0][9][-1] + texts[0][10][0], texts[1][12][-2:] + texts[1][13] + texts[1][14][:1]]
    text = Text(tokenizer, stop_strings=stops)
    samples = flat(LocalEngine(model).generate([[9, 30]], keys([20]), Sampling(25, are_over=text.are_over)))
    assert [sample.ended_by for sample in samples[:2]] == ["stop", "stop"]
    assert {sample.ended_by for sample in samples} == {"stop", "length"}
    for sample, whole in zip(samples, free, strict=True):
        prefixes = [whole.tokens[:count] for count in range(1, 26)]
        first = next((p for p in prefixes if any(stop in tokenizer.decode(p) for stop in stops)), whole.tokens)
        assert sample.tokens == first


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_greedy_samples_are_those_of_transformers(family):
    model = tiny_model(family)
    model.generation_config.eos_token_id = None
    for prompt, (sample,) in zip(
        PROMPTS, LocalEngine(model).generate(PROMPTS, [[0]] * 3, Sampling(12, temperature=0)), strict=True
    ):
        given = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert sample.tokens == given[0, len(prompt) :].tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 12, "top_p": 0.9}], ids=str)
def test_samples_are_distributed_as_those_of_transformers(model, options):
    """Two tokens each; a chi-square test of two samples."""
    n, prompt, V = 3000, PROMPTS[0], model.config.vocab_size
    torch.manual_seed(0)
    theirs = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_return_sequences=n,
        do_sample=True,
        min_new_tokens=2,
        max_new_tokens=2,
        **{"top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": None, **options},
    )[:, len(prompt) :]
    samples = flat(LocalEngine(model, max_rows=n).generate([prompt], keys([n]), Sampling(2, **options)))
    ours = torch.tensor([sample.tokens for sample in samples])
    for of_pair in (lambda first, second: first, lambda first, second: second, lambda a, b: a % 7 * 7 + b % 7):
        counts = [of_pair(*given.T).bincount(minlength=V).double() for given in (theirs, ours)]
        both = counts[0] + counts[1]
        common = both >= 10
        statistic = ((counts[0] - counts[1])[common] ** 2 / both[common]).sum()
        degrees = int(common.sum()) - 1
        assert statistic < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "cohere2"])
def test_logps_are_those_of_training(family):
    model = tiny_model(family)
    sampling = Sampling(11, temperature=1.3, ends=frozenset(range(3, 60, 14)))
    samples = LocalEngine(model).generate(PROMPTS, keys([4, 4, 4]), sampling)
    tree, scored = pack_rationales(
        PROMPTS,
        [[sample.tokens for sample in of_prompt] for of_prompt in samples],
        [[9]] * len(PROMPTS),
        ends=[[sample.end for sample in of_prompt] for of_prompt in samples],
    )
    logps = TreeModel(model).logprobs(tree, scored, temperature=1.3)[scored.kind[scored.segment] == RATIONALE]
    assert {sample.ended_by for sample in flat(samples)} == {"end", "length"}
    expected = torch.tensor([logp for sample in flat(samples) for logp in sample.logps])
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)


def test_modules_stay_in_the_mode_that_they_were_in():
    model = tiny_llama(character_tokenizer(), attention_dropout=0.5).train()
    model.lm_head.eval()
    LocalEngine(model).generate([[5]], [[0, 1]], Sampling(2))
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "Sampling: max_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "Sampling: temperature must be 0 or more, got -0.5"),
        ({"temperature": math.nan}, "Sampling: temperature must be 0 or more, got nan"),
        ({"top_p": 0}, r"Sampling: top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.5}, r"Sampling: top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, "Sampling: top_k must be 0 or more, got -1"),
    ],
)
def test_sampling_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_tokens": 5} | options)


@pytest.mark.parametrize(
    ("prompts", "keys", "message"),
    [
        ([[5], []], [[1], [2]], "generate: prompts must have at least one token each, got none in prompt 1"),
        ([[5]], [[1], [2]], "generate: keys must be one list for each of 1 prompts, got 2"),
        ([[5, 99]], [[1]], r"generate: prompts must be of tokens in \[0, 99\), got 5 to 99 in prompt 0"),
    ],
)
def test_prompts_and_keys_are_checked(model, prompts, keys, message):
    with pytest.raises(ValueError, match=message):
        LocalEngine(model).generate(prompts, keys, Sampling(3))


def test_rows_are_checked(model):
    with pytest.raises(ValueError, match="LocalEngine: max_rows must be at least 1, got 0"):
        LocalEngine(model, max_rows=0)


def test_nothing_asked_for_is_nothing(model):
    assert LocalEngine(model).generate([], [], Sampling(3)) == []
    given = LocalEngine(model).generate([[5], [6]], [[], [3]], Sampling(3))
    assert [len(of_prompt) for of_prompt in given] == [0, 1]
    assert LocalEngine(model).generate([[5]], [[]], Sampling(3)) == [[]]


def test_logits_that_are_no_numbers_are_refused(model):
    engine = LocalEngine(copy.deepcopy(model))
    engine.generate([[5]], [[0]], Sampling(3))
    with torch.no_grad():
        engine.model.lm_head.weight[3, 3] = math.nan
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="generate: logits must be numbers, got NaN after 0 sampled tokens"):
            engine.generate([[5]], [[0]], Sampling(3, temperature))


def test_paths_longer_than_the_rotary_embeddings_were_made_for_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    LocalEngine(model).generate([[5, 6]], [[0]], Sampling(14))
    with pytest.raises(ValueError, match="with dynamic rotary embeddings a path must have at most 16 tokens, got 17"):
        LocalEngine(model).generate([[5, 6]], [[0]], Sampling(15))


# The model that is trained


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_model_is_found_in_what_wraps_it(model, process_group):
    tree_model = TreeModel(model)
    for wrapped in (model, tree_model, torch.compile(model), torch.compile(tree_model)):
        assert unwrapped(wrapped) is model
    for wrapped in (tree_model, torch.compile(tree_model)):
        assert unwrapped(DistributedDataParallel(wrapped)) is model
    with pytest.raises(TypeError, match="model must be a model of transformers, or wrap one, got Linear"):
        unwrapped(nn.Linear(2, 2))


def test_the_model_is_found_under_an_adapter(model):
    peft = pytest.importorskip("peft")
    inner = copy.deepcopy(model)
    adapted = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"]))
    assert unwrapped(adapted) is inner
    assert unwrapped(TreeModel(adapted.get_base_model())) is inner


def test_a_copy_samples_from_the_model_it_was_last_in_sync_with(model):
    trained = tiny_llama(character_tokenizer(), seed=1)
    expected, old = (LocalEngine(one).generate(PROMPTS, keys([3, 3, 3]), Sampling(6)) for one in (trained, model))
    engine = LocalEngine(copy.deepcopy(model))
    assert engine.generate(PROMPTS, keys([3, 3, 3]), Sampling(6)) == old
    engine.sync(TreeModel(trained))
    assert engine.generate(PROMPTS, keys([3, 3, 3]), Sampling(6)) == expected


def test_an_engine_on_the_trained_model_itself_is_always_in_sync(model):
    weights = copy.deepcopy(model.state_dict())
    engine = LocalEngine(model)
    engine.sync(TreeModel(model))
    assert engine.model is model
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_weights_of_another_model_are_refused(model):
    deeper = tiny_llama(character_tokenizer(), num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"every weight of the one that samples, but model\.layers\.2\."):
        copy_weights(model, deeper)
