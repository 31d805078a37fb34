"""Train the demo's language model and its process-reward head from scratch.

    python -m forktree.demo.train --out DIR

The model imitates a teacher whose steps are valid but who sometimes misses the target; from the same hidden states a
reward head learns whether each step leaves the target within reach. In the last phase the head also learns from
solutions that the model itself samples, its right and its wrong steps.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forktree.demo import task
from forktree.device.properties import gpu_names

PAD, EOS = "<pad>", "<eos>"
VOCABULARY = {token: i for i, token in enumerate([PAD, EOS, *task.ALPHABET])}
IGNORE = -100  # marks a position without a target
Example = tuple[str, str]  # a problem and a solution attempt


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of the task: a BPE without merges."""
    core = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """A four-layer Llama of about a million parameters."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
    )
    return LlamaForCausalLM(config)


def build_head(hidden_size: int) -> nn.Module:
    """Scores the hidden state at the newline that ends a step; the reward is sigmoid(score)."""
    return nn.Sequential(nn.Linear(hidden_size, 256), nn.ReLU(), nn.Linear(256, 1))


@torch.no_grad()
def attempts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[str], sample: bool
) -> list[str]:
    """The model's own solution of each problem, sampled at temperature 1 or greedy."""
    inputs = tokenizer(problems, padding=True, return_tensors="pt").to(model.device)
    options = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    ids = model.generate(**inputs, **options, max_new_tokens=48)
    return tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def own_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Example]:
    """Solutions sampled from the model as it is at that time."""
    stream = task.problems("train", seed)
    while True:
        problems = list(islice(stream, 1024))
        yield from zip(problems, attempts(model, tokenizer, problems, sample=True), strict=True)


def batches(stream: Iterator[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches of examples of like length, so that little of a batch is padding."""
    rng = random.Random(seed)
    while chunk := list(islice(stream, 16 * size)):
        chunk.sort(key=lambda example: len(example[0]) + len(example[1]))
        starts = list(range(0, len(chunk), size))
        rng.shuffle(starts)
        for start in starts:
            yield chunk[start : start + size]


def encode(batch: list[Example]) -> Tensor:
    """Token ids, padded on the right: causal attention never looks at the padding."""
    rows = [[VOCABULARY[c] for c in problem + text] + [VOCABULARY[EOS]] for problem, text in batch]
    longest = max(map(len, rows))
    return torch.tensor([row + [VOCABULARY[PAD]] * (longest - len(row)) for row in rows])


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Post-norm hidden states `[B, L, H]` fp32 of token ids `[B, L]`, computed in bf16."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        states: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return states.float()


def imitation_loss(model: LlamaForCausalLM, batch: list[Example], ids: Tensor, states: Tensor) -> Tensor:
    """Next-token cross-entropy on the attempts; problems are given, not learnt."""
    targets = ids.masked_fill(ids == VOCABULARY[PAD], IGNORE)
    for row, (problem, _) in zip(targets, batch, strict=True):
        row[: len(problem)] = IGNORE
    logits = model.lm_head(states[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE)


def step_scores(head: nn.Module, batch: list[Example], ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The head's score of every step in the batch, and whether the step is right (1.0 or 0.0)."""
    is_step = ids == VOCABULARY["\n"]
    for row, (problem, _) in zip(is_step, batch, strict=True):
        row[: len(problem)] = False
    right = [label for problem, text in batch for label in task.label_steps(problem, text)]
    return head(states[is_step]).squeeze(-1), torch.tensor(right, dtype=torch.float32)


def reward_loss(head: nn.Module, batch: list[Example], ids: Tensor, states: Tensor) -> Tensor:
    """Binary cross-entropy of the head's logits at the ends of steps, against whether each step is right."""
    return F.binary_cross_entropy_with_logits(*step_scores(head, batch, ids, states))


def auc(scores: Tensor, right: Tensor) -> float:
    """How often a right step scores above a wrong one."""
    above = scores[right > 0][:, None] > scores[right == 0][None]
    return above.float().mean().item()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, head: nn.Module) -> dict[str, float]:
    """Accuracy on held-out problems, and how well the head tells right from wrong, step by step."""
    problems = list(islice(task.problems("held_out", seed=0), 200))
    greedy = attempts(model, tokenizer, problems, sample=False)
    more = list(islice(task.problems("held_out", seed=1), 1000))
    sampled = list(zip(more, attempts(model, tokenizer, more, sample=True), strict=True))
    sampled = [example for example in sampled if example[1].count("\n") == task.COUNT - 1]
    ids = encode(sampled)
    scores, right = step_scores(head, sampled, ids, hidden_states(model, ids))
    by_step = zip(scores.view(-1, task.COUNT - 1).T, right.view(-1, task.COUNT - 1).T, strict=True)
    return {
        "greedy_accuracy": sum(map(task.is_correct, problems, greedy)) / len(problems),
        "sampled_accuracy": sum(task.is_correct(*example) for example in sampled) / len(more),
        **{f"auc_step_{i}": auc(*step) for i, step in enumerate(by_step, 1)},
    }


def build_optimizers(model: nn.Module, head: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the trunk, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([*others, *head.parameters()], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(out: Path, steps: int, own_steps: int, batch_size: int, seed: int) -> None:
    """Imitation and reward on the teacher's attempts; in the last `own_steps` of `steps` reward on own samples too."""
    torch.manual_seed(seed)
    if gpu_names():
        torch.set_default_device("cuda")
    tokenizer, model = build_tokenizer(), build_model()
    head = build_head(model.config.hidden_size)
    optimizers = build_optimizers(model, head)

    def rate(step: int) -> float:  # warm up, hold, and fall to zero over the last 40 %
        return min((step + 1) / 100, 1.0, (steps - step) / (0.4 * steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    # shorter problems are where longer ones end: they teach the last steps sooner
    taught = batches(task.demonstrations("train", seed, [2, 3, 4, 4, 4]), batch_size, seed)
    sampled = batches(own_samples(model, tokenizer, seed + 1), batch_size, seed)
    log: list[dict[str, float]] = []
    start, tokens = time.time(), 0

    for step in range(1, steps + 1):
        batch = next(taught)
        ids = encode(batch)
        states = hidden_states(model, ids)
        tokens += int((ids != VOCABULARY[PAD]).sum())
        imitation, reward = imitation_loss(model, batch, ids, states), reward_loss(head, batch, ids, states)
        loss = imitation + 0.3 * reward
        record = {"step": step, "tokens": tokens, "imitation": imitation.item(), "reward": reward.item()}
        if step > steps - own_steps:
            own = next(sampled)
            ids = encode(own)
            own_reward = reward_loss(head, own, ids, hidden_states(model, ids))
            record["own_reward"] = own_reward.item()
            loss = loss + 0.3 * own_reward
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

        if step % 400 == 0 or step == steps:
            record |= evaluate(model, tokenizer, head)
        if step % 50 == 0 or step == steps:
            record["seconds"] = time.time() - start
            log.append({name: round(value, 4) for name, value in record.items()})
            print(log[-1], flush=True)
        if step % 400 == 0 or step == steps:
            save(out, model, tokenizer, head, log)


def save(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    head: nn.Module,
    log: list[dict[str, float]],
) -> None:
    """Write everything to `out`, so that an interrupted run still leaves a model."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = {f"score.{name}": weight for name, weight in head.state_dict().items()}
    save_file(weights, out / "prm_head.safetensors")
    (out / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))


def main() -> None:
    """Trains the model and its head, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--own-steps", type=int, default=400, help="last steps, which also learn from own samples")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
