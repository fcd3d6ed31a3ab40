"""Configs: every bad value names its field, value and remedy; OmegaConf can hold them."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: ShardSourceConfig(urls=""), "urls="),
        (lambda: ShardSourceConfig(urls=[]), "urls="),
        (lambda: ShardSourceConfig(urls="a.tar", weight=0), "weight=0"),
        (lambda: ShardSourceConfig(urls="a.tar", weight=float("nan")), "weight=nan"),
        (lambda: ShardSourceConfig(urls="a.tar", caption="last"), "caption='last'"),
        (lambda: ShardSourceConfig(urls="a.tar", num_samples=0), "num_samples=0"),
        (lambda: LoaderConfig(batch_size=0), "batch_size=0"),
        (lambda: LoaderConfig(workers=-1), "workers=-1"),
        (lambda: LoaderConfig(shuffle_window=0), "shuffle_window=0"),
        (lambda: LoaderConfig(max_bad_fraction=5), "max_bad_fraction=5"),
        (lambda: LoaderConfig(draft_side=0), "draft_side=0"),
        (lambda: LoaderConfig(match="picture"), "match='picture'"),
    ],
)
def test_bad_values_are_named(build, field):
    with pytest.raises(ValueError, match=field):
        build()


@pytest.mark.parametrize("urls", ["a.tar", ["a.tar", "b.tar"]])
def test_structured_config_takes_one_address_or_a_list(urls):
    merged = OmegaConf.merge(OmegaConf.structured(ShardSourceConfig), {"urls": urls})
    assert OmegaConf.to_object(merged) == ShardSourceConfig(urls=urls)
    assert OmegaConf.to_object(OmegaConf.structured(LoaderConfig)) == LoaderConfig()
