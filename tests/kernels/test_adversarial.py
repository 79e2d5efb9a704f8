"""Adversarial and virtual adversarial training of attention scores."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    AdditiveAttentionPooling,
    ShapeError,
    adversarial_attention_loss,
    interpretable_perturbation,
    masked_attention,
    score_differences,
    score_perturbation,
    virtual_adversarial_attention_loss,
)

KINDS = ("AT", "iAT", "iAT published code")


class Classifier(torch.nn.Module):
    def __init__(self, classes=3, channels=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.pooling = AdditiveAttentionPooling(channels)
        self.output = torch.nn.Linear(channels, classes)
        self.double()

    def logits(self, scores, hidden, mask):
        return self.output(self.pooling.pool(scores, hidden, mask))


@pytest.fixture
def task():
    make = torch.Generator().manual_seed(3)
    hidden = 2 * torch.randn(4, 7, 6, generator=make, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 5, 3, 2])[:, None]
    label = torch.tensor([0, 2, 1, 1])
    model = Classifier()

    def logits(scores):
        return model.logits(scores, hidden, mask)

    def loss(scores):
        return torch.nn.functional.cross_entropy(logits(scores), label)

    return model, hidden, mask, logits, loss


def test_masked_attention():
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    weights = masked_attention(scores, mask)
    expected = scores[:2].masked_fill(~mask[:2], -torch.inf).softmax(-1)
    torch.testing.assert_close(weights[:2], expected, atol=1e-11, rtol=0)
    assert (weights[2] == 0).all()
    torch.testing.assert_close(masked_attention(scores), scores.softmax(-1))
    assert torch.autograd.gradcheck(lambda s: masked_attention(s, mask), (scores,))
    weights.sum().backward()
    assert bool(torch.isfinite(scores.grad).all()) and (scores.grad[2] == 0).all()


def test_perturbation_has_the_asked_length():
    gradient = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]])
    made = score_perturbation(gradient, xi=5.0)
    assert made.tolist() == [[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]]


def test_differences():
    scores = torch.tensor([[1.0, 3.0, 0.0, 9.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    found = score_differences(scores, mask)
    expected = torch.tensor([0.0, -2.0, 1.0, 0.0], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(found[0, 0], expected)
    assert (found[0, 3] == 0).all() and (found[0, :, 3] == 0).all() and (found[1] == 0).all()
    torch.testing.assert_close(
        torch.linalg.vector_norm(found[0, :3], dim=-1), torch.ones(3, dtype=torch.float64)
    )
    between = score_differences(scores, between="samples")
    assert between.shape == (2, 2, 4)
    torch.testing.assert_close(between, -between.transpose(0, 1))
    assert between[0, 1].tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_interpretable_perturbation_is_the_gradient_through_its_weights(task):
    model, hidden, mask, _, loss = task
    scores = model.pooling.scores(hidden).detach()
    directions = score_differences(scores, mask)
    weights = torch.zeros_like(directions, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(scores + (weights * directions).sum(2)), weights)
    norm = torch.linalg.vector_norm(slope, dim=(1, 2), keepdim=True)
    expected = (0.7 * slope / norm * directions).sum(2)
    found = adversarial_attention_loss(loss, scores, kind="iAT", xi=0.7, mask=mask)
    torch.testing.assert_close(found.perturbation, expected, atol=1e-14, rtol=1e-12)


def test_interpretable_and_plain_perturbations_agree_where_scores_differ(task):
    model, hidden, mask, _, loss = task
    scores = model.pooling.scores(hidden)
    plain, weighed, reverse = (
        adversarial_attention_loss(loss, scores, kind=kind, xi=0.5, mask=mask) for kind in KINDS
    )
    torch.testing.assert_close(weighed.perturbation, plain.perturbation, atol=1e-14, rtol=1e-12)
    assert torch.equal(reverse.perturbation, -plain.perturbation)
    # Tokens that all have one score have no differences to weigh.
    flat = torch.ones_like(scores)
    gradient = torch.randn(4, 7, dtype=torch.float64)
    assert (interpretable_perturbation(gradient, score_differences(flat)) == 0).all()


def test_adversarial_loss_is_larger_and_the_published_sign_makes_it_smaller(task):
    model, hidden, mask, _, loss = task
    scores = model.pooling.scores(hidden)
    for kind in KINDS:
        found = adversarial_attention_loss(loss, scores, kind=kind, xi=0.2, mask=mask)
        rises = found.adversarial > found.clean
        assert bool(rises) == (kind != "iAT published code")
        torch.testing.assert_close(found.clean, loss(scores))
        torch.testing.assert_close(found.adversarial, loss(scores + found.perturbation))
        norms = torch.linalg.vector_norm(found.perturbation, dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, 0.2))
        assert (found.perturbation[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_perturbation_is_the_clean_loss(task, kind):
    model, hidden, mask, _, loss = task
    scores = model.pooling.scores(hidden)
    found = adversarial_attention_loss(loss, scores, kind=kind, xi=0.0, weight=0.5, mask=mask)
    assert torch.equal(found.adversarial, found.clean)
    torch.testing.assert_close(found.total, 1.5 * found.clean)
    parameters = list(model.parameters())
    got = torch.autograd.grad(found.total, parameters)
    expected = torch.autograd.grad(1.5 * loss(model.pooling.scores(hidden)), parameters)
    torch.testing.assert_close(got, expected)


def test_perturbation_is_a_constant(task):
    model, hidden, mask, _, loss = task
    scores = model.pooling.scores(hidden)
    found = adversarial_attention_loss(loss, scores, weight=0.3, mask=mask)
    assert not found.perturbation.requires_grad and not found.gradient.requires_grad
    parameters = list(model.parameters())
    got = torch.autograd.grad(found.total, parameters)
    again = model.pooling.scores(hidden)
    expected = torch.autograd.grad(loss(again) + 0.3 * loss(again + found.perturbation), parameters)
    torch.testing.assert_close(got, expected)


def test_gradient_of_the_scores_by_differences(task):
    model, hidden, mask, _, loss = task
    scores = model.pooling.scores(hidden).detach().requires_grad_()
    shift = adversarial_attention_loss(loss, scores, mask=mask).perturbation
    assert torch.autograd.gradcheck(lambda s: loss(s) + loss(s + shift), (scores,))


@pytest.mark.parametrize("kind", ["VAT", "iVAT"])
def test_virtual(task, kind):
    model, hidden, mask, logits, _ = task
    scores = model.pooling.scores(hidden)

    def found(**options):
        generator = torch.Generator().manual_seed(5)
        return virtual_adversarial_attention_loss(
            logits, scores, kind=kind, mask=mask, generator=generator, **options
        )

    made = found(xi=0.5)
    assert made.divergence > 0
    assert (made.perturbation[~mask] == 0).all()
    norms = torch.linalg.vector_norm(made.perturbation, dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.5))
    clean, moved = (
        torch.distributions.Categorical(logits=logits(s))
        for s in (scores, scores + made.perturbation)
    )
    expected = torch.distributions.kl_divergence(clean, moved).mean()
    torch.testing.assert_close(made.divergence, expected)
    assert torch.equal(found(xi=0.5).perturbation, made.perturbation)
    none = found(xi=0.0)
    assert float(none.divergence.detach()) == 0.0
    assert all((g.abs() < 1e-15).all() for g in torch.autograd.grad(
        none.divergence, list(model.parameters()))
    )  # fmt: skip
    # Not worse than random perturbations of that length, on average.
    make = torch.Generator().manual_seed(6)
    random = []
    for _ in range(20):
        shift = score_perturbation(torch.randn(4, 7, generator=make).double() * mask, xi=0.5)
        other = torch.distributions.Categorical(logits=logits(scores + shift))
        random.append(torch.distributions.kl_divergence(clean, other).mean())
    assert made.divergence > torch.stack(random).mean()


def test_virtual_with_one_logit_is_two_classes(task):
    _, hidden, mask, _, _ = task
    binary = Classifier(classes=1)
    scores = binary.pooling.scores(hidden)

    def one(s):
        return binary.logits(s, hidden, mask)

    def two(s):
        return torch.cat([torch.zeros_like(one(s)), one(s)], dim=1)

    a, b = (
        virtual_adversarial_attention_loss(
            f, scores, mask=mask, generator=torch.Generator().manual_seed(1)
        )
        for f in (one, two)
    )
    assert torch.equal(a.divergence, b.divergence) and a.divergence > 0


def test_works_without_gradients_of_the_caller(task):
    model, hidden, mask, logits, loss = task
    with torch.no_grad():
        scores = model.pooling.scores(hidden)
        found = adversarial_attention_loss(loss, scores, mask=mask)
        virtual = virtual_adversarial_attention_loss(logits, scores, mask=mask)
    assert found.adversarial > found.clean and virtual.divergence > 0


def test_half_precision(task):
    model, hidden, mask, _, _ = task
    scores = model.pooling.scores(hidden).detach()
    gradient = torch.randn(4, 7, dtype=torch.float64)
    for made, exact in (
        (masked_attention(scores.bfloat16(), mask), masked_attention(scores, mask)),
        (score_perturbation(gradient.bfloat16()), score_perturbation(gradient)),
        (score_differences(scores.bfloat16(), mask), score_differences(scores, mask)),
    ):
        assert made.dtype == torch.bfloat16
        assert float((made.double() - exact).abs().max()) < 3e-2


def test_refuses(task):
    model, hidden, mask, logits, loss = task
    scores = model.pooling.scores(hidden)
    with pytest.raises(ShapeError, match="kind is 'iVAT'"):
        adversarial_attention_loss(loss, scores, kind="iVAT")
    with pytest.raises(ShapeError, match="kind is 'AT'"):
        virtual_adversarial_attention_loss(logits, scores, kind="AT")
    with pytest.raises(ShapeError, match="must be a scalar"):
        adversarial_attention_loss(logits, scores)
    with pytest.raises(ShapeError, match="logits"):
        virtual_adversarial_attention_loss(loss, scores)
    with pytest.raises(ShapeError, match=r"scores \(B, T\)"):
        adversarial_attention_loss(loss, scores[0])
    with pytest.raises(ShapeError, match="mask must be bool"):
        adversarial_attention_loss(loss, scores, mask=mask[:1])
    with pytest.raises(ShapeError, match="expected 'tokens' or 'samples'"):
        score_differences(scores, between="words")
    with pytest.raises(ShapeError, match="directions"):
        interpretable_perturbation(scores, score_differences(scores, between="samples"))


def test_compile_and_export(task):
    model, hidden, mask, _, _ = task

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pooling = model.pooling

        def forward(self, hidden, mask):
            scores = self.pooling.scores(hidden)
            shift = interpretable_perturbation(scores, score_differences(scores, mask))
            return self.pooling(hidden, mask), shift, score_perturbation(scores)

    expected = Model()(hidden, mask)
    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden, mask), expected)
    exported = torch.export.export(Model(), (hidden, mask)).module()
    torch.testing.assert_close(exported(hidden, mask), expected)
