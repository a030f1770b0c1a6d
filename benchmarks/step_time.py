"""Step time of GAD against stock GRPO and against the naive pairwise update, step by step in one running trainer.

    python benchmarks/step_time.py --size 0.5b                        # one GPU, vLLM rollout
    python benchmarks/step_time.py --size tiny --device cpu           # what it does, without a GPU
    python benchmarks/step_time.py --size 0.5b trainer.n_gpus_per_node=2 actor_rollout_ref.actor.strategy=fsdp2

One trainer with actor, reference, discriminator and rollout engine runs all sides in turn (side 1, 2, ..., 1, 2, ...),
so that they share machine, processes, weights and noise; the first rounds do not count. Weights are random, answers
are forced to their full length, teacher answers are as long. Sides:

    grpo          stock verl's GRPO step: no discriminator, no teacher rows
    gad           GAD as users run it
    gad_separate  GAD with a pass of its own for D's scores and for old_log_prob, and stock's outputs of vLLM
    gad_pairwise  gad_separate with the teacher run once per student sample in D's update
    gad_unscored  gad_separate without the pass for D's scores (random rewards): what scoring costs

All but gad get their answers from vLLM as stock verl does, token by token with text. All sides look for finished
rollouts as often (gad.poll_interval), so stock's 2 s polling does not count against it.
Further arguments are Hydra overrides. The doctor's estimate of the GPU memory comes first.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

SIDES = ("grpo", "gad", "gad_separate", "gad_pairwise", "gad_unscored")
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SIZES = {  # of well-known models of these sizes, as a Llama
    "tiny": (64, 128, 2, 2, 2, 512),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
}
PHASES = "gen old_log_prob ref values adv update_critic update_actor update_weights step".split()
TEMPLATE_TOKENS = 16
"""At most as many tokens of a prompt come from the chat template; the others are one per word."""


def build_problem(folder: Path, size: str, prompt_length: int, response_length: int, prompts: int) -> None:
    """Random model, tokenizer of one token per word, and data whose teacher answers fill the response length."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = dict(zip(SHAPE, SIZES[size], strict=True))
    special = ["<pad>", "<user>", "<assistant>", "<eos>"]
    words = [f"w{i}" for i in range(shape["vocab_size"] - len(special))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}"
        "<assistant> {{ m['content'] }}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        **shape,
        max_position_embeddings=4096,
        tie_word_embeddings=size != "7b",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # 7B takes minutes on a CPU
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    del model
    torch.cuda.empty_cache()  # for the workers, which are other processes
    rng = random.Random(0)
    rows = [
        {
            "content": [{"role": "user", "content": " ".join(rng.choices(words, k=prompt_length - TEMPLATE_TOKENS))}],
            "teacher_response": " ".join(rng.choices(words, k=response_length)),
            "data_source": "random",
            "extra_info": {"index": index},
        }
        for index in range(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def overrides(args: argparse.Namespace, folder: Path, steps: int) -> list[str]:
    tokens = max(32768, (args.n + 1) * (args.prompt + args.response))
    return [
        f"device={args.device}",
        "gad.stage=warmup",  # D's score head is random
        f"actor_rollout_ref.model.path={folder}/model",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        f"data.train_batch_size={args.prompts}",
        f"data.max_prompt_length={args.prompt}",
        f"data.max_response_length={args.response}",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.rollout.n={args.n}",
        "actor_rollout_ref.rollout.ignore_eos=True",
        f"actor_rollout_ref.rollout.max_model_len={args.prompt + args.response}",
        f"actor_rollout_ref.rollout.max_num_seqs={args.prompts * args.n}",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",
        f"actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu={tokens}",
        f"critic.ppo_max_token_len_per_gpu={tokens}",
        f"critic.forward_max_token_len_per_gpu={tokens}",
        "trainer.n_gpus_per_node=1",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        "trainer.logger=[console]",
        f"trainer.default_local_dir={folder}/out",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000",
        *args.overrides,
    ]


def stock_outputs(server, stock: bool) -> None:
    """In a vLLM server's process: answers come out as in stock verl, or as in GAD (vllm_async_server.py)."""
    from vllm.sampling_params import RequestOutputKind

    engine = server.engine
    if not hasattr(server, "generate_of_gad"):
        server.generate_of_gad = engine.generate

    def generate(*args, sampling_params, **kwargs):
        sampling_params.output_kind = RequestOutputKind.CUMULATIVE
        sampling_params.detokenize, sampling_params.flat_logprobs = True, False
        return server.generate_of_gad(*args, sampling_params=sampling_params, **kwargs)

    engine.generate = generate if stock else server.generate_of_gad


def trainer_class():
    """The GAD trainer that changes sides from step to step and keeps every step's metrics."""
    import ray
    import torch
    import transfer_queue as tq
    from omegaconf import open_dict
    from tensordict import TensorDict

    from recipe.gad.training.rows import Group
    from verl.trainer.ppo.v1.trainer_gad import PPOTrainerGAD
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.workers.critic.dp_critic import SCORING_FIELDS, DataParallelPPOCritic

    class StepTimeTrainer(PPOTrainerGAD):
        sides: tuple[str, ...] = SIDES

        def __init__(self, config):
            super().__init__(config)
            self.records: list[tuple[str, dict]] = []

        def on_step_begin(self):
            self.side = self.sides[(self.global_steps - 1) % len(self.sides)]
            self.use_critic = self.side != "grpo"
            as_users_run_it = self.side == "gad"
            with open_dict(self.config):
                self.config.gad.score_in_update = self.config.gad.skip_old_log_prob = as_users_run_it
            if self.config.actor_rollout_ref.rollout.name == "vllm":
                servers = self.llm_server_manager.server_handles
                ray.get([server.__ray_call__.remote(stock_outputs, not as_users_run_it) for server in servers])
            super().on_step_begin()

        def _balance_batch(self, batch, metrics, **kwargs):
            if self.side == "grpo":
                return PPOTrainerSync._balance_batch(self, batch, metrics, **kwargs)
            return super()._balance_batch(batch, metrics, **kwargs)

        def _compute_values(self, batch, metrics):
            if self.side != "gad_unscored":
                return super()._compute_values(batch, metrics)
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
            offsets = data["response_mask"].offsets()
            scores = torch.zeros(int(offsets[-1]))
            scores[offsets[1:] - 1] = torch.randn(len(batch))
            nested = torch.nested.nested_tensor_from_jagged(scores, offsets)
            fields = TensorDict({"values": nested, "rm_scores": nested}, batch_size=len(batch))
            tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
            return batch

        def _update_discriminator(self, partition_id, metrics):
            if self.side != "gad_pairwise":
                self.discriminator = DataParallelPPOCritic(self.critic_wg, self.config.critic, self.rollout_n)
                return super()._update_discriminator(partition_id, metrics)
            groups, prompts = self._groups, self.config.critic.ppo_mini_batch_size
            self._groups = self._pairs(groups, partition_id)
            with open_dict(self.config):
                self.config.critic.ppo_mini_batch_size = prompts * self.rollout_n
                self.discriminator = DataParallelPPOCritic(self.critic_wg, self.config.critic, rollout_n=1)
                scores = super()._update_discriminator(partition_id, metrics)
                self.config.critic.ppo_mini_batch_size = prompts
            return scores

        def _pairs(self, groups, partition_id):
            """Every student sample with its own copy of the teacher's row."""
            keys = [group.teacher.key for group in groups]
            data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=SCORING_FIELDS)
            pairs, rows = [], {}
            for i, group in enumerate(groups):
                for j, student in enumerate(group.students):
                    pair = Group(f"{group.uid}-{j}", 1, [student], group.teacher_tokens)
                    rows[pair.teacher.key] = {name: data[name][i] for name in SCORING_FIELDS}
                    pairs.append(pair)
            self._put_rows(partition_id, rows)
            self._extra_keys.extend(rows)
            return pairs

        def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
            if self.side == "grpo":
                PPOTrainerSync._compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch)
            else:
                super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
            self.records.append((self.side, dict(metrics)))

    return StepTimeTrainer


class DeviceMemory(threading.Thread):
    """Largest memory in use on any visible GPU, in GiB, by the driver's own count (all processes together)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak_gib = 0.0

    def run(self):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            command.append(f"--id={visible}")
        while True:
            used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            self.peak_gib = max(self.peak_gib, *(int(mib) / 1024 for mib in used))
            time.sleep(1.0)


def train(config, sides: tuple[str, ...]) -> list[tuple[str, dict]]:
    """Run the trainer in this process; returns (side, metrics) of every step."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
    from verl.trainer.ppo.v1 import AgentLoopManagerTQ

    runtime_env = get_ppo_ray_runtime_env(config)
    runtime_env.setdefault("env_vars", {}).update(TRANSFER_QUEUE_ENABLE="1")
    if "VERL_PLATFORM" in os.environ:
        runtime_env["env_vars"]["VERL_PLATFORM"] = os.environ["VERL_PLATFORM"]
    config.transfer_queue.enable = True
    OmegaConf.resolve(config)
    ray_init = OmegaConf.to_container(config.ray_kwargs.ray_init)
    ray.init(**{**ray_init, "include_dashboard": False, "runtime_env": runtime_env})
    tq.init(config.transfer_queue)
    try:
        trainer = trainer_class()(config)
        trainer.sides = sides
        trainer.init()
        manager = AgentLoopManagerTQ.create(
            config=config,
            llm_client=trainer.get_llm_client(),
            teacher_client=trainer.get_teacher_client(),
            reward_loop_worker_handles=trainer.get_reward_handles(),
        )
        trainer.fit(manager)
        return trainer.records
    finally:
        tq.close()
        ray.shutdown()


def numbers(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


def medians(records: list[tuple[str, dict]]) -> dict[str, dict[str, float]]:
    """side -> metric -> median over its steps."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for side, metrics in records:
        for name, value in numbers(metrics).items():
            values[side][name].append(value)
    return {side: {name: statistics.median(v) for name, v in named.items()} for side, named in values.items()}


def table(result: dict[str, dict[str, float]]) -> str:
    """Markdown: seconds of verl's phases, throughput, MFU, peak memory, and step time against the first side's."""
    columns = [*PHASES, "tokens/s", "MFU actor", "MFU D", "peak GiB", "step ratio"]
    lines = ["| side | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    reference = next(iter(result.values()))["timing_s/step"]
    for side, m in result.items():
        seconds = [f"{m.get(f'timing_s/{phase}', 0.0):.2f}" for phase in PHASES]
        peak = max((v for name, v in m.items() if name.endswith("max_memory_allocated_gb")), default=0.0)
        mfu = [f"{m[name]:.2f}" if name in m else "" for name in ("perf/mfu/actor", "perf/mfu/critic")]
        step = m["timing_s/step"]
        rest = [f"{m['perf/total_num_tokens'] / step:.0f}", *mfu, f"{peak:.1f}", f"{step / reference:.2f}"]
        lines.append(f"| {side} | " + " | ".join([*seconds, *rest]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="most tokens of a prompt; it has a few fewer")
    parser.add_argument("--response", type=int, default=512, help="tokens of every answer")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of every side")
    parser.add_argument("--warmup_rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="the first is the reference")
    parser.add_argument("--output", type=Path, help="also write every step's metrics as JSON")
    args, args.overrides = parser.parse_known_args()
    if args.device == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"
    unknown = [argument for argument in args.overrides if argument.startswith("-")]
    if unknown:
        parser.error(f"unknown arguments {unknown}")

    import torch

    import verl  # noqa: F401  (activates the overlay)
    from recipe.gad.doctor.checks import memory_findings
    from recipe.gad.run.config import compose_config

    sides = tuple(args.sides)
    steps = (args.warmup_rounds + args.rounds) * len(sides)
    with tempfile.TemporaryDirectory(prefix="gad-step-time-") as name:
        build_problem(Path(name), args.size, args.prompt, args.response, prompts=4 * args.prompts)
        config = compose_config(overrides(args, Path(name), steps))
        findings = list(memory_findings(config, gpu_memory=None))
        print(*findings, sep="\n", flush=True)
        if any(finding.level == "error" for finding in findings):
            raise SystemExit("this run does not fit the GPU")
        memory = DeviceMemory()
        if args.device == "gpu":
            memory.start()
        records = train(config, sides)
    counted = records[args.warmup_rounds * len(sides) :]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    print(
        f"\n{args.size}, {args.prompts} prompts x {args.n}, {args.response} response tokens; {machine}; "
        f"medians of {args.rounds} steps after {args.warmup_rounds}; seconds"
    )
    print(table(medians(counted)))
    if args.device == "gpu":
        print(f"peak memory of the device, all processes: {memory.peak_gib:.1f} GiB")
    if args.output:
        steps_of = [{"side": side, **numbers(metrics)} for side, metrics in counted]
        result = {"machine": machine, "peak_gib": memory.peak_gib, "steps": steps_of}
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
