"""The bench of routers: its table of runs that there are."""

from __future__ import annotations

import argparse

import pytest
import routers


def test_the_table_has_means_and_says_how_many_seeds() -> None:
    loads = {"variation": 0.25, "dead": 0.125, "overflow": 0.1}
    results = {
        "dense/0": {"loss": 5.0},
        "dense/1": {"loss": 5.2},
        "softmax/0": {"loss": 4.9, **loads},
        "softmax, no loss/0": {"loss": 9.0, **loads},
        "expert_choice/0": {"loss": 4.0, **loads},
        "expert_choice/1": {"loss": 4.2, **loads},
    }
    lines = routers.table(results, argparse.Namespace(seeds=2, experts=8)).splitlines()[2:]
    assert lines == [
        "| dense | - | 5.100 +- 0.141 | - | - | - |",
        "| softmax | 8, 1 | 4.900 (1 of 2 seeds) | 0.25 | 12 % | 10.0 % |",
        "| softmax, no loss | 8, 1 | 9.000 (1 of 2 seeds) | 0.25 | 12 % | 10.0 % |",
        "| expert_choice | 8, 1 | 4.100 +- 0.141 (sees later tokens) | 0.25 | 12 % | 10.0 % |",
    ]


def test_an_unknown_router_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        routers.main(["roulette"])
    assert "roulette; legal: dense, softmax" in capsys.readouterr().err
