"""LANTERN's generation: engine, EAGLE drafter and verifier on a tiny text-conditional LlamaGen, recorded end to end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.adapters_eagle import processors_of
from tests.parity.adapters_llamagen import scalar
from tests.parity.adapters_verifiers import lantern
from tests.parity.weights import Case
from varkit.checkpoints.eagle import eagle_arguments
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.text import left_padded
from varkit.generators.eagle import Eagle
from varkit.generators.llamagen import LlamaGen
from varkit.rng import Draw, Rng
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative.drafters.eagle import EagleDrafter
from varkit.samplers.speculative.drafters.eagle_trees import DynamicTree, StaticTree
from varkit.samplers.speculative.engine import Loop
from varkit.samplers.speculative.interfaces import DraftBlock, Progress, Siblings, Verdict, Verifier
from varkit.samplers.speculative.target import Target
from varkit.samplers.speculative.verifiers import Exact

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Of a LlamaGen that LANTERN converted -> ours."""


def target_of(case: Case) -> LlamaGen:
    made, state = case.fixture.meta["constructor"], dict[str, Tensor]()
    for key, value in case.fixture.part("target.").items():
        if key.endswith(".q_proj.weight"):
            parts = [case.fixture.state[f"target.{key.replace('q_proj', f'{part}_proj')}"] for part in "qkv"]
            value, key = torch.cat(parts), key.replace("self_attn.q_proj", "attention.wqkv")
        elif key.endswith((".k_proj.weight", ".v_proj.weight")):
            continue
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        state[key.removeprefix("model.")] = value
    model = LlamaGen(
        num_classes=None,
        text_length=made["cls_token_num"],
        text_dim=made["caption_dim"],
        depth=made["num_hidden_layers"],
        hidden_size=made["hidden_size"],
        num_heads=made["num_attention_heads"],
        kv_heads=made["num_key_value_heads"],
        ffn_size=made["intermediate_size"],
        norm_eps=made["rms_norm_eps"],
        rope_base=made["rope_base"],
        grid=round(made["block_size"] ** 0.5),
        codebook_size=made["vocab_size"],
    )
    load_strictly(model, state, "fixture")
    return model.eval()


def drafter_of(case: Case) -> InTurn:
    made, s = case.fixture.meta["constructor"], case.settings
    official = {**made, **made["drafter"], "rms_norm_eps": 1e-6}
    network = Eagle(**eagle_arguments(official))
    load_strictly(network, case.fixture.part("drafter."), "fixture")
    if s["tree_kind"] == "dynamic":
        return InTurn(network.eval(), DynamicTree(s["draft_total_tokens"] - 1, s["draft_depth"], s["draft_top_k"]))
    return InTurn(network.eval(), StaticTree(s["tree"], s["draft_top_k"]))


class Recorded(Verifier):
    """Hands a verifier the recorded numbers of its tests, one a sibling that it looked at."""

    def __init__(self, inner: Verifier, numbers: Tensor) -> None:
        self.inner, self.numbers, self.used = inner, numbers, 0
        self.lossless, self.proposals, self.many = inner.lossless, inner.proposals, inner.many

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        given = self.numbers[self.used : self.used + siblings.tokens.shape[1]]
        uniform = torch.full_like(siblings.tokens, 0.5, dtype=torch.float64)
        uniform[0, : len(given)] = given
        verdict = self.inner.step(p, siblings, uniform, hidden)
        self.used += int(siblings.valid.sum() if verdict.accepted < 0 else verdict.accepted + 1)
        return verdict


class Draws(Rng):
    """Recorded draws in turn: of the first token, which all tokens get at first, and of fixed trees."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64))
        self.numbers = iter(numbers)
        self.first = self.next()

    def next(self) -> Tensor:
        """0.5 where decoding is greedy: nothing was recorded, and nothing depends on it."""
        return next(self.numbers, torch.tensor(0.5, dtype=torch.float64))

    def uniform(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        if kind == Draw.TREE:
            return torch.stack([self.next() for _ in range(count or 1)]).view(1, 1, -1)
        return self.first.expand(1, positions.shape[-1], *([] if count is None else [count])).clone()


class InTurn(EagleDrafter):
    """Behind the draws of a tree stands that of the token that the round ends with, wherever that will be."""

    loop: Loop

    def propose(self, progress: Progress) -> DraftBlock:
        block = super().propose(progress)
        number = self.rng.next()  # type: ignore[attr-defined]
        self.loop.numbers.token.fill_(number)
        self.loop.numbers.residual.fill_(number)
        return block


def verifier_of(case: Case) -> Recorded:
    exact = not case.settings["lantern"]
    inner = Exact() if exact else lantern(case, case.settings["lantern_delta"])
    if not exact:
        inner.use_neighbours(case.inputs["neighbours"])  # type: ignore[attr-defined]
    return Recorded(inner, case.inputs["uniforms"])


@adapter("lantern", "sampler", "generate")
def _(case: Case) -> Answers:
    """A greedy target is one whose filter leaves the best token alone; then no number matters."""
    s, model, drafter = case.settings, target_of(case), drafter_of(case)
    greedy = s["temperature"] == 0
    processors: list[Any] = build_processors(top_k=1) if greedy else processors_of(case)
    cond = left_padded(case.inputs["caption"], case.inputs["caption_mask"])
    order, rng, counts = torch.arange(model.layout.length), Draws(case.inputs["multinomial_uniform"]), list[int]()
    with torch.no_grad():
        scales = torch.full(order.shape, s["guidance_scale"])
        target = Target(model, cond, model.null(cond), order, scales, processors)
        drafter.check(target)
        drafter.loop = loop = Loop(target, drafter, verifier_of(case), rng)
        while sum(counts) <= s["new_tokens"]:
            turn = int(target.turns)
            loop.round()
            counts.append(int(target.turns) - turn)
    return {
        "indices": loop.tokens[:, : s["new_tokens"]],
        "mean_emitted": scalar(torch.tensor(sum(counts) / len(counts))),
    }
