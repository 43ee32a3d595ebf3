"""The engine for vLLM, against stand-ins for vLLM and TRL that have a model of their own."""

import copy
import inspect
import sys
import threading
import types
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator

from latro.batch import Batch
from latro.config import LatroConfig
from latro.rollout import LocalEngine, Sampling
from latro.text import Text
from latro.vllm import VllmEngine, cut, whole_weights
from tests.test_trainer import TOKENIZER, trainer_of
from tests.tiny import examples, tiny_llama

TEXT = Text(TOKENIZER, stop_strings=["ab", "c"])
LATE = 2  # tokens that the stand-in goes on behind a stop string


@dataclass
class SamplingParams:
    """Those of vllm.SamplingParams that are asked for."""

    n: int = 1
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 16
    logprobs: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class Server:
    """Has weights of its own, looks for stop strings late, and gives the token that ended a sample with the others."""

    def __init__(self):
        self.model = tiny_llama(TOKENIZER, seed=7)
        self.engine = LocalEngine(self.model)
        self.loaded, self.resets, self.asked = [], 0, []
        self.alone = threading.Lock()  # requests come at once, and LocalEngine is for one

    def load_weights(self, weights):
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            self.loaded.append(name)
            with torch.no_grad():
                own[name].copy_(weight)

    def reset_prefix_cache(self):
        self.resets += 1

    def draw(self, prompt, params):
        self.asked.append((prompt, params))
        assert params.ignore_eos and not params.skip_special_tokens and not params.spaces_between_special_tokens
        assert params.n == 1 or params.temperature > 0

        def are_over(rows):
            texts = [TEXT.decode(row[: max(len(row) - LATE, 0)]) for row in rows]
            return [any(stop in text for stop in params.stop) for text in texts]

        sampling = Sampling(
            params.max_tokens,
            params.temperature,
            params.top_p,
            params.top_k,
            frozenset(params.stop_token_ids),
            are_over,
        )
        keys = [params.seed + k for k in range(params.n)]
        with self.alone:
            (samples,) = self.engine.generate([prompt], [keys], sampling)
        return [(sample.tokens + [t for t in [sample.end] if t is not None], sample.logps) for sample in samples]


class VLLMClient:
    """As TRL's."""

    servers: ClassVar[list] = []
    mode = "processed_logprobs"

    def __init__(
        self,
        base_url: str | None = None,
        host: str = "0.0.0.0",
        server_port: int = 8000,
        group_port: int = 51216,
        connection_timeout: float = 0.0,
    ):
        self.base_url = base_url
        self.server = self.servers[-1]

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": self.mode}}

    def generate(
        self,
        prompts,
        features=None,
        n=1,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        max_tokens=16,
        logprobs=0,
        structured_outputs_regex=None,
        generation_kwargs=None,
    ):
        assert (features, repetition_penalty, min_p, structured_outputs_regex) == (None, 1.0, 0.0, None)
        params = SamplingParams(n, None, temperature, top_p, top_k, max_tokens, logprobs)
        vars(params).update(generation_kwargs)
        drawn = [one for prompt in prompts for one in self.server.draw(prompt, params)]
        return {
            "prompt_ids": prompts,
            "completion_ids": [tokens for tokens, _ in drawn],
            "logprobs": [[[logp] for logp in logps] for _, logps in drawn],
            "logprob_token_ids": [[[token] for token in tokens] for tokens, _ in drawn],
        }

    def update_named_params(self, metadata, named_params):
        weights = list(named_params)
        assert metadata == [(n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in weights]
        self.server.load_weights(weights)

    def reset_prefix_cache(self):
        self.server.reset_prefix_cache()


class LLM:
    """As vLLM's, with weights behind as many attributes."""

    def __init__(self, server):
        self.server = server
        runner = types.SimpleNamespace(model=server)
        executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))
        self.llm_engine = types.SimpleNamespace(model_executor=executor)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        found = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            outputs = [
                types.SimpleNamespace(
                    token_ids=tuple(tokens),
                    logprobs=[{t: types.SimpleNamespace(logprob=logp)} for t, logp in zip(tokens, logps, strict=True)],
                )
                for tokens, logps in self.server.draw(prompt["prompt_token_ids"], params)
            ]
            found.append(types.SimpleNamespace(outputs=outputs))
        return found

    def reset_prefix_cache(self):
        self.server.reset_prefix_cache()


class VLLMGeneration:
    """As TRL's."""

    def __init__(
        self,
        model,
        accelerator,
        processing_class,
        mode="colocate",
        server_base_url=None,
        server_timeout=240.0,
        group_port=51216,
        gpu_memory_utilization=0.9,
        max_model_length=None,
    ):
        self.given = {name: value for name, value in locals().items() if name != "self"}
        self.server = Server()
        if mode == "server":
            VLLMClient.servers.append(self.server)
            self.vllm_client = VLLMClient(base_url=server_base_url)
        else:
            self.llm = LLM(self.server)


@pytest.fixture
def stand_ins(monkeypatch):
    """In place of the packages."""
    modules = {
        "vllm": {"SamplingParams": SamplingParams},
        "trl": {},
        "trl.generation": {},
        "trl.generation.vllm_client": {"VLLMClient": VLLMClient},
        "trl.generation.vllm_generation": {"VLLMGeneration": VLLMGeneration},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


MODES = pytest.mark.parametrize("mode", ["server", "colocate"])


def config_of(mode, **options):
    return LatroConfig(output_dir="x", use_cpu=True, use_vllm=True, vllm_mode=mode, **options)


def engine_of(mode, model=None, **options):
    return VllmEngine(model or tiny_llama(TOKENIZER), config_of(mode, **options), Accelerator(cpu=True), TOKENIZER)


PROMPTS = [[5, 6, 7], [9, 10], [11, 12, 13, 14]]
KEYS = [[10**18, 3, 4], [-(2**63), 5], [2**63 - 1] * 4]


@MODES
def test_samples_end_as_the_protocol_says(stand_ins, mode):
    """Those of the model that was handed over, cut where it would have stopped itself."""
    model = tiny_llama(TOKENIZER)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)  # nearly any token, ends and stop strings among them
    engine = engine_of(mode, model)
    engine.sync(model)
    sampling = Sampling(60, 0.9, 0.95, 40, frozenset({1, 30}), TEXT.are_over, TEXT.stop_strings)
    ended = []
    found = engine.generate(PROMPTS, KEYS, sampling, ended.append)
    keys = [[of_prompt[0] % (1 << 62) + k for k in range(len(of_prompt))] for of_prompt in KEYS]
    expected = LocalEngine(model).generate(PROMPTS, keys, sampling)
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
        assert replace(one, logps=[]) == replace(other, logps=[])
    assert {sample.ended_by for of_prompt in found for sample in of_prompt} >= {"stop", "end"}
    assert ended == [3, 2, 4]


@MODES
def test_greedy_sampling(stand_ins, mode):
    engine = engine_of(mode)
    engine.sync(engine.model)
    (found,) = engine.generate([[5, 6]], [[0, 1]], Sampling(5, temperature=0))
    assert found[0] == found[1] and found[0] is not found[1]
    assert found[:1] == LocalEngine(engine.model).generate([[5, 6]], [[0]], Sampling(5, temperature=0))[0]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("xyz", ("xyz", "length", 3)),
        ("xyz<", ("xyz", "end", 4)),
        ("x<yz", ("x", "end", 2)),
        ("xabyz", ("xab", "stop", 3)),
        ("xabyz<", ("xab", "stop", 3)),
        ("xa<b", ("xa", "end", 3)),
        ("c", ("c", "stop", 1)),
        ("", ("", "length", 0)),
    ],
)
def test_cut(tokens, expected):
    end = TOKENIZER.eos_token_id
    row = [end if character == "<" else TOKENIZER(character)["input_ids"][0] for character in tokens]
    logps = [-float(n) for n in range(len(row))]
    sample = cut(row, logps, Sampling(9, ends=frozenset({end}), are_over=TEXT.are_over))
    assert (TEXT.decode(sample.tokens), sample.ended_by, len(sample.logps)) == expected
    assert sample.logps == logps[: len(sample.logps)]
    assert sample.end == (end if expected[1] == "end" else None)


@pytest.mark.parametrize("logps", [[-1.0], [-1.0, None], [-1.0, float("nan")]], ids=str)
def test_log_probs_that_are_none_are_refused(logps):
    with pytest.raises(ValueError, match="vLLM must give a log-prob for each of 2 tokens"):
        cut([5, 6], logps, Sampling(9))


# Weights


@MODES
def test_weights_are_pushed_whole_and_the_prefix_cache_is_emptied(stand_ins, mode):
    engine = engine_of(mode)
    server = engine.generation.server
    for n in (1, 2):
        engine.sync(engine.model)
        assert server.resets == n
    names = [name for name, _ in engine.model.named_parameters()]
    assert server.loaded == names * 2
    for name, weight in server.model.named_parameters():
        assert torch.equal(weight, dict(engine.model.named_parameters())[name])


@MODES
def test_another_model_is_refused(stand_ins, mode):
    with pytest.raises(ValueError, match="the one that the VllmEngine was made for"):
        engine_of(mode).sync(tiny_llama(TOKENIZER))


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_in_the_weights_and_the_model_stays_as_it_is(dora):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    model = peft.get_peft_model(tiny_llama(TOKENIZER), adapter)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = dict(whole_weights(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    plain = tiny_llama(TOKENIZER)
    assert found.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(found)
    tokens = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


# In the trainer


def trained(tmp_path, mode, monkeypatch, spoilt=False, **options):
    """-> of each update the log-probs that samples were drawn with, and those that the policy found."""
    if spoilt:
        sync = VllmEngine.sync
        monkeypatch.setattr(VllmEngine, "sync", lambda self, model: sync(self, model) if first.pop() else None)
    first = [False] * 9 + [True]
    trainer = trainer_of(
        tmp_path, use_vllm=True, vllm_mode=mode, max_steps=3, learning_rate=3e-2, temperature=0.8, **options
    )
    seen, record = [], trainer.record

    def kept(batch: Batch, out, ref_logps):
        drawn = ~batch.sampling_logps.isnan()
        seen.append((batch.sampling_logps[drawn].float(), out.logps[drawn].clone()))
        record(batch, out, ref_logps)

    trainer.record = kept
    trainer.train()
    assert isinstance(trainer.engine, VllmEngine)
    return seen


@MODES
def test_tokens_after_an_update_are_the_new_weights(stand_ins, mode, tmp_path, monkeypatch):
    """And would not be without a sync after it."""
    for drawn, policy in trained(tmp_path / "synced", mode, monkeypatch):
        torch.testing.assert_close(drawn, policy, rtol=1e-3, atol=1e-3)
    first, *others = trained(tmp_path / "spoilt", mode, monkeypatch, spoilt=True)
    torch.testing.assert_close(*first, rtol=1e-3, atol=1e-3)
    assert all((drawn - policy).abs().max() > 0.1 for drawn, policy in others)


def test_an_engine_of_an_own_model_samples_the_new_weights(tmp_path):
    """The same of any engine, by `copy_weights`."""
    engine = LocalEngine(tiny_llama(TOKENIZER, seed=7))
    trainer = trainer_of(tmp_path, engine, max_steps=2, learning_rate=3e-2)
    trainer.train()
    keys, sampling = [[1, 2, 3]], Sampling(12)
    stale = engine.generate(PROMPTS[:1], keys, sampling)
    expected = LocalEngine(trainer.tree_model.model).generate(PROMPTS[:1], keys, sampling)
    assert stale != expected
    engine.sync(trainer.model_wrapped)
    assert engine.generate(PROMPTS[:1], keys, sampling) == expected


def test_what_is_asked_of_vllm(stand_ins, tmp_path):
    trainer = trainer_of(
        tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://there:1", top_p=0.9, top_k=30
    )
    given = trainer.engine.generation.given
    assert (given["mode"], given["server_base_url"], given["group_port"]) == ("server", "http://there:1", 51216)
    assert given["model"] is trainer.tree_model.model
    trainer.train()
    asked = trainer.engine.generation.server.asked
    assert len(asked) == 2  # a request for each prompt
    for _, params in asked:
        assert (params.n, params.top_p, params.top_k, params.max_tokens, params.logprobs) == (3, 0.9, 30, 12, 0)
        assert params.stop == ["The answer is"] and params.stop_token_ids == [TOKENIZER.eos_token_id]
    assert len({params.seed for _, params in asked}) == 2


def test_evaluation(stand_ins, tmp_path):
    trainer = trainer_of(tmp_path, use_vllm=True, eval_dataset=examples(3), majority=2)
    assert {"eval_accuracy", "eval_majority@2"} <= trainer.evaluate().keys()


# What is refused


def test_without_vllm_it_is_said_what_to_install():
    if "vllm" in sys.modules or _is_installed("vllm"):
        pytest.skip("vllm is installed")
    with pytest.raises(ImportError, match=r"use_vllm needs TRL 1.16 or later with vLLM: pip install 'trl\[vllm\]'; No"):
        engine_of("server")


def _is_installed(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_a_server_with_other_log_probs_is_refused(stand_ins, monkeypatch):
    monkeypatch.setattr(VLLMClient, "mode", "raw_logprobs")
    with pytest.raises(
        ValueError, match="got a server with --logprobs-mode raw_logprobs; start it with --logprobs-mode"
    ):
        engine_of("server")


def test_bad_options_are_refused(stand_ins, tmp_path):
    with pytest.raises(ValueError, match="vllm_mode must be colocate or server, got 'here'"):
        config_of("here")
    with pytest.raises(ValueError, match="engine must be None with use_vllm, which is one, got LocalEngine"):
        trainer_of(tmp_path, LocalEngine(tiny_llama(TOKENIZER)), use_vllm=True)
    with pytest.raises(ValueError, match="each of 1 prompts must have a token and a key at least, got lengths"):
        engine_of("colocate").generate([[]], [[1]], Sampling(3))


def test_adapters_that_cannot_be_merged_are_refused(stand_ins):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(copy.deepcopy(tiny_llama(TOKENIZER)), adapter)
    with pytest.raises(ValueError, match=r"an adapter that has modules_to_save, got .*lm_head"):
        engine_of("server", model)


def test_stand_ins_have_the_signatures_of_what_they_stand_for():
    """Every parameter that they have is there by the same name, with the same default."""
    pytest.importorskip("trl", reason="the package trl is not installed")
    from trl.generation import vllm_client, vllm_generation

    for own, theirs in (
        (VLLMClient.__init__, vllm_client.VLLMClient.__init__),
        (VLLMClient.generate, vllm_client.VLLMClient.generate),
        (VLLMClient.update_named_params, vllm_client.VLLMClient.update_named_params),
        (VLLMClient.reset_prefix_cache, vllm_client.VLLMClient.reset_prefix_cache),
        (VLLMClient.get_server_info, vllm_client.VLLMClient.get_server_info),
        (VLLMGeneration.__init__, vllm_generation.VLLMGeneration.__init__),
    ):
        real = inspect.signature(theirs).parameters
        for name, parameter in inspect.signature(own).parameters.items():
            assert real[name].default == parameter.default, (own.__qualname__, name)
