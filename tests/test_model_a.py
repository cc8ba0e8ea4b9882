import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from img2prompt import model_a
from img2prompt.model_a import (
    LinearHead,
    PaperHead,
    Ridge,
    Schedule,
    Standardise,
    Stored,
    cosine_loss,
    fit,
    parameter_groups,
    predict,
    ridge,
    train,
)
from img2prompt.params import load_params

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(2, 3, (120, 12)).astype(np.float32)
TARGETS = RNG.normal(size=(12, 6)).astype(np.float32)
TARGETS = (FEATURES - 2) @ TARGETS / 10 + RNG.normal(size=6).astype(np.float32)
TARGETS /= np.linalg.norm(TARGETS, axis=1, keepdims=True)
ROWS, UNSEEN = np.arange(100), np.arange(100, 120)


def schedule(**changes):
    values = dict(
        epochs=3, lr_tower=1e-3, lr_head=1e-2, batch_size=16, accumulate=1, weight_decay=0.01, warmup=0.1,
        clip_grad=1.0, seed=(0,),
    )  # fmt: skip
    return Schedule(**values | changes)


def start(kind=PaperHead, dropout=0.0):
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12))
    standardise = Standardise(torch.from_numpy(FEATURES[ROWS]))
    regression = ridge(standardise(torch.from_numpy(FEATURES[ROWS])), torch.from_numpy(TARGETS[ROWS]))
    return tower, kind(standardise, regression, dropout)


def run(resume, plan, kind=PaperHead, dropout=0.0, targets=None):
    tower, head = start(kind, dropout)
    targets = TARGETS[None] if targets is None else targets
    history = fit(tower, head, Stored(FEATURES), targets, ROWS, plan, "cpu", resume, UNSEEN, "test")
    return tower, head, history


def weights(*modules):
    return torch.cat([value.detach().flatten() for module in modules for value in module.parameters()])


def predictions(tower, head):
    # Not the weights: what a norm takes out has no gradient, and Adam makes steps of the rounding left there. For the
    # same reason not the paper's head, whose two norms agree at the start, so that its mix has no gradient.
    return predict(tower, head, Stored(FEATURES), UNSEEN, 64, "cpu")


def test_paper_head_by_hand():
    # Two features, already standard, and two outputs. FC1 = identity: V = (1, -1) has mean 0 and deviation 1,
    # so N1 = (1, -1). FC2 swaps: N2 = (-1, 1). With w = 0.75, A = 0.75 * N1 + 0.25 * N2 = (0.5, -0.5).
    head = PaperHead(Standardise(torch.eye(2)), Ridge(torch.eye(2), torch.zeros(2), 0.0, 0.0), 0.0)
    head.standardise.mean.zero_()
    head.standardise.std.fill_(1)
    with torch.no_grad():
        head.fc2.weight.copy_(torch.eye(2).flip(0))
        for norm in (head.norm1, head.norm2):
            norm.weight.fill_(1)
        head.w.fill_(0.75)
        assert torch.allclose(head(torch.tensor([[1.0, -1.0]])), torch.tensor([[0.5, -0.5]]), atol=1e-4)


def test_mix_starts_at_a_half_and_is_learned(tmp_path):
    assert start()[1].w.item() == 0.5
    _, head, _ = run(tmp_path / "a", schedule())
    assert head.w.item() != 0.5


def test_cosine_loss_by_hand():
    predicted = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    # cosines 1, 0 and 1/sqrt(2), whatever the norms
    assert cosine_loss(predicted, target).item() == pytest.approx(0 + 1 + (1 - 0.5**0.5))


def test_ridge_is_the_closed_form_one():
    from sklearn.linear_model import Ridge as Reference

    for rows in (ROWS, ROWS[:8]):  # more rows than features, and fewer
        standardise = Standardise(torch.from_numpy(FEATURES[rows]))
        x = standardise(torch.from_numpy(FEATURES[rows]))
        found = ridge(x, torch.from_numpy(TARGETS[rows]))
        reference = Reference(alpha=found.strength).fit(x.double(), TARGETS[rows].astype(np.float64))
        assert np.allclose(found.weight, reference.coef_, atol=1e-5)
        assert np.allclose(found.bias, reference.intercept_, atol=1e-5)


def test_ridge_strength_is_the_best_by_leaving_each_row_out():
    from sklearn.linear_model import Ridge as Reference

    # Rows whose mean stays zero whichever is left out would make this exact; with 40 rows it is so to 1e-2.
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 5))
    y = x @ rng.normal(size=(5, 4)) + 2 * rng.normal(size=(40, 4)) + 1
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    x = (x - x.mean(0)) / x.std(0)
    found = ridge(torch.from_numpy(x).float(), torch.from_numpy(y).float())

    def left_out(strength):
        predicted = [
            Reference(alpha=strength).fit(np.delete(x, i, 0), np.delete(y, i, 0)).predict(x[i : i + 1])[0]
            for i in range(40)
        ]
        return np.mean([p @ t / np.linalg.norm(p) for p, t in zip(predicted, y, strict=True)])

    assert found.score == pytest.approx(left_out(found.strength), abs=2e-3)
    assert left_out(found.strength) >= max(left_out(found.strength * factor) for factor in (0.1, 10)) - 2e-3


def test_ridge_of_noise_is_the_mean_target():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(50, 30)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32) + 2
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    found = ridge(torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy(y))
    assert np.allclose(found.bias, y.mean(0), atol=1e-6)
    assert found.weight.norm() < 0.05


@pytest.mark.parametrize("kind", [LinearHead, PaperHead])
def test_heads_start_as_the_ridge_regression(kind):
    features = torch.from_numpy(FEATURES)
    targets = functional.normalize(features @ torch.randn(12, 384, generator=torch.Generator().manual_seed(0)))
    standardise = Standardise(features)
    regression = ridge(standardise(features), targets)
    head = kind(standardise, regression, 0.0)
    with torch.no_grad():
        expected = standardise(features) @ regression.weight.T + regression.bias
        assert functional.cosine_similarity(head(features), expected).min() > 0.98


@pytest.mark.parametrize("kind", [LinearHead, PaperHead])
def test_training_learns(tmp_path, kind):
    _, _, history = run(tmp_path / "a", schedule(epochs=30), kind)
    assert [entry["epoch"] for entry in history] == list(range(1, 31))
    mean = TARGETS[ROWS].mean(0) / np.linalg.norm(TARGETS[ROWS].mean(0))
    assert history[-1]["score"] > (TARGETS[UNSEEN] @ mean).mean() + 0.1
    assert history[-1]["loss"] < history[0]["loss"]


def test_every_trainable_parameter_is_in_exactly_one_group():
    tower, head = start()
    tower[0].weight.requires_grad_(False)
    groups = parameter_groups(tower, head, schedule())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(p) for module in (tower, head) for p in module.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_rates_differ_and_norms_are_not_decayed():
    tower, head = start()
    rate = {}
    for group in parameter_groups(tower, head, schedule(weight_decay=0.3)):
        for parameter in group["params"]:
            rate[id(parameter)] = (group["lr"], group["weight_decay"])
    assert rate[id(tower[0].weight)] == (1e-3, 0.3)
    assert rate[id(tower[1].weight)] == (1e-3, 0.0)
    assert rate[id(head.fc1.weight)] == (1e-2, 0.3)
    assert rate[id(head.norm2.bias)] == rate[id(head.w)] == (1e-2, 0.0)


def test_schedule_warms_up_and_falls():
    plan = schedule(warmup=0.2)
    factors = [plan.factor(step, 10) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    # Half-way through the cosine of 8 steps the rate is half its peak.
    assert factors[6] == pytest.approx(0.5)


def test_accumulating_two_batches_of_one_is_a_batch_of_two(tmp_path):
    # 100 rows in steps of 6 leave a short last step: no micro-batch may be lost there either.
    one = run(tmp_path / "a", schedule(batch_size=6), LinearHead)
    two = run(tmp_path / "b", schedule(batch_size=3, accumulate=2), LinearHead)
    assert np.allclose(predictions(*one[:2]), predictions(*two[:2]), atol=1e-4)
    assert one[2][-1]["loss"] == pytest.approx(two[2][-1]["loss"], abs=1e-5)


def test_a_short_step_weighs_its_rows_alike(tmp_path):
    # One step an epoch either way: 100 rows at once, or as micro-batches of 40, 40 and 20.
    one = run(tmp_path / "a", schedule(batch_size=100), LinearHead)
    three = run(tmp_path / "b", schedule(batch_size=40, accumulate=3), LinearHead)
    assert np.allclose(predictions(*one[:2]), predictions(*three[:2]), atol=1e-4)


@pytest.mark.parametrize("killed_in", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, killed_in, monkeypatch):
    targets = np.stack([TARGETS, TARGETS[::-1]])
    whole = run(tmp_path / "a", schedule(), dropout=0.2, targets=targets)

    saved = model_a._save

    def save_and_die(path, model, optimiser, scaler, history):
        saved(path, model, optimiser, scaler, history)
        if len(history) == killed_in:
            raise KeyboardInterrupt

    monkeypatch.setattr(model_a, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", schedule(), dropout=0.2, targets=targets)
    monkeypatch.undo()
    torch.manual_seed(99)
    again = run(tmp_path / "b", schedule(), dropout=0.2, targets=targets)
    assert torch.equal(weights(*whole[:2]), weights(*again[:2]))
    assert whole[2] == again[2]


def test_frozen_parameters_and_statistics_stay(tmp_path):
    tower, head = start()
    tower.append(nn.BatchNorm1d(12))
    tower[0].requires_grad_(False)
    before = copy.deepcopy(tower.state_dict())
    fit(tower, head, Stored(FEATURES), TARGETS[None], ROWS, schedule(), "cpu", tmp_path / "a", UNSEEN, "test")
    after = tower.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["2.running_mean"], after["2.running_mean"])
    assert not torch.equal(before["1.weight"], after["1.weight"])


def test_targets_of_watched_rows_do_not_train(tmp_path):
    changed = TARGETS.copy()
    changed[UNSEEN] = -changed[UNSEEN]
    one, two = run(tmp_path / "a", schedule()), run(tmp_path / "b", schedule(), targets=changed[None])
    assert torch.equal(weights(*one[:2]), weights(*two[:2]))
    assert one[2][-1]["score"] != two[2][-1]["score"]


def test_augmented_targets_are_used(tmp_path):
    one = run(tmp_path / "a", schedule())
    two = run(tmp_path / "b", schedule(), targets=np.stack([TARGETS, TARGETS[::-1]]))
    assert not torch.equal(weights(*one[:2]), weights(*two[:2]))


def test_predictions_have_norm_one_and_do_not_depend_on_the_batch():
    tower, head = start()
    one = predict(tower, head, Stored(FEATURES), UNSEEN, 3, "cpu")
    assert one.shape == (20, 6)
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    assert np.allclose(one, predict(tower, head, Stored(FEATURES), UNSEEN, 64, "cpu"), atol=1e-6)


def test_two_phases_and_the_control_without_a_tower(tmp_path):
    settings = load_params(Path(__file__).parent.parent / "params.yaml").model_a
    args = (TARGETS[None], ROWS, UNSEEN, settings, settings.baseline, (0, 1), "cpu")
    tower = nn.Sequential(nn.Linear(12, 12))
    before = weights(tower)
    _, history = train("clip", FEATURES, Stored(FEATURES), tower, *args, tmp_path / "a")
    head, both = settings.baseline.head_epochs, settings.baseline.tower_epochs
    assert history.phase.tolist() == ["head"] * head + ["tower"] * both
    assert not torch.equal(before, weights(tower))
    _, control = train("clip", FEATURES, Stored(FEATURES), nn.Sequential(), *args, tmp_path / "b")
    assert len(control) == len(history)
    assert control.score[:head].tolist() == history.score[:head].tolist()
