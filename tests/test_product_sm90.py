"""The fused product of Hopper, csrc/linear_logprobs/product_sm90.h: what it leaves in the state, in the partials and in
E, against the definition in float64. On a Hopper GPU, and elsewhere in the emulator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latro_kernels.linear_logprobs import protocol
from latro_kernels.linear_logprobs.cuda import PRODUCT_WIDTH
from tests import emulator

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if ON_GPU else "cpu"
MOST = 58  # bits of a logit above the guess before the tile's offset is another
ROUNDING = 3e-5  # of float32 sums of 200 products, in bits and so of exponentials


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


@dataclass
class Head:
    """Columns [first_v, first_v + V) of a vocabulary, and tokens whose targets lie in and beside them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperatures: Tensor
    first_v: int
    softcap: float
    logit_scale: float

    def logits_and_slopes(self) -> tuple[Tensor, Tensor]:
        """In bits, float64."""
        products = self.hidden.double() @ self.weight.double().T
        if self.bias is not None:
            products = products + self.bias.double()
        logits, slopes = self.logit_scale * products, torch.ones_like(products)
        if self.softcap:
            slopes = 1 / torch.cosh(logits / self.softcap) ** 2
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperatures[:, None].double() / math.log(2), slopes

    def is_target(self) -> Tensor:
        return torch.arange(len(self.weight), device=DEVICE) == (self.targets - self.first_v)[:, None]


def random_head(M, V, D, dtype, *, bias=False, softcap=0.0, logit_scale=1.0, first_v=0, seed=0) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return Head(
        hidden=randn(M, D).to(DEVICE, dtype),
        weight=(randn(V, D) * 4 / D**0.5).to(DEVICE, dtype),
        bias=randn(V).to(DEVICE, dtype) if bias else None,
        targets=torch.randint(0, V + 2 * first_v, (M,), generator=generator).to(DEVICE),
        temperatures=(torch.rand(M, generator=generator) + 0.5).to(DEVICE),
        first_v=first_v,
        softcap=softcap,
        logit_scale=logit_scale,
    )


@dataclass
class Made:
    state: Tensor
    partials: Tensor | None
    exponentials: Tensor | None


def run(head: Head, guess: Tensor, guessed: Tensor, *, statistics: bool, keep: bool) -> Made:
    """Without statistics, `guess` is the shift that E has."""
    M, V = len(head.hidden), len(head.weight)
    tiles, first_tile = -(-V // PRODUCT_WIDTH), 2
    state = unwritten(protocol.STATE_ROWS, M)
    state[protocol.TEMPERATURE] = head.temperatures
    if statistics:
        state[protocol.GUESS], state[protocol.GUESSED] = guess, guessed
    else:
        state[protocol.SHIFT] = guess
    partials = unwritten(3, first_tile + tiles + 1, M) if statistics else None
    exponentials = unwritten(M + 1, 64 * -(-V // 64) + 64, dtype=head.hidden.dtype) if keep else None
    ops = torch.ops.latro_kernels if ON_GPU else emulator.build()
    ops.head_product_and_epilogue(
        head.hidden, head.weight, head.bias, head.targets, state, exponentials[:M, :V] if keep else None, partials,
        first_tile, head.first_v, head.logit_scale, head.softcap,
    )  # fmt: skip
    if exponentials is not None:
        assert exponentials[M:].isnan().all()
        assert exponentials[:, V + -V % 8 :].isnan().all()  # the rest of a row: no tile's
    if partials is not None:
        assert partials[:, :first_tile].isnan().all()
        assert partials[:, first_tile + tiles :].isnan().all()
        partials = partials[:, first_tile : first_tile + tiles]
    return Made(state, partials, None if exponentials is None else exponentials[:M, :V])


def steps(highest: Tensor, guess: Tensor, guessed: Tensor) -> Tensor:
    distance = highest - guess
    far = (distance > MOST) | ((guessed == 0) & (distance < -MOST))
    return torch.where(far, distance.ceil().clamp(min=-3.4e38), 0)


def check(head: Head, guess: Tensor, guessed: Tensor, *, statistics=True, keep=True) -> None:
    made = run(head, guess, guessed, statistics=statistics, keep=keep)
    logits, slopes = head.logits_and_slopes()
    is_target = head.is_target()
    here = is_target.any(1) & statistics
    others = logits.masked_fill(is_target, -math.inf)
    for row, values in ((protocol.LOGIT, logits), (protocol.SLOPE, slopes)):
        written = made.state[row].double()
        torch.testing.assert_close(written[here], values[is_target & here[:, None]], rtol=ROUNDING, atol=10 * ROUNDING)
        assert written[~here].isnan().all()
    assert made.state[[protocol.HIGHEST, protocol.TOTAL, protocol.ENTRY]].isnan().all()
    guess = guess.double()
    for tile, columns in enumerate(torch.arange(len(head.weight), device=DEVICE).split(PRODUCT_WIDTH)):
        of_tile = others[:, columns]
        offset = guess
        if statistics:
            highest, total, moment = made.partials[:, tile].double()
            expected = of_tile.amax(1)
            torch.testing.assert_close(highest, expected, rtol=ROUNDING, atol=10 * ROUNDING)
            offset = guess + steps(expected, guess, guessed)
        exponentials = torch.exp2(of_tile - offset[:, None])
        if statistics:
            below = torch.where(exponentials > 0, of_tile - expected[:, None], 0)
            torch.testing.assert_close(total, exponentials.sum(1), rtol=10 * ROUNDING, atol=1e-37)
            torch.testing.assert_close(moment, (exponentials * below).sum(1), rtol=10 * ROUNDING, atol=1e-37)
        if keep:
            dtype = head.hidden.dtype
            torch.testing.assert_close(
                made.exponentials[:, columns].double(),
                exponentials * slopes[:, columns],
                rtol=torch.finfo(dtype).eps / 2 + 10 * ROUNDING,
                atol=max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1e-37),
            )


def near_guess(head: Head) -> tuple[Tensor, Tensor]:
    """A whole number near each row's highest logit."""
    guess = head.logits_and_slopes()[0].amax(1).round().float()
    return guess, torch.ones_like(guess)


# Ragged everywhere; a cluster whose second block has no row; fewer tiles than clusters, and several for each of the
# emulator's three; more rows of tiles than a group has.
SIZES = [(1, 1, 8), (127, 255, 72), (129, 257, 128), (300, 700, 200), (2100, 300, 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_statistics_and_exponentials_are_those_of_the_definition(size, dtype):
    head = random_head(*size, dtype)
    check(head, *near_guess(head))


HEADS = {
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0, "logit_scale": 2.0},
    "softcap and bias": {"softcap": 30.0, "bias": True},
    "negative scale": {"logit_scale": -0.5},
    "strip": {"first_v": 300},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("made", ["statistics", "exponentials", "both"])
def test_every_head_and_what_is_made_of_it(head, made):
    head = random_head(130, 300, 72, torch.float16, **HEADS[head])
    check(head, *near_guess(head), statistics=made != "exponentials", keep=made != "statistics")


def test_operands_may_be_rows_of_larger_matrices():
    head = random_head(130, 300, 72, torch.bfloat16)
    for name in ("hidden", "weight"):
        matrix = getattr(head, name)
        wide = unwritten(len(matrix), 96, dtype=matrix.dtype)
        wide[:, 8:80] = matrix
        setattr(head, name, wide[:, 8:80])
    check(head, *near_guess(head))


@pytest.mark.parametrize("distance", [-300.0, -59.5, -57.5, 57.5, 59.5, 300.0])
@pytest.mark.parametrize("is_guessed", [True, False])
def test_a_guess_may_be_far_off(distance, is_guessed):
    """bfloat16 then holds E in full where the highest logit has moved the tile's offset to itself, and 2^-300 as 0."""
    head = random_head(130, 300, 72, torch.bfloat16)
    guess, guessed = near_guess(head)
    check(head, guess - math.floor(distance), guessed * is_guessed)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_forbidden_entries_count_for_nothing(softcap):
    """A tile of nothing else too, and one that holds a target. Under a softcap they are at -cap, and count."""
    head = random_head(130, 600, 72, torch.bfloat16, bias=True, softcap=softcap)
    head.bias[:256] = -math.inf
    head.bias[300:400:2] = -math.inf
    head.targets[:65] %= 256
    guess, guessed = near_guess(head)
    guessed[:65] = 0
    check(head, guess, guessed)


def test_a_row_that_is_not_a_number_is_that_row_alone():
    head = random_head(130, 300, 72, torch.bfloat16)
    guess, guessed = near_guess(head)
    clean = run(head, guess, guessed, statistics=True, keep=True)
    head.hidden[77, 5] = math.nan
    made = run(head, guess, guessed, statistics=True, keep=True)
    rest = torch.arange(130, device=DEVICE) != 77
    assert made.partials[1:, :, 77].isnan().all()
    assert made.exponentials[77].isnan().sum() == 300 - 1  # but at the target
    assert torch.equal(made.partials[:, :, rest], clean.partials[:, :, rest])
    assert torch.equal(made.exponentials[rest], clean.exponentials[rest])


@pytest.mark.parametrize("late", ["", "copies", "products", "copies products"])
def test_neither_when_copies_land_nor_the_order_of_threads_matters(late, monkeypatch):
    head = random_head(300, 700, 200, torch.bfloat16)
    guess, guessed = near_guess(head)
    expected = run(head, guess, guessed, statistics=True, keep=True)
    monkeypatch.setenv("LATRO_EMULATOR_LATE", late)
    monkeypatch.setenv("LATRO_EMULATOR_SEED", "7")
    made = run(head, guess, guessed, statistics=True, keep=True)
    assert torch.equal(made.partials, expected.partials)
    assert torch.equal(made.exponentials, expected.exponentials)
    torch.testing.assert_close(made.state, expected.state, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", ["D", "stride", "base"])
def test_rows_that_copies_cannot_read_are_refused(where):
    head = random_head(4, 8, 24, torch.bfloat16)
    if where == "D":
        head.hidden, head.weight = head.hidden[:, :20], head.weight[:, :20]
    elif where == "stride":
        head.weight = unwritten(8, 28, dtype=torch.bfloat16)[:, :24]
    else:
        head.hidden = unwritten(4 * 24 + 4, dtype=torch.bfloat16)[4:].view(4, 24)
    with pytest.raises(RuntimeError, match="the fused product needs rows of whole 16 bytes"):
        run(head, *near_guess(head), statistics=True, keep=True)
