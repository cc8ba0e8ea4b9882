import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from img2prompt.cli.check import load_params
from img2prompt.clip.model import load_clip
from img2prompt.clip.towers import tower as tower_of
from img2prompt.clip.towers import unfrozen
from img2prompt.core import blocks as core_blocks
from img2prompt.core.blocks import Stack
from img2prompt.core.metric import cosine, unit
from img2prompt.model_a import ridge as module
from img2prompt.model_a import training
from img2prompt.model_a.heads import LinearHead, PaperHead
from img2prompt.model_a.inputs import AnyImage, Stored
from img2prompt.model_a.prediction import predict
from img2prompt.model_a.ridge import Ridge, TextPrior, _Sizes, _Spectrum, refit, ridge
from img2prompt.model_a.training import LOWER, Schedule, Start, cosine_loss, fit, give_back, parameter_groups, train
from img2prompt.model_a.validation import LINE, Choice, Gain, Validation, draw_groups, validation_rows

rng = np.random.default_rng(0)
FEATURES = rng.normal(2, 3, (120, 12)).astype(np.float32)
TARGETS = rng.normal(size=(12, 6)).astype(np.float32)
TARGETS = (FEATURES - 2) @ TARGETS / 10 + rng.normal(size=6).astype(np.float32)
TARGETS /= np.linalg.norm(TARGETS, axis=1, keepdims=True)
ROWS, UNSEEN = np.arange(100), np.arange(100, 120)


def schedule(**changes):
    values = dict(
        epochs=3, lr_tower=1e-3, lr_head=1e-2, layer_decay=1.0, mse=0.0, pull=0.0, ema=0.0, batch_size=16, accumulate=1,
        weight_decay=0.01, warmup=0.1, clip_grad=1.0, grad_checkpointing=False, seed=(0,),
    )  # fmt: skip
    return Schedule(**values | changes)


REGRESSION = ridge(torch.from_numpy(FEATURES[ROWS]), torch.from_numpy(TARGETS[ROWS]))


PARTS = np.arange(120) % 3
OTHERS = refit(
    REGRESSION, torch.from_numpy(FEATURES[ROWS]), torch.from_numpy(TARGETS[ROWS]), [PARTS[ROWS] == p for p in range(3)]
)


def start(kind=PaperHead, dropout=0.0, hidden=0):
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12))
    return tower, kind(REGRESSION, dropout, hidden, OTHERS)


def well_started(kind=LinearHead, dropout=0.0, hidden=0):
    """A tower that does nothing yet, so that the head predicts as the regression does."""
    torch.manual_seed(0)
    return identity(), kind(REGRESSION, dropout, hidden, OTHERS)


def identity():
    tower = nn.Sequential(nn.Linear(12, 12))
    nn.init.eye_(tower[0].weight)
    nn.init.zeros_(tower[0].bias)
    return tower


def validation(targets=TARGETS, **changes):
    """The unseen rows watch; by default a floor that no training falls through, so that no rate is lowered."""
    values = dict(
        inputs=Stored(FEATURES), rows=UNSEEN, targets=targets[UNSEEN], groups=np.arange(20), floor=-9.0, batch_size=64,
        device="cpu",
    )  # fmt: skip
    return Validation(**values | changes)


def run(resume, plan, kind=PaperHead, dropout=0.0, targets=None, hidden=0, watch=None, last=True, at=start, **more):
    """Train; `last`: keep the last epoch's weights, whatever the watching rows would choose."""
    tower, head = at(kind, dropout, hidden)
    targets = TARGETS[None] if targets is None else targets
    watch = validation(targets[0]) if watch is None else watch
    with pytest.MonkeyPatch.context() as patch:
        if last:
            falling = itertools.count(0, -1)  # of two gains compared, the first one asked for is the larger
            patch.setattr(Gain, "sure", property(lambda gain: next(falling)))
            patch.setattr(training, "LINE", ())
        history, _ = fit(
            tower, head, Stored(FEATURES), targets, ROWS, plan, "cpu", resume / "file", watch, "test", **more
        )
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
    for step in (-0.25, 0.25):  # the next of the strengths, of which not all are tried
        assert found.score >= left_out(found.strength * 10**step, found.share) - 1e-5
    # The weights are those of both regressions fitted to all rows.
    prior = found.share * z @ text.weight.numpy().T
    fit = Reference(alpha=found.strength).fit(standard, y[:n] - prior)
    expected = prior + fit.predict(standard)
    assert np.allclose(standard @ found.weight.numpy().T + found.bias.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("features", [10, 1000])  # with fewer rows than features a weak penalty fits them all
def test_the_search_of_a_strength_begins_where_generalised_cross_validation_is_best(features):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, features)), rng.normal(size=(80, 20))
    x, y = x - x.mean(0), y - y.mean(0)
    rows, outputs = torch.from_numpy(x), torch.from_numpy(y)
    spectrum = _Spectrum(rows, rows.T @ rows, outputs, _Sizes.of(np.arange(80)))
    for strength in 80 * 10.0 ** np.arange(-3, 5):
        hat = x @ np.linalg.solve(x.T @ x + strength * np.eye(features), x.T) + 1 / 80
        expected = np.square(y - hat @ y).sum() / (1 - np.trace(hat) / 80) ** 2
        assert spectrum.expected(strength, 20, 1) == pytest.approx(expected, rel=1e-3)
        assert (spectrum.expected(strength, 20, 5) == np.inf) == (5 * np.trace(hat) >= 80)


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


def text_prior(rows, words):
    """The prior of a rotation of the features and of texts, the first of which are those of the rows."""
    values = np.random.default_rng(4)
    texts = FEATURES[:, :4] @ values.normal(size=(4, 4)) + values.normal(size=(120, 4))
    return TextPrior(texts[words].astype(np.float32), TARGETS[words], np.eye(12, 4, dtype=np.float32))


class Counted(np.ndarray):
    """An array that knows the most rows that were read of it at once."""

    most = 0

    def __getitem__(self, key):
        found = np.asarray(super().__getitem__(key))
        Counted.most = max(Counted.most, len(found))
        return found


@pytest.mark.parametrize("rows", [ROWS, ROWS[:9]])  # more rows than features, and fewer
@pytest.mark.parametrize("prior", [False, True])
def test_blocks_of_rows_give_the_same_regression(monkeypatch, rows, prior):
    groups, words = rows // 3, np.concatenate([rows, UNSEEN])
    args = FEATURES[rows], TARGETS[rows], groups, text_prior(rows, words) if prior else None
    whole = ridge(*args)
    masks = [rows % 3 == 1, rows < 3, rows < 0]
    others = refit(whole, *args[:2], masks)
    monkeypatch.setattr(core_blocks, "BLOCK", 7)
    blocked = ridge(Stack([FEATURES], rows), Stack([TARGETS], rows), groups, args[3])
    again = refit(whole, Stack([FEATURES], rows), Stack([TARGETS], rows), masks)
    assert (whole.share > 0) == prior
    for one, two in ((whole, blocked), (whole, again[2]), *zip(others, again, strict=True)):
        assert (one.strength, one.share) == (two.strength, two.share)
        assert torch.allclose(one.weight, two.weight, atol=1e-6)
        assert torch.allclose(one.bias, two.bias, atol=1e-6)


@pytest.mark.parametrize("prior", [False, True])
def test_of_many_rows_some_whole_groups_choose_and_all_are_fitted(monkeypatch, prior):
    from sklearn.linear_model import Ridge as Reference

    groups = ROWS // 3
    monkeypatch.setattr(module, "CHOOSING", 40)
    monkeypatch.setattr(core_blocks, "BLOCK", 7)
    monkeypatch.setattr(Counted, "most", 0)
    texts = text_prior(ROWS, np.arange(120)) if prior else None
    found = ridge(FEATURES[ROWS].view(Counted), TARGETS[ROWS].view(Counted), groups, texts)
    assert 37 < Counted.most <= 40
    drawn = draw_groups(groups, 40, 0)
    assert all(len(set(drawn[groups == group])) == 1 for group in groups)
    x, shift = (FEATURES[ROWS] - found.mean.numpy()) / found.std.numpy(), np.zeros((6, 12))
    shift = found.prior.numpy() if prior else shift
    if not prior:
        cosines = []
        for group in np.unique(groups[drawn]):
            own, others = drawn & (groups == group), drawn & (groups != group)
            predicted = Reference(alpha=found.strength).fit(x[others], TARGETS[ROWS][others]).predict(x[own])
            cosines += cosine(predicted, TARGETS[ROWS][own]).tolist()
        assert found.score == pytest.approx(np.mean(cosines), abs=1e-6)
    reference = Reference(alpha=found.strength).fit(x.astype(np.float64), TARGETS[ROWS] - x @ shift.T)
    assert np.allclose(found.weight, reference.coef_ + shift, atol=1e-5)
    assert np.allclose(found.bias, reference.intercept_, atol=1e-5)


def test_groups_too_large_to_be_drawn_whole_choose_by_some_of_their_rows(monkeypatch):
    monkeypatch.setattr(module, "CHOOSING", 40)
    chosen = module._chosen(ROWS // 50)
    assert len(set(chosen)) == 40
    assert set(chosen // 50) == {0, 1}


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


def test_embeddings_and_tokens_are_not_decayed_and_groups_of_a_whole_tower_have_their_rates(uncut_clip, tiny_clip):
    head = start()[1]
    plan = schedule(weight_decay=0.3, layer_decay=0.5)
    for folder, layers, names in ((tiny_clip, 5, "embedding"), (uncut_clip, 4, "relative_position_bias_table")):
        tower = unfrozen(tower_of(load_clip(folder, "cpu").model.visual), layers)
        found = parameter_groups(tower, head, plan)
        decayed = {id(p) for group in found for p in group["params"] if group["weight_decay"]}
        tokens = {id(p) for name, p in tower.named_parameters() if name.endswith(names)}
        matrices = {id(p) for name, p in tower.named_parameters() if p.ndim > 1} - tokens
        assert tokens
        assert matrices
        assert decayed & {id(p) for p in tower.parameters()} == matrices
        assert {group["lr"] for group in found if group["of"] == "tower"} == {1e-3 * 0.5**k for k in range(layers)}
        grouped = [id(p) for group in found for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for module in (tower, head) for p in module.parameters())


def test_checkpoints_take_less_memory_for_the_same_weights(tmp_path):
    """By the numbers that autograd holds for the backward pass."""
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        deep = nn.Sequential(*(nn.Sequential(nn.Linear(12, 96), nn.GELU(), nn.Linear(96, 12)) for _ in range(4)))
        head = LinearHead(REGRESSION, 0.2, 0)
        held = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, to=held: to.append(value.numel()) or value, lambda x: x
        ):
            fit(
                deep, head, Stored(FEATURES), TARGETS[None], ROWS, schedule(grad_checkpointing=on), "cpu",
                tmp_path / str(on), validation(floor=-9.0), "test",
            )  # fmt: skip
        found.append((weights(deep, head), sum(held)))
    (plain, most), (checkpoints, least) = found
    assert torch.equal(plain, checkpoints)
    assert least < most / 2


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


@pytest.mark.parametrize("killed_in", [1, 2, 3, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, killed_in, monkeypatch):
    """Killed after each epoch that is written, also after some that a lower rate then trains again."""
    plan = schedule(ema=0.3, mse=0.01, layer_decay=0.5, lr_head=0.15, warmup=0.5, pull=0.01)
    how = dict(dropout=0.2, targets=np.stack([TARGETS, TARGETS]), hidden=8, last=False, at=well_started)
    how |= dict(watch=validation(floor=0.95), parts=PARTS, draw=AnyImage(np.arange(120) % 100, (0,)))
    saved, written = training._Run.save, []

    def save_and_die(run, path):
        saved(run, path)
        written.append(dict(run.lowered))
        if len(written) == killed_in:
            raise KeyboardInterrupt

    whole = run(tmp_path / "a", plan, LinearHead, **how)
    monkeypatch.setattr(training._Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", plan, LinearHead, **how)
    assert (written[-1]["head"] > 0) == (killed_in > 1)
    monkeypatch.undo()
    torch.manual_seed(99)
    again = run(tmp_path / "b", plan, LinearHead, **how)
    assert torch.equal(weights(*whole[:2]), weights(*again[:2]))
    assert whole[2] == again[2]


def test_frozen_parameters_and_statistics_stay(tmp_path):
    tower, head = start()
    tower.append(nn.BatchNorm1d(12))
    tower[0].requires_grad_(False)
    before = copy.deepcopy(tower.state_dict())
    plan = schedule(lr_tower=1e-4, lr_head=1e-3)
    fit(tower, head, Stored(FEATURES), TARGETS[None], ROWS, plan, "cpu", tmp_path / "a", validation(), "test")
    after = tower.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["2.running_mean"], after["2.running_mean"])
    assert not torch.equal(before["1.weight"], after["1.weight"])


def test_validation_rows_choose_but_do_not_train(tmp_path):
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
    saved = training._Run.save

    def keep(of_run, path):
        steps.append(weights(of_run.model))
        saved(of_run, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "save", keep)
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


GROUPS = np.arange(120) // 2
INNER = ridge(torch.from_numpy(FEATURES[:80]), torch.from_numpy(TARGETS[:80]))


def begin(parts=4):
    fitted, of_part = np.arange(120) < 80, np.where(np.arange(120) < 80, GROUPS % parts, -1)
    data = torch.from_numpy(FEATURES[:80]), torch.from_numpy(TARGETS[:80])
    others = refit(INNER, *data, [of_part[:80] == part for part in range(parts)])
    return Start(REGRESSION, fitted, np.arange(80, 100), INNER, of_part, others)


def trained(*args, **options):
    return trained_and_shown(*args, **options)[:3]


def trained_and_shown(resume, tower, section, kind="linear", targets=TARGETS, beginning=None, **rates):
    rates = section.linear.model_copy(update=rates)
    args = (TARGETS[None] if targets is None else targets[None], GROUPS, section, rates, (0, 1), "cpu", resume)
    return train(kind, beginning or begin(), FEATURES, [Stored(FEATURES)], tower, *args)


@pytest.mark.parametrize("kind", ["linear", "model_a"])
def test_where_training_does_harm_the_model_is_its_start_on_all_rows(tmp_path, kind):
    """Targets of the rows that train are of other images: what can be learned from them is wrong."""
    wrong = TARGETS.copy()
    wrong[:80] = wrong[:80][::-1]
    tower = identity()
    before = weights(tower)
    head, history, choice = trained(tmp_path, tower, settings(), kind, wrong, lr_tower=0.01, lr_head=0.01)
    assert len(history) > 1
    assert choice.share == choice.epoch == 0
    assert choice.gain == Gain(0.0, 0.0)
    assert torch.equal(weights(tower), before)
    expected = type(head)(REGRESSION, 0.0, 0)
    assert torch.equal(weights(head), weights(expected))
    assert torch.equal(head.state_dict().get("mean", torch.zeros(0)), expected.state_dict().get("mean", torch.zeros(0)))


def test_validation_rows_are_shown_to_a_model_that_does_not_know_them(tmp_path):
    """What is said of them is the inner regression's where nothing is learned, and not that of all training rows."""
    section = settings()
    *_, shown = trained_and_shown(tmp_path / "a", identity(), section, lr_tower=1e-12, lr_head=1e-12)
    by_inner, by_all = (LinearHead(regression, 0.0, 0).eval() for regression in (INNER, REGRESSION))
    watched = torch.from_numpy(FEATURES[80:100])
    np.testing.assert_allclose(shown, unit(by_inner(watched).detach().numpy()), atol=1e-6)
    assert np.abs(shown - unit(by_all(watched).detach().numpy())).max() > 1e-4
    assert shown.shape == (20, 6)


def test_the_point_kept_is_the_best_on_the_validation_rows(tmp_path, monkeypatch):
    """Among the start, the ends of the epochs, and the line from the start to the end."""
    seen = []
    judge = Validation.cosines

    def keep(watch, tower, head):
        found = judge(watch, tower, head)
        seen.append((weights(tower, head), found))
        return found

    monkeypatch.setattr(Validation, "cosines", keep)
    tower, head = start(LinearHead, dropout=0.2)
    watch = validation()
    _, choice = fit(
        tower, head, Stored(FEATURES), TARGETS[None], ROWS, schedule(epochs=4), "cpu", tmp_path / "a", watch, "test"
    )
    before = seen[0][1]
    gains = [Gain.of(found - before, watch.groups).sure for _, found in seen]
    best = int(np.argmax(gains))
    assert gains[best] > 0
    assert torch.allclose(weights(tower, head), seen[best][0], atol=1e-6)
    assert choice.gain.sure == pytest.approx(gains[best])
    assert len(seen) == 1 + 2 + 4 + len(LINE)  # the start, two looks, four epochs, the line
    line = [point for point, _ in seen[-len(LINE) :]]
    end = seen[-len(LINE) - 1][0]
    for share, point in zip(LINE, line, strict=True):
        assert torch.allclose(point, torch.lerp(seen[0][0], end, share), atol=1e-6)


def test_a_rate_that_does_harm_is_found_out_early_and_lowered(tmp_path):
    tower, head = well_started()
    plan, watch = schedule(epochs=20, lr_tower=1e-5, lr_head=1.0), validation(floor=0.95)
    args = (Stored(FEATURES), TARGETS[None], ROWS)
    history, choice = fit(tower, head, *args, plan, "cpu", tmp_path / "a", watch, "test")
    assert choice.lowered_head >= 1
    assert choice.lowered_tower == 0
    # It ends as if the lower rate had been asked for.
    same = well_started()
    lower = schedule(epochs=20, lr_tower=1e-5, lr_head=LOWER**choice.lowered_head)
    again, _ = fit(*same, *args, lower, "cpu", tmp_path / "b", watch, "test")
    assert again == history
    assert torch.equal(weights(tower, head), weights(*same))


def test_training_is_as_long_as_asked_and_never_too_short(tmp_path):
    # 80 rows in steps of 64 are two steps an epoch.
    assert len(trained(tmp_path / "a", identity(), settings(steps=9), epochs=3)[1]) == 5
    assert len(trained(tmp_path / "b", identity(), settings(steps=0), epochs=3)[1]) == 3


def test_without_validation_rows_nothing_is_trained(tmp_path):
    alone = Start(REGRESSION, np.arange(120) < 100, np.empty(0, np.int64), REGRESSION, None, None)
    tower = identity()
    before = weights(tower)
    head, history, choice = trained(tmp_path, tower, settings(), beginning=alone)
    assert history.empty
    assert choice == Choice(0, 0.0, Gain(0.0, 0.0))
    assert torch.equal(weights(tower, head), torch.cat([before, weights(LinearHead(REGRESSION, 0.0, 0))]))


def test_the_control_without_a_tower_trains_the_head(tmp_path):
    _, history, choice = trained(tmp_path, nn.Sequential(), settings(), lr_head=0.01)
    assert len(history) == 50
    assert choice.lowered_tower == 0


def test_what_was_learned_is_added_to_the_regression_of_all_rows():
    small, large = (nn.Linear(2, 1) for _ in range(2))
    learned = copy.deepcopy(small)
    with torch.no_grad():
        learned.weight += torch.tensor([[0.25, -0.5]])
    give_back(learned, small.state_dict(), large.state_dict())
    assert torch.allclose(learned.weight, large.weight + torch.tensor([[0.25, -0.5]]))
    assert torch.equal(learned.bias, large.bias)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:9]])  # more rows than features, and fewer
def test_a_refit_is_the_regression_of_the_other_rows(rows):
    from sklearn.linear_model import Ridge as Reference

    x, y = torch.from_numpy(FEATURES[rows]), torch.from_numpy(TARGETS[rows])
    for prior in (None, torch.randn(6, 12, generator=torch.Generator().manual_seed(0))):
        found = dataclasses.replace(ridge(x, y), prior=prior)
        parts = np.arange(len(rows)) % 3
        others = refit(found, x, y, [parts == part for part in range(3)])
        standard = ((x - found.mean) / found.std).double().numpy()
        shift = np.zeros((6, 12)) if prior is None else prior.double().numpy()
        for part in range(3):
            kept = parts != part
            reference = Reference(alpha=found.strength).fit(standard[kept], y.numpy()[kept] - standard[kept] @ shift.T)
            assert np.allclose(others[part].weight, reference.coef_ + shift, atol=1e-5)
            assert np.allclose(others[part].bias, reference.intercept_, atol=1e-5)


@pytest.mark.parametrize("kind", [LinearHead, PaperHead])
def test_a_row_trains_against_the_regression_without_its_part(kind):
    x, y = torch.from_numpy(FEATURES[ROWS]), torch.from_numpy(TARGETS[ROWS])
    parts = np.repeat(np.arange(4), [40, 0, 35, 25])
    others = refit(REGRESSION, x, y, [np.arange(100) % 4 == part for part in range(4)])
    found = kind(REGRESSION, 0.0, 0, others)(x, [40, 0, 35, 25])
    for part in (0, 2, 3):
        assert torch.allclose(found[parts == part], kind(others[part], 0.0, 0)(x)[parts == part], atol=1e-5)
    # No file has the parts.
    assert kind(REGRESSION, 0.0, 0, others).state_dict().keys() == kind(REGRESSION, 0.0, 0).state_dict().keys()


def test_the_loss_of_each_row_is_that_against_the_regression_without_its_part(tmp_path):
    plan = schedule(epochs=1, lr_head=1e-12, lr_tower=1e-12)  # batches of 16 rows, of 3 parts in any order
    _, _, history = run(tmp_path / "a", plan, LinearHead, at=well_started, parts=PARTS)
    x, losses = torch.from_numpy(FEATURES[ROWS]), []
    for part, other in enumerate(OTHERS):
        own = PARTS[ROWS] == part
        losses.append(cosine_loss(LinearHead(other, 0.0, 0)(x[own]), torch.from_numpy(TARGETS[ROWS][own])))
    assert history[0]["loss"] == pytest.approx(sum(losses).item() / 100, rel=1e-4)


def test_the_pull_holds_the_head_at_its_start(tmp_path):
    def moved(pull):
        head = run(tmp_path / str(pull), schedule(pull=pull, weight_decay=0.0), LinearHead)[1]
        return (head.fc.weight - REGRESSION.weight).norm().item()

    assert moved(100.0) < moved(1.0) < moved(0.0)
    head = PaperHead(REGRESSION, 0.0, 0)
    weight, gradient = head.fc1.fc.weight, torch.ones(6, 12)
    with torch.no_grad():
        weight[0, :2] += torch.tensor([3.0, 4.0])
    weight.grad = gradient.clone()
    head.pull(0.5)
    gradient[0, :2] += torch.tensor([1.5, 2.0])
    assert torch.allclose(weight.grad, gradient, atol=1e-6)


def test_dropout_is_torchs_in_training_alone():
    head = LinearHead(Ridge(torch.zeros(6), torch.ones(6), torch.eye(6), torch.zeros(6), 0.0, 0.0, 0.0), 0.2, 0)
    x = torch.ones(4000, 6)
    torch.manual_seed(0)
    with torch.no_grad():
        found = head(x)
        assert set(found.flatten().tolist()) == {0.0, 1.25}
        assert found.mean(0).numpy() == pytest.approx(np.ones(6), abs=0.05)
        assert torch.equal(head.eval()(x), x)


def test_validation_rows_are_whole_groups_and_at_most_a_fifth():
    rng = np.random.default_rng(5)
    rows = np.sort(rng.choice(5000, 1000, replace=False))
    groups = rng.integers(0, 150, 1000)
    groups[:400] = 150  # a giant, which is passed over
    for limit, most in ((64, 64), (900, 200)):
        watch = validation_rows(rows, groups, limit, (1, 2))
        assert most - 30 < watch.sum() <= most
        assert not set(groups[watch]) & set(groups[~watch])
        assert np.array_equal(watch, validation_rows(rows, groups, limit, (1, 2)))
        assert not np.array_equal(watch, validation_rows(rows, groups, limit, (1, 3)))


def test_one_group_alone_tells_nothing():
    assert not validation_rows(np.arange(10), np.repeat([0, 1], [9, 1]), 256, (0,)).any()


def test_the_error_of_a_gain_is_over_groups():
    gains = np.array([0.1, 0.1, 0.1, -0.1, -0.1, 0.3])
    alone = Gain.of(gains, np.arange(6))
    assert alone.mean == pytest.approx(1 / 15)
    assert alone.error == pytest.approx(gains.std() / np.sqrt(6))
    # Copies in a group are no more evidence than one of them.
    assert Gain.of(gains.repeat(4), np.arange(6).repeat(4)).error == pytest.approx(alone.error)
    assert alone.sure == pytest.approx(alone.mean - alone.error)


def test_harm_is_to_be_worse_than_a_constant_and_beyond_doubt():
    watch = validation(floor=0.4, groups=np.arange(20))
    before = np.full(20, 0.5)
    assert watch.harmful(before, before - 0.11)
    assert not watch.harmful(before, before - 0.09)
    assert not watch.harmful(before, before - 0.11 - np.tile([-0.5, 0.5], 10))
    assert watch.harmful(before, np.where(np.arange(20) == 3, np.nan, before))  # weights that ran away


def test_an_epoch_takes_any_image_that_stands_in_for_a_row():
    draw = AnyImage(np.array([0, 1, 0, 3, 1, 0, -1, 1]), (3,))
    rows = np.array([0, 1, 3])
    seen = [draw(rows, epoch).tolist() for epoch in range(30)]
    assert {epoch[0] for epoch in seen} == {0, 2, 5}
    assert {epoch[1] for epoch in seen} == {1, 4, 7}
    assert {epoch[2] for epoch in seen} == {3}
    assert [draw(rows, epoch).tolist() for epoch in range(30)] == seen


def test_an_image_that_stands_in_has_its_own_target(tmp_path):
    draw = AnyImage(np.where(np.arange(120) < 100, np.arange(120) // 2 * 2, -1), (3,))
    rows = np.arange(0, 100, 2)
    other = TARGETS.copy()
    other[1:100:2] = other[1:100:2][::-1]  # of rows that train only by standing in
    found = []
    for name, targets in (("a", TARGETS), ("b", other)):
        tower, head = start(LinearHead)
        fit(
            tower, head, Stored(FEATURES), targets[None], rows, schedule(), "cpu", tmp_path / name,
            validation(floor=-9.0), "test", draw=draw,
        )  # fmt: skip
        found.append(weights(tower, head))
    assert not torch.equal(*found)
