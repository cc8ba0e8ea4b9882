import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from img2prompt.cli.check import load_params
from img2prompt.model_a import training
from img2prompt.model_a.heads import LinearHead, PaperHead
from img2prompt.model_a.inputs import AnyImage, Stored
from img2prompt.model_a.ridge import Ridge, TextPrior, ridge
from img2prompt.model_a.training import Schedule, cosine_loss, fit, parameter_groups, predict, train

rng = np.random.default_rng(0)
FEATURES = rng.normal(2, 3, (120, 12)).astype(np.float32)
TARGETS = rng.normal(size=(12, 6)).astype(np.float32)
TARGETS = (FEATURES - 2) @ TARGETS / 10 + rng.normal(size=6).astype(np.float32)
TARGETS /= np.linalg.norm(TARGETS, axis=1, keepdims=True)
ROWS, UNSEEN = np.arange(100), np.arange(100, 120)


def schedule(**changes):
    values = dict(
        epochs=3, lr_tower=1e-3, lr_head=1e-2, layer_decay=1.0, mse=0.0, ema=0.0, batch_size=16, accumulate=1,
        weight_decay=0.01, warmup=0.1, clip_grad=1.0, seed=(0,),
    )  # fmt: skip
    return Schedule(**values | changes)


REGRESSION = ridge(torch.from_numpy(FEATURES[ROWS]), torch.from_numpy(TARGETS[ROWS]))


def start(kind=PaperHead, dropout=0.0, hidden=0):
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12))
    return tower, kind(REGRESSION, dropout, hidden)


def run(resume, plan, kind=PaperHead, dropout=0.0, targets=None, hidden=0):
    tower, head = start(kind, dropout, hidden)
    targets = TARGETS[None] if targets is None else targets
    history = fit(tower, head, Stored(FEATURES), targets, ROWS, plan, "cpu", resume, UNSEEN, "test")
    return tower, head, history


def weights(*modules):
    return torch.cat([value.detach().flatten() for module in modules for value in module.parameters()])


def predictions(tower, head):
    # Not the weights: what a norm takes out has no gradient, and Adam makes steps of the rounding left there. For the
    # same reason not the paper's head, whose two norms agree at the start, so that its mix has no gradient.
    return predict(tower, head, [Stored(FEATURES)], UNSEEN, 64, "cpu")


def test_paper_head_by_hand():
    # Two features, already standard, and two outputs. FC1 = identity: V = (1, -1) has mean 0 and deviation 1,
    # so N1 = (1, -1). FC2 swaps: N2 = (-1, 1). With w = 0.75, A = 0.75 * N1 + 0.25 * N2 = (0.5, -0.5).
    head = PaperHead(Ridge(torch.zeros(2), torch.ones(2), torch.eye(2), torch.zeros(2), 0.0, 0.0, 0.0), 0.0, 0)
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
        found = ridge(torch.from_numpy(FEATURES[rows]), torch.from_numpy(TARGETS[rows]))
        x = (FEATURES[rows] - found.mean.numpy()) / found.std.numpy()
        assert np.allclose(x.std(0, ddof=1), 1, atol=1e-4)
        reference = Reference(alpha=found.strength).fit(x.astype(np.float64), TARGETS[rows].astype(np.float64))
        assert np.allclose(found.weight, reference.coef_, atol=1e-5)
        assert np.allclose(found.bias, reference.intercept_, atol=1e-5)


@pytest.mark.parametrize("n", [40, 12])  # more rows than features, and fewer
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("extra", [None, 0, 9])  # without texts, with the rows' own, with more
def test_ridge_strength_is_the_best_by_leaving_each_group_out(n, size, extra):
    from sklearn.linear_model import Ridge as Reference

    rng = np.random.default_rng(1)
    words = rng.normal(size=(n + (extra or 0), 4))
    x = np.concatenate([words[:n] + rng.normal(size=(n, 4)), rng.normal(size=(n, 10))], axis=1)
    y = words @ rng.normal(size=(4, 6)) + rng.normal(size=(len(words), 6)) + 1
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    groups = np.repeat(np.arange(n), size)[:n]
    projection = np.eye(14, 4) + 0.1 * rng.normal(size=(14, 4))
    tensors = [torch.from_numpy(array).float() for array in (x, words, y, projection)]
    prior = None if extra is None else TextPrior(tensors[1], tensors[2], tensors[3])
    found = ridge(tensors[0], tensors[2][:n], groups, prior)
    text = ridge(tensors[1], tensors[2], np.concatenate([groups, n + np.arange(extra or 0)]))
    assert (found.share > 0) == (prior is not None)

    standard = (x - found.mean.numpy()) / found.std.numpy()
    c = (words - text.mean.numpy()) / text.std.numpy()
    to_texts = found.std.numpy()[:, None] * projection / text.std.numpy()
    z = standard @ (to_texts / np.sqrt(np.square(standard @ to_texts).mean()))

    def left_out(strength, share):
        """Both regressions fitted anew without each group."""
        cosines = []
        for group in np.unique(groups):
            out = groups == group
            others = np.concatenate([~out, np.ones(len(words) - n, bool)])
            prior = np.zeros((n, 6))
            if share:
                prior = share * z @ Reference(alpha=text.strength).fit(c[others], y[others]).coef_.T
            fit = Reference(alpha=strength).fit(standard[~out], (y[:n] - prior)[~out])
            predicted = prior[out] + fit.predict(standard[out])
            cosines += list((predicted * y[:n][out]).sum(1) / np.linalg.norm(predicted, axis=1))
        return np.mean(cosines)

    assert found.score == pytest.approx(left_out(found.strength, found.share), abs=1e-5)
    for strength, share in ((10, 1), (0.1, 1), (1, 0.5)):
        assert found.score >= left_out(found.strength * strength, found.share * share) - 1e-3
    # The weights are those of both regressions fitted to all rows.
    prior = found.share * z @ text.weight.numpy().T
    fit = Reference(alpha=found.strength).fit(standard, y[:n] - prior)
    expected = prior + fit.predict(standard)
    assert np.allclose(standard @ found.weight.numpy().T + found.bias.numpy(), expected, atol=1e-4)


def test_rows_of_one_group_alone_are_left_out_one_by_one():
    x, y = torch.from_numpy(FEATURES[ROWS]), torch.from_numpy(TARGETS[ROWS])
    assert ridge(x, y, np.zeros(100, int)).strength == ridge(x, y).strength


def test_copies_in_a_group_make_the_regression_stronger():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 40)).repeat(3, 0), rng.normal(size=(30, 6)).repeat(3, 0)
    tensors = torch.from_numpy(x).float(), functional.normalize(torch.from_numpy(y).float())
    # Row by row, each copy is predicted from its twins and a weak fit looks perfect.
    alone, grouped = ridge(*tensors), ridge(*tensors, np.arange(30).repeat(3))
    assert alone.score > 0.9 > grouped.score
    assert grouped.strength > 10 * alone.strength


def test_ridge_of_noise_is_the_mean_target():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(50, 30)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32) + 2
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    found = ridge(torch.from_numpy(x), torch.from_numpy(y))
    assert np.allclose(found.bias, y.mean(0), atol=1e-6)
    assert found.weight.norm() < 0.05


@pytest.mark.parametrize("hidden", [0, 32])
@pytest.mark.parametrize("kind", [LinearHead, PaperHead])
def test_heads_start_as_the_ridge_regression(kind, hidden):
    features = torch.from_numpy(FEATURES)
    targets = functional.normalize(features @ torch.randn(12, 384, generator=torch.Generator().manual_seed(0)))
    regression = ridge(features, targets)
    head = kind(regression, 0.0, hidden)
    with torch.no_grad():
        expected = (features - regression.mean) / regression.std @ regression.weight.T + regression.bias
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
    assert rate[id(head.fc1.fc.weight)] == (1e-2, 0.3)
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


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, killed_in, monkeypatch):
    plan = schedule(ema=0.3, mse=0.01, layer_decay=0.5)
    how = dict(dropout=0.2, targets=np.stack([TARGETS, TARGETS[::-1]]), hidden=8)
    whole = run(tmp_path / "a", plan, **how)

    saved = training._save

    def save_and_die(path, *state):
        saved(path, *state)
        if len(state[-1]) == killed_in:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", plan, **how)
    monkeypatch.undo()
    torch.manual_seed(99)
    again = run(tmp_path / "b", plan, **how)
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
    one = predict(tower, head, [Stored(FEATURES)], UNSEEN, 3, "cpu")
    assert one.shape == (20, 6)
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    assert np.allclose(one, predictions(tower, head), atol=1e-6)


def test_each_layer_has_the_rate_of_the_one_behind_it_times_the_decay():
    tower, head = start()
    tower.append(nn.Linear(12, 12))
    rate = {
        id(parameter): group["lr"]
        for group in parameter_groups(tower, head, schedule(layer_decay=0.5))
        for parameter in group["params"]
    }
    for layer, expected in zip([*tower, head], [2.5e-4, 5e-4, 1e-3, 1e-2], strict=True):
        assert {rate[id(parameter)] for parameter in layer.parameters()} == {expected}


def test_mean_squared_error_by_hand():
    predicted, target = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # cosines 1 and 0; squared errors (1 + 0) / 2 and (1 + 9) / 2
    assert cosine_loss(predicted, target, 0.1).item() == pytest.approx(0 + 1 + 0.1 * (0.5 + 5))


def test_averaged_weights_by_hand(tmp_path):
    """The plain run's weights after each step, one epoch a step, averaged here."""
    plan = dict(epochs=4, batch_size=100, warmup=0.0)
    steps = [weights(*start(LinearHead))]
    saved = training._save

    def keep(path, model, *rest):
        steps.append(weights(model))
        saved(path, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_save", keep)
        *last, _ = run(tmp_path / "a", schedule(**plan), LinearHead)
    assert torch.equal(steps[-1], weights(*last))
    average = steps[0]
    for now in steps[1:]:
        average = average + (now - average) / 2  # half of 4 steps: a decay of 1 - 1/2
    *averaged, history = run(tmp_path / "b", schedule(**plan, ema=0.5), LinearHead)
    assert torch.allclose(weights(*averaged), average, atol=1e-6)
    # What is logged is the score of what is kept.
    assert history[-1]["score"] == pytest.approx((predictions(*averaged) * TARGETS[UNSEEN]).sum(1).mean(), abs=1e-6)


@pytest.mark.parametrize("kind", [LinearHead, PaperHead])
def test_a_wide_hidden_layer_learns_what_a_line_cannot(tmp_path, kind):
    targets = np.tanh(np.abs(FEATURES - 2) @ rng.normal(size=(12, 6)).astype(np.float32) / 3)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    plan = schedule(epochs=30, batch_size=33, lr_head=3e-2)  # 100 rows: the last batch is one row alone
    losses = [
        run(tmp_path / str(hidden), plan, kind, targets=targets[None], hidden=hidden)[2][-1]["loss"]
        for hidden in (0, 256)
    ]
    assert losses[1] < 0.9 * losses[0]


def test_views_are_averaged_at_norm_one():
    tower, head = start()
    views = [Stored(FEATURES), Stored(FEATURES[::-1].copy())]
    one, other, both = (predict(tower, head, which, ROWS, 7, "cpu") for which in (views[:1], views[1:], views))
    assert not np.allclose(one, other, atol=0.1)
    assert np.allclose(both, (one + other) / np.linalg.norm(one + other, axis=1, keepdims=True), atol=1e-5)


def settings(**changes):
    return load_params(Path(__file__).parent.parent / "params.yaml").model_a.model_copy(update=changes)


def trained(resume, tower, section, **rates):
    args = (TARGETS[None], ROWS, UNSEEN, section, section.linear.model_copy(update=rates), (0, 1), "cpu")
    return train("linear", REGRESSION, FEATURES, Stored(FEATURES), tower, *args, resume)


def test_two_phases_and_the_control_without_a_tower(tmp_path):
    section, epochs = settings(), {"head_epochs": 2, "tower_epochs": 3}
    tower = nn.Sequential(nn.Linear(12, 12))
    before = weights(tower)
    _, history = trained(tmp_path / "a", tower, section, **epochs)
    assert history.phase.tolist() == ["head"] * 2 + ["tower"] * 3
    assert not torch.equal(before, weights(tower))
    _, control = trained(tmp_path / "b", nn.Sequential(), section, **epochs)
    assert control.phase.tolist() == history.phase.tolist()
    assert control.score[:2].tolist() == history.score[:2].tolist()
    assert control.score[2:].tolist() != history.score[2:].tolist()


def test_wise_is_between_the_start_and_the_trained_weights(tmp_path):
    found = {}
    for share in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        tower = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))
        before = weights(tower)
        head, _ = trained(tmp_path / str(share), tower, settings(wise=share, lr_tower=0.01, dropout=0.0))
        found[share] = weights(tower, head)
    assert torch.equal(found[0.0][: len(before)], before)
    assert not torch.equal(found[0.0], found[1.0])
    assert torch.allclose(found[0.25], 0.75 * found[0.0] + 0.25 * found[1.0], atol=1e-6)


def test_an_epoch_takes_any_image_of_a_prompt():
    prompts = np.array([0, 1, 0, 2, 1, 0, -1, 1])
    own = np.arange(8, dtype=np.float32)[:, None]
    inputs = AnyImage(Stored(own), prompts, (3,))
    rows = [np.array([0, 1]), np.array([3, 2])]
    seen = [torch.cat(list(inputs.batches(rows, epoch)))[:, 0].int().tolist() for epoch in range(30)]
    assert {epoch[0] for epoch in seen} == {0, 2, 5}
    assert {epoch[1] for epoch in seen} == {1, 4, 7}
    assert {epoch[2] for epoch in seen} == {3}
    again = [torch.cat(list(inputs.batches(rows, epoch)))[:, 0].int().tolist() for epoch in range(30)]
    assert again == seen
    assert torch.cat(list(inputs.batches(rows, None)))[:, 0].tolist() == [0, 1, 3, 2]
