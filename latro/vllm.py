"""Sampling by vLLM, in a server of its own or beside the trainer (`pip install 'trl[vllm]'`, TRL 1.16 or later).

TRL starts vLLM or connects to a server. What is asked of it is ours: a request for each prompt with a seed of its own,
tokens in and tokens out. So is what is sent to it: each weight whole, with what an adapter adds to it, and the model
left as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from latro.config import LatroConfig
from latro.rollout import Sample, Sampling, unwrapped, whole

CONNECTIONS = 64  # to a server at once: as many as TRL's client keeps open
PROCESSED = "processed_logprobs"  # of the distribution that tokens are drawn from: at its temperature, cut by top_p

Drawn = tuple[list[int], list[float]]  # tokens, one that ended them included, and their log-probs


class VllmEngine:
    """An `Engine` (latro/rollout.py). Sample k of a prompt has the seed of the prompt's first key, plus k."""

    def __init__(
        self, model: nn.Module, args: LatroConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """model: the one that is trained, of transformers or of PEFT."""
        _check_model(model)
        try:
            import vllm
            from trl.generation.vllm_client import VLLMClient
            from trl.generation.vllm_generation import VLLMGeneration
        except ImportError as error:
            raise ImportError(
                f"use_vllm needs TRL 1.16 or later with vLLM: pip install 'trl[vllm]'; {error}"
            ) from error
        self.model, self.accelerator, self.vllm = model, accelerator, vllm
        self.in_server = args.vllm_mode == "server"
        self.generation = VLLMGeneration(
            model=model,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
        )
        self._names: list[tuple[str, str, list[int]]] = []  # of the weights, their dtypes and shapes
        if self.in_server:
            # Each process asks for itself: prompts need not be gathered, nor be as many everywhere.
            self.client = (
                self.generation.vllm_client
                if accelerator.is_main_process
                else VLLMClient(args.vllm_server_base_url, connection_timeout=args.vllm_server_timeout)
            )
            _check_server(self.client)

    def sync(self, model: nn.Module) -> None:
        if unwrapped(model) is not unwrapped(self.model):
            raise ValueError("sync: the model must be the one that the VllmEngine was made for, got another one")
        with torch.no_grad():
            if self.in_server:
                self._send()
            else:
                for named in whole_weights(self.model):
                    self._loader.load_weights([named])
                self.generation.llm.reset_prefix_cache()
        self.accelerator.wait_for_everyone()  # none asks a server that has not got them all

    def generate(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[Sequence[int]],
        sampling: Sampling,
        progress: Callable[[int], object] = lambda ended: None,
    ) -> list[list[Sample]]:
        if len(keys) != len(prompts) or not all(prompts) or not all(keys):
            raise ValueError(
                f"generate: each of {len(prompts)} prompts must have a token and a key at least, got lengths "
                f"{[len(prompt) for prompt in prompts]} and {[len(of_prompt) for of_prompt in keys]}"
            )
        requests = [_request(of_prompt, sampling) for of_prompt in keys]
        ask = self._ask_server if self.in_server else self._ask_here
        samples = []
        for drawn, of_prompt in zip(ask(prompts, requests), keys, strict=True):
            if sampling.temperature == 0:  # of which vLLM makes one only
                drawn = drawn * len(of_prompt)
            samples.append([cut(*one, sampling) for one in drawn])
            progress(len(of_prompt))
        return samples

    def _ask_server(self, prompts: Sequence[list[int]], requests: list[dict[str, Any]]) -> Iterator[list[Drawn]]:
        def ask(prompt: list[int], request: dict[str, Any]) -> list[Drawn]:
            named = {
                name: request.pop(name) for name in ("n", "temperature", "top_p", "top_k", "max_tokens", "logprobs")
            }
            found = self.client.generate(prompts=[prompt], **named, generation_kwargs=request)
            logps = [[logp for (logp,) in of_one] for of_one in found["logprobs"]]
            return list(zip(found["completion_ids"], logps, strict=True))

        with ThreadPoolExecutor(CONNECTIONS) as threads:
            yield from threads.map(ask, prompts, requests)

    def _ask_here(self, prompts: Sequence[list[int]], requests: list[dict[str, Any]]) -> Iterator[list[Drawn]]:
        with torch.autocast(self.accelerator.device.type, enabled=False):
            found = self.generation.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                sampling_params=[self.vllm.SamplingParams(**request) for request in requests],
                use_tqdm=False,
            )
        for of_prompt in found:
            yield [(list(one.token_ids), _logps(one.token_ids, one.logprobs)) for one in of_prompt.outputs]

    def _send(self) -> None:
        """A server is told what comes before it comes."""
        self._names = self._names or [
            (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
            for name, weight in whole_weights(self.model)
        ]
        weights = whole_weights(self.model)
        if self.accelerator.is_main_process:
            self.client.update_named_params(self._names, weights)
            self.client.reset_prefix_cache()
        else:
            for _ in weights:  # that all processes gather
                pass

    @property
    def _loader(self) -> Any:
        """vLLM's model, which takes weights by the names of transformers."""
        return self.generation.llm.llm_engine.model_executor.driver_worker.model_runner.model


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, whole and with what adapters add to it, by the name that it has in a model without adapters.
    Of a sharded model every process must go through all of them."""
    inner = unwrapped(model)
    adapted = {name: module for name, module in inner.named_modules() if _is_adapted(module)}
    for name, module in adapted.items():
        merged = _gathered_copy(module)  # to merge into the module itself and out again would change it by rounding
        merged.merge()
        for own, weight in merged.get_base_layer().named_parameters():
            yield f"{name}.{own}", weight.detach()
    for name, weight in inner.named_parameters():
        if not any(name.startswith(f"{module}.") for module in adapted):
            with whole(weight) as gathered:
                yield name.replace("_checkpoint_wrapped_module.", ""), gathered.detach()


def _gathered_copy(module: nn.Module) -> Any:
    with ExitStack() as gathered:
        # In place of the copies that would be made of them.
        weights = {id(p): nn.Parameter(gathered.enter_context(whole(p)).detach().clone()) for p in module.parameters()}
        return copy.deepcopy(module, weights)


def cut(tokens: list[int], logps: list[float], sampling: Sampling) -> Sample:
    """What `Engine.generate` promises, of tokens that may go on behind a stop string."""
    if len(logps) != len(tokens) or any(logp is None or math.isnan(logp) for logp in logps):
        raise ValueError(
            f"generate: vLLM must give a log-prob for each of {len(tokens)} tokens, got {len(logps)}: {logps!r:.80}"
        )
    end = next((n for n, token in enumerate(tokens) if token in sampling.ends), len(tokens))
    over = sampling.are_over([tokens[:n] for n in range(1, end + 1)]) if end else []
    if True in over:
        count = over.index(True) + 1
        return Sample(tokens[:count], logps[:count], None, "stop")
    if end < len(tokens):
        return Sample(tokens[:end], logps[: end + 1], tokens[end], "end")
    return Sample(tokens, logps)


def _request(keys: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """In vLLM's words. It ends where we would or later, never at tokens that it takes for an end itself."""
    return {
        "n": 1 if sampling.temperature == 0 else len(keys),
        "seed": keys[0] % (1 << 62),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "logprobs": 0,  # of the drawn token alone
        "stop": list(sampling.stop_strings),
        "stop_token_ids": sorted(sampling.ends),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }


def _logps(tokens: Iterable[int], found: Iterable[Any]) -> list[float]:
    return [of_one[token].logprob for token, of_one in zip(tokens, found, strict=True)]


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merge")


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "disable_adapter"):
        saved = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
        if saved:
            raise ValueError(f"use_vllm must not be given with an adapter that has modules_to_save, got {saved[0]}")


def _check_server(client: Any) -> None:
    mode = client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != PROCESSED:
        raise ValueError(
            f"use_vllm needs the log-probs of the distribution that tokens are drawn from, got a server with "
            f"--logprobs-mode {mode}; start it with --logprobs-mode {PROCESSED}"
        )
