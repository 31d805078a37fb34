"""Whole models, tiny and random: tree decoding agrees with transformers' eager attention on each path."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers as hf

from forktree.errors import InvalidInput
from forktree.model import Runner, attach
from forktree.model.positions import NO_LIMIT
from forktree.plan.layout import TreeLayout

VOCAB = 99
NUM_SLOTS = 160
# A large initializer_range makes attention peaked and logits large: a wrong mask changes them by whole units.
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
SLIDING = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
ALTERNATING = dict(num_hidden_layers=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, **ALTERNATING)

CONFIGS = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, dict(sliding_window=8)),
    "qwen2": (hf.Qwen2Config, SLIDING),
    "qwen3": (hf.Qwen3Config, dict(head_dim=16, **SLIDING)),
    "gemma2": (hf.Gemma2Config, GEMMA),
    "gemma3": (hf.Gemma3TextConfig, GEMMA),
    "phi3": (hf.Phi3Config, dict(sliding_window=8)),
    "olmo2": (hf.Olmo2Config, {}),
    "gpt_oss": (
        hf.GptOssConfig,
        dict(
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            **ALTERNATING,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    "gpt2": (hf.GPT2Config, dict(scale_attn_by_inverse_layer_idx=True)),
    "qwen3_moe": (hf.Qwen3MoeConfig, dict(head_dim=16, **EXPERTS)),
    # states its window in the mask only
    "qwen2_moe": (
        hf.Qwen2MoeConfig,
        dict(
            shared_expert_intermediate_size=16,
            layer_types=["sliding_attention"] * 2 + ["full_attention"],
            **SLIDING,
            **EXPERTS,
        ),
    ),
    "granite": (
        hf.GraniteConfig,
        dict(
            logits_scaling=4.0,
            attention_multiplier=0.2,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
        ),
    ),
    "cohere2": (hf.Cohere2Config, dict(logit_scale=0.5, **ALTERNATING)),
    # hand no keyword arguments to their attention
    "stablelm": (hf.StableLmConfig, {}),
    "nemotron": (hf.NemotronConfig, dict(head_dim=8)),
}
# what it calls its decoder is the last layer of its head
CONFIGS["modernbert"] = (
    hf.ModernBertDecoderConfig,
    dict(
        num_hidden_layers=4,
        local_attention=16,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=3,
        sep_token_id=4,
    ),
)
if hasattr(hf, "Gemma4TextConfig"):
    # the last two layers use the keys and values of those before
    CONFIGS["gemma4"] = (
        hf.Gemma4TextConfig,
        dict(
            head_dim=8,
            global_head_dim=16,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
            **ALTERNATING,
        ),
    )


def tiny(name: str) -> hf.PreTrainedModel:
    config_class, options = CONFIGS[name]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **options})
    config._attn_implementation = "eager"
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def runner(request):
    return Runner(attach(tiny(request.param)), num_slots=NUM_SLOTS)


@dataclass
class Node:
    """Tokens written one after the other; `parent` and `fork` say what lies before them."""

    parent: int
    fork: int
    pos: int
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class Forest:
    """A naive model of many branches: a node is a list of tokens and slots, a branch the index of its tip."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[Node] = []
        self.free = [int(s) for s in rng.permutation(NUM_SLOTS)]

    def root(self) -> int:
        self.nodes.append(Node(-1, 0, 0))
        return len(self.nodes) - 1

    def length(self, branch: int) -> int:
        return self.nodes[branch].pos + len(self.nodes[branch].tokens)

    def path(self, branch: int) -> list[int]:
        """All tokens from the root to the tip."""
        tokens, node, stop = [], branch, len(self.nodes[branch].tokens)
        while node >= 0:
            tokens = self.nodes[node].tokens[:stop] + tokens
            node, stop = self.nodes[node].parent, self.nodes[node].fork
        return tokens

    def fork(self, branch: int, length: int) -> int:
        """A branch that goes on after the first `length` tokens of another; mid-node as often as not."""
        while self.nodes[branch].pos >= length and self.nodes[branch].parent >= 0:
            branch = self.nodes[branch].parent
        self.nodes.append(Node(branch, length - self.nodes[branch].pos, length))
        return len(self.nodes) - 1

    def rewind(self, branch: int, length: int) -> int:
        """Frees the slots behind `length`, so that others overwrite them. Forks if a child sees them."""
        node = self.nodes[branch]
        keep = length - node.pos
        if keep < max([1] + [child.fork for child in self.nodes if child.parent == branch]):
            return self.fork(branch, length)
        self.free += node.slots[keep:]
        del node.tokens[keep:], node.slots[keep:]
        return branch

    def grow(self, branch: int, count: int) -> None:
        node = self.nodes[branch]
        node.tokens += [int(t) for t in self.rng.integers(VOCAB, size=count)]
        node.slots += [self.free.pop(int(self.rng.integers(len(self.free)))) for _ in range(count)]

    def step(self, pending: dict[int, int]) -> tuple[list[int], list[int], list[int], TreeLayout]:
        """Tokens, positions, slots and layout of the last pending[branch] tokens of each branch."""
        lengths = [len(node.tokens) for node in self.nodes]
        rows = list(pending.values())
        positions = [p for b, n in pending.items() for p in range(self.length(b) - n, self.length(b))]
        layout = TreeLayout(
            slot_index=[s for node in self.nodes for s in node.slots],
            node_begin=np.cumsum([0, *lengths])[:-1],
            node_len=lengths,
            node_parent=[node.parent for node in self.nodes],
            node_fork=[node.fork for node in self.nodes],
            node_pos=[node.pos for node in self.nodes],
            row_indptr=np.cumsum([0, *rows]),
            path_indptr=np.arange(len(rows) + 1),
            path_node=list(pending),
            path_stop=[TreeLayout.ALL] * len(rows),
            path_top=[-1] * len(rows),
            causal=[1] * len(rows),
            row_token=np.arange(sum(rows)),
            row_pos=positions,
        )
        last = [(self.nodes[b], n) for b, n in pending.items()]
        tokens = [t for node, n in last for t in node.tokens[-n:]]
        slots = [s for node, n in last for s in node.slots[-n:]]
        return tokens, positions, slots, layout


def compute(runner: Runner, forest: Forest, pending: dict[int, int]) -> torch.Tensor:
    tokens, positions, slots, layout = forest.step(pending)
    return runner.logits(runner.forward(tokens, positions, slots, runner.plans(layout)))


@torch.no_grad()
def eager(runner: Runner, forest: Forest, pending: dict[int, int]) -> torch.Tensor:
    """The model's own logits of the same tokens, each path alone, all of it computed anew."""
    model = runner.spec.packed.model
    assert model.config._attn_implementation == "eager"
    paths = [(torch.tensor([forest.path(branch)]), n) for branch, n in pending.items()]
    return torch.cat([model(ids, attention_mask=torch.ones_like(ids)).logits[0, -n:] for ids, n in paths])


def check(runner: Runner, forest: Forest, pending: dict[int, int]) -> None:
    expected = eager(runner, forest, pending)
    assert expected.std() > 0.3  # else agreement within 1e-4 would mean little
    torch.testing.assert_close(compute(runner, forest, pending), expected, atol=1e-4, rtol=0)


@pytest.fixture
def forest(runner):
    for x in (x for pool in runner.pools for x in pool.tensors):
        x.fill_(torch.nan)  # a read of a slot that nobody wrote spoils the logits
    return Forest(np.random.default_rng(1))


def test_prefill(runner, forest):
    """Two prompts as two contexts of one forward, then the rest of the first in chunks."""
    first, second = forest.root(), forest.root()
    forest.grow(first, 21)
    forest.grow(second, 5)
    check(runner, forest, {first: 21, second: 5})
    for chunk in (1, 7, 2):
        forest.grow(first, chunk)
        check(runner, forest, {first: chunk})


def test_random_trees(runner, forest):
    """Forks at any offset, rewinds that free slots for others, steps of 1 to 5 tokens a branch."""
    rng = forest.rng
    branches = [forest.root(), forest.root()]
    for branch in branches:
        forest.grow(branch, 12)
    check(runner, forest, dict.fromkeys(branches, 12))
    for _ in range(8):
        for i in range(len(branches)):
            if rng.random() < 0.3:
                branches[i] = forest.rewind(branches[i], int(rng.integers(1, forest.length(branches[i]) + 1)))
        parent = branches[rng.integers(len(branches))]
        branches.append(forest.fork(parent, int(rng.integers(1, forest.length(parent) + 1))))
        branches = [branches[i] for i in sorted(rng.permutation(len(branches))[:5])]
        decode = [b for b in branches if rng.random() < 0.8] or branches[:1]
        pending = {b: int(rng.integers(1, 6)) if rng.random() < 0.4 else 1 for b in decode}
        for branch, count in pending.items():
            forest.grow(branch, count)
        check(runner, forest, pending)


def test_tokens_see_tokens_of_the_same_step(runner, forest):
    """A branch forked in the middle of tokens that are computed in the very step."""
    trunk = forest.root()
    forest.grow(trunk, 9)
    early, late = forest.fork(trunk, 4), forest.fork(trunk, 9)
    forest.grow(early, 3)
    forest.grow(late, 2)
    check(runner, forest, {trunk: 9, early: 3, late: 2})


def test_negative_slots_are_not_stored(runner, forest):
    branch = forest.root()
    forest.grow(branch, 6)
    check(runner, forest, {branch: 6})
    before = [x.clone() for pool in runner.pools for x in pool.tensors]
    forest.grow(branch, 1)
    tokens, positions, _, layout = forest.step({branch: 1})
    runner.forward(tokens, positions, [-1], runner.plans(layout))
    after = [x for pool in runner.pools for x in pool.tensors]
    torch.testing.assert_close(after, before, atol=0, rtol=0, equal_nan=True)


WINDOWS = {
    "mistral": [8, 8, 8],
    "phi3": [8, 8, 8],
    "qwen2": [None, 8, 8],
    "qwen3": [None, 8, 8],
    "qwen2_moe": [8, 8, None],
    "modernbert-decoder": [None, 8, None, 8],
    **dict.fromkeys(("gemma2", "gemma3", "gemma4", "gpt_oss", "cohere2"), [8, None] * 2),
}


def test_windows_are_found(runner):
    name = runner.spec.name.removesuffix("_text")
    assert [kind.window for kind in runner.spec.layers] == WINDOWS.get(name, [None] * 3)


def test_sizes(runner, forest):
    kinds = runner.spec.layers
    assert runner.bytes_per_slot == sum(4 * k.num_kv_heads * (k.head_dim + k.value_dim) for k in kinds)
    assert (runner.vocab_size, runner.max_position) == (VOCAB, 128 if runner.spec.name == "gpt2" else NO_LIMIT)
    assert (runner.device.type, runner.dtype) == ("cpu", torch.float32)
    forest.grow(forest.root(), 1)
    assert runner.plans(forest.step({0: 1})[-1]).keys() == set(kinds)  # one plan a kind, not a layer


@pytest.mark.parametrize("runner", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=[1, VOCAB]), "tokens must be at least 0 and below 99, got 1 to 99"),
        (dict(positions=[-1, 0]), "positions must be at least 0 and below 2147483647, got -1 to 0"),
        (dict(slots=[0, NUM_SLOTS]), "slots must be at least -1 and below 160"),
        (dict(tokens=[1.5, 2.5]), "tokens must be a list of integers, got float64"),
        (dict(tokens=[1]), "one length .* got 1, 2 and 2"),
    ],
)
def test_bad_input_is_named_before_anything_runs(runner, forest, change, message):
    branch = forest.root()
    forest.grow(branch, 2)
    tokens, positions, slots, layout = forest.step({branch: 2})
    arguments = {"tokens": tokens, "positions": positions, "slots": slots, **change}
    with pytest.raises(InvalidInput, match=message):
        runner.forward(**arguments, plans=runner.plans(layout))
    assert all(x.isnan().all() for pool in runner.pools for x in pool.tensors)


@pytest.mark.parametrize("runner", ["llama"], indirect=True)
def test_results_in_fp32_do_not_depend_on_the_company(runner, forest):
    """The same token alone and beside 20 others: the linear layers see at least 16 rows either way."""
    norm, sizes = runner.spec.packed.decoder.norm, []
    hook = norm.register_forward_hook(lambda _module, args, _output: sizes.append(args[0].shape[1]))
    one, many = forest.root(), forest.root()
    forest.grow(one, 1)
    forest.grow(many, 20)
    alone, together = compute(runner, forest, {one: 1}), compute(runner, forest, {one: 1, many: 20})
    hook.remove()
    assert sizes == [16, 21]
    torch.testing.assert_close(alone[0], together[0], atol=1e-6, rtol=0)
