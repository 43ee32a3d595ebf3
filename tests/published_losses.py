"""The loss of every objective as its paper has it: of a batch in the papers' words, one token at a time."""

import torch
from torch.nn.functional import logsigmoid

# Rows (chosen, rejected) of three prompts with 3, 2 and 4 rationales; some in no pair, some in several.
PAIRS = torch.tensor([[0, 1], [2, 1], [3, 4], [8, 5]])
# Chains: three whose proposal was accepted, and two whose state stayed.
CHAINS = torch.tensor([[0, 0], [1, 2], [4, 4], [5, 5], [6, 7]])


class Plain:
    """A batch in the papers' words: sums over tokens, found one token at a time."""

    def __init__(self, logps, scored, extras):
        self.K = torch.bincount(scored.prompt).tolist()
        R = len(scored.prompt)
        self.prompts = [[r for r in range(R) if scored.prompt[r] == n] for n in range(len(self.K))]
        tokens = {}
        for m, s in enumerate(scored.segment.tolist()):
            of = int(scored.kind[s]), int(scored.rationale[s]), int(scored.option[s])
            tokens.setdefault(of, []).append(m)
        self.z = [logps[tokens[0, r, 0]].sum() for r in range(R)]
        self.y_tokens = [logps[tokens[1, r, 0]] for r in range(R)]
        self.y = [t.sum() for t in self.y_tokens]
        self.options = [[logps[tokens[1, r, o]].sum() for o in range(3)] for r in range(R)]
        self.base_tokens = [logps[tokens[2, self.prompts[n][0], 0]] for n in scored.prompt.tolist()]
        self.ratio = [self.z[r] - extras["ref_logps"][tokens[0, r, 0]].sum() for r in range(R)]
        self.bonus, self.correct = extras["bonus"], extras["correct"].double()
        self.R = R

    def loo(self, values):
        found = [None] * self.R
        for group in self.prompts:
            for k in group:
                others = [values[j] for j in group if j != k]
                found[k] = (values[k] - sum(others) / len(others)).detach()
        return found

    def deviation(self, values, rows):
        return torch.stack([values[r] for r in rows]).detach().std()

    def group_of(self, r):
        return next(group for group in self.prompts if r in group)


def mean(values):
    return sum(values) / len(values)


def log_mean_exp(values):
    return torch.stack(values).exp().mean().log()


def latro(p):
    advantage = p.loo([p.y[r] + p.bonus[r] - 0.05 * p.ratio[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + p.y[r] for r in range(p.R)])


def latro_without_stop(p):
    advantage = p.loo([p.y[r] + p.bonus[r] - 0.05 * p.ratio[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + p.y_tokens[r][1:].sum() for r in range(p.R)])


def jepo(p):
    advantage = p.loo([p.y[r] + p.bonus[r] for r in range(p.R)])
    reward = [p.y[r] + p.bonus[r] for r in range(p.R)]
    scaled = [a / (p.deviation(reward, p.group_of(r)) + 1e-4) for r, a in enumerate(advantage)]
    assert any(abs(a) > 1 for a in scaled) and any(abs(a) < 1 for a in scaled)
    return -mean([max(-1, min(1, float(a))) * p.z[r] + p.y[r] for r, a in enumerate(scaled)])


def jepo_multi_advantage(p, values):
    found = []
    for r in range(p.R):
        group = p.group_of(r)
        others = log_mean_exp([values[j] for j in group if j != r])
        found.append((log_mean_exp([values[j] for j in group]) - others).detach())
    return found


def jepo_multi(p):
    """The bound itself, and the score function's term; the bonus is a log-likelihood of something else."""
    advantage = jepo_multi_advantage(p, [p.y[r] + p.bonus[r] for r in range(p.R)])
    bound = [log_mean_exp([p.y[r] for r in group]) for group in p.prompts]
    score = [sum(advantage[r] * p.z[r] for r in group) for group in p.prompts]
    return -mean([a + b for a, b in zip(bound, score, strict=True)])


def verifree(p):
    advantage = p.loo([p.y[r].exp() + p.bonus[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + p.y[r].exp() for r in range(p.R)])


def avg_logprob(p):
    average = [p.y_tokens[r].mean() for r in range(p.R)]
    advantage = p.loo([average[r] + p.bonus[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + average[r] for r in range(p.R)])


def rlpr(p):
    def reward(r):
        return (p.y_tokens[r].exp().mean() - p.base_tokens[r].exp().mean()).clamp(0, 1) + p.bonus[r]

    rewards = [reward(r).detach() for r in range(p.R)]
    advantage = []
    for r in range(p.R):
        group = p.group_of(r)
        centred = rewards[r] - mean([rewards[j] for j in group])
        advantage.append(centred / (p.deviation(rewards, group) + 1e-4))
    return -mean([advantage[r] * p.z[r] for r in range(p.R)])


def gain(p):
    reward = [torch.clamp(p.y[r] - p.base_tokens[r].sum(), min=0) + p.bonus[r] for r in range(p.R)]
    advantage = p.loo(reward)
    return -mean([advantage[r] * p.z[r] for r in range(p.R)])


def rloo(p):
    advantage = p.loo([p.correct[r] - 0.2 * p.ratio[r] + p.bonus[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + 0.7 * p.correct[r] * p.y[r] for r in range(p.R)])


def multiple_choice(p):
    right = [torch.stack(options).log_softmax(0)[0] for options in p.options]
    odds = [a - (1 - a.exp()).log() for a in right]
    advantage = p.loo([odds[r] + p.bonus[r] for r in range(p.R)])
    return -mean([advantage[r] * p.z[r] + 0.5 * right[r] for r in range(p.R)])


def rft(p):
    """The mean log-likelihood of the data set of right samples."""
    return -mean([p.z[r] + p.y[r] for r in range(p.R) if p.correct[r]])


def dpo(p):
    return -mean([logsigmoid(0.1 * (p.ratio[w] - p.ratio[l])) for w, l in PAIRS.tolist()])


def ranked_dpo(p):
    found = []
    for group in p.prompts:
        ranked = sorted(group, key=lambda r: float(p.y[r].detach()))
        best, worst = ranked[-1], ranked[0]
        found.append(logsigmoid(0.1 * (p.ratio[best] - p.ratio[worst])))
    return -mean(found)


def trice(p):
    terms = []
    for c, (state, proposal) in enumerate(CHAINS.tolist()):
        others = [float(a == b) for d, (a, b) in enumerate(CHAINS.tolist()) if d != c]
        terms.append(p.z[state] - mean(others) * p.z[proposal] + p.y[state])
    return -mean(terms)
