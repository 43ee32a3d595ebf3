"""Each CUDA kernel of the linear head by itself, on sizes that leave tails: in the emulator, or on a GPU."""

import math

import pytest
import torch

from latro_kernels.linear_logprobs import protocol
from latro_kernels.linear_logprobs.cuda import EPILOGUE_WIDTH as WIDTH
from tests import emulator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOG2_E = math.log2(math.e)
SENTINEL = 77.0

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def ops():
    return torch.ops.latro_kernels if DEVICE == "cuda" else emulator.build()


class Room:
    """A tensor in the middle of others' memory, which has to stay as it was."""

    def __init__(self, rows, columns, dtype=torch.float32, stride=None):
        stride = stride or -(-columns // 64) * 64
        self.memory = torch.full((64 + rows * stride + 64,), SENTINEL, dtype=dtype, device=DEVICE)
        self.padded = self.memory[64:-64].view(rows, stride)
        self.inside = self.padded[:, :columns]
        self.inside.fill_(torch.nan)

    def assert_others_untouched(self):
        """Columns between the matrix and its stride are its own."""
        assert (self.memory[:64] == SENTINEL).all()
        assert (self.memory[-64:] == SENTINEL).all()


def new_state(M, **rows):
    state = Room(protocol.STATE_ROWS, M, stride=M)
    state.inside.zero_()
    state.inside[protocol.TEMPERATURE] = 1
    state.inside[protocol.HIGHEST] = -torch.inf
    for name, values in rows.items():
        state.inside[getattr(protocol, name)] = values
    return state


def normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def entries(M, V):
    return (torch.arange(M, device=DEVICE) * 37 + V - 1) % V


@every_dtype
@pytest.mark.parametrize(("M", "D"), [(1, 1), (7, 8), (8, 37), (9, 256), (17, 264)])
def test_guess(M, D, dtype, ops):
    V = 5
    hidden, weight, bias = normal(M, D, dtype=dtype), normal(V, D, dtype=dtype, seed=1), normal(V, dtype=dtype, seed=2)
    targets, state = entries(M, V), new_state(M)
    ops.head_guess(hidden, weight, bias, targets, state.inside, 0.7, 0.0)
    logits = 0.7 * LOG2_E * ((hidden.double() * weight.double()[targets]).sum(1) + bias.double()[targets])
    assert (state.inside[protocol.GUESS].double() - logits).abs().max() <= 0.5 + 1e-4
    assert torch.equal(state.inside[protocol.GUESS], state.inside[protocol.GUESS].round())
    assert (state.inside[protocol.GUESSED] == 1).all()
    state.assert_others_untouched()


@every_dtype
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    ("M", "V"), [(1, 1), (3, 63), (7, 64), (8, 65), (9, WIDTH - 1), (2, WIDTH), (17, WIDTH + 1), (5, 2 * WIDTH + 200)]
)
def test_epilogue(M, V, softcap, dtype, ops):
    """Tiles begin where others end, targets lie at both ends of the strip and outside it, and offsets are the guess."""
    first_v, first_tile, tiles = 128, 2, 3 + -(-V // WIDTH)
    products, bias = Room(M, V), normal(V, dtype=dtype, seed=1)
    products.inside.copy_(normal(M, V))
    targets = first_v + torch.tensor([-1, 0, V - 1, V], device=DEVICE)[torch.arange(M, device=DEVICE) % 4]
    state = new_state(M, GUESS=torch.arange(M, device=DEVICE) % 3, GUESSED=1, LOGIT=SENTINEL, SLOPE=SENTINEL)
    partials, E = Room(3 * tiles, M, stride=M), Room(M, V, dtype)
    whole = partials.inside.view(3, tiles, M)
    ops.head_epilogue(
        products.inside, bias, bias, targets, state.inside, E.inside, whole, first_tile, first_v, 0.7, softcap
    )

    raw = 0.7 * (products.inside.double() + bias.double())
    logits = LOG2_E * (softcap * (raw / softcap).tanh() if softcap else raw)
    slope = 1 - (raw / softcap).tanh().square() if softcap else torch.ones_like(raw)
    is_target = torch.arange(V, device=DEVICE) == targets[:, None] - first_v
    others = logits.masked_fill(is_target, -torch.inf)
    exponentials = (others - state.inside[protocol.GUESS].double()[:, None]).exp2()
    for found, exact in ((E.inside, exponentials * slope), (state.inside[protocol.LOGIT][:, None], logits)):
        mask = torch.ones_like(is_target) if found is E.inside else is_target
        close = torch.isclose(found.double().expand_as(exact), exact, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-6)
        assert (close | ~mask).all()
    assert (state.inside[protocol.LOGIT][~is_target.any(1)] == SENTINEL).all()
    for tile in range(tiles):
        here = slice((tile - first_tile) * WIDTH, (tile - first_tile + 1) * WIDTH)
        if tile < first_tile or here.start >= V:
            assert whole[:, tile].isnan().all()
            continue
        highest = others[:, here].amax(1)
        centred = (others[:, here] - highest[:, None]).nan_to_num(nan=0).clamp(min=-1000)  # NaN: the target alone
        exact = torch.stack([highest, exponentials[:, here].sum(1), (exponentials[:, here] * centred).sum(1)])
        torch.testing.assert_close(whole[:, tile].double(), exact, rtol=1e-5, atol=1e-4)
    for room in (products, state, partials, E):
        room.assert_others_untouched()


@pytest.mark.parametrize("headroom", [False, True])
@pytest.mark.parametrize(("M", "tiles"), [(1, 1), (31, 7), (32, 8), (33, 9), (70, 40)])
def test_combine(M, tiles, headroom, ops):
    """From tiles of four logits each, some of them far above the guess."""
    logits = normal(M, tiles, 4).double() * 3
    logits[::3, tiles // 2] += 100
    logits[1::3, tiles // 3] += 300  # 2^-300 is 0 in float32
    own, slope = normal(M, seed=1), normal(M, seed=2).sigmoid()
    state = new_state(M, GUESS=own.round(), GUESSED=1, LOGIT=own, SLOPE=slope)
    guess = own.round().double()
    highest = logits.amax(2)
    steps = (highest - guess[:, None]).ceil().where(highest - guess[:, None] > 58, 0)
    exponentials = (logits - guess[:, None, None] - steps[..., None]).exp2()
    moments = (exponentials * (logits - highest[..., None])).sum(2)
    partials = torch.stack([highest, exponentials.sum(2), moments]).transpose(1, 2).float().contiguous()
    logps, entropy = Room(1, M, stride=M), Room(1, M, stride=M)
    ops.head_combine(partials, state.inside, logps.inside[0], entropy.inside[0], headroom)

    every = torch.cat([own.double()[:, None], logits.flatten(1)], 1) / LOG2_E
    exact = every.log_softmax(1)
    torch.testing.assert_close(logps.inside[0].double(), exact[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.inside[0].double(), -(exact.exp() * exact).sum(1), rtol=1e-5, atol=1e-5)
    shift, total, entry = state.inside[[protocol.SHIFT, protocol.TOTAL, protocol.ENTRY]].double()
    assert headroom or torch.equal(shift, shift.round())
    torch.testing.assert_close(total.log2() + shift, every.logsumexp(1) * LOG2_E, rtol=0, atol=1e-5 * 150)
    torch.testing.assert_close(entry, total * exact[:, 0].expm1() * slope.double(), rtol=1e-5, atol=0)
    if headroom:
        torch.testing.assert_close(total, torch.full_like(total, 2.0**14), rtol=1e-4, atol=0)
    for room in (state, logps, entropy):
        room.assert_others_untouched()


@every_dtype
@pytest.mark.parametrize(("M", "tiles", "V"), [(1, 1, 3), (33, 3, 9), (40, 4, 16)])
@pytest.mark.parametrize("first_tile", [0, 2])
def test_settle(M, tiles, V, first_tile, dtype, ops):
    """Tiles of four columns; in some rows one of them is above the guess, in some all were below it before."""
    highest = normal(tiles, M)
    highest[-1, ::5] += 70
    partials = torch.full((3, first_tile + tiles + 1, M), 200.0, device=DEVICE)
    partials[0, first_tile:-1] = highest
    state = new_state(M, GUESS=0, GUESSED=1, HIGHEST=torch.where(torch.arange(M, device=DEVICE) % 7 == 3, 90, -1))
    before = state.inside[protocol.HIGHEST].clone()
    E, unit = Room(M, V, dtype, stride=V), Room(M, 6, stride=6)
    E.inside.copy_(normal(M, V, dtype=dtype, seed=1))
    unit.inside.copy_(normal(M, 6, seed=2))
    exponentials, sums = E.inside.clone(), unit.inside.clone()
    ops.head_settle(partials, first_tile, tiles, 4, state.inside, E.inside, unit.inside)

    def steps(values):
        return values.ceil().where(values > 58, 0)

    now = torch.maximum(before, highest.amax(0))
    assert torch.equal(state.inside[protocol.HIGHEST], now)
    of_column = highest.repeat_interleave(4, 0)[:V].T
    assert torch.equal(E.inside, (exponentials.double() * (steps(of_column) - steps(now)[:, None]).exp2()).to(dtype))
    assert torch.equal(unit.inside, sums * (steps(before) - steps(now)).exp2()[:, None])
    for room in (state, E, unit):
        room.assert_others_untouched()


@every_dtype
@pytest.mark.parametrize("and_targets", [False, True])
@pytest.mark.parametrize(("M", "D"), [(1, 1), (9, 37), (20, 264), (5, 2056)])
def test_add_rows(M, D, and_targets, dtype, ops):
    """Rows of one token, of several, and of none."""
    rows = torch.arange(M, device=DEVICE).square() % 7
    in_order, order = rows.sort(stable=True)
    ends = torch.searchsorted(in_order, in_order, right=True)
    values = normal(M, D) if and_targets else normal(M, D, dtype=dtype)
    coefficients, of_targets = normal(M, seed=1), normal(M, seed=2)
    weight, targets = normal(3, D, dtype=dtype), entries(M, 3)
    for out_dtype in {dtype, torch.float32}:
        out = Room(7, D, out_dtype, stride=D)
        out.inside.copy_(normal(7, D, dtype=out_dtype, seed=3))
        exact = out.inside.double()
        arguments = values, coefficients, order, in_order, ends, weight if and_targets else None, targets, of_targets
        ops.head_add_rows(*arguments, out.inside)
        exact = exact.index_add(0, rows, coefficients.double()[:, None] * values.double())
        if and_targets:
            exact = exact.index_add(0, rows, of_targets.double()[:, None] * weight.double()[targets])
        tolerance = torch.finfo(out_dtype).eps
        torch.testing.assert_close(out.inside.double(), exact, rtol=tolerance, atol=2e-6)
        out.assert_others_untouched()


def runs(M):
    """Rows of one token, of three, and at the end of many: where each token's begin and end."""
    rows = torch.arange(M, device=DEVICE).clamp(max=M // 2) // 3 * 2
    rows[::5] += 1
    rows = rows.sort().values
    return torch.searchsorted(rows, rows), torch.searchsorted(rows, rows, right=True)


def temperatures(M):
    return torch.tensor([0.5, 1.0, 1.0], device=DEVICE)[torch.arange(M, device=DEVICE) % 3]


@every_dtype
@pytest.mark.parametrize(("M", "V"), [(1, 5), (255, 7), (257, 300)])
def test_clear_targets(M, V, dtype, ops):
    first_v, targets, (begins, ends) = 40, entries(M, V + 80), runs(M)
    state, E = new_state(M, TEMPERATURE=temperatures(M)), Room(M, V, dtype)
    E.inside.fill_(3)
    ops.head_clear_targets(begins, ends, targets, state.inside, first_v, E.inside)
    expected = torch.full_like(E.inside, 3)
    for m in range(M):
        of_row = slice(begins[m], ends[m])
        fellows = targets[of_row][temperatures(M)[of_row] == temperatures(M)[m]] - first_v
        expected[m, fellows[(fellows >= 0) & (fellows < V)]] = 0
    assert torch.equal(E.inside, expected)
    E.assert_others_untouched()


@pytest.mark.parametrize("M", [1, 40, 257])
def test_couple_targets(M, ops):
    """Some tokens of a row have the same target, some another temperature."""
    (begins, ends), targets, coefficients = runs(M), entries(M, 3), normal(M)
    logits, slopes = normal(M, 3, seed=1)[begins], normal(M, 3, seed=2)[begins]
    shift, entry, total = normal(M, seed=3), normal(M, seed=4), normal(M, seed=5).exp()
    logit, slope = (of_row.gather(1, targets[:, None])[:, 0] for of_row in (logits, slopes))
    state = new_state(M, TEMPERATURE=temperatures(M), LOGIT=logit, SLOPE=slope, SHIFT=shift, TOTAL=total, ENTRY=entry)
    out = Room(1, M, stride=M)
    ops.head_couple_targets(coefficients, begins, ends, targets, state.inside, out.inside[0])
    exact = torch.zeros(M, dtype=torch.float64)
    for m in range(M):
        fellows = [j for j in range(begins[m], ends[m]) if temperatures(M)[j] == temperatures(M)[m]]
        if any(targets[j] == targets[m] for j in fellows if j < m):
            continue
        for j in fellows:
            share = (logit[m] - shift[m]).exp2() / total[m] * slope[m]
            own = entry[j] / total[j] if targets[j] == targets[m] else share
            exact[m] += (coefficients[j] * own).double().cpu()
    torch.testing.assert_close(out.inside[0].double().cpu(), exact, rtol=1e-4, atol=1e-4)
    out.assert_others_untouched()


@every_dtype
@pytest.mark.parametrize(("M", "V"), [(1, 1), (7, 255), (8, 256), (19, 300)])
def test_add_bias_grad(M, V, dtype, ops):
    E, out, coefficients = Room(M, V, dtype), Room(1, V, stride=V), normal(M, seed=1)
    E.inside.copy_(normal(M, V, dtype=dtype))
    out.inside.copy_(normal(1, V, seed=2))
    exact = out.inside[0].double() + coefficients.double() @ E.inside.double()
    ops.head_add_bias_grad(E.inside, coefficients, out.inside[0])
    torch.testing.assert_close(out.inside[0].double(), exact, rtol=1e-5, atol=1e-5)
    out.assert_others_untouched()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU test_gpu.py does this with memory that is all there")
def test_offsets_beyond_31_bits(ops, tmp_path):
    """Rows that lie five gigabytes apart, in a file with holes."""
    M, V, stride = 3, 100, (5 << 28) + 64
    files = [torch.from_file(str(tmp_path / name), shared=True, size=M * stride) for name in "ab"]
    products, E = (file.view(M, stride)[:, :V] for file in files)
    products.copy_(normal(M, V))
    targets, state = entries(M, V), new_state(M, GUESSED=1)
    partials = torch.zeros(3, 1, M)
    ops.head_epilogue(products, products, None, targets, state.inside, E, partials, 0, 0, 1.0, 0.0)
    exact = (products * LOG2_E).exp2().scatter(1, targets[:, None], 0)
    torch.testing.assert_close(E.contiguous(), exact, rtol=1e-5, atol=0)
    ops.head_add_bias_grad(E, torch.ones(M), total := torch.zeros(V))
    torch.testing.assert_close(total, exact.sum(0))
    highest = torch.full((3, 1, M), 70.0)
    ops.head_settle(highest, 0, 1, WIDTH, state.inside, E, None)
    torch.testing.assert_close(E.contiguous(), exact, rtol=1e-5, atol=0)
