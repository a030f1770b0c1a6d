"""GPU memory and checkpoint sizes of a run, from its configuration and the model's config.json; see docs/memory.md.

No weights are loaded: parameters are counted in the headers of the safetensors files, or on the meta device. All sizes
are bytes on one GPU unless a name says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe.gad.run.checkpoint import has_score_head, tensor_shapes
from recipe.gad.run.config import (
    ACTOR,
    ACTOR_MODEL,
    REF,
    ROLLOUT,
    get,
    has_discriminator,
    integer,
    lora_rank,
    needs_reference,
    parallelism,
    world_size,
)
from recipe.gad.run.findings import InputError

GIB = 1024**3
DTYPE_BYTES = {"fp32": 4, "float32": 4, "float": 4, "float64": 8, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
FLOAT32_BYTES = 4
ADAM_MOMENTS = 2
TRAINING_LOGITS = 2
"""Tensors of tokens x vocabulary that are alive at once: logits and logits / temperature, whose gradients flash-attn's
loss kernel writes in their place (measured: docs/memory.md)."""
FORWARD_LOGITS = 2
"""The same without a backward pass: logits and logits / temperature."""


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture-of-experts decoder."""

    parameters: int
    """Of all experts of all layers."""
    count: int
    """Experts of one layer."""
    active: int
    """Experts that one token passes in a layer."""
    intermediate: int
    shared_intermediate: int
    """Intermediate size of the expert that every token passes besides; 0: there is none."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, as its config.json names them."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    """Of a dense MLP; 0: every layer has experts."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    experts: Experts | None = None

    @property
    def head_parameters(self) -> int:
        """Parameters of the language-model head that are not the embedding's."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def root_parameters(self) -> int:
        """Parameters outside the layers that FSDP gathers for the whole pass: embedding and head."""
        return self.vocabulary * self.hidden + self.head_parameters

    @property
    def layer_parameters(self) -> int:
        return (self.parameters - self.root_parameters) // self.layers

    @property
    def active_layer_parameters(self) -> int:
        """Parameters of all layers that one token passes."""
        idle = 0
        if self.experts:
            idle = self.experts.parameters * (self.experts.count - self.experts.active) // self.experts.count
        return self.parameters - self.root_parameters - idle

    def lora_parameters(self, rank: int) -> int:
        """Parameters of LoRA matrices on every linear map of every layer.

        PEFT gives an expert's gate and up, which transformers keeps in one weight, twice the rank.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        width = self.experts.shared_intermediate if self.experts else self.intermediate
        mlp = 3 * (self.hidden + width) if width else 0
        if experts := self.experts:
            router = self.hidden + experts.count
            mlp += router + experts.count * (3 * self.hidden + 5 * experts.intermediate)
        return rank * self.layers * (attention + mlp)

    def layer_activation_bytes(self, compute_bytes: int) -> int:
        """Bytes per token that the backward pass of one layer needs: RMS norms in float32, attention, gated MLP.

        A layer with experts needs an MLP for each active one, its input and output, and the router's probabilities.
        """
        norms = 2 * self.hidden * (FLOAT32_BYTES + 2 * compute_bytes)
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        mlp = compute_bytes * 4 * self.intermediate
        if self.experts:
            routed = self.experts.active * (4 * self.experts.intermediate + 2 * self.hidden)
            sparse = (
                compute_bytes * (routed + 4 * self.experts.shared_intermediate) + FLOAT32_BYTES * self.experts.count
            )
            mlp = max(mlp, sparse)
        return norms + compute_bytes * attention + mlp

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes of the KV cache per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


def model_shape(folder: Path, value_model: bool, trust_remote_code: bool = False) -> ModelShape:
    """Shape of the model in a Hugging Face folder.

    Args:
        folder: holds config.json and weights in any format.
        value_model: the model is loaded as a critic: with a score head in place of the language-model head.
        trust_remote_code: as in ``from_pretrained``.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    shape = ModelShape(
        parameters=0,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        tied=bool(text.tie_word_embeddings),
    )
    if any(folder.glob("*.safetensors")):
        shapes = tensor_shapes(folder)
        has_head = "lm_head.weight" in shapes
    else:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        has_head = not shape.tied
    parameters = sum(map(prod, shapes.values()))
    if experts := _experts(text, shapes):
        shape = replace(shape, intermediate=_mlp_width(shapes, shared=False), experts=experts)
    if has_head and (shape.tied or value_model):  # a tied copy of the embedding, or a head that a critic drops
        parameters -= shape.vocabulary * shape.hidden
    if not value_model:
        return replace(shape, parameters=parameters)
    score_head = 0 if has_score_head(folder) else shape.hidden + 1
    return replace(shape, parameters=parameters + score_head, tied=True)


def _experts(config: Any, shapes: dict[str, list[int]]) -> Experts | None:
    """Experts of a model; None: it has none, or its configuration does not say how many a token passes."""
    parameters = sum(prod(size) for name, size in shapes.items() if ".experts." in name)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((number for name in names if isinstance(number := getattr(config, name, None), int)), 0)
    active = getattr(config, "num_experts_per_tok", None)
    if not (parameters and count and isinstance(active, int)):
        return None
    return Experts(
        parameters=parameters,
        count=count,
        active=active,
        intermediate=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        shared_intermediate=_mlp_width(shapes, shared=True),
    )


def _mlp_width(shapes: dict[str, list[int]], shared: bool) -> int:
    """Largest intermediate size of the MLPs that every token passes: shared experts or those of dense layers; or 0."""
    gates = [(name, size) for name, size in shapes.items() if name.endswith(".gate_proj.weight")]
    return max((size[0] for name, size in gates if ".experts." not in name and ("shared" in name) == shared), default=0)


@dataclass(frozen=True)
class Training:
    """How a role runs on one GPU."""

    shards: int
    """GPUs that share weights, gradients and optimizer state."""
    tokens: int
    """Tokens of the largest micro-batch on this GPU."""
    weight_bytes: int = 4
    compute_bytes: int = 2
    trainable: int | None = None
    """Trained parameters: those of LoRA; None: all of the model's, 0: forward only (the reference)."""
    head: int = 0
    """Parameters of the model itself that are trained beside those of LoRA (a discriminator's score head)."""
    gradient_checkpointing: bool = True
    logits: bool = True
    """Logits of the whole vocabulary are materialized (a language model without fused kernels)."""
    param_offload: bool = False
    optimizer_offload: bool = False
    cpu_states: bool = False
    """Weights, gradients and optimizer state stay on the CPU at all times (FSDP2's offload policy, the reference)."""
    average: bool = False
    """A float32 average of what is trained is kept where the weights were at the start (gad.discriminator_ema)."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one role on one GPU."""

    weights: float
    """With their average, if it is on the GPU."""
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    step: float
    """Temporaries of the optimizer step, after the activations are freed."""
    resident: float
    """What stays on the GPU while another role works."""

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        return self.states + max(self.gathered + self.activations + self.logits, self.step)


def role_memory(shape: ModelShape, run: Training) -> RoleMemory:
    """Memory of one role on one GPU; the formulas of docs/memory.md in the order of its table."""
    forward_only = run.trainable == 0
    trained = shape.parameters if run.trainable is None else run.trainable
    share = 0.0 if run.cpu_states else run.weight_bytes / run.shards
    weights = (shape.parameters + (0 if run.trainable is None else trained)) * share
    trained += run.head
    if run.average and not (run.param_offload or run.cpu_states):
        weights += FLOAT32_BYTES * trained / run.shards
    gradients, optimizer = trained * share, ADAM_MOMENTS * trained * share
    layer = shape.layer_activation_bytes(run.compute_bytes)
    gathered = run.compute_bytes * (shape.root_parameters + 2 * shape.layer_parameters)
    if not forward_only:
        unit_gradients = run.compute_bytes * shape.root_parameters
        unit_gradients += (run.compute_bytes + FLOAT32_BYTES) * shape.layer_parameters
        gathered += unit_gradients if run.trainable is None else 0
    if forward_only:
        activations = run.tokens * layer
    elif run.gradient_checkpointing:
        activations = run.tokens * (shape.layers * shape.hidden * run.compute_bytes + layer)
    else:
        activations = run.tokens * shape.layers * layer
    copies = 0 if not run.logits else FORWARD_LOGITS if forward_only else TRAINING_LOGITS
    return RoleMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gathered=float(gathered),
        activations=float(activations),
        logits=float(copies * run.tokens * shape.vocabulary * run.compute_bytes),
        step=trained * share,
        resident=(0.0 if run.param_offload else weights) + (0.0 if run.optimizer_offload else optimizer),
    )


def fresh_memory(shape: ModelShape, tokens: int) -> RoleMemory:
    """Memory of a fresh discriminator of validation (gad.fresh_discriminator) on the GPU that trains it.

    float32 weights on this GPU alone, which autocast keeps in bfloat16 too; activations are recomputed.

    Args:
        shape: of its base model as a value model.
        tokens: of its largest micro-batch.
    """
    run = Training(shards=1, tokens=tokens, logits=False, param_offload=True, optimizer_offload=True)
    return replace(role_memory(shape, run), gathered=float(run.compute_bytes * shape.parameters))


def checkpoint_bytes(shape: ModelShape, run: Training, contents: Sequence[str]) -> int:
    """Bytes on disk of one checkpoint of one role, over all ranks; ``contents`` is checkpoint.save_contents."""
    trained = shape.parameters if run.trainable is None else run.trainable
    whole = shape.parameters + (0 if run.trainable is None else trained)
    sizes = {"model": whole, "hf_model": shape.parameters, "optimizer": ADAM_MOMENTS * (trained + run.head)}
    average = FLOAT32_BYTES * (trained + run.head) if run.average else 0
    return average + run.weight_bytes * sum(size for name, size in sizes.items() if name in contents)


def checkpoints_on_disk(saves: int | None, keep: int | None) -> int | None:
    """Most checkpoints of one role that exist at the same time; None: no bound.

    verl removes the oldest before it writes the new one, except with ``keep`` = 1: then both exist for a while.

    Args:
        saves: checkpoints that the run writes; None: unknown.
        keep: trainer.max_actor_ckpt_to_keep or max_critic_ckpt_to_keep; None or below 1: all.
    """
    if not keep or keep < 1:
        return saves
    most = 2 if keep == 1 else keep
    return most if saves is None else min(saves, most)


# ---------------------------------------------------------------------- from a run's configuration


def _dtype_bytes(config: DictConfig, key: str, default: str) -> int:
    if (name := get(config, key, default)) not in DTYPE_BYTES:
        raise InputError(f"{key}={name}: expected one of {', '.join(DTYPE_BYTES)}", fix=f"{key}={default}")
    return DTYPE_BYTES[name]


def training(config: DictConfig, role: str, shape: ModelShape) -> Training | None:
    """How ``role`` (ACTOR, REF or "critic") runs; None for engines other than FSDP, which have no estimate."""
    if get(config, f"{role}.strategy") not in ("fsdp", "fsdp2"):
        return None
    engine = f"{role}.fsdp" if role == "critic" else f"{role}.fsdp_config"
    model = "critic.model" if role == "critic" else ACTOR_MODEL
    size, gpus = integer(config, f"{engine}.fsdp_size", -1, minimum=-1), world_size(config)
    sharing = (parallelism(config, role) or (1, 1))[1]
    prefix = f"{role}.log_prob" if role == REF else f"{role}.ppo"
    dynamic = get(config, f"{REF}.log_prob_use_dynamic_bsz" if role == REF else f"{role}.use_dynamic_bsz")
    if dynamic:
        tokens = integer(config, f"{prefix}_max_token_len_per_gpu")
    else:
        row = integer(config, "data.max_prompt_length") + integer(config, "data.max_response_length")
        tokens = -(-integer(config, f"{prefix}_micro_batch_size_per_gpu") * row // sharing)
    rank = lora_rank(config, model)
    forward_only = role == REF
    return Training(
        shards=min(size, gpus) if size > 0 else gpus,
        tokens=tokens,
        weight_bytes=_dtype_bytes(config, f"{engine}.model_dtype", "bf16" if forward_only else "fp32"),
        compute_bytes=_dtype_bytes(config, f"{engine}.mixed_precision.param_dtype", "bf16"),
        trainable=0 if forward_only else shape.lora_parameters(rank) if rank else None,
        head=shape.hidden + 1 if rank and role == "critic" else 0,
        gradient_checkpointing=bool(get(config, f"{model}.enable_gradient_checkpointing")),
        logits=role != "critic" and not get(config, f"{model}.use_fused_kernels"),
        param_offload=bool(get(config, f"{engine}.param_offload")),
        optimizer_offload=bool(get(config, f"{engine}.optimizer_offload")),
        cpu_states=forward_only or bool(get(config, f"{engine}.offload_policy")),
        average=role == "critic" and bool(get(config, "gad.discriminator_ema")),
    )


def trained_roles(config: DictConfig) -> list[tuple[str, str]]:
    """(role, key of its model folder) of the roles that are trained and saved."""
    roles = [(ACTOR, f"{ACTOR_MODEL}.path")]
    return [*roles, ("critic", "critic.model.path")] if has_discriminator(config) else roles


def roles(config: DictConfig) -> list[tuple[str, str]]:
    """(role, key of its model folder) of every role that runs in the trainer's processes."""
    apart = needs_reference(config) and not lora_rank(config, ACTOR_MODEL)  # else it is the actor without its adapter
    return [*trained_roles(config), *([(REF, f"{ACTOR_MODEL}.path")] if apart else [])]


def rollout_weight_bytes(config: DictConfig, shape: ModelShape) -> float:
    """Bytes of the rollout engine's weights on one GPU."""
    element = _dtype_bytes(config, f"{ROLLOUT}.dtype", "bfloat16")
    return shape.parameters * element / integer(config, f"{ROLLOUT}.tensor_model_parallel_size", 1)


def kv_tokens(config: DictConfig, shape: ModelShape, rollout_bytes: float) -> int:
    """Tokens of KV cache of one rollout engine, if it may use ``rollout_bytes`` of each of its GPUs."""
    element = _dtype_bytes(config, f"{ROLLOUT}.dtype", "bfloat16")
    shared = min(integer(config, f"{ROLLOUT}.tensor_model_parallel_size", 1), shape.kv_heads)
    return int((rollout_bytes - rollout_weight_bytes(config, shape)) // (shape.kv_bytes(element) / shared))
