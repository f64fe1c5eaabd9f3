"""Partitions: disjoint covers, FedPhD's layouts by hand, flwr-datasets' partitions to the sample."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.data.partition import Scheme, assign
from espalier.errors import DataError
from espalier.seeds import seed_for
from tests.support.paths import ROOT


def labels_of(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def held(labels: np.ndarray, owner: np.ndarray, client: int) -> dict[int, int]:
    values, counts = np.unique(labels[owner == client], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_fedphd_layout_of_cifar10() -> None:
    # 50,000 images, 20 clients: client c holds c//4 and c//4 + 5, 1250 images each.
    labels = labels_of([5000] * 10)
    owner = assign(labels, 20, Scheme("fedphd"), name="cifar10")
    for client in range(20):
        assert held(labels, owner, client) == {client // 4: 1250, client // 4 + 5: 1250}


def test_fedphd_layout_of_other_numbers() -> None:
    # 10 classes, 8 clients: 2 slices a class, class i at clients 2i and 2i+1 (mod 8).
    labels = labels_of([10] * 10)
    owner = assign(labels, 8, Scheme("fedphd"), name="digits")
    assert held(labels, owner, 0) == held(labels, owner, 1) == {0: 5, 4: 5, 8: 5}
    assert held(labels, owner, 6) == {3: 5, 7: 5}


def test_fedphd_layout_of_celeba() -> None:
    # Shares .30 .45 .05 .20 of 20 clients: 6, 9, 1, 4, which is 20 already.
    labels = labels_of([300, 450, 50, 200])
    owner = assign(labels, 20, Scheme("fedphd"), name="celeba")
    expected = [(0, 50)] * 6 + [(1, 50)] * 9 + [(2, 50)] + [(3, 50)] * 4
    assert [held(labels, owner, client) for client in range(20)] == [{c: n} for c, n in expected]
    # Shares .31 .44 .04 .21: exact 6.2, 8.8, 0.8, 4.2; rounded up 7, 9, 1, 5 = 22; classes 0 and 3 (0.8 over)
    # give way: 6, 9, 1, 4.
    labels = labels_of([310, 440, 40, 210])
    owner = assign(labels, 20, Scheme("fedphd", 1), name="other")
    first = [next(iter(held(labels, owner, client))) for client in range(20)]
    assert np.bincount(first).tolist() == [6, 9, 1, 4]


SCHEMES = st.one_of(
    st.builds(Scheme, st.just("iid"), seed=st.integers(0, 3)),
    st.builds(Scheme, st.just("dirichlet"), st.floats(0.05, 10), seed=st.integers(0, 3)),
    st.builds(Scheme, st.just("pathological"), st.integers(1, 4), seed=st.integers(0, 3)),
    st.builds(Scheme, st.just("fedphd"), st.integers(0, 4), seed=st.integers(0, 3)),
)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    clients=st.integers(1, 12),
    scheme=SCHEMES,
    order=st.randoms(use_true_random=False),
)
def test_every_sample_has_one_owner_and_every_client_a_sample(
    counts: list[int], clients: int, scheme: Scheme, order: object
) -> None:
    labels = labels_of(counts)
    order.shuffle(labels)  # type: ignore[attr-defined]
    try:
        owner = assign(labels, clients, scheme, name="toy")
    except DataError:  # refused, never silently short
        return
    assert owner.shape == labels.shape
    sizes = np.bincount(owner[owner >= 0], minlength=clients)
    assert len(sizes) == clients
    assert sizes.min() >= 1
    left_out = set(labels[owner < 0].tolist())
    if scheme.kind != "pathological" or clients >= len(counts):
        assert not left_out
    assert left_out.isdisjoint(labels[owner >= 0].tolist())  # a class is left out whole or not at all
    if scheme.kind == "iid":
        assert sizes.max() - sizes.min() <= 1
    if scheme.kind == "pathological":
        assert all(len(held(labels, owner, client)) == scheme.value for client in range(clients))
    assert np.array_equal(owner, assign(labels, clients, scheme, name="toy"))


def test_the_draw_depends_on_name_number_scheme_and_seed() -> None:
    labels = labels_of([50] * 4)
    base = assign(labels, 4, Scheme("iid"), name="a")
    assert not np.array_equal(base, assign(labels, 4, Scheme("iid"), name="b"))
    assert not np.array_equal(base, assign(labels, 4, Scheme("iid", seed=1), name="a"))
    assert assign(labels, 4, Scheme("dirichlet", 0.1), name="a").tolist() != base.tolist()


REFUSED = "refused"


def theirs(labels: np.ndarray, clients: int, scheme: Scheme) -> np.ndarray | str:
    """Return flwr-datasets' partition of labels shuffled as `assign` shuffles them."""
    datasets = pytest.importorskip("datasets")
    flower = pytest.importorskip("flwr_datasets.partitioner")
    seed = seed_for(scheme.seed, "toy", 0, f"partition/{clients}/{scheme}")
    if scheme.kind == "iid":
        partitioner = flower.IidPartitioner(clients)
    elif scheme.kind == "dirichlet":
        partitioner = flower.DirichletPartitioner(
            clients, "label", scheme.value, min_partition_size=scheme.min_size, shuffle=False, seed=seed
        )
    else:
        partitioner = flower.PathologicalPartitioner(
            clients, "label", int(scheme.value), "first-deterministic", shuffle=False, seed=seed
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels[order], "index": order})
    owner = np.full(len(labels), -1, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # repeated draws, unused classes
        try:
            for client in range(clients):
                owner[np.asarray(partitioner.load_partition(client)["index"], np.int64)] = client
        except ValueError:
            return REFUSED
    return owner


@pytest.mark.parametrize("counts", [[137, 80, 201], [150] * 10, [3, 5, 2, 9], [40]])
@pytest.mark.parametrize(
    "text",
    [
        "iid",
        "dirichlet=0.01",
        "dirichlet=0.05,min=3",
        "dirichlet=0.1",
        "dirichlet=0.5,min=10",
        "dirichlet=1",
        "dirichlet=100",
        "pathological=1",
        "pathological=2",
        "pathological=3",
    ],
)
def test_partitions_are_those_of_flwr_datasets(counts: list[int], text: str) -> None:
    labels = np.random.default_rng(1).permutation(labels_of(counts))
    for seed, clients in itertools.product((0, 1, 2), (1, 3, 10)):
        scheme = Scheme.parse(f"{text},seed={seed}")
        expected = theirs(labels, clients, scheme)
        found: np.ndarray | str = REFUSED
        with contextlib.suppress(DataError):
            found = assign(labels, clients, scheme, name="toy")
        assert np.array_equal(found, expected)


def test_a_share_starts_no_process_and_imports_no_flwr_datasets() -> None:
    code = """
import subprocess, sys
from espalier.data.spec import open_data
subprocess.run = subprocess.Popen = None
print(len(open_data("digits:0/4")), len(open_data("digits:0/4:dirichlet=10")) > 9, "flwr_datasets" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "360 True False\n"


def test_a_draw_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"use fewer partitions, a larger alpha or another seed \(in 11 draws"
    ):
        assign(labels_of([3, 3]), 5, Scheme("dirichlet", 0.01, min_size=2), name="toy")
    with pytest.raises(DataError, match="3 classes per client, but the data have 2"):
        assign(labels_of([3, 3]), 5, Scheme("pathological", 3), name="toy")
    with pytest.raises(DataError, match="class 0 belongs to 5 clients and has 3 samples"):
        assign(labels_of([3, 3]), 5, Scheme("pathological", 2), name="toy")


def test_too_many_clients_are_refused() -> None:
    with pytest.raises(DataError, match="a client would get none of 3 samples"):
        assign(labels_of([3]), 4, Scheme("iid"), name="toy")
    with pytest.raises(DataError, match="at least 4 clients"):
        assign(labels_of([3, 3, 3, 3]), 2, Scheme("fedphd", 1), name="toy")
    with pytest.raises(DataError, match="3 classes per client"):
        assign(labels_of([9, 9]), 2, Scheme("fedphd", 3), name="toy")


def test_pathological_layout_leaves_no_class_out() -> None:
    labels = labels_of([8] * 4)
    one = assign(labels, 4, Scheme("pathological", 1), name="toy")
    assert [held(labels, one, client) for client in range(4)] == [{c: 8} for c in range(4)]
    two = assign(labels, 6, Scheme("pathological", 2), name="toy")
    assert all(client % 4 in held(labels, two, client) for client in range(6))
    assert two.min() == 0


def test_unowned_classes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    labels = labels_of([5] * 6)
    owner = assign(labels, 2, Scheme("pathological", 2), name="toy")
    missing = sorted(set(labels[owner < 0].tolist()))
    assert missing
    assert str(missing) in caplog.text
