"""The names by which models tell what a module is for, where its type does not: Hugging Face's, timm's, peft's."""

from __future__ import annotations

import re

# Components of a path that wrappers add: torch.compile, checkpoint_wrapper, FSDP, peft.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"}

NORM = re.compile(r"norm|^ln", re.IGNORECASE)
# They scale by 1 + weight, and the weight starts at zero.
CENTERED_NORM = re.compile(r"(Gemma[23]?|Qwen3Next|Qwen3_5(Moe)?|Centered)(RMS|Layer)?Norm$|LayerNorm1P$")
RELATIVE = re.compile(r"relative|rel_?(pos|emb)|(^|[._])(rpe|rpb)(_|$)", re.IGNORECASE)
BIAS = re.compile(r"(^|_)(bias|biases)(_|\d|$)", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|token|posit|latent|probe|prompt", re.IGNORECASE)
# A matrix is a kernel if it or its module is called so.
KERNEL_NAME = re.compile(r"(\w*_)?(weights?|kernel|w\d*|matrix|proj|projection)(_\w+)?", re.IGNORECASE)
KERNEL_KIND = re.compile(r"linear|dense|proj|router|gate|mlp|head", re.IGNORECASE)
# Stacked experts that are (E, in, out). Where transformers marks them with `is_transposed`, that decides.
TRANSPOSED_EXPERTS = re.compile(r"^(Llama4TextExperts|GptOssExperts|AriaGroupedExpertsGemm)$")

# What a kernel is for, by the path of its module: pattern, gain, name. The first match decides.
_ROLES = [
    (re.compile(pattern, re.IGNORECASE), gain, what)
    for pattern, gain, what in (
        # Those of an MLP, whose activation is a function in most models and no module.
        (
            r"(mlp|ffns?(\.\d+)?|feed_?forward|ff|densereludense|experts?(\.\d+)?)"
            r"\.(c_proj|fc2|down_proj|w2|wo|out|output|proj|lin2|linear2|out_proj|dense_4h_to_h|fc_out|layer_2|value)$"
            r"|(^|\.)(fc2|down_proj|linear2|dense_4h_to_h|ffn_output)$|(layer|blocks|ffn)\.\d+\.output\.dense$",
            2,
            "MLP output, after the activation",
        ),
        (
            r"(mlp|ffns?(\.\d+)?|feed_?forward|ff|densereludense|experts?(\.\d+)?)\.(c_fc|fc1|w1|w3|wi(_\d)?|lin1|linear1|fc_in|layer_1|key)$"
            r"|(^|\.)(up_proj|gate_proj|gate_up_proj|dense_h_to_4h)$|layers?\.\d+\.(fc1|linear1)$|intermediate\.dense$",
            1,
            "MLP input",
        ),
        (
            r"att(n|ention)?\w*\.(output\.dense|o|o_proj|out|out_proj|out_lin|c_proj|proj|dense|wo|to_out(\.0)?)$",
            1,
            "attention output",
        ),
        (
            r"(^|[._])(q|k|v|query|key|value|qkv|kv)(_(a|b))?(_proj|_lin)?$|c_attn$|query_key_value$|to_(q|k|v|qkv|kv)$",
            1,
            "query, key or value",
        ),
        (r"(^|\.)in_proj(_\w+)?$", 1, "input projection"),
    )
]
_HEAD = re.compile(r"(^|\.)(lm_head|head|classifier|score|qa_outputs|seq_relationship)$")


def own_path(path: str) -> str:
    """`path` without what wrappers add to it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def role(path: str, activation: str = "") -> tuple[int, str]:
    """The gain of the kernel at `path`, and what it is for. activation: the class of the one that it reads, or ""."""
    for pattern, gain, what in _ROLES:
        if pattern.search(path):
            return gain, what
    if activation:
        return 2, f"kernel after {activation}"
    return 1, "head" if _HEAD.search(path) else "kernel"
