"""FedPAQ: the mean of quantised differences."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from espalier.wire.compression import QSGD
from espalier.wire.payload import Layout
from espalier.wire.uplink import CODE
from tests.support.by_hand import (
    Call,
    run_tree,
    same,
    small_tree,
    tapped,
    trained,
)


def test_fedpaq_adds_the_plain_mean_of_the_quantised_differences(tmp_path: Path) -> None:
    """W + (1/r) Σ Q(y_k − w): the differences are those of a run without a codec, rounded to a level beside."""
    settings = {"rounds": 1, "local_steps": 3, "data": "digits:{i}/{of}:dirichlet=0.5"}
    data = settings.pop("data")
    plain_tree = small_tree(tmp_path / "plain", 3, data=data)
    plain = tapped(plain_tree)
    run_tree(plain_tree, "fedavg", 3, **settings)
    tree = small_tree(tmp_path / "coded", 3, data=data)
    calls = tapped(tree)
    run = run_tree(tree, "fedpaq", 3, codec_levels=5, **settings)
    exact: dict[str, Call] = {call.plan.client: call for call in plain}
    names = list(trained(run))
    layout = Layout.of({n: calls[0].sent[n] for n in names})
    total = {n: np.zeros(calls[0].sent[n].shape) for n in names}
    assert len({call.report.samples for call in calls}) == 3  # weighted, the mean would be another
    for call in calls:
        decoded = QSGD(5).decode(call.sections[CODE], layout, "me")
        other = exact[call.plan.client]
        difference = {n: (other.payload[n] - other.sent[n]).astype(np.float64) for n in names}
        norm = math.sqrt(sum(float((d**2).sum()) for d in difference.values()))
        for n in names:
            assert np.abs(decoded[n] - difference[n]).max() <= norm / 5 * (1 + 1e-5)
            np.testing.assert_allclose(decoded[n] * 5 / norm, np.round(decoded[n] * 5 / norm), atol=1e-4)
            total[n] += decoded[n]
    same(trained(run), {n: calls[0].sent[n] + total[n] / 3 for n in names})
    # 32 + d(1 + ⌈log2(s + 1)⌉) bits, the padding of a byte aside.
    size = sum(a.size for a in total.values())
    assert calls[0].sections.keys() == {CODE}
    assert sum(a.nbytes for a in calls[0].sections[CODE].values()) == 4 + math.ceil(size * 4 / 8)
