"""Discriminator update: the teacher once per prompt (ours) against once per student sample (the pairwise form).

    python benchmarks/grouped_update.py [--prompts 8] [--n 8] [--tokens 128] [--hidden 256] [--layers 4] [--rounds 7]

Both sides run in one process, in turn, on the same model and data; forward and backward are timed together. Prints the
median of the rounds, the ratio, and how far apart the two gradients are.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForTokenClassification

import verl  # noqa: F401  (activates the overlay)
from verl.trainer.ppo.core_algos import compute_discriminator_loss, compute_grouped_discriminator_loss


def scores(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """D's score of every row, (rows,): the value at the last token."""
    return model(input_ids=input_ids).logits[:, -1, 0]


def grouped(model, teacher_PT, student_PNT):
    """One forward over P x (n + 1) rows."""
    P, N, T = student_PNT.shape
    rows = torch.cat([teacher_PT.unsqueeze(1), student_PNT], dim=1).flatten(0, 1)
    scores_PM = scores(model, rows).view(P, N + 1)
    return compute_grouped_discriminator_loss(scores_PM[:, 1:], scores_PM[:, 0])[0]


def pairwise(model, teacher_PT, student_PNT):
    """One forward over P x 2n rows: every student sample brings its own copy of the teacher."""
    P, N, T = student_PNT.shape
    rows = torch.cat([teacher_PT.repeat_interleave(N, dim=0), student_PNT.flatten(0, 1)])
    teacher, student = scores(model, rows).chunk(2)
    mask = torch.ones(P * N, 1, device=rows.device)
    return compute_discriminator_loss(student.unsqueeze(-1), teacher.unsqueeze(-1), mask, mask)[0]


def timed(update, model, *data) -> float:
    """Seconds of one forward and backward."""
    model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    update(model, *data).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 8), ("n", 8), ("tokens", 128), ("hidden", 256), ("layers", 4), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_labels=1,
        classifier_dropout=0.0,
    )
    model = LlamaForTokenClassification(config).to(device)
    teacher = torch.randint(1024, (args.prompts, args.tokens), device=device)
    student = torch.randint(1024, (args.prompts, args.n, args.tokens), device=device)

    gradients, seconds = {}, {grouped: [], pairwise: []}
    for update in (grouped, pairwise):  # warm-up, and the comparison of the gradients
        timed(update, model, teacher, student)
        gradients[update] = gradient(model)
    for _ in range(args.rounds):
        for update in (grouped, pairwise):
            seconds[update].append(timed(update, model, teacher, student))

    medians = {update: statistics.median(times) for update, times in seconds.items()}
    apart = (gradients[grouped] - gradients[pairwise]).norm() / gradients[pairwise].norm()
    print(f"{device}, torch {torch.__version__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters,")
    print(f"{args.prompts} prompts x {args.n} samples x {args.tokens} tokens, median of {args.rounds} rounds\n")
    print(f"{'update':10}{'rows':>8}{'ms':>10}{'ratio':>8}")
    for update, rows in ((pairwise, 2 * args.n), (grouped, args.n + 1)):
        ratio = medians[update] / medians[pairwise]
        print(f"{update.__name__:10}{args.prompts * rows:8d}{medians[update] * 1e3:10.1f}{ratio:8.2f}")
    print(f"\ngradients differ by {apart:.1e} (relative norm)")


if __name__ == "__main__":
    main()
