"""EAGLE drafters in the real loop: plain greedy decoding, the exact law, any batch, and the command line."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.test_eagle import lively
from tests.test_speculative import SIGNIFICANCE, ResidualIsP, p_value
from varkit import AutoPipeline, ClassToImagePipeline, NextGroupSampler, Rng
from varkit.cli import app
from varkit.generators.eagle import Eagle
from varkit.generators.llamagen import LlamaGen
from varkit.heads.categorical import Categorical
from varkit.interfaces import Cond
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative.drafters.eagle import EagleDrafter
from varkit.samplers.speculative.interfaces import Siblings
from varkit.samplers.speculative.names import parse_options, parse_pair
from varkit.samplers.speculative.sampler import SpeculativeSampler
from varkit.samplers.speculative.verifiers import VERIFIERS
from varkit.tokenizers.vqgan import VQGAN

SIZE, GRID, FAMILY = 12, (4, 5), 10
TREES: dict[str, dict[str, Any]] = {
    "dynamic": {"nodes": 9, "depth": 2, "width": 3},
    "static": {"tree": [[0], [1], [0, 0], [1, 0], [0, 0, 0]]},
    "chain": {"tree": "chain"},
}

SMALL: dict[str, dict[str, Any]] = {
    "small-dynamic": {"nodes": 5, "depth": 2, "width": 2},  # of three tokens; three would accept one always
    "small-static": {"tree": [[0], [1], [0, 0], [0, 1], [1, 0]]},
    "small-chain": {"tree": [[0], [0, 0], [0, 0, 0]]},
}


def models(grid: tuple[int, int] = GRID, size: int = SIZE, text: bool = False, **more: Any) -> tuple[LlamaGen, Eagle]:
    """A target, and a drafter that is a little like it: it has its embedding."""
    kind = {"num_classes": None, "text_length": 4, "text_dim": 6} if text else {"num_classes": 3}
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2, "grid": grid, "codebook_size": size}
    torch.manual_seed(6)
    target = lively(LlamaGen(**sizes, **kind), 1)
    drafter = Eagle.of(target, **more)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return target, drafter.eval()


def conditions(target: LlamaGen, count: int) -> Cond:
    if target.condition == "class":
        return Cond(torch.arange(count) % 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    features = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    return Cond(sequence=features[:count], mask=mask[:count])


def draw(
    target: LlamaGen, drafter: Eagle | None, count: int, tree: str = "", cond: Cond | None = None, **s: Any
) -> Any:
    verifier = s.pop("verifier", "exact")
    sampler: Any = NextGroupSampler(**s)
    if drafter is not None:
        sampler = SpeculativeSampler("eagle", verifier, (TREES | SMALL)[tree], **s)
        sampler.draft_model = drafter
    cond = conditions(target, count) if cond is None else cond
    tokenizer: Any = SimpleNamespace(layout=target.layout)  # drafting reads no more of it
    if drafter is None:
        sizes = {"base_channels": 32, "channel_multipliers": (1,), "num_res_blocks": 1, "z_channels": 8}
        tokenizer = VQGAN(target.layout.codebook_size, 8, grid=target.layout.grids[0], **sizes).eval()
    return sampler.generate(tokenizer, target, cond, Rng.from_seed(0, len(cond)), null=target.null(cond))


@pytest.mark.parametrize("w", [1.0, 2.5])
@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_greedy_decoding_is_plain_greedy_decoding(text: bool, w: float) -> None:
    """And many drafts are right, so that keys of several nodes were kept."""
    target, drafter = models(text=text)
    plain = draw(target, None, 3, top_k=1, guidance_scale=w)
    for tree in TREES:
        out = draw(target, drafter, 3, tree, top_k=1, guidance_scale=w)
        assert torch.equal(out.tokens, plain.tokens)
        assert sum(out.accepted) > 0
        alone = draw(target, drafter, 1, tree, top_k=1, guidance_scale=w)
        assert torch.equal(alone.tokens, plain.tokens[:1])


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
@pytest.mark.parametrize("tree", TREES)
def test_an_image_does_not_depend_on_its_batch(tree: str, text: bool) -> None:
    target, drafter = models(text=text)
    settings: dict[str, Any] = {"guidance_scale": 2.0, "top_k": 8, "temperature": 1.3}
    three = draw(target, drafter, 3, tree, **settings)
    one = draw(target, drafter, 1, tree, **settings)
    assert torch.equal(one.tokens, three.tokens[:1]) and one.target_calls == three.target_calls[:1]
    assert len(set(three.target_calls)) > 1 or tree == "chain"  # rows went on at speeds of their own


def test_what_padding_is_read_as_changes_drafts_and_nothing_else() -> None:
    """As released: no law changes, and where there is no padding nothing at all."""
    (target, drafter), (_, quirky) = models(text=True), models(text=True, official_quirks=True)
    plain = draw(target, None, 3, top_k=1, guidance_scale=2.0)
    ours, theirs = (draw(target, d, 3, "dynamic", top_k=1, guidance_scale=2.0) for d in (drafter, quirky))
    assert torch.equal(ours.tokens, plain.tokens) and torch.equal(theirs.tokens, plain.tokens)
    blocks = []
    for network in (drafter, quirky):
        found = EagleDrafter(network, "dynamic")
        cond = conditions(target, 3)
        sampler = SpeculativeSampler(guidance_scale=2.0)
        with torch.no_grad():
            looked = sampler.target(target, cond, target.null(cond), sampler.settings(), target.schedule())
            found.check(looked)
            looked.first()
        blocks.append(looked.hidden)
    changed = (blocks[0] != blocks[1]).any(2).any(1)  # R
    assert changed.tolist() == [True, False, True] * 2


# ---- the law ----------------------------------------------------------------------------------------------------


def exact_law(target: LlamaGen, label: int, w: float, **filters: Any) -> Tensor:
    """Of all sequences, by teacher forcing, without a cache."""
    length, size = target.layout.length, target.layout.codebook_size
    sequences = torch.tensor(list(product(range(size), repeat=length)))
    inputs = torch.cat([torch.zeros_like(sequences[:, :1]), sequences[:, :-1]], 1)
    with torch.no_grad():
        cond, null = (
            target.teacher_forced(inputs, Cond(torch.full((len(inputs),), c))).logits
            for c in (label, target.num_classes)
        )
    p = Categorical(torch.lerp(null, cond, w)).probs(build_processors(**filters)).double()
    return p.gather(2, sequences[..., None])[..., 0].prod(1)


ROWS = 5000
LAWS: list[tuple[str, float, dict[str, Any]]] = [
    ("small-dynamic", 1.0, {}),
    ("small-dynamic", 2.0, {"top_k": 2}),
    ("small-static", 1.0, {"top_p": 0.8}),
    ("small-static", 2.0, {}),
    ("small-chain", 2.0, {"temperature": 1.5}),
]


def score(tree: str, w: float, filters: dict[str, Any], verifier: str = "exact") -> tuple[float, float]:
    """The p-value of a chi-square test over sequences of four tokens, and the share of drafts that were accepted."""
    target, drafter = models((1, 4), 3)
    cond = Cond(torch.ones(ROWS, dtype=torch.int64))
    settings = {"guidance_scale": w, "guidance_schedule": "constant", **filters}
    out = draw(target, drafter, ROWS, tree, cond, verifier=verifier, **settings)
    cells = (out.tokens * torch.tensor([27, 9, 3, 1])).sum(1)
    law = exact_law(target, 1, w, **filters)
    return p_value(torch.bincount(cells, minlength=len(law)), law), sum(out.accepted) / sum(out.drafted)


@pytest.mark.parametrize(("tree", "w", "filters"), LAWS, ids=[f"{t}-{w}-{'-'.join(f)}" for t, w, f in LAWS])
def test_the_law_is_that_of_plain_decoding(tree: str, w: float, filters: dict[str, Any]) -> None:
    value, accepted = score(tree, w, filters)
    assert value > SIGNIFICANCE / FAMILY and accepted > 0.05


@pytest.mark.parametrize("tree", ["small-dynamic", "small-static"])
def test_a_wrong_verifier_is_caught(monkeypatch: pytest.MonkeyPatch, tree: str) -> None:
    monkeypatch.setitem(VERIFIERS, "wrong", ResidualIsP)
    assert score(tree, 2.0, {}, "wrong")[0] < 1e-9


def test_states_of_another_node_cost_drafts_and_no_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that reads wrong states changes no image, and is accepted otherwise: so it did read the right ones."""
    target, drafter = models()
    good = draw(target, drafter, 3, "static", top_k=1, guidance_scale=2.0)
    observe = EagleDrafter.observe

    def wrong(self: EagleDrafter, outcome: Any) -> None:
        observe(self, SimpleNamespace(**{**vars(outcome), "hidden": -outcome.hidden}))  # type: ignore[arg-type]

    monkeypatch.setattr(EagleDrafter, "observe", wrong)
    bad = draw(target, drafter, 3, "static", top_k=1, guidance_scale=2.0)
    assert torch.equal(good.tokens, bad.tokens) and good.accepted != bad.accepted


# ---- names and the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("sjd:window=4", ("jacobi", "exact", {"window": 4}, {})),
        ("recycling:k=3+bounded:k=5,tv_bound=0.2", ("recycling", "bounded", {"k": 3}, {"k": 5, "tv_bound": 0.2})),
        ("eagle+lantern:network=a/b,k=9", ("eagle", "lantern", {"network": "a/b"}, {"k": 9})),
        ("lantern:network=a+b/c,nodes=4", ("eagle", "lantern", {"network": "a+b/c", "nodes": 4}, {})),
        ("eagle:tree=[[0],[1],[0,0]]+bounded", ("eagle", "bounded", {"tree": [[0], [1], [0, 0]]}, {})),
        ("little+match:branches=[2,2],model=x", ("little", "match", {"branches": [2, 2], "model": "x"}, {})),
    ],
)
def test_options_go_where_they_belong(name: str, pair: tuple[Any, ...]) -> None:
    assert parse_pair(name) == pair
    assert parse_options('a=[1,{"b":2,"c":3}],d=x') == {"a": [1, {"b": 2, "c": 3}], "d": "x"}


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A saved pipeline, and a drafter of its generator."""
    target, drafter = models((4, 4))
    torch.manual_seed(0)
    tokenizer = VQGAN(SIZE, 8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=8, grid=4)
    root = tmp_path_factory.mktemp("pair")
    pipe = ClassToImagePipeline(target, tokenizer.eval(), NextGroupSampler(guidance_scale=2.0))
    pipe.save_pretrained(root / "model")
    drafter.save_pretrained(root / "drafter")
    return str(root / "model"), str(root / "drafter")


@pytest.mark.parametrize("more", ["", "+lantern:k=4,tv_bound=0.2", "+bounded:k=4,tv_bound=0.3"])
def test_the_command_drafts_with_a_network_of_a_folder(folders: tuple[str, str], more: str, tmp_path: Path) -> None:
    model, drafter = folders
    name = f"eagle:network={drafter},nodes=6,depth=2,width=3{more}"
    out = ["--out", str(tmp_path / "x.png"), "--class", "0,1", "--device", "cpu"]
    told = CliRunner().invoke(app, ["sample", model, *out, "--sampler", name, "--json"])
    assert told.exit_code == 0, told.output
    stats = json.loads(told.stdout.splitlines()[-1])
    assert stats["law"] == ("not lossless" if more else "lossless") and stats["drafted"] > 0


def test_the_network_is_opened_once_and_kept_by_name(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = AutoPipeline.from_pretrained(folders[0]), {"class_labels": [0, 1], "seed": 1, "output_type": "latent"}
    named = pipe.choose_sampler(f"eagle:network={folders[1]},nodes=6", 2)
    first = pipe(**call, sampler=named)
    opened = named.draft_model
    assert isinstance(opened, Eagle)
    assert torch.equal(pipe(**call, sampler=named).images, first.images) and named.draft_model is opened
    pipe.register_modules(sampler=named)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoPipeline.from_pretrained(tmp_path / "saved")(**call).images, first.images)


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ("eagle", "needs the network that was trained for the model"),
        ("eagle:network=nowhere", "no drafter at 'nowhere'"),
        ("eagle:netwrk=x", "did you mean 'network'"),
        ("eagle:nodes=many", "nodes of the drafter eagle must be int; got 'many'"),
        ("eagle:nodes=4,tree=chain", "a fixed tree has its own"),
        ("eagle:tree=5", "cannot take"),
        ("eagle:nodes=4+bounded:window=3", "verifier bounded has no option window"),
        ("eagle:nodes=4+grouped", "drafts trees, and Grouped treats chains"),
        ("recycling+bounded:k=4", "both have an option k: write options behind the one"),
        ("sjd:window=3,window=4", "window is given twice"),
        ("jacobi:model=x", "has no option model"),
    ],
)
def test_bad_names_end_in_one_line(folders: tuple[str, str], sampler: str, told: str) -> None:
    done = CliRunner().invoke(app, ["sample", folders[0], "--sampler", sampler, "--device", "cpu"])
    assert done.exit_code == 2 and told in done.stderr, done.output
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_a_drafter_of_another_model_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    models((4, 5))[1].save_pretrained(tmp_path / "other")
    done = CliRunner().invoke(app, ["sample", folders[0], "--sampler", f"eagle:network={tmp_path / 'other'}"])
    assert done.exit_code == 2 and "made for another target" in done.stderr


def test_points_at_once_are_points_one_by_one() -> None:
    """The short cut of `Exact` and the recursion that it stands for."""
    exact: Any = VERIFIERS["exact"]()
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(400, 5, generator=generator) * (torch.rand(400, 5, generator=generator) > 0.3)
    p = p[p.sum(1) > 0]
    p = p / p.sum(1, keepdim=True)
    tokens = torch.randint(0, 5, (len(p), 4), generator=generator)  # with tokens that come twice
    valid, uniform = torch.rand(tokens.shape, generator=generator) > 0.2, torch.rand(tokens.shape, generator=generator)
    some = Siblings(tokens, valid, torch.ones_like(valid), None, "iid")
    like = Siblings(tokens, valid, torch.ones_like(valid), p[:, None].expand(-1, 4, -1), "iid")
    short, long = exact.step(p, some, uniform), exact.step(p, like, uniform)
    assert torch.equal(short.accepted, long.accepted) and 0 < int((short.accepted < 0).sum()) < len(p)
    torch.testing.assert_close(short.residual, long.residual)
