"""The ops of the library: one thin function each, and beneath it its fake implementation, for torch.compile.

Every op runs on CPU and on CUDA (`linear`, `grouped_linear` and `activation`: CPU only) and takes float32, bfloat16 or
float16. What it means is `reference.<op>`, in plain PyTorch. The tensors of one call are contiguous, of one device and,
where they are floating point, of one dtype; another one raises a RuntimeError "<op>: <argument> must be <what>, got
<what it is>". Values of tensors are never checked, since that would make the device wait: each docstring says what they
have to be. On a CPU, what an op computes for a row or a node is bit-equal whatever else is in the call. None of the ops
has a derivative: training uses the same formulas in plain PyTorch.

Letters: B rows, N tree nodes, K heads, L layers, P drafts per head, D hidden size, V vocabulary (Vd draft vocabulary),
S cache capacity, Hq / Hkv attention heads, E head size, W = ceil(N / 64) words, C cache planes (2 x model layers).
"""

from .attention import commit_cache, tree_attention, write_cache
from .heads import draft_topk, head_stack, hidden_entropy, rerank
from .layers import activation, grouped_linear, linear
from .verify import choose_tokens, verify_tree

__all__ = [
    "activation",
    "choose_tokens",
    "commit_cache",
    "draft_topk",
    "grouped_linear",
    "head_stack",
    "hidden_entropy",
    "linear",
    "rerank",
    "tree_attention",
    "verify_tree",
    "write_cache",
]
