"""EAGLE drafters and their trees: from a recorded call to our public classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints.eagle import eagle_arguments
from varkit.checkpoints.files import load_strictly
from varkit.generators.eagle import Eagle
from varkit.heads.categorical import Categorical
from varkit.interfaces import Processor
from varkit.rng import Rng
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative.drafters.eagle import EagleDrafter
from varkit.samplers.speculative.drafters.eagle_trees import DynamicTree, StaticTree, leaf_paths
from varkit.samplers.speculative.interfaces import DraftBlock
from varkit.samplers.speculative.target import ancestors_of
from varkit.training.objectives.eagle import drafter_loss


def network_of(case: Case) -> Eagle:
    model = Eagle(**eagle_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, {k: v.clone() for k, v in case.fixture.state.items()}, "fixture")
    return model.eval()


def processors_of(case: Case) -> list[Processor]:
    """In the recorded order. None of them runs at temperature 0."""
    s = case.settings
    if s["temperature"] == 0:
        return []
    return [p for name in s["processor_order"] for p in build_processors(**{name: s[name]})]


class InTurn(Rng):
    """Recorded uniform numbers, as they are asked for."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64))
        self.numbers = iter(numbers)

    def uniform(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        return torch.stack([next(self.numbers) for _ in range(count or 1)]).view(1, 1, -1)


def drafter_of(case: Case, tree: Any) -> EagleDrafter:
    """Rows with a condition, then without; the first ids (one for all rows) stand beside no state."""
    drafter = EagleDrafter(network_of(case), tree)
    scale = case.settings["guidance_scale"]
    hidden, ids = case.inputs["hidden_states"], case.inputs["input_ids"]
    drafter.start(
        1,
        lambda states: states @ case.inputs["head_weight"].T,
        lambda logits, positions: Categorical(*logits.chunk(2)).guide(scale).logits,
        processors_of(case),
        guided=True,
        greedy=case.settings["temperature"] == 0,
        prefix=hidden[:, :-1],
    )
    drafter.feed(ids[:1, -1:], hidden[:, -1:], torch.ones(1, dtype=torch.int64))
    return drafter


@adapter("eagle-drafter", "drafter", "forward")
def _(case: Case) -> Answers:
    model, given = network_of(case), case.inputs
    cached = case.settings["cached_positions_2"]
    more = given["input_ids_2"].shape[1]
    state = model.start(len(given["input_ids"]), guided=False, room=more)
    every = torch.ones(len(given["input_ids"]), dtype=torch.int64)
    first = model.extend(state, given["input_ids"], given["hidden_states"], every * cached)
    torch.testing.assert_close(model(given["input_ids"], given["hidden_states"]), first)  # the same without a cache
    return {
        "hidden": first,
        "hidden_2": model.extend(state, given["input_ids_2"], given["hidden_states_2"], every * more),
    }


def as_answers(case: Case, block: DraftBlock, root: Tensor, suffix: str) -> Answers:
    parents, sampled = block.parents, case.settings["temperature"] > 0
    return {
        f"draft_tokens{suffix}": torch.cat([root, block.tokens], 1),
        f"retrieve_indices{suffix}": leaf_paths(parents[0], by_number=sampled),
        f"tree_mask{suffix}": ancestors_of(parents)[0],
        f"tree_position_ids{suffix}": torch.cat([torch.zeros_like(root), block.depth], 1)[0],
    }


@adapter("eagle-drafter", "drafter", "draft-dynamic")
def _(case: Case) -> Answers:
    s, given = case.settings, case.inputs
    if s["draft_law"] != "point":
        raise ValueError("a dynamic tree is chosen, not drawn")
    drafter = drafter_of(case, DynamicTree(s["draft_total_tokens"] - 1, s["draft_depth"], s["draft_top_k"]))
    rng = Rng.from_seed(0, 1)
    answers = as_answers(case, drafter.draft(rng), given["input_ids"][:1, -1:], "")
    if "hidden_states_2" in given:
        hidden = given["hidden_states_2"]
        ids = given["input_ids_2"][:1, -hidden.shape[1] :]
        drafter.feed(ids, hidden, torch.tensor([hidden.shape[1]]))
        answers |= as_answers(case, drafter.draft(rng), ids[:, -1:], "_2")
    return answers


@adapter("eagle-drafter", "drafter", "draft-static")
def _(case: Case) -> Answers:
    s = case.settings
    tree = StaticTree(s["tree"], s["draft_top_k"])
    laws, tokens, values = drafter_of(case, tree).draws(tree, InTurn(case.inputs["draft_uniform"]))
    return {"draft_prob": laws[0], "tokens": tokens[0], "values": values[0]}


@adapter("eagle-drafter", "drafter", "loss")
def _(case: Case) -> Answers:
    s, given = case.settings, case.inputs
    if s["hidden_loss"] != "smooth-l1":
        raise ValueError("states are compared by smooth L1")
    losses = drafter_loss(
        given["predicted"],
        given["target"],
        lambda hidden: hidden @ given["head_weight"].T,
        given["loss_mask"],
        hidden_weight=s["hidden_weight"],
        token_weight=s["token_weight"],
        epsilon=s["epsilon"],
    )
    return {"loss": losses["loss"].view(1), "vloss": losses["hidden"].view(1), "ploss": losses["token"].view(1)}


@adapter("lantern", "tree", "buffers")
def _(case: Case) -> Answers:
    tree = StaticTree(case.settings["tree"], case.settings["draft_top_k"])
    paths = leaf_paths(tree.parents)
    root, none = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1)
    return {
        "tree_attn_mask": ancestors_of(tree.parents[None])[0],
        "tree_indices": torch.cat([root, tree.indices + 1]),  # the root's own token comes first
        "tree_position_ids": torch.cat([root, tree.depth]),
        "retrieve_indices": paths,
        "p_indices": torch.cat([none, tree.sibling_groups])[paths],
        "draft_level_sizes": torch.tensor([len(where) for where, _ in tree.levels]),
        "draft_repeats": torch.cat([repeats[repeats > 0] for _, repeats in tree.levels]),
        "draft_tree_indices": torch.cat([where for where, _ in tree.levels]),
    }
