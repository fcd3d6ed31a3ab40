"""Zero-shot naming and told-apart shares on cases small enough to count by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.choices import told_apart
from latentmodal.experiments.evaluation.zero_shot import (
    class_embeddings,
    fill_template,
    zero_shot_metrics,
)

NAMES = ["cat", "dog", "set {}", "owl", "elk"]


def letters(prompts: list[str]) -> torch.Tensor:
    """An encoder anyone can recompute: counts of some characters, of varying length."""
    return torch.tensor([[1.0 + prompt.count(c) for c in "acdegostw{"] for prompt in prompts])


@pytest.mark.parametrize(
    ("name", "filled"),
    [("cat", "a cat, cat!"), ("{0}", "a {0}, {0}!"), ("{}", "a {}, {}!"), ("{x", "a {x, {x!")],
)
def test_names_may_hold_braces(name, filled):
    assert fill_template("a {}, {}!", name) == filled


def test_template_without_a_place_is_refused():
    with pytest.raises(UserError, match="mark the place"):
        fill_template("a photo", "cat")


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_class_embedding_is_the_renormalised_mean_of_normalised_prompts(batch_size):
    templates = ("{}", "a good {}", "two {}s together")
    got = class_embeddings(NAMES, templates, letters, batch_size)
    for row, name in enumerate(NAMES):
        prompts_PE = F.normalize(letters([t.replace("{}", name) for t in templates]), dim=1)
        expected = F.normalize(prompts_PE.mean(0), dim=0)
        torch.testing.assert_close(got[row].float(), expected)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [([], ("{}",), "0 class names"), (["a"], (), "0 templates"), (["a", "a"], ("{}",), "twice")],
)
def test_class_embeddings_refuse(names, templates, message):
    with pytest.raises(UserError, match=message):
        class_embeddings(names, templates, letters)


def test_accuracies_by_hand():
    # Class 0: both right. Class 1: one of four right, the rest taken for class 2. Class 2: none.
    named = torch.tensor([0, 0, 1, 2, 2, 2])
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    result = zero_shot_metrics(torch.eye(5)[named], torch.eye(5), labels, NAMES)
    assert result.acc1 == pytest.approx(3 / 6)
    assert result.mean_per_class_recall == pytest.approx((1 + 1 / 4) / 2)
    assert result.acc5 == 1.0
    assert result.confusions == [("dog", "set {}", 3)]
    assert (result.chance_acc1, result.chance_acc5) == (0.2, 1.0)
    assert (result.num_images, result.num_classes) == (6, 5)


def test_no_acc5_below_five_classes():
    result = zero_shot_metrics(torch.eye(4), torch.eye(4), torch.arange(4), NAMES[:4])
    assert result.acc5 is result.chance_acc5 is None
    assert result.acc1 == 1.0
    assert result.confusions == []


def test_equal_classes_are_never_right():
    six = [*NAMES, "yak"]
    result = zero_shot_metrics(torch.rand(9, 3), torch.ones(6, 3), torch.arange(9) % 6, six)
    assert result.acc1 == result.acc5 == result.mean_per_class_recall == 0.0
    assert sum(times for *_, times in result.confusions) == 9


@pytest.mark.parametrize("labels", [[0, 5], [-1, 0], [0]])
def test_labels_must_fit(labels):
    with pytest.raises(UserError, match="label"):
        zero_shot_metrics(torch.ones(2, 5), torch.eye(5), torch.tensor(labels), NAMES)


def test_told_apart_by_kind():
    image = torch.tensor([1.0, 0.0]).expand(5, 2)
    near, far = [2.0, 0.1], [0.3, 1.0]
    positive = torch.tensor([near, near, near, far, near])
    negative = torch.tensor([far, far, near, near, far])  # the third is a tie
    kinds = ["noun_swap", "relation_swap", "relation_swap", "relation_swap", "relation_swap"]
    results = told_apart(image, positive, negative, kinds)
    assert list(results) == ["noun_swap", "relation_swap"]
    relation = results["relation_swap"]
    assert (relation.share, relation.num_pairs, relation.chance) == (0.5, 4, 0.5)
    assert relation.standard_error == pytest.approx(math.sqrt(0.25 / 4))
    assert (results["noun_swap"].share, results["noun_swap"].standard_error) == (1.0, 0.0)


def test_best_of_several_embeddings_names_and_tells_apart():
    image_NVE = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]])
    class_CE = torch.tensor([[0.0, 1.0], [1.0, -0.1]])
    # The first image ties nothing: 1 for class 0, 0.995 for class 1. The second: 0.8 and 0.52.
    result = zero_shot_metrics(image_NVE, class_CE, torch.tensor([0, 1]), NAMES[:2])
    assert result.acc1 == 0.5
    right, wrong = class_CE[[0, 0]], class_CE[[1, 1]]
    assert told_apart(image_NVE, right, wrong, ["a", "a"])["a"].share == 1.0
    assert told_apart(image_NVE, wrong, right, ["a", "a"])["a"].share == 0.0


def test_told_apart_refuses_uneven_and_damaged_input():
    ones = torch.ones(2, 3)
    with pytest.raises(UserError, match="2, 2, 1, 2"):
        told_apart(ones, ones, ones[:1], ["a", "b"])
    with pytest.raises(UserError, match="false caption embeddings"):
        told_apart(ones, ones, ones * float("nan"), ["a", "b"])
