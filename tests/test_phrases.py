"""Sets of phrases: nothing depends on their order, where the ordinary mask would."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_models import liven
from tests.test_text import _encoder, ids  # noqa: F401
from tests.test_text_training import _tokenizer, captioned  # noqa: F401
from varkit import AutoPipeline, ClassToImagePipeline, NextGroupSampler, Rng, TextToImagePipeline
from varkit.conditioning.text import TextCondition, set_length, side_by_side
from varkit.config import ConfigError
from varkit.generators.llamagen import LlamaGen, apart
from varkit.interfaces import JOINT, Cond
from varkit.rng import Draw, RecordedRng
from varkit.tokenizers.vqgan import TINY, VQGAN
from varkit.training.objectives import build_objective, objective_config

pytest.importorskip("transformers", reason="the extra text is not installed")

SIZES: dict[str, Any] = {"num_classes": None, "text_length": 9, "text_dim": 12, "depth": 3, "hidden_size": 32}
TOKENS: dict[str, Any] = {k: TINY[k] for k in ("grid", "codebook_size", "latent_dim")}


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return liven(LlamaGen(**{**SIZES, **TOKENS, "num_heads": 2, **changes}))


def phrases(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 12, generator=generator) for n in lengths]


def arranged(own: list[Tensor]) -> list[Cond]:
    """A set in every order."""
    return [side_by_side([some], 9) for some in permutations(own)]


def tokens_of(network: Any, count: int, seed: int = 3) -> Tensor:
    shape = (count, network.layout.length)
    return torch.randint(0, network.layout.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- the condition ----------------------------------------------------------------------------------------------


def test_phrases_stand_side_by_side_and_what_reads_all_comes_last() -> None:
    a, b = phrases(3, 2)
    cond = side_by_side([[a, b], [b]], 9)
    sequence, mask = cond.text
    assert cond.phrase is not None and mask.sum(1).tolist() == [set_length([3, 2]), set_length([2])] == [6, 2]
    assert cond.phrase.tolist() == [[0] * 3 + [0] * 3 + [1] * 2 + [JOINT], [0] * 9]
    torch.testing.assert_close(sequence[0, 3:8], torch.cat([a, b]))
    torch.testing.assert_close(sequence[0, 8], (a[-1] + b[-1]) / 2)
    assert torch.equal(sequence[1, 7:], b) and not sequence[1, :7].any()


def test_a_phrase_sees_itself_alone_and_the_rest_sees_all() -> None:
    seen = apart(torch.tensor([[0, 0, 1, JOINT]]), 5)[0, 0]
    assert seen[:2].tolist() == [[True, True, False, False, False]] * 2
    assert seen[2].tolist() == [False, False, True, False, False] and seen[3:].all()


def test_conditions_keep_what_belongs_to_a_phrase() -> None:
    network = model()
    cond = side_by_side([phrases(3, 2), phrases(2, 1, seed=4)], 9)
    plain = Cond(sequence=cond.sequence, mask=cond.mask)
    assert cond.phrase is not None
    both = cond.beside(network.null(cond))
    assert both.phrase is not None and torch.equal(both.phrase[:2], cond.phrase) and not both.phrase[2:].any()
    assert torch.equal(plain.beside(cond).phrase[2:], cond.phrase)  # type: ignore[index]
    assert torch.equal(cond[1:].phrase, cond.phrase[1:])  # type: ignore[arg-type]
    assert plain.beside(plain).phrase is None
    gone = network.replace_by_null(cond, torch.tensor([True, False]))
    assert not gone.phrase[0].any() and torch.equal(gone.phrase[1], cond.phrase[1])
    with pytest.raises(ValueError, match="to which phrase it belongs"):
        Cond(sequence=cond.sequence, mask=cond.mask, phrase=cond.phrase[:, 1:])


def test_texts_become_sets_without_order_or_repetition(encoder: Path) -> None:
    condition = TextCondition(str(encoder), max_length=9)
    cond = condition.encode(phrases=["red cat", "the mat"])
    for same in ({"the mat", "red cat"}, ("the mat", "RED cat", "red cat"), [["the mat", "red cat"]]):
        again = condition.encode(phrases=same)
        assert torch.equal(again.sequence, cond.sequence) and torch.equal(again.phrase, cond.phrase)  # type: ignore[arg-type]
    alone = [condition.encode(prompt=text).text for text in ("red cat", "the mat")]  # each by itself
    rows = torch.cat([sequence[mask] for sequence, mask in alone])
    torch.testing.assert_close(cond.text[0][0, -7:-1], rows, atol=1e-5, rtol=1e-5)
    several = condition.encode(phrases=[["dog"], ["a", "blue", "mat"]])
    assert len(several) == 2 and several.text[1].sum(1).tolist() == [2, 7]
    for one, mask in zip(
        condition.encode(phrases=["a red dog"]).text, condition.encode(prompt="a red dog").text, strict=True
    ):
        assert torch.equal(one, mask)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a cat", "must be a set of phrases"),
        ([], "must be a set of phrases"),
        ([["a"], []], "phrases of image 1 must be a set"),
        ([["a"], "dog"], "phrases of image 1 must be a set"),
        (["a", "  "], "says nothing. Leave it out"),
        ([["a", 3]], "image 0: 3 says nothing"),
        (["a red cat on the mat", "a blue dog"], "take 12 tokens together; 9 are read"),
    ],
)
def test_what_is_wrong_with_phrases_is_said(encoder: Path, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextCondition(str(encoder), max_length=9).encode(phrases=given)


# ---- the network ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_do_not_depend_on_the_order_and_by_the_ordinary_mask_they_do() -> None:
    network = model()
    inputs = tokens_of(network, 1)
    orders = arranged(phrases(3, 2, 3))
    seen = [network.teacher_forced(inputs, cond).logits for cond in orders]
    assert len(seen) == 6
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], atol=1e-4, rtol=1e-4)
    sentences = [Cond(sequence=c.sequence, mask=c.mask) for c in orders]
    read = [network.teacher_forced(inputs, cond).logits for cond in sentences]
    assert min((other - read[0]).abs().max() for other in read[1:]) > 1e-2
    losses = [
        float(network.training_loss(inputs, inputs, c, Rng.from_seed(0, 1))["loss"]) for c in (*orders, *sentences)
    ]
    assert max(losses[:6]) - min(losses[:6]) < 1e-4 and max(losses[6:]) - min(losses[6:]) > 1e-3
    # no mask at all between phrases but for the last entry would not do either: it must read all of them
    blind = [Cond(sequence=c.sequence, mask=c.mask, phrase=c.phrase.masked_fill(c.phrase == JOINT, 9)) for c in orders]  # type: ignore[union-attr]
    assert (network.teacher_forced(inputs, blind[0]).logits - seen[0])[:, 0].abs().max() > 1e-2


@torch.no_grad()
def test_each_phrase_counts() -> None:
    network = model()
    inputs, own = tokens_of(network, 1), phrases(3, 2, 3)
    whole = network.teacher_forced(inputs, side_by_side([own], 9)).logits
    for i in range(3):
        some = side_by_side([own[:i] + own[i + 1 :]], 9)
        assert (network.teacher_forced(inputs, some).logits - whole).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_a_cache_gives_the_teacher_forced_network() -> None:
    """Also in several positions at once, and after going back to the start, which reads the prefix again."""
    network = model()
    inputs = tokens_of(network, 2)
    cond = side_by_side([phrases(3, 2), phrases(4, seed=4)], 9)
    null = network.null(cond)
    whole = [network.teacher_forced(inputs, c).logits for c in (cond, null)]
    state, count = network.start(cond, null), network.layout.length
    for _ in range(2):
        first = 0
        for size in (1, 3, count - 4):
            where = torch.arange(first, first + size)
            says = network.predict(state, inputs[:, where], where)
            for ours, full in zip((says.logits, says.null_logits), whole, strict=True):
                torch.testing.assert_close(ours, full[:, where], atol=1e-4, rtol=1e-4)
            network.append(state, inputs[:, where], where)
            first += size
        state.reset()
    (alone,) = network.teacher_forced(inputs[1:], cond[1:]).logits
    one = Cond(sequence=cond[1:].sequence, mask=cond[1:].mask)
    assert torch.equal(alone, network.teacher_forced(inputs[1:], one).logits[0])  # one phrase is a prompt


# ---- the pipeline -----------------------------------------------------------------------------------------------


@pytest.fixture(name="pipe")
def _pipe(encoder: Path) -> TextToImagePipeline:
    torch.manual_seed(1)
    sampler = NextGroupSampler(guidance_scale=2.0, guidance_schedule="constant")
    parts: Any = (model(), liven(VQGAN(**TINY), 0.05), sampler)
    pipe = TextToImagePipeline(*parts, text_encoder_name=str(encoder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler", [None, "sjd"])
def test_tokens_do_not_depend_on_the_order(pipe: TextToImagePipeline, sampler: str | None) -> None:
    drawn = [ids(pipe, phrases=list(some), sampler=sampler) for some in permutations(["a cat", "the mat", "red"])]
    assert all(torch.equal(other, drawn[0]) for other in drawn[1:])
    # not because texts are sorted on the way: conditions in any order give the same tokens
    null = pipe.no_prompt()
    draws = [
        pipe.draw(cond, null, Rng.from_seed(0, 1), known=None, output_type="latent", callback=None)[0]
        for cond in arranged(phrases(3, 2, 3))
    ]
    assert all(torch.equal(other, draws[0]) for other in draws[1:])
    sentences = [ids(pipe, text) for text in ("a cat the mat red", "red the mat a cat", "the mat a cat red")]
    assert not all(torch.equal(other, sentences[0]) for other in sentences[1:])


def test_sets_of_several_images_and_what_is_reported(pipe: TextToImagePipeline) -> None:
    sets = [["red", "dog"], ["mat"]]
    both = pipe(phrases=sets, num_images_per_prompt=2, output_type="latent", seed=0)
    assert both.prompts == ["dog, red", "dog, red", "mat", "mat"] and len(both.images) == 4
    prompts = ids(pipe, ["mat"], rng=Rng.from_seed(0, 1, 2), seed=None)
    assert torch.equal(both.images[2], prompts[0])
    away = ids(pipe, phrases=["red", "dog"], negative_prompt="blue")
    assert not torch.equal(away, ids(pipe, phrases=["red", "dog"]))
    image = torch.rand(1, 3, *pipe.image_tokenizer.image_size) * 2 - 1
    edits = [
        pipe.edit(image, box=(0, 0, 0.5, 1), phrases=list(some), seed=0, output_type="pt").images
        for some in permutations(["red", "dog"])
    ]
    assert torch.equal(*edits)
    with pytest.raises(ValueError, match="give prompt=, phrases= or features=, not both"):
        pipe("dog", phrases=["red"])
    pipe.transformer.reads_phrases = False
    with pytest.raises(ValueError, match="LlamaGen cannot read a set of phrases: give prompt="):
        pipe(phrases=["red"])


def test_a_generator_of_classes_says_that_it_reads_no_phrases() -> None:
    network: Any = liven(LlamaGen(**{**SIZES, **TOKENS, "num_heads": 2, "num_classes": 3}))
    tokenizer: Any = liven(VQGAN(**TINY), 0.05)
    pipe = ClassToImagePipeline(network, tokenizer, NextGroupSampler())
    assert not network.reads_phrases
    with pytest.raises(ValueError, match="is drawn from classes and reads no phrases: give class_labels="):
        pipe(phrases=["red"])


# ---- training ---------------------------------------------------------------------------------------------------


def objective(encoder: Path, tokenizer: str, **changes: Any) -> Any:
    values = {
        "name": "next-token",
        "model": "llamagen_t2i_small_64",
        "tokenizer": tokenizer,
        "text_encoder": str(encoder),
        "phrases": ", ",
        "model_overrides": {"depth": 2, "hidden_size": 32, "num_heads": 2, "text_length": 9, "cond_drop_rate": 0.0},
        **changes,
    }
    return build_objective(objective_config(values), [])


def test_a_share_of_the_captions_is_read_as_sets(encoder: Path, tokenizer: str, tmp_path: Path) -> None:
    own = objective(encoder, tokenizer)
    texts = ["red cat, the mat", "the mat, red cat", "a dog", "", "red, , RED", "a red cat on the mat, a blue dog"]
    own.check_texts("data.train", texts)
    assert any("2 captions are sets of phrases; 2 with ', ' are read as they are" in note for note in own.notes)
    with pytest.raises(ConfigError, match=r"no caption of data\.validation holds several phrases"):
        own.check_texts("data.validation", ["a dog", "red"])
    height, width = own.image_size
    batch = {
        "images": torch.rand(6, 3, height, width) * 2 - 1,
        "labels": torch.zeros(6, dtype=torch.int64),
        "texts": texts,
    }

    def cond(*u: float) -> Cond:
        return own.cond(batch, RecordedRng(uniform={Draw.PHRASES: torch.tensor(u)[:, None]}))

    whole = own.cond(batch)
    assert whole.phrase is None  # as sample sheets are drawn
    some = cond(0.4, 0.4, 0.4, 0.4, 0.4, 0.4)
    assert some.phrase is not None and (some.phrase == JOINT).any(1).tolist() == [True, True, *[False] * 4]
    assert torch.equal(some.sequence[0], some.sequence[1])  # type: ignore[index]
    assert torch.equal(some.sequence[2:], whole.sequence[2:])  # type: ignore[index]
    condition = own.captions.condition.encode(phrases=["the mat", "red cat"])
    torch.testing.assert_close(some.sequence[:1], condition.sequence, atol=1e-5, rtol=1e-5)  # type: ignore[index]
    none = cond(0.6, 0.6, 0.6, 0.6, 0.6, 0.6)
    assert torch.equal(none.sequence, whole.sequence) and not none.phrase.any()  # type: ignore[arg-type, union-attr]
    liven(own.model)  # the output of a new one is zero, and learns first
    own.train()
    losses = own(batch, "main", 0, 10, Rng.from_seed(0, 6))
    losses["loss"].backward()
    assert losses["loss"].isfinite() and own.model.cls_embedding.cap_proj.fc1.weight.grad.abs().sum() > 0
    own.export(tmp_path)
    pipe = AutoPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(ids(pipe, phrases=["red cat", "the mat"]), ids(pipe, phrases={"the mat", "red cat"}))


def test_an_encoder_that_learns_along_learns_from_sets(tokenizer: str) -> None:
    """One of bytes, of which several are a feature."""
    own = objective(Path(), tokenizer, text_encoder={"width": 12, "depth": 1, "heads": 2, "length": 36, "pool": 4})
    texts = ["red cat, the mat", "a dog"]
    own.check_texts("data.train", texts)
    liven(own.model)
    own.train()
    height, width = own.image_size
    batch = {"images": torch.zeros(2, 3, height, width), "labels": torch.zeros(2, dtype=torch.int64), "texts": texts}
    cond = own.cond(batch, RecordedRng(uniform={Draw.PHRASES: torch.zeros(2, 1)}))
    assert (cond.phrase == JOINT).any(1).tolist() == [True, False]
    assert cond.text[1][0].sum() == set_length([2, 2])  # 7 bytes and the end of each
    cond.text[0][0].square().sum().backward()  # of the set alone
    grads = [p.grad for p in own.captions.network.parameters() if p.grad is not None]
    assert sum(g.abs().sum() for g in grads) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": None, "features": "somewhere"}, "so give objective.text_encoder"),
        ({"phrases": " "}, "more than spaces"),
        ({"phrase_share": 0}, "above 0, at most 1"),
    ],
)
def test_a_bad_plan_is_refused(encoder: Path, tokenizer: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(encoder, tokenizer, **changes)
