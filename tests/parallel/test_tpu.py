"""Topologies by name, their links, and meshes over several slices."""

import dataclasses
import types

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.parallel.tpu import GENERATIONS, generation_of, parse_topology
from tests import processes
from tests.plan.runs import compiler


@pytest.mark.parametrize(
    ("text", "name", "chips", "cloud"),
    [
        ("v6e:2x4", "v6e:2x4", 8, "v6e-8"),
        ("v6e-8", "v6e:2x4", 8, "v6e-8"),
        ("v5litepod-16", "v5e:4x4", 16, "v5litepod-16"),
        ("v5p-16", "v5p:2x2x2", 8, "v5p-16"),  # Cloud counts cores of v5p, two a chip
        ("v5p:2x2x4", "v5p:2x2x4", 16, "v5p-32"),
        ("v6e:16x16*2", "v6e:16x16*2", 512, "v6e-256"),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, "tpu7x-8"),
    ],
)
def test_topologies_have_two_names(text, name, chips, cloud):
    topology = parse_topology(text)
    assert (topology.name, topology.chips, topology.accelerator_type) == (name, chips, cloud)
    assert parse_topology(topology.name) == topology


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v9:2x2", r"'v9:2x2' does not exist; there are v5e:\{1x1,.*v6e:\{1x1,2x2,2x4,"),
        ("v6e:3x3", r"of v6e there are 1x1, 2x2, 2x4, .* \(chips\), also as v6e-1, v6e-4, v6e-8"),
        ("v6e-7", "of v6e there are"),
        ("v6e:2x4*0", "does not exist"),
        ("", "does not exist; there are"),
    ],
)
def test_an_unknown_topology_lists_the_known_ones(text, words):
    with pytest.raises(UserError, match=words):
        parse_topology(text)


@pytest.mark.parametrize(
    ("topology", "lengths", "links"),
    [
        ("v6e:2x4", (2, 4), 2),  # a mesh without rings: a corner has one link a direction
        ("v6e:16x16", (16, 16), 4),
        ("v6e:16x16", (1, 16), 2),
        ("v6e:8x16", (8, 16), 3),
        ("v5p:2x2x4", (2, 2, 4), 3),  # smaller than a cube of 4x4x4: no rings
        ("v5p:4x4x8", (4, 4, 8), 6),
        ("v5p:4x4x4", (4, 4, 4), 6),
        ("v5p:4x4x4", (1, 2, 1), 1),
    ],
)
def test_links_of_the_worst_placed_chip(topology, lengths, links):
    assert parse_topology(topology).links(lengths) == links


def test_every_generation_is_found_by_its_devices():
    for generation in GENERATIONS.values():
        for kind in generation.kinds:
            assert generation_of(types.SimpleNamespace(platform="tpu", device_kind=kind)) is generation
    assert generation_of(types.SimpleNamespace(platform="cpu", device_kind="cpu")) is None


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def _slices(count, each):
    return [Chip(i, i // each, i // each) for i in range(count * each)]


def test_slices_lie_along_the_data_axis():
    mesh = make_mesh(2, -1, 2, _slices(2, 4))
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    assert mesh.devices.shape == (2, 2, 2)
    assert (slices[0] == slices[0, 0, 0]).all()
    assert (slices[1] == slices[1, 0, 0]).all()
    assert slices[0, 0, 0] != slices[1, 0, 0]


def test_parameters_are_not_spread_over_slices():
    with pytest.raises(UserError, match=r"2 slices .* make mesh_data a multiple of 2"):
        make_mesh(1, -1, 1, _slices(2, 4))


@compiler
def test_every_slice_takes_every_mesh():
    """Also those for which an axis of the torus must be cut, as four chips in a line into two and two."""
    processes.run_all(_make_every_mesh, [()])  # of its own: libtpu puts handlers on signals


def _make_every_mesh():
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            topology = parse_topology(f"{generation.name}:{shape}")
            if topology.chips * generation.devices > 256:
                continue
            for several in (topology, dataclasses.replace(topology, slices=2)):
                devices = several.devices()
                for tensor in (2, 4, 8):
                    if len(devices) // several.slices % tensor == 0:
                        mesh = make_mesh(several.slices, -1, tensor, devices)
                        assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}, (several.name, tensor)
