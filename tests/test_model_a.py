import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from img2prompt import model_a
from img2prompt.model_a import (
    LinearHead,
    PaperHead,
    Schedule,
    Stored,
    cosine_loss,
    fit,
    parameter_groups,
    predict,
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
    head = kind(torch.from_numpy(FEATURES[ROWS]), torch.from_numpy(TARGETS[ROWS].mean(0)), dropout)
    return tower, head


def run(resume, plan, kind=PaperHead, dropout=0.0, targets=None):
    tower, head = start(kind, dropout)
    targets = TARGETS[None] if targets is None else targets
    history = fit(tower, head, Stored(FEATURES), targets, ROWS, plan, "cpu", resume, UNSEEN, "test")
    return tower, head, history


def weights(*modules):
    return torch.cat([parameter.detach().flatten() for module in modules for parameter in module.parameters()])


def test_paper_head_by_hand():
    # Two features, already standard, and two outputs. FC1 = identity: V = (1, -1) has mean 0 and deviation 1,
    # so N1 = (1, -1). FC2 swaps: N2 = (-1, 1). With w = 0.75, A = 0.75 * N1 + 0.25 * N2 = (0.5, -0.5).
    head = PaperHead(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.zeros(2), 0.0)
    head.standardise.mean.zero_()
    head.standardise.std.fill_(1)
    with torch.no_grad():
        head.fc1.weight.copy_(torch.eye(2))
        head.fc2.weight.copy_(torch.eye(2).flip(0))
        for bias in (head.fc1.bias, head.fc2.bias):
            bias.zero_()
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


@pytest.mark.parametrize(("kind", "least"), [(LinearHead, 0.9999), (PaperHead, 0.98)])
def test_heads_start_at_the_mean_target(kind, least):
    _, head = start(kind)
    mean = torch.from_numpy(TARGETS[ROWS].mean(0))
    with torch.no_grad():
        assert functional.cosine_similarity(head(torch.from_numpy(FEATURES)), mean[None]).min() > least


@pytest.mark.parametrize("kind", [LinearHead, PaperHead])
def test_training_learns(tmp_path, kind):
    _, _, history = run(tmp_path / "a", schedule(epochs=30), kind)
    assert [entry["epoch"] for entry in history] == list(range(1, 31))
    mean = TARGETS[ROWS].mean(0) / np.linalg.norm(TARGETS[ROWS].mean(0))
    assert history[-1]["score"] > (TARGETS[UNSEEN] @ mean).mean() + 0.1


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
    one = run(tmp_path / "a", schedule(batch_size=6))
    two = run(tmp_path / "b", schedule(batch_size=3, accumulate=2))
    assert torch.allclose(weights(*one[:2]), weights(*two[:2]), atol=1e-5)
    assert one[2][-1]["loss"] == pytest.approx(two[2][-1]["loss"], abs=1e-5)


def test_a_short_step_weighs_its_rows_alike(tmp_path):
    # One step an epoch either way: 100 rows at once, or as micro-batches of 40, 40 and 20.
    one = run(tmp_path / "a", schedule(batch_size=100))
    three = run(tmp_path / "b", schedule(batch_size=40, accumulate=3))
    assert torch.allclose(weights(*one[:2]), weights(*three[:2]), atol=1e-5)


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
    settings = load_params().model_a
    args = (TARGETS[None], ROWS, UNSEEN, settings, settings.baseline, (0, 1), "cpu")
    tower = nn.Sequential(nn.Linear(12, 12))
    before = weights(tower)
    _, history = train("clip", FEATURES, Stored(FEATURES), tower, *args, tmp_path / "a")
    assert history.phase.tolist() == ["head"] * settings.baseline.head_epochs + ["tower"] * settings.baseline.tower_epochs
    assert not torch.equal(before, weights(tower))
    _, control = train("clip", FEATURES, Stored(FEATURES), nn.Sequential(), *args, tmp_path / "b")
    assert len(control) == len(history)
    head = settings.baseline.head_epochs
    assert control.score[:head].tolist() == history.score[:head].tolist()
