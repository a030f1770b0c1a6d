"""Shared by all tests: layers and their times, the CPU platform, small tokenizers, a tiny model with data on disk."""

import importlib.util
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["VERL_PLATFORM"] = "cpu"  # before the first import of verl
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    del os.environ["CUDA_VISIBLE_DEVICES"]  # an empty string stops Ray

import pytest

LAYERS = ("unit", "docs", "examples", "packaging", "recipe", "integration", "e2e", "gpu")
"""The folders of tests/, in order of cost: a layer runs only if the layers before it passed."""
MARKERS = {"packaging": ["slow"], "integration": ["slow", "ray"], "e2e": ["slow", "ray"], "gpu": ["slow", "ray"]}
"""Markers of every test of a layer; those of single tests stand at the test."""
TIMES: Counter[str] = Counter()
"""Seconds spent in each layer, of all processes together."""


def layer_of(path: str | Path) -> str:
    """The layer of a test file: its folder in tests/."""
    folder = Path(path).resolve().relative_to(Path(__file__).parent).parts[0]
    if folder not in LAYERS:
        raise pytest.UsageError(f"tests/{folder} is in no layer. Fix: add {folder!r} to LAYERS in tests/conftest.py")
    return folder


def pytest_configure():
    """A suite that was started in the background ignores Ctrl-C, and so would the processes that tests interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LAYERS.index(layer_of(item.path)))  # stable: the order within a layer stays
    for item in items:
        for name in MARKERS.get(layer_of(item.path), ()):
            item.add_marker(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process; so do all of integration, which share a trainer and depend on its state."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "integration" if "integration" in Path(file).parts else file

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    result = yield
    layer = layer_of(item.path)
    if item.session.testsfailed and nextitem is not None and layer_of(nextitem.path) != layer:
        item.session.shouldfail = f"tests/{layer} failed, so the layers after it were not run"
    return result


def pytest_runtest_logreport(report):
    TIMES[layer_of(Path(__file__).parents[1] / report.location[0])] += report.duration


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("time of each layer")
    for layer, seconds in TIMES.items():
        terminalreporter.write_line(f"{seconds:7.1f} s  tests/{layer}")
    if "GAD_TEST_START" in os.environ:  # set by scripts/test.sh
        total = time.time() - float(os.environ["GAD_TEST_START"])
        terminalreporter.write_line(f"{total:7.1f} s  in all, since scripts/test.sh started")


@pytest.fixture(scope="session")
def load_script():
    """Function from a name and a folder to FOLDER/NAME.py as a module (the verl wheel ships a package `scripts`)."""

    def load(name: str, folder: str = "scripts"):
        file = Path(__file__).resolve().parents[1] / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"gad_{name}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_tokenizer(
    template: str | None = CHATML,
    specials: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos: str | None = "<|im_end|>",
    pad: str | None = "<|endoftext|>",
):
    """Byte-level BPE with a few merges, special tokens after the bytes, and a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("<", "|"), ("|", ">")]
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    core = Tokenizer(BPE({token: i for i, token in enumerate(vocab)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Function that builds a byte-level tokenizer, see :func:`_byte_tokenizer`."""
    return _byte_tokenizer


@pytest.fixture(scope="session")
def spaced_tokenizer():
    """Function that builds a tokenizer for a chat template which, as SentencePiece, puts a space before every text."""

    def spaced_tokenizer(template: str):
        from tokenizers import Tokenizer, decoders, normalizers
        from tokenizers.models import BPE
        from transformers import PreTrainedTokenizerFast

        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        vocab = dict.fromkeys([*special.values(), "▁", "▁▁", *"abcdefghijklmnopqrstuvwxyzINST[]/<|>:"])
        core = Tokenizer(BPE({token: i for i, token in enumerate(vocab)}, [("▁", "▁")], unk_token="<unk>"))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)

    return spaced_tokenizer


@pytest.fixture(scope="session")
def tiny_problem(tmp_path_factory):
    """Folder with model/ (random 2-layer Llama, word tokens), train.parquet (64 rows) and val.parquet (8 rows)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import LlamaForCausalLM

    from recipe.gad.quickstart.problem import build_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = sorted(word for word in tokenizer.get_vocab() if not word.startswith("<"))
    rng = random.Random(0)

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    for name, size in (("train", 64), ("val", 8)):
        rows = [
            {
                "content": [{"role": "user", "content": sentence(2, 5)}],
                "teacher_response": sentence(2, 9),
                "data_source": "tiny",
                "extra_info": {"index": index},
            }
            for index in range(size)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="session")
def tiny_overrides():
    """Hydra overrides of a run on the tiny problem: 8 prompts a step, 4 samples each, large learning rates."""
    return (
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=12",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "critic.optim.lr=1e-3",
        "gad.poll_interval=0.02",
    )


@pytest.fixture(scope="session")
def compose_config(tiny_problem, tiny_overrides):
    """Function composing gad_trainer for the tiny problem on one CPU rank, with overrides."""
    from hydra import compose, initialize_config_module

    def compose_config(*overrides: str):
        base = [
            "device=cpu",
            f"actor_rollout_ref.model.path={tiny_problem}/model",
            f"data.train_files={tiny_problem}/train.parquet",
            f"data.val_files={tiny_problem}/val.parquet",
            *tiny_overrides,
            "trainer.logger=[console]",
        ]
        with initialize_config_module(config_module="recipe.gad.config", version_base=None):
            return compose("gad_trainer", overrides=[*base, *overrides])

    return compose_config
