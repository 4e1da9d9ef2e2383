"""EAGLE drafters: what is stable and what is drafted, the trees, training, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.test_training import lines, recipe
from varkit import ClassToImagePipeline, NextGroupSampler, Rng
from varkit.checkpoints.files import load_official, write_official
from varkit.config import ConfigError
from varkit.generators.eagle import Eagle
from varkit.generators.llamagen import LlamaGen
from varkit.interfaces import Cond
from varkit.pipelines.auto import open_drafter
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative.drafters.eagle import EagleDrafter
from varkit.samplers.speculative.drafters.eagle_trees import TREES, DynamicTree, StaticTree, leaf_paths, parse_tree
from varkit.samplers.speculative.interfaces import DraftBlock, Outcome
from varkit.samplers.speculative.proposals import draw_without_replacement
from varkit.samplers.speculative.target import ancestors_of
from varkit.tokenizers.vqgan import VQGAN
from varkit.training.loop import train
from varkit.training.objectives import build_objective, objective_config
from varkit.training.objectives.eagle import drafter_loss

SIZE, WIDTH, GRID = 12, 32, (4, 5)
STATIC = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0))
TREE = {"static": STATIC, "dynamic": DynamicTree(7, 2, 3)}


def lively(model: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def network(prefix: int = 2) -> Eagle:
    torch.manual_seed(5)
    return lively(Eagle(SIZE, WIDTH, 2, 40, prefix_length=prefix, grid=GRID))


def target_model(**changes: Any) -> LlamaGen:
    sizes = {"num_classes": 3, "depth": 2, "hidden_size": WIDTH, "num_heads": 2, "grid": GRID, "codebook_size": SIZE}
    torch.manual_seed(6)
    return lively(LlamaGen(**{**sizes, **changes}), 1)


class Stand:
    """What the loop gives: states that depend on image, branch and place alone, and random acceptance."""

    def __init__(self, drafter: EagleDrafter, batch: int, guided: bool, prefix: int = 2, **settings: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(2, 8, 40, WIDTH, generator=generator)[: 1 + guided, :batch].flatten(0, 1)  # R 40 C
        self.head = torch.randn(SIZE, WIDTH, generator=generator)
        self.turns = torch.zeros(batch, dtype=torch.int64)
        self.order = torch.arange(math.prod(GRID))
        self.scales = torch.full((len(self.order),), 2.0)
        self.null = Cond(self.turns) if guided else None
        self.processors = build_processors(**settings)
        self.hidden = self.table[:, : prefix + 1]
        self.prefix, self.drafter, self.guided = prefix, drafter, guided
        layout = SimpleNamespace(codebook_size=SIZE, grids=(GRID,))
        config = SimpleNamespace(hidden_size=WIDTH)
        self.model = SimpleNamespace(
            layout=layout, config=config, prefix_length=prefix + 1, output_of=lambda h: h @ self.head.T
        )
        self.tokens = [[int(i) % SIZE] for i in range(batch)]
        drafter.check(self)
        drafter.begin(self, Rng.from_seed(0, batch))

    def progress(self) -> Any:
        turns = torch.tensor([len(t) for t in self.tokens])
        return SimpleNamespace(newest=torch.tensor([t[-1] for t in self.tokens]), turns=turns)

    def round(self, steps: list[int]) -> DraftBlock:
        """Image b keeps steps[b] nodes of its first path (as far as it goes), and a drawn token; -1: it is finished."""
        block = self.drafter.propose(self.progress())
        nodes, batch = block.tokens.shape[1] + 1, len(steps)
        depth = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), block.depth], 1)
        hidden = torch.stack(
            [
                self.table[r, [self.prefix + len(self.tokens[r % batch]) + int(d) for d in depth[r % batch]]]
                for r in range(len(self.table))
            ]
        )
        path, emitted = torch.full((batch, 5), -1), torch.full((batch, 5), -1)
        for b, keep in enumerate(steps):
            if keep < 0:
                continue
            route = [0]
            while len(route) <= keep:
                below = [n for n in range(1, nodes) if block.parents[b, n - 1] == route[-1] and block.valid[b, n - 1]]
                if not below:
                    break
                route.append(below[-1])
            new = [int(block.tokens[b, n - 1]) for n in route[1:]] + [(7 * len(self.tokens[b]) + b) % SIZE]
            path[b, : len(route)], emitted[b, : len(new)] = torch.tensor(route), torch.tensor(new)
            self.tokens[b] += new
        count = (path >= 0).sum(1)
        self.drafter.observe(Outcome(block, torch.empty(0), path, emitted, count, hidden))
        return block

    def expected(self, row: int, image: int, more: tuple[int, ...] = (), states: Tensor | None = None) -> Tensor:
        """The network over the whole sequence at once: the state after the newest token."""
        ids = [0] * self.prefix + self.tokens[image]
        hidden = self.table[row, : len(ids)]
        if states is not None:
            ids, hidden = ids + list(more), torch.cat([hidden, states])
        return self.drafter.network(torch.tensor([ids]), hidden[None])[0, -1]


# ---- stable and drafted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", TREE)
def test_what_is_stable_is_the_decided_sequence_and_nothing_else(kind: str, guided: bool) -> None:
    drafter = EagleDrafter(network(), TREE[kind])
    stand = Stand(drafter, 3, guided)
    for steps in ([0, 2, 1], [1, -1, 0], [2, 0, 2]):
        stand.round(steps)
        for row in range(3 * (1 + guided)):
            torch.testing.assert_close(drafter.root[row], stand.expected(row, row % 3), atol=1e-4, rtol=1e-4)
    lengths = [len(t) for t in stand.tokens]
    assert len(set(lengths)) > 1 and drafter.state.lengths.tolist() == [n + 2 for n in lengths]


@pytest.mark.parametrize("guided", [False, True])
def test_each_node_is_drawn_from_the_law_of_its_own_path(guided: bool) -> None:
    """q of a node is the head's law after the network has gone down its path, one entry after the other."""
    drafter = EagleDrafter(network(), STATIC)
    stand = Stand(drafter, 2, guided, top_k=6)
    stand.round([1, 0])
    block = drafter.propose(stand.progress())
    assert block.q is not None and block.proposal == "without-replacement" and not block.point.any()
    for b in range(2):
        for node in range(len(STATIC)):
            up, at = [], int(block.parents[b, node])
            while at:
                up.append(at)
                at = int(block.parents[b, at - 1])
            logits = []
            for row in range(b, len(stand.table), 2):
                state = stand.expected(row, b)
                seen: list[Tensor] = []
                for place in range(len(up)):
                    seen.append(state)
                    tokens = tuple(int(block.tokens[b, n - 1]) for n in up[::-1][: place + 1])
                    state = stand.expected(row, b, tokens, torch.stack(seen))
                logits.append(stand.model.output_of(state))
            mixed = logits[0] if not guided else logits[1] + 2 * (logits[0] - logits[1])
            for processor in stand.processors:
                mixed = processor(mixed)
            torch.testing.assert_close(block.q[b, node], mixed.softmax(-1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", TREE)
def test_an_image_drafts_the_same_in_any_batch_and_when_others_leave(kind: str) -> None:
    both, alone = (Stand(EagleDrafter(network(), TREE[kind]), n, True) for n in (3, 1))
    for first, second in zip(([1, 0, 2], [0, 2, 1]), ([1], [0]), strict=True):
        a, b = both.round(first), alone.round(second)
        assert torch.equal(a.tokens[:1], b.tokens) and torch.equal(a.parents[:1], b.parents)
    both.drafter.keep(torch.tensor([0, 2]))
    both.table = both.table[[0, 2, 3, 5]]
    both.tokens = [both.tokens[0], both.tokens[2]]
    for _ in range(2):
        a, b = both.round([1, 0]), alone.round([1])
        assert torch.equal(a.tokens[:1], b.tokens)
    for row in range(4):
        torch.testing.assert_close(both.drafter.root[row], both.expected(row, row % 2), atol=1e-4, rtol=1e-4)


def test_a_real_target_and_its_states_fit() -> None:
    """The drafter of a `LlamaGen` starts with its embedding, and reads what its head reads."""
    model = target_model()
    drafter = Eagle.of(model)
    assert torch.equal(drafter.embed_tokens.weight, model.tok_embeddings.weight)
    assert not drafter.embed_tokens.weight.requires_grad and drafter.prefix_length == 0
    inputs, cond = torch.randint(0, SIZE, (2, 20)), Cond(torch.tensor([0, 2]))
    states = model.last_states(inputs, cond)
    torch.testing.assert_close(model.output(states), model.teacher_forced(inputs, cond).logits)
    with pytest.raises(ValueError, match=r"another target: it has \{.*'grid': \(4, 5\).*\(5, 4\)"):
        drafter.require(target_model(grid=(5, 4)))


# ---- trees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 5, SIZE])
def test_a_dynamic_tree_holds_the_best_of_what_it_scored_with_all_ancestors(width: int) -> None:
    drafter = EagleDrafter(network(), DynamicTree(9, 2, width))
    stand = Stand(drafter, 3, True)
    block = stand.round([0, 0, 0])
    below = torch.arange(1, block.tokens.shape[1] + 1)
    assert (block.parents < below).all() and block.point.all() and block.valid.all() and block.q is None
    for b in range(3):
        pairs = list(zip(block.parents[b].tolist(), block.tokens[b].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)  # siblings differ
        children: dict[int, int] = {}
        for parent, _ in pairs:
            children[parent] = children.get(parent, 0) + 1
        assert max(children.values()) <= width


def test_filters_leave_out_what_they_forbid() -> None:
    for kind in TREE:
        stand = Stand(EagleDrafter(network(), TREE[kind]), 2, False, top_k=2)
        block = stand.round([0, 0])
        for b in range(2):
            for parent in range(block.tokens.shape[1] + 1):
                below = block.valid[b] & (block.parents[b] == parent)
                assert below.sum() <= 2
                assert parent == 0 or block.valid[b, parent - 1] or not below.any()


@pytest.mark.parametrize("kind", TREE)
def test_a_greedy_target_gets_the_best_tokens_as_points(kind: str) -> None:
    stand = Stand(EagleDrafter(network(), TREE[kind]), 2, True, top_k=1)
    block = stand.round([0, 0])
    assert block.point.all() and block.q is None and block.valid.all()
    assert ((block.parents == 0).sum(1) > 1).all()  # and not one alone, which is all that the filter leaves


def test_draws_without_replacement_follow_the_law() -> None:
    law = torch.tensor([0.5, 0.3, 0.2, 0.0])
    count = 40000
    uniform = Rng.from_seed(0, 1).uniform(torch.arange(count), 0, count=3)[0]
    tokens, shares = draw_without_replacement(law.expand(count, -1), uniform)
    first = torch.bincount(tokens[:, 0], minlength=4) / count
    torch.testing.assert_close(first, law, atol=0.01, rtol=0)
    second = torch.bincount(tokens[tokens[:, 0] == 0][:, 1], minlength=4) / (tokens[:, 0] == 0).sum()
    torch.testing.assert_close(second, torch.tensor([0, 0.6, 0.4, 0]), atol=0.01, rtol=0)
    assert torch.equal(tokens.sort(1).values, torch.tensor([0, 1, 2]).expand(count, -1))
    torch.testing.assert_close(shares[:, 2], torch.ones(count))
    left = draw_without_replacement(law, torch.full((4,), 0.5))[1]
    assert left[2] > 0 and left[3] == 0  # nothing is left to draw


@pytest.mark.parametrize("name", TREES)
def test_named_trees_are_whole(name: str) -> None:
    tree = StaticTree(name)
    seen = ancestors_of(tree.parents[None])[0]
    assert torch.equal(seen.sum(1) - 1, torch.cat([torch.zeros(1, dtype=torch.int64), tree.depth]))
    paths = leaf_paths(tree.parents)
    assert set(paths.flatten().tolist()) - {-1} == set(range(len(tree.paths) + 1))
    assert parse_tree(name).paths == parse_tree(TREES[name][::-1]).paths  # type: ignore[union-attr]


def test_trees_that_are_none_are_refused() -> None:
    for paths, message in (
        ([(0,), (2,)], r"path \(2,\) without \(1,\)"),
        ([(0, 0)], r"path \(0, 0\) without \(0,\)"),
        ([], "at least one path"),
        ("medusa", "did you mean 'medusa_2_7b_63'"),
        ("dynamik", "did you mean 'dynamic'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_tree(paths)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width must be at least that, got 2"):
        StaticTree(STATIC, 2)
    with pytest.raises(ValueError, match="depth of a dynamic tree must be at least 1; got 0"):
        DynamicTree(depth=0)
    with pytest.raises(ValueError, match="20 draws, the codebook has 12 entries"):
        EagleDrafter(network(), StaticTree(STATIC, 20))
    stand = Stand(EagleDrafter(network()), 1, False)
    stand.order = stand.order.flip(0)
    with pytest.raises(ValueError, match="one order of the tokens, raster"):
        stand.drafter.check(stand)
    stand.model = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="continues the states of LlamaGen; Linear is none"):
        stand.drafter.check(stand)
    with pytest.raises(ValueError, match="reads 2 states of the target's prefix"):
        EagleDrafter(network()).start(1, lambda h: h, lambda logits, _: logits)


# ---- files and training -----------------------------------------------------------------------------------------


def test_the_configuration_beside_a_released_file_is_read(tmp_path: Path) -> None:
    model = network(prefix=4)
    write_official(model, tmp_path / "pytorch_model.bin")
    official = {
        "vocab_size": SIZE,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "rms_norm_eps": 1e-6,
        "block_size": 16,
        "rope_base": 100,
        "cls_token_num": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(official))
    again: Any = load_official(tmp_path / "pytorch_model.bin", grid=list(GRID))
    assert again.config.rope_base == 100 and again.config.num_heads == 2 and again.length == 24
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    official["num_key_value_heads"] = 1
    (tmp_path / "config.json").write_text(json.dumps(official))
    with pytest.raises(ValueError, match="as many key-value heads as heads"):
        load_official(tmp_path / "pytorch_model.bin")


def test_the_chameleon_layer_turns_halves_and_norms_heads() -> None:
    sizes = {"norm_input": True, "norm_heads": True, "line_length": 24, "prefix_length": 0}
    model = lively(Eagle(SIZE, WIDTH, 2, 40, **sizes))
    ids, hidden = torch.randint(0, SIZE, (1, 9)), torch.randn(1, 9, WIDTH)
    state = model.start(1, False, 3)
    one = [model.extend(state, ids[:, i : i + 1], hidden[:, i : i + 1], torch.ones(1).long()) for i in range(9)]
    torch.testing.assert_close(torch.cat(one, 1), model(ids, hidden), atol=1e-5, rtol=1e-4)
    x = torch.randn(1, 9, 2, 16)
    turned = model.rotary(x, torch.arange(9)[None])
    assert torch.equal(turned[:, 0], x[:, 0])  # the place 0 is not turned
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    shifted = model.rotary(x, torch.arange(9)[None] + 5)  # products depend on distances alone
    scores = [torch.einsum("bnhd,bmhd->bhnm", t, t) for t in (turned, shifted)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline, as a target."""
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    tokenizer = VQGAN(SIZE, 8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=8, grid=4)
    model = target_model(num_classes=10, grid=4)
    ClassToImagePipeline(model, tokenizer.eval(), NextGroupSampler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_drafter_learns_the_states_of_its_target(folder: Path, guidance: float | None, tmp_path: Path) -> None:
    plan = {"name": "eagle", "target": str(folder), "noise": 0.01, "guidance_scale": guidance}
    changes = ("loop.steps=40", "loop.validate_every=10", "loop.save_every=40", "optim.lr=1e-2", "loop.log_every=10")
    run = train(recipe(tmp_path / "run", plan, *changes))
    validated = [line for line in lines(run.folder) if "validation/loss" in line]
    assert validated[-1]["validation/hidden"] < 0.8 * validated[0]["validation/hidden"]
    assert validated[-1]["validation/overlap"] > validated[0]["validation/overlap"]
    target = LlamaGen.from_pretrained(folder / "transformer")
    drafter = open_drafter(str(run.folder / "model"), target)
    assert torch.equal(drafter.embed_tokens.weight, target.tok_embeddings.weight)
    names = load_file(next((run.folder / "model").glob("*.safetensors"))).keys()
    assert not any("output" in name for name in names)  # the head is the target's


def test_pairs_are_one_ahead_and_the_prefix_does_not_count(folder: Path) -> None:
    objective: Any = build_objective(objective_config({"name": "eagle", "target": str(folder), "null_rate": 0.0}), [])
    tokens = torch.randint(0, SIZE, (2, 16))
    ids, states = objective.pairs({"tokens": tokens, "labels": torch.tensor([1, 2])}, Rng.from_seed(0, 2))
    assert torch.equal(ids, tokens[:, :-1]) and states.shape == (2, 16, WIDTH)  # token p beside the state that gave it
    inputs = objective.frozen("tokenizer").embed(tokens)
    logits = objective.frozen("target").teacher_forced(inputs, Cond(torch.tensor([1, 2]))).logits
    torch.testing.assert_close(objective.head(states), logits)
    all_null: Any = build_objective(objective_config({"name": "eagle", "target": str(folder), "null_rate": 1.0}), [])
    without = all_null.pairs({"tokens": tokens, "labels": torch.tensor([1, 2])}, Rng.from_seed(0, 2))[1]
    torch.testing.assert_close(without[0, 0], without[1, 0])


def test_the_loss_of_perfect_states_is_the_laws_entropy() -> None:
    states, head = torch.randn(4, 6, WIDTH), torch.randn(SIZE, WIDTH)
    losses = drafter_loss(states, states, lambda h: h @ head.T, torch.ones(4, 6), epsilon=0.0)
    law = (states @ head.T).softmax(-1)
    torch.testing.assert_close(losses["token"], -(law * law.log()).sum(-1).mean(), atol=1e-3, rtol=1e-3)
    assert losses["hidden"] == 0 and float(losses["overlap"]) == pytest.approx(1, abs=1e-5)
    half = torch.zeros(4, 6)
    half[:, :3] = 1
    worse = torch.cat([states[:, :3], states[:, 3:] + 5], 1)
    assert drafter_loss(worse, states, lambda h: h @ head.T, half)["hidden"] == 0


def test_objectives_that_cannot_be_are_refused(folder: Path) -> None:
    for values, message in (
        ({"null_rate": 2}, r"null_rate must be in \[0, 1\]; got 2"),
        ({"noise": -1}, "noise must not be negative; got -1"),
        ({"text_encoder": "x"}, "is conditioned on class: leave out"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_objective(objective_config({"name": "eagle", "target": str(folder), **values}), [])
    with pytest.raises(ConfigError, match=r"10 classes.*the data 11"):
        build_objective(objective_config({"name": "eagle", "target": str(folder)}), [str(i) for i in range(11)])
    with pytest.raises(ValueError, match="no drafter at 'nowhere'"):
        open_drafter("nowhere", target_model())
