"""Small models of every supported architecture, and forests of tokens run through them."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import transformers as hf

from forktree.model.attach import attach
from forktree.model.model_spec import ModelSpec
from forktree.model.runner import Runner
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


def build(
    config_class: type[hf.PreTrainedConfig], *, attention: str | None = None, **options: object
) -> hf.PreTrainedModel:
    """A random fp32 model of `SIZES`. attention: the implementation, else transformers' choice."""
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **options})
    if attention is not None:
        config._attn_implementation = attention
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny(name: str) -> hf.PreTrainedModel:
    config_class, options = CONFIGS[name]
    return build(config_class, attention="eager", **options)


@cache
def spec(name: str, dtype: torch.dtype = torch.float32) -> ModelSpec:
    """A tiny model that was verified, shared by many tests: not to be changed."""
    return attach(tiny(name).to(dtype))


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
        """Frees the slots after `length` tokens, so that others overwrite them. Forks if a child sees them."""
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
