"""Sampling latents group by group, on a toy whose answer is known: its flow carries any noise to a given point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from varkit import Rng
from varkit.heads.flow import Flow
from varkit.interfaces import Cond, Generator, Losses, State
from varkit.layout import TokenLayout
from varkit.samplers.continuous import ContinuousSampler, put, steps_of, take
from varkit.tokenizers.kl_vae import KLVAE


class Nothing(State):
    def rewind(self, count: int) -> None: ...

    def reset(self) -> None: ...


class Toy(Generator):
    """Position p of class c is drawn at c + p / 10 + what was read before; without a class at -1."""

    layout = TokenLayout(((2, 2),), None, 3)
    condition = "class"

    def __init__(self, own_orders: bool = False) -> None:
        self.own_orders = own_orders
        self.seen: list[Tensor] = []

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        return list(torch.arange(4).chunk(num_steps or 4))

    def groups(self, rng: Rng, num_steps: int | None = None, order: str | None = None) -> list[Tensor]:
        if not self.own_orders:
            return self.schedule(num_steps)
        orders = torch.stack([torch.arange(4).roll(i) for i in range(len(rng))])
        return list(orders.chunk(num_steps or 4, dim=1))

    def start(self, cond: Cond, null: Cond | None = None) -> State:
        self.cond, self.guided, self.seen = cond, null is not None, []
        return Nothing()

    def predict(self, state: Any, inputs: Tensor, positions: Tensor) -> Flow:
        goal = (self.cond.labels[:, None] + positions / 10)[..., None] + 0.0 * inputs
        self.seen.append(inputs)

        def towards(target: Tensor) -> Any:
            return lambda x, t: (x - target) / t.view(-1, 1, 1)

        cond, null = towards(goal), towards(torch.full_like(goal, -1.0))
        return Flow(cond, 3, (lambda x, t: (cond(x, t), null(x, t))) if self.guided else None)

    def append(self, state: Any, tokens: Tensor, positions: Tensor) -> None: ...

    def training_loss(self, tokens: Tensor, inputs: Tensor, cond: Cond, rng: Rng, **options: Any) -> Losses:
        return {}


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer() -> KLVAE:
    return KLVAE(image_size=4, latent_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)


def expected(labels: Tensor) -> Tensor:
    return (labels[:, None] + torch.arange(4) / 10)[..., None].expand(-1, -1, 3)


@pytest.mark.parametrize("own_orders", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_token_lands_where_its_flow_leads(tokenizer: KLVAE, own_orders: bool, groups: int) -> None:
    toy, cond = Toy(own_orders), Cond(torch.tensor([0, 2, 1]))
    out = ContinuousSampler(num_steps=groups, head_steps=3).generate(tokenizer, toy, cond, Rng.from_seed(0, 3))
    torch.testing.assert_close(out.tokens, expected(cond.labels))
    assert (out.steps, out.head_calls) == (groups, 3 * groups)
    if groups == 4 and not own_orders:  # each token reads the one before it, the first nothing
        read = torch.cat(toy.seen, 1)
        torch.testing.assert_close(read[:, 1:], out.tokens[:, :-1])
        assert not read[:, 0].any()


def test_guidance_leads_away_from_the_null_branch_where_it_is_on(tokenizer: KLVAE) -> None:
    cond, null = Cond(torch.tensor([1])), Cond(torch.tensor([9]))
    sampler = ContinuousSampler(
        guidance_scale=3.0, guidance_schedule="constant", guidance_interval=(1, 2), head_steps=1
    )
    out = sampler.generate(tokenizer, Toy(), cond, Rng.from_seed(0, 1), null=null).tokens
    plain = expected(cond.labels)
    away = -1 + 3 * (plain + 1)
    torch.testing.assert_close(out, torch.where(torch.tensor([0, 1, 1, 0])[:, None].bool(), away, plain))


def test_known_tokens_stay_and_are_read(tokenizer: KLVAE) -> None:
    cond, given = Cond(torch.tensor([0, 1])), torch.full((2, 4, 3), 7.0)
    for own in (False, True):
        toy = Toy(own)
        keep = torch.tensor([[True, False, False, True], [False, True, False, False]])
        out = ContinuousSampler().generate(tokenizer, toy, cond, Rng.from_seed(0, 2), known=(given, keep)).tokens
        torch.testing.assert_close(out, torch.where(keep[..., None], given, expected(cond.labels)))


def test_head_steps_fall_in_a_line() -> None:
    assert [steps_of(i, 4, 50, 15) for i in range(4)] == [50, 38, 26, 15]  # DiSA's for xAR
    assert [steps_of(i, 3, 20, None) for i in range(3)] == [20] * 3
    assert steps_of(0, 1, 20, 5) == 20


def test_tokens_at_positions_of_each_image() -> None:
    tokens = torch.arange(24.0).view(2, 4, 3)
    positions = torch.tensor([[3, 0], [1, 2]])
    got = take(tokens, positions)
    assert torch.equal(got, torch.stack([tokens[0, [3, 0]], tokens[1, [1, 2]]]))
    again = torch.zeros_like(tokens)
    put(again, positions, got)
    assert torch.equal(again[0, [3, 0]], tokens[0, [3, 0]]) and not again[0, [1, 2]].any()


def test_refusals(tokenizer: KLVAE) -> None:
    cond = Cond(torch.tensor([0]))
    with pytest.raises(ValueError, match="head_steps must be at least 1; got 0"):
        ContinuousSampler(head_steps=0)
    with pytest.raises(ValueError, match="a flow has no temperature"):
        ContinuousSampler(temperature=0.9).generate(tokenizer, Toy(), cond, Rng.from_seed(0, 1))
    with pytest.raises(ValueError, match="guidance_scale 2 needs the unconditional branch"):
        ContinuousSampler().generate(tokenizer, Toy(), cond, Rng.from_seed(0, 1), guidance_scale=2)
