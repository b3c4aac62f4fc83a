"""What is taken from other libraries beyond their public interface, or has been renamed by them before.

Each row is looked for at the moment that its user needs it. What has gone, or has other parameters, is one line that
names the package and its version: elsewhere it would be an answer steered at the wrong tokens, or not at all. The
packages have upper bounds in pyproject.toml too.

What is on the list is touched in one module for each library: `library.py` of its backend, mlx-lm's evaluator in
`mlx/evaluator.py`, lm-eval in `tasks/lm_eval.py`. A test holds that, and that no private name is without a row.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from mlx_lqr.errors import InputError

Moment = Literal[
    "mlx", "mlx sampling", "mlx steer", "mlx evaluator", "convert", "torch", "torch steer", "llama", "lm-eval"
]
"""When rows are looked for: a backend loads, a model of its library is steered, something is used for the first time"""


@dataclass(frozen=True)
class Borrowed:
    """Something of another library."""

    package: str
    """Its name on PyPI."""
    place: str
    """`module:attribute.attribute`."""
    user: str
    """The module of ours that needs it, and what for."""
    moment: Moment
    parameters: tuple[str, ...] = ()
    """Names that the signature of what stands there must have."""
    attributes: tuple[str, ...] = ()
    """Names that it, or where `made` is given, an instance of it, must have."""
    made: tuple[Any, ...] | None = None
    """Arguments to make an instance with."""
    sets: tuple[str, ...] = ()
    """Names of attributes that its code sets, where no instance is made cheaply."""

    def missing(self) -> str | None:
        """What is not there as it is needed, or None."""
        module, _, path = self.place.partition(":")
        try:
            thing = _module(module)
            for name in path.split("."):
                thing = getattr(thing, name)
        except (ImportError, AttributeError):
            return self.place
        if self.parameters and (lost := set(self.parameters) - _parameters(thing)):
            return f"the parameter {min(lost)} of {self.place}"
        if lost := set(self.sets) - set(thing.__code__.co_names if self.sets else ()):
            return f"{self.place}.{min(lost)}"
        holder = thing if self.made is None else thing(*self.made)
        if absent := [name for name in self.attributes if not _has(holder, name)]:
            return f"{self.place}.{absent[0]}"
        return None


_CACHES = "mlx_lqr.backends.mlx.library: decodes in mlx-lm's caches, and takes over what they hold"
_FAMILY = "mlx_lqr.backends.mlx.library: does what a config says beyond mlx-lm's own class"
_PROMPTS = "mlx_lqr.backends.mlx.library: learns of prompts"
_EVALUATOR = "mlx_lqr.backends.mlx.evaluator: scores with the steered model"
_LOAD = "mlx_lqr.backends.torch.library: builds what a config says"
_CONVERT = "mlx_lqr.backends.mlx.library: converts what mlx-lm reads, and keeps the precision that it keeps"
_ATTENTION = "mlx_lqr.backends.torch.library: attends in its own way"
_GENERATE = "mlx_lqr.backends.torch.library: learns of prompts; steps are not compiled"
_BATCHING = "mlx_lqr.backends.torch.library: steers generate_batch"
_GGML = "mlx_lqr.backends.llama.library: calls ggml, whose functions llama-cpp-python does not bind"
_REQUESTS = "transformers.generation.continuous_batching.requests"

BORROWED: tuple[Borrowed, ...] = (
    Borrowed("mlx-lm", "mlx_lm.models.cache:make_prompt_cache", _CACHES, "mlx", parameters=("model",)),
    Borrowed("mlx-lm", "mlx_lm.models.cache:KVCache", _CACHES, "mlx", made=(),
             attributes=("keys", "values", "offset", "state", "trim", "is_trimmable", "make_mask")),
    Borrowed("mlx-lm", "mlx_lm.models.cache:RotatingKVCache", _CACHES, "mlx",
             parameters=("max_size", "keep"), made=(8,),
             attributes=("keys", "values", "offset", "keep", "max_size", "_idx", "_temporal_order", "state", "trim",
                         "is_trimmable", "make_mask")),
    Borrowed("mlx-lm", "mlx_lm.models.cache:ArraysCache", _CACHES, "mlx", made=(1,),
             attributes=("cache", "left_padding")),
    Borrowed("mlx-lm", "mlx_lm.models.cache:BatchKVCache", _CACHES, "mlx", made=([0, 1],),
             attributes=("state", "filter", "make_mask")),
    Borrowed("mlx-lm", "mlx_lm.models.cache:BatchRotatingKVCache", _CACHES, "mlx", made=(8, [0, 1]),
             attributes=("state", "filter", "make_mask")),
    Borrowed("mlx-lm", "mlx_lm.models.gemma2:Attention.__init__", "mlx_lqr.backends.mlx.library: masks of its batches",
             "mlx", sets=("repeats",)),
    Borrowed("mlx-lm", "mlx_lm.models.base:create_attention_mask", _FAMILY, "mlx",
             parameters=("cache", "window_size", "return_array")),
    Borrowed("mlx-lm", "mlx_lm.models.switch_layers:SwitchGLU.__init__", _FAMILY, "mlx", parameters=("activation",)),
    *(Borrowed("mlx-lm", f"mlx_lm.sample_utils:{name}", "mlx_lqr.backends.mlx.library: filters", "mlx sampling")
      for name in ("apply_min_p", "apply_top_k", "apply_top_p")),
    Borrowed("mlx-lm", "mlx_lm.generate:generate_step", _PROMPTS, "mlx steer",
             parameters=("prompt", "model", "input_embeddings")),
    Borrowed("mlx-lm", "mlx_lm.generate:speculative_generate_step", _PROMPTS,
             "mlx steer", parameters=("prompt", "model", "draft_model")),
    Borrowed("mlx-lm", "mlx_lm.generate:PromptProcessingBatch.prompt", _PROMPTS,
             "mlx steer", parameters=("self", "tokens")),
    Borrowed("mlx-lm", "mlx_lm.evaluate:MLXLM", _EVALUATOR, "mlx evaluator",
             attributes=("loglikelihood", "loglikelihood_rolling", "generate_until")),
    Borrowed("mlx-lm", "mlx_lm.evaluate:MLXLM.__init__", _EVALUATOR, "mlx evaluator",
             sets=("_model", "_max_tokens", "use_chat_template")),
    Borrowed("mlx-lm", "mlx_lm.evaluate:MLXLM._tokenize", _EVALUATOR, "mlx evaluator", parameters=("self", "texts")),
    Borrowed("mlx-lm", "mlx_lm.evaluate:DEFAULT_MAX_TOKENS", _EVALUATOR, "mlx evaluator"),
    Borrowed("mlx-lm", "mlx_lm.evaluate:MLXLM._process_prompt", "mlx_lqr.backends.mlx.library: learns of contexts",
             "mlx evaluator", parameters=("self", "prompt")),
    Borrowed("mlx-lm", "mlx_lm.evaluate:MLXLM._score_fn", "mlx_lqr.backends.mlx.library: learns of continuations",
             "mlx evaluator", parameters=("self", "inputs")),
    Borrowed("mlx-lm", "mlx_lm.utils:load_model", _CONVERT, "convert",
             parameters=("lazy", "model_config")),
    Borrowed("mlx-lm", "mlx_lm.models.qwen3_moe:Model", _CONVERT, "convert",
             attributes=("quant_predicate",)),
    Borrowed("mlx-lm", "mlx_lm.models.deepseek_v3:Model", _CONVERT,
             "convert", attributes=("cast_predicate",)),
    Borrowed("transformers", "transformers:PreTrainedConfig", _ATTENTION,
             "torch", made=(), attributes=("_attn_implementation_internal", "_attn_implementation")),
    Borrowed("transformers", "transformers:PreTrainedConfig", "mlx_lqr.backends.torch.library: differentiates experts",
             "torch", made=(), attributes=("_experts_implementation_internal", "_experts_implementation")),
    *(Borrowed("transformers", f"transformers:{name}", _LOAD, "torch")
      for name in ("CONFIG_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING")),
    Borrowed("transformers", "transformers.activations:ACT2FN", _LOAD, "torch"),
    Borrowed("transformers", "transformers:PreTrainedModel.from_pretrained", _LOAD, "torch", parameters=("config",)),
    Borrowed("transformers", "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS",
             _ATTENTION, "torch", attributes=("register",)),
    Borrowed("transformers", "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS",
             _ATTENTION, "torch", attributes=("register",)),
    Borrowed("transformers", "transformers:GenerationMixin.generate", _GENERATE,
             "torch steer", parameters=("inputs",)),
    Borrowed("transformers", "transformers:GenerationConfig", _GENERATE,
             "torch steer", made=(), attributes=("disable_compile", "compile_config")),
    Borrowed("transformers", "transformers:GenerationMixin.generate_batch", _BATCHING, "torch steer",
             parameters=("inputs",)),
    Borrowed("transformers", "transformers:GenerationMixin.init_continuous_batching", _BATCHING, "torch steer",
             parameters=("generation_config", "continuous_batching_config")),
    Borrowed("transformers", "transformers.generation.configuration_utils:ContinuousBatchingConfig", _BATCHING,
             "torch steer", made=(),
             attributes=("allow_block_sharing", "use_cuda_graph", "cuda_graph_booleans", "varlen_compile_config",
                         "decode_compile_config", "default_compile_level")),
    Borrowed("transformers", "transformers.generation.continuous_batching.cache:PagedAttentionCache", _BATCHING,
             "torch steer", attributes=("update",)),
    Borrowed("transformers", f"{_REQUESTS}:RequestState", _BATCHING, "torch steer",
             parameters=("request_id", "initial_tokens", "generated_tokens")),
    Borrowed("transformers", f"{_REQUESTS}:RequestState.create_equivalent_initial_request", _BATCHING, "torch steer",
             parameters=("self",)),
    Borrowed("llama-cpp-python", "llama_cpp.llama_cpp:_lib", _GGML, "llama"),
    Borrowed("lm-eval", "lm_eval:simple_evaluate", "mlx_lqr.tasks.lm_eval: runs the tasks", "lm-eval",
             parameters=("model", "tasks", "num_fewshot", "limit")),
    Borrowed("lm-eval", "lm_eval.tasks:TaskManager", "mlx_lqr.tasks.lm_eval: chooses tasks", "lm-eval",
             parameters=("include_path", "include_defaults"), attributes=("all_subtasks",)),
    Borrowed("lm-eval", "lm_eval.utils:handle_non_serializable", "mlx_lqr.tasks.lm_eval: writes results", "lm-eval"),
)  # fmt: skip


@functools.cache
def check_borrowed(moment: Moment) -> None:
    """Look for all that is needed at this moment.

    Raises:
        InputError: something is not there, or is not as it was.
    """
    for row in BORROWED:
        if row.moment == moment and (missing := row.missing()) is not None:
            raise changed(row.package, f"has no {missing}")


def changed(package: str, what: str) -> InputError:
    """The refusal of a version of a package in which something is not as it was."""
    return InputError(
        f"{package} {metadata.version(package)} {what}: this version is not one that mlx-lqr is made for, install "
        "another (pip install -U mlx-lqr brings one)"
    )


def _module(name: str) -> Any:
    if name.startswith(("mlx_lm.models.", "mlx_lm.sample_utils")):
        from mlx_lqr.backends.mlx.library import import_mlx_lm

        return import_mlx_lm(name.removeprefix("mlx_lm."))
    return importlib.import_module(name)


def _parameters(thing: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(thing).parameters)


def _has(holder: Any, name: str) -> bool:
    """Whether it has the attribute, without running the code of a property."""
    owner = holder if inspect.isclass(holder) else type(holder)
    return name in vars(holder) or hasattr(owner, name)
